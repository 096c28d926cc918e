"""Renumbered blocks of a shorter model: corrections that preserve what they compute, and a check that it is preserved.

Some families compute with the number of blocks or with a block's own number. `corrected` compensates for that in a few of
them. `check_renumbered` works for any family. It runs every kept block as built in the original and in the pruned model, with
the same random weights and hidden states. It refuses the model if the outputs differ.

Sources of the corrections, all in transformers' models/*/modeling_*.py: MiniCPM3 multiplies what a block adds by
`scale_depth / sqrt(num_hidden_layers)`; GPT-2 with `scale_attn_by_inverse_layer_idx` divides attention scores by the block's
number, counted from one.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import RecipeError, SourceError
from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource
from compressor.reading import elide

TOKENS = 16
WINDOW = 3  # tokens; shorter than the text of the check, so that a lost or added window is detected
WINDOWS = ("sliding_window", "window_size", "local_attention", "attention_chunk_size")
TOLERANCE = 1e-4  # relative to what a block adds; equivalent arithmetic in fp32 differs by about 1e-6
REMEDY = "take from the width instead (prune_width, --by width)"


def corrected(source: ModelSource, kept: Sequence[int], fewer: Rewriting) -> Rewriting:
    """Add corrections that make kept blocks compute the same under their new numbers, for the families that need them.

    Args:
        source: Model with all its blocks.
        kept: Old number of each kept block, ascending.
        fewer: Change that drops the other blocks.

    Raises:
        RecipeError: The weights to be corrected are packed.
    """
    correct = CORRECTIONS.get(source.model.config.model_type)
    return fewer if correct is None else correct(source, kept, fewer)


def _residual_scale(source: ModelSource, kept: Sequence[int], fewer: Rewriting) -> Rewriting:
    """Keep MiniCPM3's scale_depth / sqrt(num_hidden_layers)."""
    scale = source.model.config.scale_depth * math.sqrt(len(kept) / len(source.layers))
    return replace(fewer, config={**fewer.config, "scale_depth": scale})


def _inverse_number(source: ModelSource, kept: Sequence[int], fewer: Rewriting) -> Rewriting:
    """Scale GPT-2's queries so that their scores are unchanged after division by the new number.

    The weight of `c_attn` is [D, 3 D] and its bias [3 D]; queries are the first D columns.
    """
    if not source.model.config.scale_attn_by_inverse_layer_idx:
        return fewer
    if source.packed():
        raise RecipeError(
            f"{source.path}: its blocks scale attention by their number (scale_attn_by_inverse_layer_idx), which cannot be "
            f"corrected in packed weights; prune the model before it is quantized, or {REMEDY}"
        )
    tensors = {
        source.names[f"{source.prefix}.{new}.attn.c_attn.{leaf}"]: functools.partial(_scaled_queries, (new + 1) / (old + 1))
        for new, old in enumerate(kept)
        for leaf in ("weight", "bias")
        if new != old
    }
    return replace(fewer, tensors={**fewer.tensors, **tensors})


def _scaled_queries(factor: float, qkv: Tensor) -> Tensor:
    """Scale the queries, the first third of the last axis."""
    queries, others = qkv.tensor_split([qkv.shape[-1] // 3], dim=-1)
    return torch.cat([queries * factor, others], dim=-1)


CORRECTIONS: Mapping[str, Callable[[ModelSource, Sequence[int], Rewriting], Rewriting]] = {
    "minicpm3": _residual_scale,
    "gpt2": _inverse_number,
}


def check_renumbered(source: ModelSource, fewer: Rewriting) -> None:
    """Refuse a shorter model whose blocks compute something else than before. Loads no weights from disk.

    Args:
        source: Model with all its blocks.
        fewer: Change that drops some of them, with its corrections.

    Raises:
        RecipeError: transformers cannot build the shorter model, or a block's output on random hidden states differs.
    """
    kind, count = source.model.config.model_type, len(fewer.blocks)
    where = f"{elide(str(source.path), 80)}: model type `{kind}`"
    short = replace(EMPTY, config=_short_windows(source))
    values: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    before = RandomWeights(source, (*source.rewritings, short), values, {})
    try:
        after = RandomWeights(source, (*source.rewritings, fewer, short), values, fewer.tensors)
        after.entering()
    except SourceError as error:
        raise RecipeError(
            f"{where} cannot be built with {count} of its {len(source.layers)} blocks, so none can go "
            f"({elide(str(error).removeprefix(f'{source.path}: '), 90)}); {REMEDY}"
        ) from error
    entering = before.entering()
    hidden = torch.randn(entering.shape, generator=torch.Generator().manual_seed(0)).to(source.device)
    if not torch.allclose(entering, after.entering(), rtol=TOLERANCE, atol=TOLERANCE):
        raise RecipeError(f"{where}: what enters its first block depends on their number, so none can go; {REMEDY}")
    for new, old in enumerate(fewer.blocks):
        expected = before.output(old, hidden)
        gap = float((after.output(new, hidden) - expected).norm() / (expected - hidden).norm().clamp_min(1e-30))
        if not gap <= TOLERANCE:
            raise RecipeError(
                f"{where}: block {old} would be block {new} of {count} and compute something else "
                f"(off by {gap:.2g} of what it adds); {REMEDY}"
            )


EMPTY = Rewriting({})


def _short_windows(source: ModelSource) -> dict[str, int]:
    """Return config entries that make attention windows shorter than the text of the check."""
    config = source.model.config.to_dict()
    return {key: WINDOW for key in WINDOWS if isinstance(size := config.get(key), int) and size > WINDOW}


class RandomWeights(ModelSource):
    """A model with the same random weights in every block, in fp32. No weights are loaded from disk.

    Args:
        like: Model whose path and device to use.
        rewritings: All changes to it.
        values: Store for weights, by name inside a block and shape, shared with the model to compare.
        tensors: Changes to weights, by name in the checkpoint, that only this model has.
    """

    def __init__(
        self,
        like: ModelSource,
        rewritings: Sequence[Rewriting],
        values: dict[tuple[str, tuple[int, ...]], Tensor],
        tensors: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        self.values, self.changes = values, tensors
        super().__init__(like.path, like.device, torch.float32, rewritings)

    def entering(self) -> Tensor:
        """Return the hidden states that enter the first block, for tokens [1, S]."""
        (hidden,) = self.first_inputs([torch.zeros(1, min(TOKENS, self.max_positions), dtype=torch.long)])
        return hidden

    @torch.no_grad()
    def output(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """Return the output of a block [B, S, D]."""
        block = self.block(index)
        result = block.forward(hidden_BSD)
        self.release(block)
        return result

    def read(self, name: str) -> Tensor:
        """Return random values for a parameter, the same in all blocks."""
        tensor = self._shapes[name]
        if not tensor.is_floating_point():
            return super().read(name)
        inside = name.startswith(f"{self.prefix}.")
        leaf = name.removeprefix(f"{self.prefix}.").partition(".")[2] if inside else name
        key = (leaf, tuple(tensor.shape))
        if key not in self.values:
            self.values[key] = _drawn(leaf, tensor.shape, self.device) if inside else _cheap(leaf, tensor.shape, self.device)
        change = self.changes.get(self.names[name])
        return self.values[key] if change is None else change(self.values[key])

    @functools.cached_property
    def _shapes(self) -> Mapping[str, Tensor]:
        return dict(self.model.state_dict())


def _drawn(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Draw random values, scaled so that attention is not uniform and nothing overflows."""
    scale = 2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device) * scale


def _cheap(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Draw random values with equal rows, which share memory, because the vocabulary can be large."""
    if len(shape) < 2:
        return _drawn(name, shape, device)
    return _drawn(name, torch.Size((1, *shape[1:])), device).expand(shape)
