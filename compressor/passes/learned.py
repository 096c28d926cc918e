"""Learned rounding: train the codes and scales that earlier passes left, so that the whole block's output stays what it was.

What is trained is in compressor/passes/_latents.py. Steps are taken on a few samples at a time, with learning rates that fall
to zero.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound), EMNLP 2024 findings; Chen et al.,
"EfficientQAT", ACL 2025, section 3.2 (latents unbounded, scales trained along). What differs:

* the start is what GPTQ found, not rounding;
* the target is the dense block's output on the dense model's own hidden states, the input that of the compressed model;
* the squared error is weighed by what the model's predictions make of it: see compressor/calibration/sensitivity.py;
* Adam. A step's gradients are summed in fp64 over fixed pieces of the calibration text, whichever rank computed them, so the
  result does not depend on the number of ranks.

Shape suffixes: O out_features, I in_features, D hidden, B samples, S sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.calibration.stats import Hessian
from compressor.codes import FloatCodes, IntCodes, VectorCodes
from compressor.errors import RecipeError
from compressor.passes._latents import FloatRounding, IntRounding, Rounding, VectorRounding
from compressor.passes.gptq import output_energy
from compressor.registry import node
from compressor.types import Accumulator, Block, Format, Group, Outcome, QuantizedTensor, Stats, borrowed

PIECE = 1024  # tokens whose gradients are computed together; a sample at least


@node
class Learned:
    """Train what earlier passes of the recipe rounded, codebooks too; the format stays.

    Args:
        steps: Of training, for each block.
        batch: Samples in a step.
        lr: First learning rate of the latents, in steps of the grid (their mean, of floating-point numbers), times the bits
            of a code: fine grids need small moves.
        scale_lr: First learning rate of the scales, or of the entries of codebooks, as a fraction of their mean size.
        sensitivity: Weigh errors by the Fisher information of the block's output; False takes the plain squared error.
        seed: Of the order of samples.
    """

    steps: int = 200
    batch: int = 8
    lr: float = 0.01
    scale_lr: float = 1e-3
    sensitivity: bool = True
    seed: int = 0
    needs: ClassVar[tuple[type[Accumulator], ...]] = (Hessian,)
    two_streams: ClassVar[bool] = True
    together: ClassVar[bool] = True
    options: ClassVar[tuple[Format, ...]] = ()

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not a positive number")
        for name, rate in (("lr", self.lr), ("scale_lr", self.scale_lr)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: {rate} is not in 0 … 1")

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """The layers that are packed already: nothing is left to plan."""
        return {name: (name,) for name in block.layers if isinstance(block.installed.get(name), QuantizedTensor)}

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        start = {name: packed(block, name) for name in self.units(block)}
        if not start:
            raise RecipeError(f"{block.prefix}: no earlier pass has rounded a layer; put `gptq` or `rtn` before `learned`")
        assert block.unrounded is not None
        dense = {name: block.unrounded[name].float() for name in start}
        roundings = {name: rounding(new, dense[name], f"{block.prefix}.{name}") for name, new in start.items()}
        share_books(roundings, start, block.prefix)
        text = Text(stats.inputs, stats.targets, pieces(stats.inputs, stats.ranks))
        training = Training(block, roundings, text, stats.metric if self.sensitivity else None, stats.ranks)
        before = training.loss()
        for done in training.run(self, samples_of_a_piece(stats.inputs)):
            stats.progress(done, self.steps)
        warnings: tuple[str, ...] = ()
        trained = training.roundings
        edits = {name: start[name].format.stored(r.result(), start[name].shape) for name, r in trained.items()}
        if not training.loss() < before:
            edits = start
            found = f"{self.steps} steps of training did not lower the error of its output on the calibration text"
            warnings = (f"{block.prefix}: {found}; its rounding stays as it was, try a lower lr",)
        errors = {n: _relative(edits[n], dense[n], stats[n, Hessian].value) for n in edits}
        return Outcome(edits, errors, warnings)


@dataclass(frozen=True)
class Piece:
    """Some adjacent samples of a batch: whose gradients are computed together."""

    batch: int  # in this rank's list
    samples: slice


@dataclass(frozen=True)
class Text:
    """What this rank has of the calibration text, and how all of it is cut into pieces."""

    inputs: Sequence[Tensor]  # [B, S, D] that enter the compressed block
    targets: Sequence[Tensor]  # [B, S, D] that leave the dense one
    pieces: Sequence[Piece | None]  # of every rank, in the order of the text; None are another's

    def step(self, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of some pieces: inputs and targets."""
        for piece in (self.pieces[i] for i in chosen):
            if piece is not None:
                yield self.inputs[piece.batch][piece.samples], self.targets[piece.batch][piece.samples]


def samples_of_a_piece(inputs: Sequence[Tensor]) -> int:
    """Samples [S, D] whose gradients are computed together."""
    return max(1, PIECE // inputs[0].shape[1])


def pieces(inputs: Sequence[Tensor], ranks: Group) -> list[Piece | None]:
    """The calibration text of all ranks in pieces: the same list on each, but for whose they are.

    Batch i of all lives on rank i mod world.
    """
    size = samples_of_a_piece(inputs)
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


class Training:
    """The block's roundings while they are trained; what a step of it needs besides the text."""

    def __init__(self, block: Block, roundings: Mapping[str, Rounding], text: Text, metric_DD: Tensor | None, ranks: Group):
        self.block, self.roundings, self.text, self.metric_DD, self.ranks = block, roundings, text, metric_DD, ranks

    def run(self, options: Learned, samples_of_a_piece: int) -> Iterator[int]:
        """Train; yields the number of steps done."""
        optimiser = self._optimiser(options)
        generator = torch.Generator().manual_seed(options.seed)
        count = min(max(1, options.batch // samples_of_a_piece), len(self.text.pieces))
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

    def _optimiser(self, options: Learned) -> torch.optim.Optimizer:
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
                slopes = torch.autograd.grad(self._missed(x, y, weights), list(weights.values()))
                for total, slope in zip(sums, slopes, strict=True):
                    total.add_(slope)
        self.ranks.sum_(sums)
        for rounding in self.roundings.values():
            rounding.scale.grad = None
        for rounding, total in zip(self.roundings.values(), sums, strict=True):
            rounding.latent_OI.grad, slope = rounding.slopes(total.float())
            shared = rounding.scale.grad
            rounding.scale.grad = slope if shared is None else shared + slope

    def _weights(self) -> dict[str, Tensor]:
        """In the dtype of computation."""
        return {name: r.weight().to(self.block.weight(name).dtype) for name, r in self.roundings.items()}

    def _missed(self, x_BSD: Tensor, y_BSD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the block's output, weighed, summed over tokens."""
        device = next(iter(weights.values())).device
        missed = (self.block.forward(x_BSD.to(device), weights) - y_BSD.to(device)).float()
        return (missed if self.metric_DD is None else missed @ self.metric_DD).mul(missed).sum()

    @torch.no_grad()
    def loss(self) -> float:
        """That over all of the text."""
        total = torch.zeros(1, dtype=torch.float64, device=self.ranks.device)
        weights = self._weights()
        for x, y in self.text.step(range(len(self.text.pieces))):
            total += self._missed(x, y, weights).double()
        self.ranks.sum_([total])
        return float(total)


def _relative(new: QuantizedTensor, w_OI: Tensor, h_II: Tensor) -> float:
    """Squared error of a layer's output, relative to the output."""
    return output_energy(w_OI - new.dequantize(), h_II) / max(output_energy(w_OI, h_II), 1e-30)


def share_books(roundings: Mapping[str, Rounding], packed: Mapping[str, QuantizedTensor], prefix: str) -> None:
    """Have layers that share codebooks train the same."""
    for name, r in roundings.items():
        lender = borrowed(packed[name].format, packed[name].shape)[0].removeprefix(f"{prefix}.")
        if lender in roundings:
            r.scale = roundings[lender].scale


def packed(block: Block, name: str) -> QuantizedTensor:
    """A layer that an earlier pass has packed."""
    stored = block.installed[name]
    assert isinstance(stored, QuantizedTensor)
    return stored


def rounding(packed: QuantizedTensor, w_OI: Tensor, where: str) -> Rounding:
    """The rounding of a weight `w_OI` as an earlier pass left it.

    Raises:
        RecipeError: its codes are integers in another order than the input channels.
    """
    codes = packed.format.codes(packed)
    if isinstance(codes, FloatCodes):
        return FloatRounding.at(codes, w_OI)
    if isinstance(codes, VectorCodes):
        return VectorRounding.at(codes, w_OI)
    if isinstance(codes, IntCodes) and codes.order_I is None:
        return IntRounding.at(codes, w_OI)
    raise RecipeError(
        f"{where}: `learned` trains no integers that are stored in another order ({packed.format.label}); leave it out"
    )


EXPORT = Learned
