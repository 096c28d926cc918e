"""Learn which channels and groups of heads can go, while the model learns to do without them, then take them away.

Gates on channels of the MLPs and on groups of attention heads (compressor/passes/prune/gates.py) and a LoRA beside the layers
of queries and values are trained towards the original's predictions (compressor/passes/train/distillation.py), with
multipliers that hold every part of every block to the share it shall lose, so that blocks end alike and stock software reads
them. That share rises from nothing in the first half of the steps. In the end exactly as many units go, those whose gates are
the least open; gates are folded into the writers, and the LoRA is merged. It needs the model in memory, in float32. How many
heads and channels stay is what `prune_width` would take. `recover` may follow, as the second stage of training does in the
paper.

Source: Guo et al., "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models", 2023.
What differs: the loss is the divergence from the original's predictions in the place of that on instructions; shares are held
for each part, not for the model; groups of heads go with their keys and values; the hidden state stays as it is; and the
"collaborative" instruction, a text put before all others in training and for ever after, is left out: a model that needs it
would not stand in for the original.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.model.source import ModelSource
from compressor.passes.prune.gates import Gates, settled
from compressor.passes.prune.gradual import linear
from compressor.passes.prune.prunable import find_all
from compressor.passes.prune.width_pass import WidthPass, nearest
from compressor.passes.prune.widths import Chosen, Way
from compressor.passes.train.distillation import Schedule, Training, distil, expected_memory, low_rank
from compressor.passes.train.lora import merged, student
from compressor.pipeline.prune_stage import Pruned, Work, as_stored, read_tensors, stored
from compressor.recipe.registry import node

LOSSES, UNITS = "losses", "units."  # of all steps, and what stays of each part, beside the tensors
RISE = 0.5  # of the steps, in which what shall go rises
CHANGED = ("q_proj", "v_proj")  # by LoRA, as in the paper


@node
class Compresso(WidthPass):
    """Args as of `WidthPass`, and

    steps: Number of training steps.
    batch: Samples in a step.
    lr: Highest learning rate of the LoRA; it rises to that and falls to zero with a cosine.
    gate_lr: The same of gates and multipliers.
    rank: Rank of the LoRA.
    refit: Fit the writers to what stays, too.
    seed: Seed of the order of samples, of the noise of gates, and of the LoRA's initial values.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    gate_lr: float = 0.1
    rank: int = 8
    refit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not a positive number")
        if not 0 < self.gate_lr <= 1:
            raise ValueError(f"gate_lr: {self.gate_lr} is not above 0 and at most 1")
        Schedule(self.steps, self.batch, self.lr, self.seed)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Peak of comparing shapes and of the training."""
        if not self.ratio:
            return 0
        return max(
            super().expected_memory(source, tokens, batch), expected_memory(source, tokens, low_rank(source, self.rank))
        )

    def prune(self, work: Work) -> Pruned:
        """Choose a shape, train, then take away."""
        if not self.ratio:
            return self.untouched(work)
        found = self.shapes(work.source)
        tried = self.compared(work, Way("obs", refit=True, damp=self.damp), found)
        keep = nearest(tried).keep
        file = work.once("gated", (self, keep), partial(self._trained, work, keep))
        tensors = read_tensors(file)
        losses: list[float] = tensors.pop(LOSSES).tolist()
        units = {n.removeprefix(UNITS): tuple(tensors.pop(n).tolist()) for n in list(tensors) if n.startswith(UNITS)}
        trained = stored(file, tensors)
        after = replace(work, source=work.source.rewritten(trained), known={**work.known, "gated": file.name})
        pruned = self.narrowed(after, Chosen(units, self.refit, self.damp), found, tried)
        assert pruned.rewriting is not None
        tenth = max(1, self.steps // 10)
        first, last = (sum(some) / len(some) for some in (losses[:tenth], losses[-tenth:]))
        return Pruned(trained.then(pruned.rewriting), {**pruned.report, "loss": [first, last]})

    def _trained(self, work: Work, keep: Mapping[str, int], unfinished: Path) -> dict[str, Tensor]:
        """The new tensors by name on disk, units that stay, and the losses."""
        source = work.source
        parts = {name: part for name, (_, part) in find_all(source).items() if keep[name] < part.count}
        torch.manual_seed(self.seed)
        model = student(source, self.rank, self.rank, CHANGED)
        gates = Gates(model, source, parts, keep, self.seed)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.requires_grad]},
            {"params": [gates.log_alpha_G], "lr": self.gate_lr},
            {"params": [gates.multipliers_2P], "lr": self.gate_lr, "maximize": True},
        ]
        schedule = Schedule(self.steps, self.batch, self.lr, self.seed)
        training = Training(schedule, groups, unfinished if work.ranks.first else None)
        distil(
            work,
            lambda tokens, **options: gates.at(training.done, tokens, **options),
            training,
            penalty=lambda step: gates.penalty(linear((step + 1) / (RISE * self.steps))),
        )
        new, units = folded(merged(model, source), gates, keep)
        return {
            **as_stored(source, new),
            **{f"{UNITS}{name}": some for name, some in units.items()},
            LOSSES: torch.tensor(training.losses),
        }


def folded(
    tensors: Mapping[str, Tensor], gates: Gates, keep: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the changed tensors of a model, with the gates of kept units folded into the writers, and the kept units by
    part.

    Args:
        tensors: By name in the model, merged.
        gates: As they were trained.
        keep: How many units stay.
    """
    new = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight").endswith(CHANGED)}
    units = {}
    for name, log_alpha_U in gates.by_part(gates.log_alpha_G.detach()).items():
        part = gates.parts[name]
        stays = log_alpha_U.argsort(descending=True, stable=True)[: keep[name]].sort().values
        gate_U = torch.ones_like(log_alpha_U).index_copy(0, stays, settled(log_alpha_U[stays]))
        writer = f"{name.removesuffix(part.name)}{part.writer}.weight"
        new[writer] = tensors[writer] * gate_U.repeat_interleave(part.columns)
        units[name] = stays
    return new, units


EXPORT = Compresso
