"""Whether the numbers of a directory are sound, and belong to the model that it was made from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from compressor.errors import SourceError
from compressor.evaluation.score import divergence
from compressor.evaluation.verify.check import Progress, refuse
from compressor.evaluation.verify.loaders import streamed_logits
from compressor.model.architecture import linear_layers
from compressor.model.source import ModelSource
from compressor.pipeline.plan import rewritten
from compressor.pipeline.probe import probe_tokens
from compressor.recipe.schema import load_recipe

# Cosine similarity of a packed weight with its original. Two bits leave about 0.9 of a bell-shaped weight, while layers that
# have nothing to do with each other are at 0, give or take 1/sqrt(weights): 0.5 is far from both.
SIMILAR = 0.5


def check_values(source: ModelSource, progress: Progress) -> str:
    """Every number is finite: those stored, and those that packed layers stand for."""
    problems, count = [], 0
    for name, tensor in _values(source, progress):
        bad = _not_finite(tensor)
        count += tensor.numel()
        if bad:
            problems.append(f"{source.path}: {name} holds {bad} NaN or infinite values of {tensor.numel()}")
    refuse(problems)
    return f"{count:,} values, all finite"


def check_reference(source: ModelSource, reference: Path, progress: Progress) -> str:
    """Check that tensors that were not compressed equal the original's, byte for byte, and that the others resemble it.

    Where the recipe rotated the model, that is compared with; what it may have scaled has only to resemble the original.
    """
    passes = _passes(source.path)
    original = rewritten(
        ModelSource(reference, source.device), passes, lambda done, total: progress(done, total, "rotating the original")
    )
    scaled = _blocks_tensors(source) if any(step.rescales_weights for step in passes) else set()
    packed = source.packed()
    problems = []
    aside = source.cache_tensors() | scaled
    for name in source.checkpoint:
        if source.packing.owner(name) not in source.packing and name not in aside:
            problems += _compare_bytes(source, original, name)
    replaced = original.unused.cache_scales if source.cache is not None else frozenset()
    problems += [
        f"{source.path}: {name} of {reference} is missing"
        for name in original.checkpoint
        if name not in source.checkpoint and name not in source.packing and name not in replaced
    ]
    least = (1.0, "none")
    for done, layer in enumerate(packed):
        progress(done, len(packed), f"likeness of {layer}")
        likeness = _likeness(source, original, layer, even=bool(scaled))
        least = min(least, (likeness, layer))
        if not likeness > SIMILAR:
            problems.append(
                f"{source.path}: {layer}.weight does not belong to {reference}: "
                f"cosine similarity {likeness:.3f} where more than {SIMILAR} is expected"
            )
    refuse(problems)
    unchanged = len([name for name in source.checkpoint if name in original.checkpoint and name not in scaled])
    return (
        f"{unchanged} tensors equal{', the others scaled' if scaled else ''}, "
        f"{len(packed)} packed layers alike (least cosine similarity {least[0]:.3f}, {least[1]}); "
        f"{_kl(source, original, progress)}"
    )


def _passes(directory: Path) -> tuple[Any, ...]:
    """Return the passes that were applied to the original, if the directory says."""
    recipe = directory / "recipe.yaml"
    return load_recipe(recipe).passes if recipe.is_file() else ()


def _blocks_tensors(source: ModelSource) -> set[str]:
    """Names on disk of what belongs to a block."""
    return {stored for module, stored in source.names.items() if module.startswith(f"{source.prefix}.")}


def _values(source: ModelSource, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    packed, names = source.packed(), list(source.checkpoint)
    total = len(packed) + len(names)
    for done, name in enumerate(names):
        progress(done, total, f"values of {name}")
        if source.checkpoint.headers[name].dtype.is_floating_point:
            yield name, source.checkpoint.read(name)
    for done, layer in enumerate(packed, len(names)):
        progress(done, total, f"values of {layer}")
        yield f"{layer}.weight, dequantized,", source.read_packed(layer).dequantize()


def _not_finite(tensor: Tensor) -> int:
    """How many values are not; without a mask of the whole tensor where all are."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # of which torch knows no extremes
    if tensor.numel() == 0 or torch.isfinite(torch.stack(tensor.aminmax())).all():
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _compare_bytes(source: ModelSource, original: ModelSource, name: str) -> list[str]:
    if name not in original.checkpoint:
        return [f"{source.path}: {name} is not in {original.path}"]
    found, expected = source.checkpoint.headers[name], original.checkpoint.headers[name]
    if found != expected:
        was = f"{expected.dtype} {list(expected.shape)}"
        return [f"{source.path}: {name} is {found.dtype} {list(found.shape)} where {original.path} has {was}"]
    ours, theirs = (one.checkpoint.read(name).reshape(-1).view(torch.uint8) for one in (source, original))
    return [] if torch.equal(ours, theirs) else [f"{source.path}: {name} differs from that of {original.path}"]


def _likeness(source: ModelSource, original: ModelSource, layer: str, *, even: bool) -> float:
    """Cosine similarity of a packed layer with the original's, `even` up to the scale of rows and columns; 0 without one."""
    weight = f"{layer}.weight"
    if weight not in original.names:
        return 0.0
    kind = linear_layers(source.model)[layer]
    ours, theirs = source.read(weight), kind.parameter(original.read(weight)).float()
    if ours.shape != theirs.shape:
        return 0.0
    if even:
        ours, theirs = (normalize(normalize(w_OI, dim=0), dim=1) for w_OI in (ours, theirs))
    lengths = float(ours.norm() * theirs.norm())
    return float(ours.flatten() @ theirs.flatten()) / lengths if lengths else float(torch.equal(ours, theirs))


def _kl(source: ModelSource, original: ModelSource, progress: Progress) -> str:
    """How far apart the two are on the probe: for information, since it is no measure of quality."""
    tokens = probe_tokens(source)
    try:
        log_p, log_q = (streamed_logits(one, tokens, progress).double().log_softmax(-1) for one in (original, source))
    except SourceError as error:
        return f"KL not computed: {error}"
    for one, log_probs in ((original, log_p), (source, log_q)):
        if log_probs.isnan().any():
            return f"KL not computed: the logits of {one.path} are not finite in {one.dtype}"
    kl = float(divergence(log_p, log_q).mean())
    return f"KL {kl:.3g} nats/token on the {tokens.numel()} tokens of the probe"
