"""Learn which hidden channels can go, while the model learns to do without them, then take them away.

Operators behind all that writes the hidden state, with one mask for all (compressor/passes/prune/pat_operators.py), and a
LoRA beside every linear layer are trained towards the original's predictions (compressor/passes/train/distillation.py), all
merged at the end. It needs the model in memory, in float32. The result is of the same architecture with a smaller
`hidden_size`.

Source: Liu et al., "PAT: Pruning-Aware Tuning for Large Language Models", AAAI 2025. What differs: the loss is the divergence
from the original's predictions in the place of that on text; channels can be principal components; and see the operators.
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

KEPT, LOSSES = "kept", "losses"  # channels that stay, and what all steps lost, beside the tensors
ALPHA = 4  # of the LoRA
RANK = 20  # of an operator: of so many hidden channels, one


@node
class Pat(HiddenPass):
    """Args as of `HiddenPass`, and

    steps: Number of training steps.
    batch: Samples in a step.
    lr: Highest learning rate of the operators and the LoRA; it rises to that and falls to zero with a cosine.
    mask_lr: The same of the mask.
    rank: Rank of the LoRA.
    operator_rank: Rank of the operators; null takes a twentieth of the hidden size.
    seed: Seed of the order of samples, and of the initial values of what is trained.
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
        """Peak of finding the basis and of the training, in which operators are few beside the LoRA."""
        if not self.ratio:
            return 0
        return max(
            super().expected_memory(source, tokens, batch), expected_memory(source, tokens, low_rank(source, self.rank))
        )

    def prune(self, work: Work) -> Pruned:
        """Train, merge, take away."""
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
        """The new tensors by name on disk, with zeros in channels that go."""
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
