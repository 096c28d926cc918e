"""Hidden states of a pruned model and of the original for the same text, block after block, and the error between them.

The error of a block is |y - t|² / |t|², averaged over tokens, for its outputs y and the original's t. It is relative for each
token, because hidden states of some tokens are a thousand times as long as others, and later layers see only the direction.

Shape suffixes: B samples, S sequence, D hidden, T tokens, O out_features, I in_features.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model.block import Block
from compressor.model.source import ModelSource, return_freed_memory
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP
from compressor.passes.train.distillation import Schedule, pieces, precision
from compressor.pipeline.calibration.hidden import Hidden, keeping
from compressor.pipeline.calibration.stream import watching
from compressor.pipeline.prune_stage import Work

Parameters = Mapping[str, Tensor]  # replaced parameters of a block, by name inside it
WRITERS = (f"{ATTENTION}.o_proj", f"{MLP}.down_proj")  # layers whose outputs are added to the hidden states


@dataclass
class Twins:
    """Hidden states of both models between two blocks. Sample i of the text is on rank i mod world.

    Args:
        work: Context: both models, the text, the ranks.
        student: The pruned model in float32.
        inputs: Hidden states [1, S, D] of the pruned model, for this rank's samples.
        targets: Hidden states [1, S, D] of the original, before its block `place`.
        place: Number of the original's block that comes next.
    """

    work: Work
    student: ModelSource
    inputs: Hidden
    targets: Hidden
    place: int = 0

    @classmethod
    def start(cls, work: Work) -> "Twins":
        """Return the hidden states before the first blocks."""
        source, tokens_NS = work.source, work.calibration.tokens
        student = ModelSource(source.path, source.device, torch.float32, source.rewritings)
        samples = [tokens_NS[i : i + 1] for i in work.ranks.mine(range(len(tokens_NS)))]
        keep = keeping(work.recipe.calibration.on_disk)
        return cls(work, student, student.kept_inputs(samples, keep), work.original.kept_inputs(samples, keep))

    @torch.no_grad()
    def lead(self, place: int) -> None:
        """Advance the original's hidden states to before a later block."""
        original = self.work.original
        for block in map(original.block, range(self.place, place)):
            for i, y_BSD in enumerate(self.targets):
                self.targets[i] = block.forward(y_BSD.to(original.device)).cpu()
            original.release(block)
            return_freed_memory()
        self.place = place

    @torch.no_grad()
    def follow(self, block: Block) -> None:
        """Advance the pruned model's hidden states through a block."""
        for i, x_BSD in enumerate(self.inputs):
            with precision(self.work.source):
                self.inputs[i] = block.forward(x_BSD.to(self.student.device)).cpu()

    def compared(
        self, block: Block, new: Parameters, samples: Iterable[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs of a block and the targets, for this rank's part of the given samples, by default of all."""
        ranks, (count, length) = self.work.ranks, self.work.calibration.tokens.shape
        chosen = range(count) if samples is None else samples
        for some in pieces([i // ranks.world for i in chosen if i % ranks.world == ranks.rank], length):
            x_BSD, t_BSD = (
                torch.cat([states[i] for i in some]).to(self.student.device) for states in (self.inputs, self.targets)
            )
            with precision(self.work.source):
                y_BSD = block.forward(x_BSD, new)
            yield y_BSD.float(), t_BSD.float()

    @torch.no_grad()
    def error(self, block: Block, new: Parameters) -> float:
        """Return the error of a block with some of its parameters replaced, on the entire text."""
        total = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for y_BSD, t_BSD in self.compared(block, new):
            total += missed(y_BSD, t_BSD)
        self.work.ranks.sum_([total])
        return float(total) / self.work.calibration.tokens.numel()

    def backward(self, block: Block, new: Parameters, step: int, schedule: Schedule) -> Tensor:
        """Add the gradients of a step for this rank's samples, and return their part of the loss, fp64."""
        count, length = self.work.calibration.tokens.shape
        chosen = schedule.samples(step, count)
        loss = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for y_BSD, t_BSD in self.compared(block, new, chosen):
            lost = missed(y_BSD, t_BSD) / (len(chosen) * length)
            lost.backward(retain_graph=True)  # pieces share the graph that makes `new`
            loss += lost.detach()
        return loss


def missed(y_BSD: Tensor, t_BSD: Tensor) -> Tensor:
    """Return the sum of the errors of all tokens."""
    return ((y_BSD - t_BSD).square().sum(-1) / t_BSD.square().sum(-1)).sum()


def fit(twins: Twins, block: Block, damp: float) -> dict[str, Tensor]:
    """Refit the layers that write to the hidden states, one after the other, with the rest of the block fixed.

    For inputs x of a writer W and the residual r = t - y of the block's output, W + E[r xᵀ] (E[x xᵀ] + λI)⁻¹ is the least
    squares solution, damped towards W. It is exact if the output of W is added without change. A fit that does not lower
    the block's error is discarded, as can happen for the attention or where a norm follows the writer.
    """
    new: dict[str, Tensor] = {}
    error = twins.error(block, new)
    for layer in (name for name in WRITERS if name in block.layers):
        w_OI = block.weight(layer)
        h_II, g_OI = _moments(twins, block, new, layer)
        h_II.diagonal().add_(damp * h_II.diagonal().mean().clamp(min=1e-30))
        change_OI = torch.linalg.solve(h_II, g_OI.T).T
        tried = {**new, f"{layer}.weight": block.layers[layer].parameter((w_OI + change_OI).float())}
        if (reached := twins.error(block, tried)) < error:
            new, error = tried, reached
    return new


@torch.no_grad()
def _moments(twins: Twins, block: Block, new: Parameters, layer: str) -> tuple[Tensor, Tensor]:
    """Return E[x xᵀ] and E[r xᵀ], fp64, up to a common factor, with tokens weighted as in the error."""
    out, columns = block.shape(layer)
    h_II, g_OI = (torch.zeros(rows, columns, dtype=torch.float64, device=twins.student.device) for rows in (columns, out))
    seen: list[Tensor] = []
    with watching(block, [layer], lambda _, x: seen.append(x)):
        for y_BSD, t_BSD in twins.compared(block, new):
            x_TI, t_TD = seen.pop().flatten(0, -2).float(), t_BSD.flatten(0, -2)
            weighted_TI = x_TI / t_TD.square().sum(-1, keepdim=True)
            h_II += weighted_TI.T @ x_TI
            g_OI += (t_TD - y_BSD.flatten(0, -2)).T @ weighted_TI
    twins.work.ranks.sum_([h_II, g_OI])
    return h_II, g_OI
