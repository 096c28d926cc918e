"""The block loop: source -> stream -> passes -> workspace, one block at a time.

    for each block:
        for each pass:  collect statistics, apply the pass
        advance the stream, write the block's tensors

One dense block, the statistics of one pass and the block's packed tensors are resident, so memory does not grow with depth.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from compressor.formats.base import QuantizedTensor, Stored, borrowed, stored_bits
from compressor.model.block import Block
from compressor.model.source import ModelSource, return_freed_memory
from compressor.model.surgery.kv_cache import CacheScales
from compressor.model.writer import Workspace
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE, Samples
from compressor.pipeline.calibration.hidden import Keep
from compressor.pipeline.calibration.sensitivity import sensitivities
from compressor.pipeline.calibration.stream import BlockStats, CalibrationStream
from compressor.pipeline.contract import NoNotes, Notes, Outcome, Pass
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.manifest import entries
from compressor.pipeline.plan import block_names, cache_roundings, choose, describe_stored, rest_names, stored_formats
from compressor.pipeline.probe import Probe, Record
from compressor.report.record import Report, Row


def compress(
    job: Job,
    stream: CalibrationStream | None,
    workspace: Workspace | None,
    finished: Sequence[str],
    report: Report,
    tell: Tell,
) -> Record | None:
    """Compress every block in order. Each block is calibrated on the outputs of the compressed blocks before it.

    Args:
        job: The model, the passes, the plan.
        stream: Calibration stream before the first block; None if no pass needs statistics.
        workspace: Store of finished parts; None on all ranks but the first.
        finished: Names of the parts that an interrupted run finished; the same on every rank.
        report: Record of the run, to which rows and warnings are added.
        tell: Called after each step.

    Returns: the probe's record of the compressed model's logits, for the manifest. None on all ranks but the first, and for
        models that cannot be streamed.
    """
    total = len(job.source.layers)
    probe = Probe(job.source) if workspace is not None else None
    for index in range(total):
        part = part_name(index)
        if part in finished:
            replay(job, stream, probe, workspace, index, report)
            tell(Event("resume", index + 1, total))
            continue
        started = time.monotonic()
        block = job.source.block(index)
        if stream is not None:
            stream.enter(block)
        rows, warnings = compress_block(job, block, stream, tell, workspace)
        block.settle()
        if stream is not None and index < total - 1:
            stream.advance(block)
        if probe is not None:
            probe.advance(block)
        if workspace is not None:
            record = {"rows": [asdict(r) for r in rows], "warnings": warnings, "formats": describe_stored(block)}
            keep(workspace, part, block_tensors(job.source, block), **record)
        report.rows += rows
        report.warnings += warnings
        job.source.release(block)
        del block
        return_freed_memory()
        spent = time.monotonic() - started
        speed = stream.tokens * job.ranks.world / spent if stream is not None else None
        tell(Event("compress", index + 1, total, tokens_per_second=speed))
    if workspace is not None:
        for i, name in enumerate(rest_names(job.source, job.plan)):
            if f"rest-{i:05d}" not in finished:
                keep(workspace, f"rest-{i:05d}", {name: job.source.checkpoint.read(name)})
    return finish_probe(probe, report) if probe is not None else None


def open_stream(job: Job, calibration: Samples, keep_hidden: Keep, tell: Tell) -> CalibrationStream:
    """Open the calibration stream before the first block, with the metrics and the second stream that passes need."""
    source, ranks = job.source, job.ranks
    batches = ranks.mine(calibration.batches(TOKENS_AT_ONCE))
    metrics: Sequence[Tensor] = ()
    if any(step.reads_metric for step in job.passes):
        metrics = sensitivities(source, batches, ranks, lambda done, total: tell(Event("sensitivity", done, total)))
    two_streams = any(step.two_streams for step in job.passes)
    hidden = source.kept_inputs(batches, keep_hidden)
    return CalibrationStream(hidden, ranks, source.device, two_streams=two_streams, metrics=metrics, keep=keep_hidden)


def part_name(index: int) -> str:
    """Return the name of a block in the workspace."""
    return f"block-{index:05d}"


def keep(workspace: Workspace, part: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
    """Write a finished part to disk. Put its manifest entries, computed from memory, into the journal."""
    workspace.add(part, tensors, entries=entries(tensors), **record)


def finish_probe(probe: Probe, report: Report) -> Record | None:
    """Return the probe's record. Add a warning to the report if there is none."""
    record = probe.record()
    if probe.obstacle is not None:
        report.warnings.append(f"no logits were recorded for `compress verify` to compare with: {probe.obstacle}")
    return record


def compress_block(
    job: Job, block: Block, stream: CalibrationStream | None, tell: Tell, workspace: Workspace | None
) -> tuple[list[Row], list[str]]:
    """Apply every pass to a resident block. Return the report's rows and warnings."""
    rows: dict[str, Row] = {}  # by layer: result of the last pass that changed it
    warnings: list[str] = []
    total = len(job.source.layers)
    block.unrounded = {} if any(step.two_streams for step in job.passes) else None
    for number, step in enumerate(job.passes):
        notes = NoNotes() if workspace is None else workspace.notes(part_name(block.index), number)
        outcome = apply_shared(job, step, block, stream, tell, notes)
        for name in (layer for layer in block.layers if layer in outcome.errors):  # same order for any number of ranks
            stored = outcome.edits[name]
            bits = stored_bits(stored) / block.weight(name).numel()
            label = stored.format.label if isinstance(stored, QuantizedTensor) else "dense"
            rows[name] = Row(f"{block.prefix}.{name}", label, bits, outcome.errors[name])
            tell(Event("compress", block.index, total, rows[name].layer, rows[name].error))
        block.install(outcome.edits)
        block.cache = outcome.cache or block.cache
        warnings += outcome.warnings
    return list(rows.values()), warnings


def replay(
    job: Job,
    stream: CalibrationStream | None,
    probe: Probe | None,
    workspace: Workspace | None,
    index: int,
    report: Report,
) -> None:
    """Replay a block that an interrupted run finished: send the stream and the probe through it as that run did."""
    part = part_name(index)
    if workspace is not None:
        record = workspace.finished[part]
        report.rows += [Row(**r) for r in record["rows"]]
        report.warnings += record["warnings"]
    streams = stream is not None and index < len(job.source.layers) - 1  # the same on every rank
    if not streams and probe is None:
        return
    block = job.source.block(index)
    if stream is not None and streams:
        stream.enter(block)
    stored = stored_layers(job.source, block, workspace, part) if workspace is not None else {}
    block.install(job.ranks.agree(stored) if streams else stored)
    cache = _stored_cache(job, block, workspace.read(part)) if workspace is not None else None
    block.cache = job.ranks.agree(cache) if streams else cache
    if stream is not None and streams:
        stream.advance(block)
    if probe is not None:
        probe.advance(block)
    job.source.release(block)
    return_freed_memory()


def apply_shared(job: Job, step: Pass, block: Block, stream: CalibrationStream | None, tell: Tell, notes: Notes) -> Outcome:
    """Run a pass on this rank's share of the units, or on all units if the pass shares its work out itself.

    Returns: the results of all ranks.
    """
    units, choice = step.units(block), choose(step, block, job.plan)
    if step.offers:
        if not choice:  # the plan assigns this block to other passes
            return Outcome({}, {})
        units = {unit: units[unit] for unit in choice}
    layers = [name for names in units.values() for name in names]
    assert stream is not None or not step.needs

    def progress(done: int, total: int) -> None:
        tell(Event("compress", block.index, len(job.source.layers), f"{block.prefix}: step {done} of {total}"))

    if stream is not None:
        stats = replace(stream.collect(block, layers, step.needs, progress), notes=notes)
    else:
        stats = BlockStats({}, {}, job.ranks, (), (), None, progress, notes)
    if step.together:
        return step.apply(block, stats, choice)
    costs = {unit: sum(block.weight(name).numel() for name in names) for unit, names in units.items()}
    mine = {unit: choice.get(unit) for unit in job.ranks.share(costs)}  # None for a pass that offers no options
    return job.ranks.gather(step.apply(block, stats, mine))


def block_tensors(source: ModelSource, block: Block) -> dict[str, Tensor]:
    """Return the tensors to write for a block, by name on disk: packed tensors, new dense tensors, the others unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, stored in block_names(source, block).items():
        layer = name.removesuffix(".weight")
        new = block.installed.get(layer if layer in block.layers else name)
        if isinstance(new, QuantizedTensor):
            base = stored.removesuffix(".weight")
            tensors |= {f"{base}.{part}": tensor for part, tensor in new.own.items()}
        elif new is not None:
            tensors[stored] = block.layers[layer].parameter(new) if layer in block.layers else new
        else:
            tensors[stored] = source.checkpoint.read(stored)
    scales = block.cache.tensors() if block.cache is not None else {}
    return tensors | {source.beside(f"{block.prefix}.{name}"): scale for name, scale in scales.items()}


def _stored_cache(job: Job, block: Block, tensors: Mapping[str, Tensor]) -> CacheScales | None:
    """Return the scales for keys and values in a finished part; None if the plan does not round them."""
    found = cache_roundings(job.plan, block)
    if not found:
        return None
    rounding = next(iter(found.values()))
    return CacheScales.read(rounding, found, lambda name: tensors[job.source.beside(f"{block.prefix}.{name}")])


def stored_layers(source: ModelSource, block: Block, workspace: Workspace, part: str) -> dict[str, Stored]:
    """Return the layers in a finished part, as they were installed."""
    tensors, bases = workspace.read(part), block_names(source, block)
    formats = {f.removeprefix(f"{block.prefix}."): fmt for f, fmt in stored_formats({part: workspace.finished[part]}).items()}
    stored: dict[str, Stored] = {}
    for name, on_disk in bases.items():
        layer = name.removesuffix(".weight")
        if layer in formats:
            fmt, shape = formats[layer], block.shape(layer)
            lender, lent = borrowed(fmt, shape)
            owners = dict.fromkeys(fmt.checkpoint_parts(shape), name)
            owners |= dict.fromkeys(lent, f"{lender.removeprefix(f'{block.prefix}.')}.weight")
            parts = {part: tensors[f"{bases[owner].removesuffix('.weight')}.{part}"] for part, owner in owners.items()}
            stored[layer] = QuantizedTensor(fmt, shape, parts)
        elif layer in block.layers:
            stored[layer] = block.layers[layer].parameter(tensors[on_disk])  # a transpose is its own inverse
        elif name in block.dtypes:  # a parameter, no buffer
            stored[name] = tensors[on_disk]
    return stored
