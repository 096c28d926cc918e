"""Iterative width pruning by Taylor importance: weights times their gradients, computed again after every step.

    importance of unit u = Σ |w · ∂L/∂w|    over all of its weights: rows before the writer, and the writer's columns,

which is a first-order bound of the change of L without them. In every step the least important remaining units of a part are
set to zero for good. All blocks get the same shape, so the units of a part compete only with each other. L is the divergence
from the original's predictions, KL(original || model), averaged over calibration tokens. Its gradient is zero until something
is dropped, so in the first step L is the next-token loss. A single step is one-shot Taylor pruning. At the end the writers
are refitted as in `prune_width`, which also determines the number of heads and channels to keep.

The pass needs the model in memory, in float32, and gradients of the same size.

Sources: GISP, "Global Iterative Structured Pruning", ACL 2026, for first-order importance in many steps, linearly; Ma et al.,
"LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, for the sum over coupled weights. Differences:
groups of heads are dropped as a unit, with their keys and values; all blocks have the same shape; and L after the first step.

Shape suffixes: U units.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor.model.block import Block
from compressor.model.journal import save
from compressor.model.memory import parameters as weights
from compressor.model.source import ModelSource
from compressor.passes.prune.gradual import SCHEDULES, Kind, left
from compressor.passes.prune.prunable import Part, find_all
from compressor.passes.prune.width_pass import WidthPass, nearest
from compressor.passes.prune.widths import Chosen, Way
from compressor.passes.train.distillation import Lesson, divergence, drawn, expected_memory
from compressor.pipeline.job import Event
from compressor.pipeline.prune_stage import Pruned, Work, read_tensors
from compressor.recipe.registry import node

STEP = "step"  # number of steps done, stored with the units


@node
class PruneTaylor(WidthPass):
    """Drop the least important units in several steps. The other fields are those of `WidthPass`.

    Args:
        steps: Number of steps in which units are dropped.
        batch: Number of calibration samples for the gradients of a step, drawn anew in every step.
        schedule: Pace of dropping: `linear`, the same number of units in every step; `cubic`, most of them early.
        refit: Refit the rest to the model's own outputs.
        seed: Seed of the order of samples.
    """

    steps: int = 30
    batch: int = 32
    schedule: Kind = "linear"
    refit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of comparing shapes and of computing a gradient for every weight."""
        if not self.ratio:
            return 0
        return max(super().expected_memory(source, tokens, batch), expected_memory(source, tokens, weights(source) // 4))

    def prune(self, work: Work) -> Pruned:
        """Choose a shape, then units step by step, then refit the writers."""
        if not self.ratio:
            return self.untouched(work)
        found = self.shapes(work.source)
        tried = self.compared(work, Way("obs", refit=True, damp=self.damp), found)
        keep = nearest(tried).keep
        stays = read_tensors(work.once("units", (self, keep), partial(self._chosen, work, keep)))
        units = {name: tuple(some.nonzero().flatten().tolist()) for name, some in stays.items()}
        return self.narrowed(work, Chosen(units, self.refit, self.damp), found, tried)

    def _chosen(self, work: Work, keep: Mapping[str, int], unfinished: Path) -> dict[str, Tensor]:
        """Choose the units to keep: one byte per unit, by full name of the part."""
        source, ranks = work.source, work.ranks
        model = ModelSource(source.path, source.device, torch.float32, source.rewritings)
        parts = {name: found for name, found in find_all(model).items() if keep[name] < found[1].count}
        kept = ranks.agree(read_tensors(unfinished) if ranks.first and unfinished.exists() else {})
        done = int(kept.pop(STEP, torch.zeros(())))
        stays = {name: kept.get(name, torch.ones(part.count, dtype=torch.uint8)) for name, (_, part) in parts.items()}
        whole = model.whole()
        for name, (block, part) in parts.items():
            for parameter in _parameters(block, part).values():
                parameter.requires_grad_(True)
            silence(block, part, stays[name])
        with Lesson.opened(work) as lesson:
            for step in range(done, self.steps):
                chosen = drawn(self.seed, step, self.batch, len(lesson.tokens_NS))
                loss = lesson.backward(whole, chosen, divergence if step else next_token)
                trained = [p for p in whole.parameters() if p.requires_grad]
                for p in trained:  # a rank without samples in this step has no gradients
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                ranks.sum_([loss, *(p.grad for p in trained if p.grad is not None)])
                share = SCHEDULES[self.schedule]((step + 1) / self.steps)
                for name, (block, part) in parts.items():
                    score_U = importance(block, part).cpu()
                    score_U[stays[name] == 0] = -1  # dropped units are not revived
                    best = score_U.argsort(descending=True, stable=True)[: left(part.count, keep[name], share)]
                    stays[name] = torch.zeros_like(stays[name]).index_fill(0, best, 1)
                    silence(block, part, stays[name])
                whole.zero_grad()
                if ranks.first:
                    save(unfinished, {**stays, STEP: torch.tensor(step + 1)})
                work.tell(Event("score", step + 1, self.steps, error=float(loss)))
        return stays


def next_token(found_BSV: Tensor, wanted_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Return the next-token cross-entropy, summed over tokens."""
    return cross_entropy(found_BSV[:, :-1].float().flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="sum")


def importance(block: Block, part: Part) -> Tensor:
    """Return the importance of each unit, [U], from gradients that have been accumulated."""
    terms = {name: (p * p.grad).detach().abs() for name, p in _parameters(block, part).items() if p.grad is not None}
    writer = terms.pop(part.writer).sum(0).view(part.count, -1).sum(1)
    return sum((term.view(part.count, -1).sum(1) for term in terms.values()), writer)


@torch.no_grad()
def silence(block: Block, part: Part, stays_U: Tensor) -> None:
    """Set the writer's columns of dropped units to zero."""
    gone = part.columns_of((stays_U == 0).nonzero().flatten())
    _parameters(block, part)[part.writer][:, gone] = 0


def _parameters(block: Block, part: Part) -> dict[str, torch.nn.Parameter]:
    """Return the weights and biases that belong to units, by the names of `Part.rows`, and the writer's weight."""
    names = {name: f"{name}.weight" if name in block.layers else name for name in (*part.rows, part.writer)}
    return {name: block.module.get_parameter(at) for name, at in names.items()}


EXPORT = PruneTaylor
