"""Training loop for roundings. The trained tensors are in compressor/passes/train/latents.py; each pass defines its loss.

A step uses a few samples, and learning rates decay linearly to zero. A step's gradients are summed in fp64 over fixed pieces
of the calibration text, whichever rank computed them. The result thus does not depend on the number of ranks.

Shape suffixes: B samples, S sequence, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.passes.train.latents import Rounding
from compressor.pipeline.contract import Group, Pass
from compressor.recipe.registry import node

PIECE = 1024  # maximum number of tokens whose gradients are computed together, but at least one sample
FEWEST = 20  # minimum number of steps under a time limit; with fewer the training is skipped


@node
class LatentTraining(Pass):
    """Base class of passes that train latents. A time limit may shorten the training.

    Args:
        steps: Number of training steps.
        batch: Number of samples per step.
        lr: Initial learning rate of the latents. It is multiplied by the step of the grid (the mean step for floating-point
            codes) and divided by the bits of a code, because fine grids need small moves.
        scale_lr: Initial learning rate of scales or codebook entries, relative to their mean magnitude.
        seed: Seed of the order of samples.
    """

    steps: int = 200
    batch: int = 8
    lr: float = 0.01
    scale_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not a positive number")
        for name, rate in (("lr", self.lr), ("scale_lr", self.scale_lr)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: {rate} is not in 0 … 1")

    @property
    def training_samples(self) -> int:
        return self.steps * self.batch

    def shortened(self, share: float) -> "LatentTraining | None":
        """Return the pass with a fraction of its steps, or None if fewer than `FEWEST` remain."""
        steps = int(share * self.steps)
        return replace(self, steps=steps) if steps >= FEWEST else None


@dataclass(frozen=True)
class Piece:
    """Adjacent samples of a batch whose gradients are computed together."""

    batch: int  # index in this rank's list
    samples: slice


@dataclass(frozen=True)
class Text:
    """This rank's calibration text, and the division of the entire text into pieces."""

    inputs: Sequence[Tensor]  # inputs of the compressed block or model, [B, S] or [B, S, D]
    targets: Sequence[Tensor]  # data for the loss to compare with, in the same batches
    pieces: Sequence[Piece | None]  # pieces of all ranks in the order of the text, None for those of other ranks
    piece: int  # number of samples whose gradients are computed together

    @staticmethod
    def of(inputs: Sequence[Tensor], targets: Sequence[Tensor], ranks: Group) -> "Text":
        """Divide the text into pieces. Inputs and targets are this rank's batches."""
        size = max(1, PIECE // inputs[0].shape[1])
        return Text(inputs, targets, pieces(inputs, size, ranks), size)

    def step(self, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of those of some pieces that are this rank's."""
        for piece in (self.pieces[i] for i in chosen):
            if piece is not None:
                yield self.inputs[piece.batch][piece.samples], self.targets[piece.batch][piece.samples]


def pieces(inputs: Sequence[Tensor], size: int, ranks: Group) -> list[Piece | None]:
    """Divide the calibration text of all ranks into pieces of `size` samples.

    The list has the same length on all ranks, with None for pieces of other ranks. Batch i of all is on rank i mod world.
    """
    most = torch.tensor([len(inputs)], device=ranks.device)
    ranks.max_([most])  # the last ranks may have one batch fewer
    counts = torch.zeros(ranks.world * int(most), dtype=torch.int64, device=ranks.device)
    for i, batch in enumerate(inputs):
        counts[ranks.rank + ranks.world * i] = -(-len(batch) // size)
    ranks.sum_([counts])
    found: list[Piece | None] = []
    for number, count in enumerate(counts.tolist()):
        i, owner = divmod(number, ranks.world)
        own = owner == ranks.rank
        found += [Piece(i, slice(k * size, (k + 1) * size)) if own else None for k in range(count)]
    return found


def largest(slope_OI: Tensor, rounding: Rounding, share: float) -> Tensor:
    """Keep the gradients of latents for the fraction of the codes where they are largest, and zero the others."""
    by_code = slope_OI.unflatten(0, (-1, rounding.length))
    size = by_code.square().sum(1, keepdim=True)
    least = size.flatten().kthvalue(max(1, round((1 - share) * size.numel()))).values
    kept: Tensor = (by_code * (size > least)).flatten(0, 1)
    return kept


Missed = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # inputs, targets, weights -> loss, summed over tokens


class Training:
    """A training of roundings.

    Args:
        roundings: Roundings by layer.
        dtypes: Dtypes of computation by layer.
        text: Inputs and targets.
        missed: Loss function, summed over tokens.
        ranks: Ranks that share the text.
        moving: Fraction of the codes of a weight whose latents a step moves: those with the largest gradients.
    """

    def __init__(
        self,
        roundings: Mapping[str, Rounding],
        dtypes: Mapping[str, torch.dtype],
        text: Text,
        missed: Missed,
        ranks: Group,
        moving: float = 1.0,
    ) -> None:
        self.roundings, self.dtypes, self.text, self.missed, self.ranks = roundings, dtypes, text, missed, ranks
        self.moving = moving

    def run(self, options: LatentTraining) -> Iterator[int]:
        """Train, and yield the number of steps done after each."""
        optimiser = self._optimiser(options)
        generator = torch.Generator().manual_seed(options.seed)
        count = min(max(1, options.batch // self.text.piece), len(self.text.pieces))
        waiting: list[int] = []
        for step in range(options.steps):
            if len(waiting) < count:
                waiting = torch.randperm(len(self.text.pieces), generator=generator).tolist()
            chosen, waiting = waiting[:count], waiting[count:]
            self._slopes(chosen)
            for group in optimiser.param_groups:
                group["lr"] = group["first"] * (1 - step / options.steps)
            optimiser.step()
            self.roundings = {name: r.moved(step + 1) for name, r in self.roundings.items()}
            yield step + 1

    def _optimiser(self, options: LatentTraining) -> torch.optim.Optimizer:
        """Return Adam over all latents and scales. The rate of a scale is relative to the mean magnitude of its tensor."""
        groups = [{"params": [r.latent_OI], "first": options.lr * r.step / r.bits} for r in self.roundings.values()]
        scales = {id(r.scale): r.scale for r in self.roundings.values()}  # layers may share one
        groups += [{"params": [s], "first": options.scale_lr * float(s.abs().mean())} for s in scales.values()]
        return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-30)

    def _slopes(self, chosen: Sequence[int]) -> None:
        """Set the gradients of the loss over some pieces of the text."""
        weights = {name: w.requires_grad_() for name, w in self._weights().items()}
        sums = [torch.zeros_like(w, dtype=torch.float64) for w in weights.values()]
        with torch.enable_grad():
            for x, y in self.text.step(chosen):
                slopes = torch.autograd.grad(self.missed(x, y, weights), list(weights.values()))
                for total, slope in zip(sums, slopes, strict=True):
                    total.add_(slope)
        self.ranks.sum_(sums)
        for rounding in self.roundings.values():
            rounding.scale.grad = None
        for rounding, total in zip(self.roundings.values(), sums, strict=True):
            by_latent_OI, slope = rounding.slopes(total.float())
            rounding.latent_OI.grad = by_latent_OI if self.moving == 1 else largest(by_latent_OI, rounding, self.moving)
            shared = rounding.scale.grad
            rounding.scale.grad = slope if shared is None else shared + slope

    def _weights(self) -> dict[str, Tensor]:
        """Return the rounded weights in the dtype of computation."""
        return {name: r.weight().to(self.dtypes[name]) for name, r in self.roundings.items()}

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss over the entire text."""
        total = torch.zeros(1, dtype=torch.float64, device=self.ranks.device)
        weights = self._weights()
        for x, y in self.text.step(range(len(self.text.pieces))):
            total += self.missed(x, y, weights).double()
        self.ranks.sum_([total])
        return float(total)
