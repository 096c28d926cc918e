"""After the last block: the whole compressed model in memory, for passes that train it as a whole.

The dense model goes by once, block by block, and leaves what enters its head; the compressed one stays. What a pass changes
becomes a part of the workspace of its own, which takes precedence over the blocks' parts: a run that is killed meanwhile
still has these.
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
    """Have a pass train the compressed model, and put what it changed into the workspace.

    Args:
        job: The model and the passes.
        number: Number of the pass.
        batches: This rank's tokens.
        keep_hidden: Puts hidden states where they are to lie.
        workspace: With all blocks finished; None on all ranks but the first.
        report: Warnings are added.
        tell: Called after each step.

    Returns: what the model now computes, as `pipeline.compress`.
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
    """Return the record of a training that an interrupted run had finished."""
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
    """Hidden states after the last block, with some weights in the place of their own."""
    for block in blocks:
        own = {name: weights[full] for name in block.layers if (full := f"{block.prefix}.{name}") in weights}
        x_BSD = block.forward(x_BSD, own)
    return x_BSD
