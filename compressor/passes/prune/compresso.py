"""Compresso: learn which channels and groups of heads to drop while the model adapts, then drop them.

Gates on MLP channels and on groups of attention heads (compressor/passes/prune/gates.py) are trained together with a LoRA for
the query and value layers, towards the original's predictions (compressor/passes/train/distillation.py). Multipliers hold
every part of every block to the same target sparsity, so that all blocks get the same shape and stock software loads them.
The target rises from zero during the first half of the steps. At the end exactly the target number of units is dropped, those
with the least open gates. Gates are folded into the writers, and the LoRA is merged. The pass needs the model in memory, in
float32. The number of heads and channels to keep is that of `prune_width`. `recover` may follow, like the second training
stage of the paper.

Source: Guo et al., "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models", 2023.
Differences: the loss is the divergence from the original's predictions instead of the loss on instructions. Sparsity is
controlled for each part, not for the model. Groups of heads are dropped with their keys and values. The hidden size does not
change. The "collaborative" instruction, a text prepended to every input in training and use, is left out: a model that needs
it could not replace the original.
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

LOSSES, UNITS = "losses", "units."  # losses of all steps and kept units of each part, stored with the tensors
RISE = 0.5  # fraction of the steps in which the target sparsity rises
CHANGED = ("q_proj", "v_proj")  # layers with a LoRA, as in the paper


@node
class Compresso(WidthPass):
    """Drop units that trained gates select. The other fields are those of `WidthPass`.

    Args:
        steps: Number of training steps.
        batch: Number of samples per step.
        lr: Peak learning rate of the LoRA, after warm-up. It decays to zero as a cosine.
        gate_lr: Peak learning rate of gates and multipliers, with the same schedule.
        rank: Rank of the LoRA.
        refit: Also refit the writers to the kept units.
        seed: Seed of the order of samples, the noise of gates, and the LoRA's initial values.
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
        """Return the peak memory in bytes of comparing shapes and of training."""
        if not self.ratio:
            return 0
        return max(
            super().expected_memory(source, tokens, batch), expected_memory(source, tokens, low_rank(source, self.rank))
        )

    def prune(self, work: Work) -> Pruned:
        """Choose a shape, train, then drop units."""
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
        """Return the trained tensors by name in the checkpoint, the kept units, and the losses."""
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
    """Return the changed tensors of a model, with the gates of kept units folded into writers, and each part's kept units.

    Args:
        tensors: Merged tensors, by name in the model.
        gates: Trained gates.
        keep: Number of units to keep of each part.
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
