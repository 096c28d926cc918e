"""PAT: learn which hidden channels to drop while the model adapts, then drop them.

Operators after every layer that writes the hidden state share one mask (compressor/passes/prune/pat_operators.py). They and a
LoRA for every linear layer are trained towards the original's predictions (compressor/passes/train/distillation.py), and all
are merged at the end. The pass needs the model in memory, in float32. The result is of the same architecture with a smaller
`hidden_size`.

Source: Liu et al., "PAT: Pruning-Aware Tuning for Large Language Models", AAAI 2025. Differences: the loss is the divergence
from the original's predictions instead of the loss on text. Channels can be principal components. For the operators see
their module.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.model.source import ModelSource
from compressor.passes.prune.basis import Turned, turned
from compressor.passes.prune.hidden_pass import HiddenPass
from compressor.passes.prune.pat_operators import Masked, largest, start
from compressor.passes.train.distillation import Schedule, Training, distil, expected_memory, low_rank
from compressor.passes.transform.rotate import residual_writers
from compressor.pipeline.prune_stage import Pruned, Work, read_tensors, stored
from compressor.recipe.registry import node

KEPT, LOSSES = "kept", "losses"  # kept channels and losses of all steps, stored with the tensors
ALPHA = 4  # of the LoRA
RANK = 20  # default rank of an operator: hidden size divided by this


@node
class Pat(HiddenPass):
    """Drop hidden channels that a trained mask selects. The other fields are those of `HiddenPass`.

    Args:
        steps: Number of training steps.
        batch: Number of samples per step.
        lr: Peak learning rate of the operators and the LoRA, after warm-up. It decays to zero as a cosine.
        mask_lr: Peak learning rate of the mask, with the same schedule.
        rank: Rank of the LoRA.
        operator_rank: Rank of the operators. Null is a twentieth of the hidden size.
        seed: Seed of the order of samples and of the initial values of trained parameters.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    mask_lr: float = 0.01
    rank: int = 20
    operator_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "operator_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not a positive number")
        if not 0 < self.mask_lr <= 1:
            raise ValueError(f"mask_lr: {self.mask_lr} is not above 0 and at most 1")
        Schedule(self.steps, self.batch, self.lr, self.seed)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of finding the basis and of training. Operators are small relative to the LoRA."""
        if not self.ratio:
            return 0
        return max(
            super().expected_memory(source, tokens, batch), expected_memory(source, tokens, low_rank(source, self.rank))
        )

    def prune(self, work: Work) -> Pruned:
        """Train, merge, and drop channels."""
        if not self.ratio:
            return self.done(work, None)
        basis = turned(work, self.basis)
        whole = work.source.rewritten(basis.rewriting)
        residual = self.narrower(work.source, whole)
        file = work.once("masked", self, partial(self._trained, work, whole, basis, residual.size))
        found = read_tensors(file)
        losses: list[float] = found.pop(LOSSES).tolist()
        keep_S, tenth = found.pop(KEPT), max(1, self.steps // 10)
        residual.check(keep_S)
        trained = {**basis.rewriting.tensors, **stored(file, found).tensors}
        rewriting = replace(basis.rewriting, tensors=trained).then(residual.rewriting(keep_S))
        first, last = (sum(some) / len(some) for some in (losses[:tenth], losses[-tenth:]))
        return self.done(work, rewriting, loss=[first, last])

    def _trained(self, work: Work, whole: ModelSource, basis: Turned, size: int, unfinished: Path) -> dict[str, Tensor]:
        """Return the trained tensors by checkpoint name, with zeros in dropped channels, the kept channels, and losses."""
        width = len(basis.strength_D)
        writers = [
            f"{block.prefix}.{name}"
            for block in (whole.block(index, load=False) for index in range(len(whole.layers)))
            for name in residual_writers(block, basis.norms, width)
        ]
        torch.manual_seed(self.seed)
        rank = self.operator_rank or max(1, width // RANK)
        begin = start(basis.strength_D, size)
        masked = Masked(whole, writers, begin, size, self.steps, rank, (self.rank, ALPHA))
        groups: list[dict[str, Any]] = [{"params": masked.parameters()}, {"params": [masked.mask_D], "lr": self.mask_lr}]
        schedule = Schedule(self.steps, self.batch, self.lr, self.seed)
        training = Training(schedule, groups, unfinished if work.ranks.first else None)
        distil(
            work,
            lambda tokens, **options: masked.at(training.done, tokens, **options),
            training,
            penalty=masked.penalty,
            after=masked.settle,
        )
        names, headers = whole.names, whole.checkpoint.headers
        new = {names[name]: value.to(headers[names[name]].dtype) for name, value in masked.tensors().items()}
        kept = largest(masked.mask_D, size).nonzero().flatten()
        return {**new, KEPT: kept, LOSSES: torch.tensor(training.losses)}


EXPORT = Pat
