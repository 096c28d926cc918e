"""Recovery training: train a pruned model towards the predictions of the original, by low-rank changes that are then merged.

The original runs once, block by block, to compute the inputs of its head. The pruned model is kept in memory, with a LoRA for
every linear layer of its blocks, whose norms are trained too. The loss (compressor/passes/train/distillation.py) is only the
divergence of its predictions from the original's. Shapes, and thus the architecture, do not change.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.model.source import ModelSource
from compressor.passes.prune.shapes import parameters
from compressor.passes.train.distillation import Schedule, Training, distil, expected_memory, low_rank
from compressor.passes.train.lora import merged, student
from compressor.pipeline.prune_stage import Pruned, PruningPass, Sketch, Work, as_stored, read_tensors, stored
from compressor.recipe.registry import node

LOSSES = "losses"  # losses of all steps, stored with the tensors


@node
class Recover(PruningPass):
    """Train a pruned model with LoRA. List it after pruning passes. It needs the pruned model in memory, in float32.

    Args:
        steps: Number of training steps.
        batch: Number of samples per step.
        lr: Peak learning rate, after warm-up. It decays to zero as a cosine.
        rank: Rank of the changes to linear layers.
        norms: Train the weights of norms too.
        seed: Seed of the order of samples and of the initial values of the changes.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    rank: int = 32
    norms: bool = True
    seed: int = 0
    label: ClassVar[str] = ""
    requires_pruned_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not a positive number")
        Schedule(self.steps, self.batch, self.lr, self.seed)

    @property
    def schedule(self) -> Schedule:
        """Return the schedule of the training."""
        return Schedule(self.steps, self.batch, self.lr, self.seed)

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict that no shape changes."""
        return Sketch(None)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory of the training in bytes."""
        return expected_memory(source, tokens, low_rank(source, self.rank))

    def prune(self, work: Work) -> Pruned:
        """Train the pruned model.

        Raises:
            RecipeError: The loss is not finite. The pruning stage raises it if nothing was pruned.
        """
        file = work.once("recovered", self, partial(self._trained, work))
        found = read_tensors(file)
        losses: list[float] = found.pop(LOSSES).tolist()
        count, tenth = parameters(work.source), max(1, self.steps // 10)
        first, last = (sum(some) / len(some) for some in (losses[:tenth], losses[-tenth:]))
        report = {"pass": "recover", "parameters": [count, count], "loss": [first, last]}
        return Pruned(stored(file, found), report)

    def _trained(self, work: Work, unfinished: Path) -> dict[str, Tensor]:
        """Return the trained tensors by name in the checkpoint, and the losses."""
        source = work.source
        torch.manual_seed(self.seed)
        model = self._student(source)
        trained = [p for p in model.parameters() if p.requires_grad]
        training = Training(self.schedule, trained, unfinished if work.ranks.first else None)
        distil(work, model, training)
        return {**as_stored(source, merged(model, source)), LOSSES: torch.tensor(training.losses)}

    def _student(self, source: ModelSource) -> Any:
        """Return the pruned model in float32 with low-rank changes. Only these and, if asked for, norms are trained."""
        model = student(source, self.rank, 2 * self.rank)
        if self.norms:
            for name, module in model.named_modules():
                if f"{source.prefix}." in name and "norm" in type(module).__name__.lower():
                    module.requires_grad_(True)
        return model


EXPORT = Recover
