"""The one loop: source -> stream -> passes -> workspace, a block at a time.

    for each block:  collect statistics, apply each pass, advance the stream, put the block's tensors on disk

Resident are one dense block, the statistics of one pass and the block's packed parts, so memory does not grow with depth.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from compressor.calibration.stream import CalibrationStream
from compressor.distributed import Ranks
from compressor.model.source import ModelSource, return_freed_memory
from compressor.model.writer import Workspace
from compressor.plan import block_names, choose, layer_formats, rest_names
from compressor.report import Report, Row
from compressor.types import Block, Format, Outcome, Pass, Plan, QuantizedTensor, Stored, stored_bits
from compressor.verification.manifest import entries
from compressor.verification.probe import Probe, Record


@dataclass(frozen=True)
class Event:
    """Something a person who waits wants to see."""

    stage: str  # "compress", "resume", "evaluate", "write"
    done: int
    total: int
    what: str = ""
    error: float | None = None
    tokens_per_second: float | None = None


Tell = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, and by whom."""

    source: ModelSource
    passes: Sequence[Pass]
    plan: Plan
    ranks: Ranks


def compress(
    job: Job,
    stream: CalibrationStream | None,
    workspace: Workspace | None,
    finished: Sequence[str],
    report: Report,
    tell: Tell,
) -> Record | None:
    """Compress every block in order; each sees the outputs of the compressed blocks before it.

    Args:
        job: The model, the passes, the plan.
        stream: Positioned before the first block; None if no pass needs statistics.
        workspace: Where results go; None on all ranks but the first.
        finished: Parts that an interrupted run has left, on every rank.
        report: Rows and warnings are added.
        tell: Called after each step.

    Returns: what the model now computes, for the manifest; on all ranks but the first, and where it cannot be streamed, None.
    """
    total = len(job.source.layers)
    probe = Probe(job.source) if workspace is not None else None
    for index in range(total):
        part = f"block-{index:05d}"
        if part in finished:
            replay(job, stream, probe, workspace, index, report)
            tell(Event("resume", index + 1, total))
            continue
        started = time.monotonic()
        block = job.source.block(index)
        rows, warnings = compress_block(job, block, stream, tell)
        if stream is not None and index < total - 1:
            stream.advance(block)
        if probe is not None:
            probe.advance(block)
        if workspace is not None:
            keep(workspace, part, block_tensors(job.source, block), rows=[asdict(r) for r in rows], warnings=warnings)
        report.rows += rows
        report.warnings += warnings
        job.source.release(block)
        del block
        return_freed_memory()
        spent = time.monotonic() - started
        speed = stream.tokens * job.ranks.world / spent if stream is not None else None
        tell(Event("compress", index + 1, total, tokens_per_second=speed))
    if workspace is not None:
        for i, name in enumerate(rest_names(job.source)):
            if f"rest-{i:05d}" not in finished:
                keep(workspace, f"rest-{i:05d}", {name: job.source.checkpoint.read(name)})
    return finish_probe(probe, report) if probe is not None else None


def keep(workspace: Workspace, part: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
    """Put a finished part on disk, and what the manifest will say of it, which is taken from memory, into the journal."""
    workspace.add(part, tensors, entries=entries(tensors), **record)


def finish_probe(probe: Probe, report: Report) -> Record | None:
    """What the model computes; a warning if that cannot be told."""
    record = probe.record()
    if probe.obstacle is not None:
        report.warnings.append(f"no logits were recorded for `compress verify` to compare with: {probe.obstacle}")
    return record


def compress_block(job: Job, block: Block, stream: CalibrationStream | None, tell: Tell) -> tuple[list[Row], list[str]]:
    """Apply every pass to a resident block; returns the report's rows and warnings."""
    rows: list[Row] = []
    warnings: list[str] = []
    for step in job.passes:
        outcome = apply_shared(job, step, block, stream)
        labels = {n: job.plan[f"{block.prefix}.{unit}"].label for unit, names in step.units(block).items() for n in names}
        for name in (layer for layer in block.layers if layer in outcome.edits):  # the same order for any number of ranks
            stored = outcome.edits[name]
            bits = stored_bits(stored) / block.weight(name).numel()
            rows.append(Row(f"{block.prefix}.{name}", labels[name], bits, outcome.errors[name]))
            tell(Event("compress", block.index, len(job.source.layers), rows[-1].layer, rows[-1].error))
        block.install(outcome.edits)
        warnings += outcome.warnings
    return rows, warnings


def replay(
    job: Job,
    stream: CalibrationStream | None,
    probe: Probe | None,
    workspace: Workspace | None,
    index: int,
    report: Report,
) -> None:
    """Take a block that an interrupted run finished: send the stream and the probe through it as that run did."""
    part = f"block-{index:05d}"
    if workspace is not None:
        record = workspace.finished[part]
        report.rows += [Row(**r) for r in record["rows"]]
        report.warnings += record["warnings"]
    streams = stream is not None and index < len(job.source.layers) - 1  # the same on every rank
    if not streams and probe is None:
        return
    block = job.source.block(index)
    formats = layer_formats(job.passes, block, job.plan)
    stored = _stored_layers(job.source, block, formats, workspace.read(part)) if workspace is not None else {}
    block.install(job.ranks.agree(stored) if streams else stored)
    if stream is not None and streams:
        stream.advance(block)
    if probe is not None:
        probe.advance(block)
    job.source.release(block)
    return_freed_memory()


def apply_shared(job: Job, step: Pass, block: Block, stream: CalibrationStream | None) -> Outcome:
    """Run a pass on this rank's share of the units; return every rank's results."""
    units, choice = step.units(block), choose(step, block, job.plan)
    layers = [name for names in units.values() for name in names]
    assert stream is not None or not step.needs
    stats = stream.collect(block, layers, step.needs) if stream is not None else _NoStats()
    costs = {unit: sum(block.weight(name).numel() for name in names) for unit, names in units.items()}
    mine = {unit: choice[unit] for unit in job.ranks.share(costs)}
    return job.ranks.gather(step.apply(block, stats, mine))


def block_tensors(source: ModelSource, block: Block) -> dict[str, Tensor]:
    """What is written of a block, by name on disk: packed parts, and the other tensors exactly as they were."""
    tensors: dict[str, Tensor] = {}
    for name, stored in block_names(source, block).items():
        new = block.installed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if isinstance(new, QuantizedTensor):
            base = stored.removesuffix(".weight")
            tensors |= {f"{base}.{part}": tensor for part, tensor in new.parts.items()}
        elif new is not None:
            kind = block.layers[name.removesuffix(".weight")]
            tensors[stored] = kind.parameter(new).to(source.checkpoint.headers[stored].dtype)
        else:
            tensors[stored] = source.checkpoint.read(stored)
    return tensors


class _NoStats:
    """Stands for the statistics when no pass asks for any."""

    def __getitem__(self, key: tuple[str, type[Any]]) -> Any:
        raise KeyError(f"statistic {key[1].__name__} of {key[0]} was not asked for")

    def taps(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        return [(layer,) for layer in layers]


def _stored_layers(
    source: ModelSource, block: Block, formats: Mapping[str, Format], tensors: Mapping[str, Tensor]
) -> dict[str, Stored]:
    """The linear layers of a finished part."""
    stored: dict[str, Stored] = {}
    for name, on_disk in block_names(source, block).items():
        layer, base = name.removesuffix(".weight"), on_disk.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in block.layers:
            continue
        if layer in formats:
            shape = block.shape(layer)
            parts = {part: tensors[f"{base}.{part}"] for part in formats[layer].checkpoint_parts(shape)}
            stored[layer] = QuantizedTensor(formats[layer], shape, parts)
        else:
            stored[layer] = block.layers[layer].parameter(tensors[on_disk])  # a transpose is its own inverse
    return stored
