"""Writing of the model directory, except the report and the card."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from compressor.formats.base import Borrowing, Contextual, Format
from compressor.formats.numerics.activations import Seen
from compressor.model import shards
from compressor.model.architecture import LinearKind, linear_layers
from compressor.model.hf_config import quantization_config
from compressor.model.hf_config.decilm import runs_code
from compressor.model.journal import writing
from compressor.model.source import ModelSource
from compressor.model.surgery.kv_cache import CacheRounding
from compressor.model.writer import Workspace, copy_other_files
from compressor.pipeline.contract import Pass, Plan
from compressor.pipeline.manifest import MANIFEST, Manifest
from compressor.pipeline.plan import settled, stored_formats, total_bits
from compressor.pipeline.plan_file import to_text
from compressor.pipeline.probe import Record
from compressor.recipe.schema import Recipe, Target, to_yaml
from compressor.report.record import Report
from compressor.runtime.kernels.cuda import sources
from compressor.runtime.kernels.layouts import Layout, layout_for

MADE = (MANIFEST, "recipe.yaml", "plan.yaml", "report.json", "report.html")  # made by the run even if the original has them

DENSE = "dense"  # layout of a model whose weights are not packed


def write_model(
    recipe: Recipe, source: ModelSource, plan: Plan, workspace: Workspace, report: Report, probe: Record | None
) -> None:
    """Write the model directory except the report and the card, and fill the sizes in the report.

    Args:
        recipe: The recipe.
        source: The model.
        plan: Option of every unit, dropped sub-layers included.
        workspace: Workspace with all parts finished.
        report: Record of the run.
        probe: Logits that the run computed, for the manifest.
    """
    with writing(workspace.model):
        files = shards.assemble((workspace.part(part) for part in workspace.finished), workspace.model)
    formats = stored_formats(workspace.finished)
    kinds = linear_layers(source.model)
    entry = quantization_config.write(
        formats,
        [name for name, kind in kinds.items() if type(kind) is LinearKind],
        [name for name, kind in kinds.items() if type(kind) is not LinearKind],
        next((option for option in plan.values() if isinstance(option, CacheRounding)), None),
        source.hadamard,
        source.absent,
        source.unsaid,
    )
    kernels = write_kernels(workspace, layouts_of(formats, source))
    packed = {"quantization_config": entry} if formats or source.peculiar else {}
    packed |= {sources.CONFIG_KEY: kernels} if formats else {}
    plain = {key: value for key, value in source.raw_config.items() if key != "quantization_config"}  # holds old widths
    config = json.dumps({**plain, **packed}, indent=2) + "\n"
    workspace.write_text("config.json", config)
    copied = copy_other_files(source.path, workspace.model, workspace.out)
    beside = {name: file for rewriting in source.rewritings for name, file in rewriting.files.items()}
    for name, file in beside.items():
        workspace.copy(file, name)
    tensors = {name: known for part in workspace.finished.values() for name, known in part["entries"].items()}
    names = sorted({*copied, *beside} - set(MADE))
    with writing(workspace.model):
        others = {name: hashlib.sha256((workspace.model / name).read_bytes()).hexdigest() for name in names}
    others |= {f"{sources.FOLDER}/{name}": digest for name, digest in kernels.items()}
    manifest = Manifest(hashlib.sha256(config.encode()).hexdigest(), others, tensors, probe)
    workspace.write_text(MANIFEST, manifest.text())
    workspace.write_text("recipe.yaml", to_yaml(recipe))
    workspace.write_text("plan.yaml", to_text(settled(plan, source, recipe.passes, formats)))
    bits, weights = total_bits(source, formats)
    report.layout, report.runs_code = entry["quant_method"] if packed else DENSE, runs_code(source.raw_config)
    report.size_bytes = shards.total_bytes(files)
    report.bits_per_weight = bits / weights if weights else 0.0
    state = source.model.state_dict()
    original = source.checkpoint.shard_of  # a tensor that only the result stores twice counts once
    dense = sum(state[name].numel() for name, stored in source.names.items() if stored in original)
    report.model_bits_per_weight = 8 * sum(shard.data_bytes for shard in files) / dense
    report.bits_per_weight = report.bits_per_weight or report.model_bits_per_weight  # if nothing was rounded


def layouts_of(formats: Mapping[str, Format], source: ModelSource) -> list[Layout]:
    """Return the kernel layouts of the packed layers, each once."""
    model, kinds = source.model, linear_layers(source.model)
    shapes = {layer: kinds[layer].weight(model.get_submodule(layer)).shape for layer in formats}
    found = {}
    for fmt, shape in dict.fromkeys((fmt, shapes[layer]) for layer, fmt in formats.items()):
        nothing = torch.zeros(shape)
        known = fmt.within(1.0, Seen.nothing()) if isinstance(fmt, Contextual) else fmt
        known = known.inner if isinstance(known, Borrowing) else known
        grid = known.fit(nothing, search=False)
        layout = layout_for(known.codes(grid.pack(grid.round(nothing, 0))))
        if layout is not None:
            found[layout.name] = layout
    return list(found.values())


def write_kernels(workspace: Workspace, layouts: Iterable[Layout]) -> dict[str, str]:
    """Write the CUDA sources that decode the layouts next to the weights, as their documentation.

    Returns: sha256 by file name.
    """
    digests: dict[str, str] = {}
    for layout in layouts:
        digests |= sources.digests(layout)
    if digests:
        with writing(workspace.model):
            (workspace.model / sources.FOLDER).mkdir(exist_ok=True)
    for name in digests:
        workspace.write_text(f"{sources.FOLDER}/{name}", sources.read(name))
    return digests


def default_out(model: Path, passes: Sequence[Pass], plan: Plan, target: Target | None = None) -> Path:
    """Return the default output directory: next to the model, named after it with the compression appended."""
    model = Path(os.path.abspath(model))  # noqa: PTH100 - resolve() would leave the place of a link
    pruned = "".join(f"-{step.label}" for step in passes if step.label)
    model = model.with_name(f"{model.name}{pruned}")
    if target is not None:
        return model.with_name(f"{model.name}-{target.label}")
    if not plan:
        return model if pruned else model.with_name(f"{model.name}-copy")
    labels = sorted({option.label for option in plan.values() if not isinstance(option, CacheRounding)})
    cache = "".join({f"-{option.label}" for option in plan.values() if isinstance(option, CacheRounding)})
    return model.with_name(f"{model.name}-{labels[0] if len(labels) == 1 else 'mixed'}{cache}")
