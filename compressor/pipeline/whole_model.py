"""Whole-model training: after the last block, passes that train the model get all compressed blocks in memory.

The dense model is streamed once, block by block, and only the inputs of its head are kept. The compressed model stays in
memory. The layers that a pass changes are stored as a separate part of the workspace, which takes precedence over the
blocks' parts. These are kept, so a run that is killed during training can resume from them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.formats.base import QuantizedTensor
from compressor.model.block import Block
from compressor.model.source import return_freed_memory
from compressor.model.writer import Workspace
from compressor.pipeline.blocks import finish_probe, keep, part_name, stored_layers
from compressor.pipeline.calibration.hidden import Hidden, Keep
from compressor.pipeline.contract import Whole
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.plan import block_names
from compressor.pipeline.probe import Probe, Record
from compressor.report.record import Report

TUNED = "tuned"


def tune(
    job: Job,
    number: int,
    batches: list[Tensor],
    keep_hidden: Keep,
    workspace: Workspace | None,
    report: Report,
    tell: Tell,
) -> Record | None:
    """Have a pass train the compressed model, and store the changed layers in the workspace.

    Args:
        job: The model and the passes.
        number: Number of the pass.
        batches: This rank's tokens.
        keep_hidden: Function that stores hidden states, in memory or on disk.
        workspace: Workspace with all blocks finished; None on all ranks but the first.
        report: Record of the run, to which warnings are added.
        tell: Called after each step.

    Returns: the probe's record of the model's logits, as from `blocks.compress`.
    """
    source, step = job.source, job.passes[number]
    inputs = source.kept_inputs(batches, keep_hidden)
    targets, weights = _dense(job, inputs, keep_hidden)
    blocks = [source.block(index) for index in range(len(source.layers))]
    packed: dict[str, QuantizedTensor] = {}
    for block in blocks:
        part = part_name(block.index)
        stored = stored_layers(source, block, workspace, part) if workspace is not None else {}
        block.install(job.ranks.agree(stored))
        packed |= {f"{block.prefix}.{n}": new for n, new in block.installed.items() if isinstance(new, QuantizedTensor)}
    with source.head() as head:
        whole = Whole(
            inputs=inputs,
            targets=targets,
            student=lambda x_BSD, weights: head(_through(blocks, x_BSD, weights)),
            teacher=head,
            packed=packed,
            dense={name: weights[name] for name in packed},
            dtype=source.dtype,
            ranks=job.ranks,
            progress=lambda done, total: tell(Event("tune", done, total)),
        )
        edits, warnings = step.tune(whole)
    report.warnings += warnings
    if workspace is None:
        return None
    probe = Probe(source)
    tensors: dict[str, Tensor] = {}
    for block in blocks:
        own = {name: edits[full] for name in block.layers if (full := f"{block.prefix}.{name}") in edits}
        block.install(own)
        probe.advance(block)
        bases = block_names(source, block)
        for name, new in own.items():
            base = bases[f"{name}.weight"].removesuffix(".weight")
            tensors |= {f"{base}.{part}": tensor for part, tensor in new.own.items()}
    record = finish_probe(probe, report)
    keep(workspace, TUNED, tensors, warnings=list(warnings), probe=None if record is None else record.to_dict())
    return record


def tuned(workspace: Workspace, report: Report) -> Record | None:
    """Return the probe's record of a training that an interrupted run had finished. Add its warnings to the report."""
    line = workspace.finished[TUNED]
    report.warnings += line["warnings"]
    return None if line["probe"] is None else Record.from_dict(line["probe"])


@torch.no_grad()
def _dense(job: Job, inputs: Hidden, keep_hidden: Keep) -> tuple[Hidden, dict[str, Tensor]]:
    """Return the output of the dense model's last block, and the weights of all its layers by full name."""
    hidden = inputs
    weights: dict[str, Tensor] = {}
    for block in job.source.blocks():
        hidden = keep_hidden(block.forward(x.to(job.source.device)).cpu() for x in hidden)
        weights |= {f"{block.prefix}.{name}": block.weight(name).clone() for name in block.layers}
    return_freed_memory()
    return hidden, weights


def _through(blocks: list[Block], x_BSD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the hidden states after the last block, computed with `weights` instead of the layers' own."""
    for block in blocks:
        own = {name: weights[full] for name in block.layers if (full := f"{block.prefix}.{name}") in weights}
        x_BSD = block.forward(x_BSD, own)
    return x_BSD
