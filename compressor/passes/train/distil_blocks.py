"""Blockwise distillation: train the blocks of a pruned model one by one towards the original's hidden states.

From the output of the pruned blocks before it, each block learns to produce the original's hidden states at the same place,
for the same text. Where blocks were dropped, the last one before the gap learns to replace them too. First the layers that
write to the hidden states are refitted by least squares (compressor/passes/train/blockwise.py), then AdamW steps follow. The
result of either is kept only if it lowers the error. Only one block of each model is in memory at a time, plus the hidden
states of both, so models larger than memory can be trained.

Source: Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", ICML 2025, blockwise local
distillation. Differences: the input of a block is that of the pruned model instead of the original, so that it compensates
for the blocks before it. The least squares refit is added. The error is relative for each token.

Shape suffixes: O out_features, I in_features, R rank.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.model.block import Block
from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource
from compressor.passes.prune.shapes import parameters
from compressor.passes.train.blockwise import Twins, fit
from compressor.passes.train.distillation import TOGETHER, Schedule, Training, descend
from compressor.pipeline.job import Event
from compressor.pipeline.memory_estimate import activations, block_parameters, collecting, largest_block
from compressor.pipeline.plan import block_names
from compressor.pipeline.prune_stage import Pruned, PruningPass, Sketch, Work, read_tensors, stored
from compressor.recipe.registry import node

ERRORS = "errors"  # key of a block's errors before, after the refit, and after training; stored with its tensors
RATES = {"norms": 3e-3, "scales": 3e-3, "lora": 1e-3, "all": 1e-4}  # default learning rates
Train = Literal["norms", "scales", "lora", "all"]
Made = Callable[[], Mapping[str, Tensor]]  # makes parameters of a block, by name inside it, from the trained ones


@node
class DistilBlocks(PruningPass):
    """Train the blocks of a pruned model one by one. List it after pruning passes and before `recover`.

    Args:
        train: Trained parameters of each block: `norms`, the weights of norms; `scales`, norms and a factor for each output
            of a linear layer; `lora`, norms and a low-rank change to each linear layer; `all`, every parameter.
        steps: Number of training steps per block. 0 only refits.
        batch: Number of samples per step.
        lr: Peak learning rate, after warm-up. It decays to zero as a cosine. Null is a default for each value of `train`.
        rank: Rank of low-rank changes.
        damp: Damping of the refit, added to the diagonal of the second moments as a fraction of its mean.
        seed: Seed of the order of samples and of the initial values of low-rank changes.
    """

    train: Train = "lora"
    steps: int = 200
    batch: int = 8
    lr: float | None = None
    rank: int = 32
    damp: float = 0.01
    seed: int = 0
    label: ClassVar[str] = ""
    requires_pruned_model: ClassVar[bool] = True
    compares_with_original_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} is negative; 0 leaves it at the fit")
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not a positive number")
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp: {self.damp} is not a positive number")
        Schedule(max(1, self.steps), self.batch, self.rate, self.seed)

    @property
    def rate(self) -> float:
        """Return the peak learning rate."""
        return RATES[self.train] if self.lr is None else self.lr

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict that no shape changes."""
        return Sketch(None)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of the refit, or of training a block in fp32 with gradients and moments."""
        block = largest_block(source)
        width = max((block.shape(name)[1] for name in block.layers), default=0)
        training = (4 + 16) * block_parameters(block) + activations(block, min(tokens, TOGETHER), 2 * 4)
        return 3 * collecting(source, tokens, batch) + max(training, 3 * 8 * width**2)

    def prune(self, work: Work) -> Pruned:
        """Refit and train the blocks of the pruned model.

        Raises:
            RecipeError: The loss is not finite. The pruning stage raises it if nothing was pruned.
        """
        twins = Twins.start(work)
        total = len(twins.student.layers)
        ends = [
            *work.source.numbers_in(work.original)[1:],
            len(work.original.layers),
        ]  # the original's block before which each block's targets are
        tensors: dict[str, Callable[[Tensor], Tensor]] = {}
        blocks = []
        for index, block in enumerate(twins.student.blocks()):
            twins.lead(ends[index])
            file = work.once(f"block-{index:05d}", self, partial(self._made, block, twins))
            found = read_tensors(file)
            before, fitted, trained = found.pop(ERRORS).tolist()
            blocks.append({"block": index, "before": before, "fitted": fitted, "trained": trained})
            tensors |= stored(file, found).tensors
            block.install({name: found[at] for name, at in block_names(twins.student, block).items() if at in found})
            if index < total - 1:
                twins.follow(block)
            work.tell(Event("distil", index + 1, total, error=trained))
        count = parameters(work.source)
        return Pruned(Rewriting(tensors), {"pass": "distil_blocks", "parameters": [count, count], "blocks": blocks})

    def _made(self, block: Block, twins: Twins, unfinished: Path) -> dict[str, Tensor]:
        """Return the new tensors of a block, by name in the checkpoint, and the errors."""
        names, dtypes = block_names(twins.student, block), block.dtypes
        before = twins.error(block, {})
        unchanged = before <= torch.finfo(twins.work.source.dtype).eps ** 2  # only rounding error: nothing was pruned so far
        if unchanged or not block.layers:
            return {ERRORS: torch.tensor([before] * 3)}
        new = {name: value.to(dtypes[name]).float() for name, value in fit(twins, block, self.damp).items()}
        fitted = trained = twins.error(block, new)
        if self.steps:
            block.install(new)
            tried = {name: value.to(dtypes[name]).float() for name, value in self._trained(block, twins, unfinished).items()}
            tried = {**new, **tried}
            trained = twins.error(block, tried)
            new, trained = (tried, trained) if trained < fitted else (new, fitted)
        return {names[n]: value.to(dtypes[n]) for n, value in new.items()} | {ERRORS: torch.tensor([before, fitted, trained])}

    def _trained(self, block: Block, twins: Twins, unfinished: Path) -> Mapping[str, Tensor]:
        """Return the parameters of a block after training."""
        ranks, schedule = twins.work.ranks, Schedule(self.steps, self.batch, self.rate, self.seed)
        changing, made = self._changes(block)
        training = Training(schedule, changing, unfinished if ranks.first else None)
        for done, loss in descend(training, ranks, lambda step: twins.backward(block, made(), step, schedule)):
            what = f"{block.prefix}: step {done} of {self.steps}"
            twins.work.tell(Event("distil", block.index, len(twins.student.layers), what, error=loss))
        with torch.no_grad():
            return made()

    def _changes(self, block: Block) -> tuple[list[nn.Parameter], Made]:
        """Return the trained parameters, and a function that makes the block's parameters from them."""
        whole = {
            name: nn.Parameter(value.clone())
            for name, value in block.module.named_parameters()
            if self.train == "all" or "norm" in type(block.module.get_submodule(name.rpartition(".")[0])).__name__.lower()
        }
        if self.train in ("norms", "all"):
            return list(whole.values()), lambda: whole
        change = self._scale if self.train == "scales" else self._low_rank
        generator = torch.Generator().manual_seed(self.seed)
        changed = {name: change(block.weight(name), generator) for name in block.layers}

        def made() -> Mapping[str, Tensor]:
            return whole | {f"{name}.weight": block.layers[name].parameter(w_OI()) for name, (_, w_OI) in changed.items()}

        return [*whole.values(), *(one for some, _ in changed.values() for one in some)], made

    def _scale(self, w_OI: Tensor, generator: torch.Generator) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        scale_O1 = nn.Parameter(w_OI.new_ones(len(w_OI), 1))
        return [scale_O1], lambda: scale_O1 * w_OI

    def _low_rank(self, w_OI: Tensor, generator: torch.Generator) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        """Return the factors of a low-rank change, initialised as in LoRA (one zero, one random), and the changed weight."""
        b_OR = nn.Parameter(w_OI.new_zeros(len(w_OI), self.rank))
        a_RI = nn.Parameter((torch.randn(self.rank, w_OI.shape[1], generator=generator) / w_OI.shape[1] ** 0.5).to(w_OI))
        return [b_OR, a_RI], lambda: w_OI + 2 * b_OR @ a_RI


EXPORT = DistilBlocks
