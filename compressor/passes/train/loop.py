"""Training of roundings: what is trained is in compressor/passes/train/latents.py, by which loss is the pass's own.

Steps are taken on a few samples at a time, with learning rates that fall to zero. A step's gradients are summed in fp64 over
fixed pieces of the calibration text, whichever rank computed them, so the result does not depend on the number of ranks.

Shape suffixes: B samples, S sequence, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.passes.train.latents import Rounding
from compressor.pipeline.contract import Group, Pass
from compressor.recipe.registry import node

PIECE = 1024  # tokens whose gradients are computed together; a sample at least
FEWEST = 20  # steps that a training under a time limit has at least; with fewer it is left out


@node
class LatentTraining(Pass):
    """Base class of passes that train latents, whose training a time limit may shorten.

    Args:
        steps: Number of training steps.
        batch: Samples in a step.
        lr: First learning rate of the latents, in steps of the grid (their mean, of floating-point numbers), times the bits
            of a code: fine grids need small moves.
        scale_lr: First learning rate of the scales, or of the entries of codebooks, as a fraction of their mean size.
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
        """Return the pass with a share of its steps; None if fewer than `FEWEST` would be left."""
        steps = int(share * self.steps)
        return replace(self, steps=steps) if steps >= FEWEST else None


@dataclass(frozen=True)
class Piece:
    """Some adjacent samples of a batch: whose gradients are computed together."""

    batch: int  # in this rank's list
    samples: slice


@dataclass(frozen=True)
class Text:
    """This rank's calibration text, and the division of all of it into pieces."""

    inputs: Sequence[Tensor]  # [B, S] or [B, S, D], what is compressed gets
    targets: Sequence[Tensor]  # the same, what it is compared with
    pieces: Sequence[Piece | None]  # of every rank, in the order of the text; None are another's
    piece: int  # samples whose gradients are computed together

    @staticmethod
    def of(inputs: Sequence[Tensor], targets: Sequence[Tensor], ranks: Group) -> "Text":
        """Return the text of this rank, in batches."""
        size = max(1, PIECE // inputs[0].shape[1])
        return Text(inputs, targets, pieces(inputs, size, ranks), size)

    def step(self, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of some pieces: inputs and targets."""
        for piece in (self.pieces[i] for i in chosen):
            if piece is not None:
                yield self.inputs[piece.batch][piece.samples], self.targets[piece.batch][piece.samples]


def pieces(inputs: Sequence[Tensor], size: int, ranks: Group) -> list[Piece | None]:
    """The calibration text of all ranks in pieces of so many samples: the same list on each, but for whose they are.

    Batch i of all lives on rank i mod world.
    """
    most = torch.tensor([len(inputs)], device=ranks.device)
    ranks.max_([most])  # the last ranks may have a batch less
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
    """Gradients by latents, zero but for a share of the codes: those where they are largest."""
    by_code = slope_OI.unflatten(0, (-1, rounding.length))
    size = by_code.square().sum(1, keepdim=True)
    least = size.flatten().kthvalue(max(1, round((1 - share) * size.numel()))).values
    kept: Tensor = (by_code * (size > least)).flatten(0, 1)
    return kept


Missed = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # of inputs, targets and weights: a sum over tokens


class Training:
    """Roundings while they are trained.

    Args:
        roundings: By layer.
        dtypes: Dtypes that the weights are computed with.
        text: Inputs and targets.
        missed: The loss.
        ranks: The ranks that share the text.
        moving: Share of the codes of a weight whose latents a step moves: those with the largest gradients.
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
        """Train; yields the number of steps done."""
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
        """Adam over all latents and scales; the rate of a scale is relative to what scales of its weight are like."""
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
        """In the dtype of computation."""
        return {name: r.weight().to(self.dtypes[name]) for name, r in self.roundings.items()}

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss over all of the text."""
        total = torch.zeros(1, dtype=torch.float64, device=self.ranks.device)
        weights = self._weights()
        for x, y in self.text.step(range(len(self.text.pieces))):
            total += self.missed(x, y, weights).double()
        self.ranks.sum_([total])
        return float(total)
