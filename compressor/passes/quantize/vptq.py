"""VPTQ: GPTQ for vectors of output channels, whose codebooks and indices are then improved in turns.

Within an input channel all directions count alike, so that the entry nearest to a vector is the best, and error feedback goes
from input channel to input channel as in GPTQ: its core does it.

Source: Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024. What
differs:

* Entry and residual are chosen together, for the few nearest entries.
* Afterwards, in turns, all entries of the codebooks are set to the least squares solution of the layers' objective, and each
  index to the best given the others. No step raises the loss.
* Channels that are kept dense make up for the others' errors: compressor/passes/quantize/vectors.py.

Shape suffixes: O out_features, I in_features, V vectors in a column, D their length, K entries of both codebooks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.formats.base import Format, OneOf, QuantizedTensor, Stored
from compressor.formats.numerics.codebook import vectors
from compressor.formats.vq import VQ, VectorGrid, stored
from compressor.model.block import Block
from compressor.passes.quantize.gptq import GPTQ, Layer, gptq, output_energy
from compressor.passes.quantize.refine import sweep
from compressor.passes.quantize.vectors import Problem, reduced
from compressor.pipeline.contract import Notes, Outcome, Stats
from compressor.recipe.registry import node

STEPS = 10  # of conjugate gradients, each a product of the weight's size with the Hessian
SOLVED = 1e-10  # of the first squared residual
Share = Literal["layer", "fused", "block"]


@node
class VPTQ(GPTQ):
    """Vector quantization with error feedback: fields as of `gptq`, formats `vq`.

    Args:
        refine: Turns of least squares over codebooks and of a sweep over indices.
        budget: Bits that a weight of a layer may take, its codebooks counted: of several options, each layer gets the one
            with the most bits of index that keeps to it, and of these the one with the largest codebooks.
        share: Layers that have codebooks in common, fitted to all of them in turn: only a layer itself, those that are fused
            when served, or all of a block. It is for layers so small that codebooks weigh much.
    """

    budget: float | None = None
    share: Share = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for fmt in self.options:
            if not isinstance(fmt, VQ):
                raise ValueError(f"options: {fmt.label} has no codebooks; use `vq`, or `gptq` for other formats")
            if self.share != "layer" and fmt.norm == "none":
                raise ValueError(f"share: {self.share} needs norms; add `norm: layer` or `norm: channel` to {fmt.label}")

    @property
    def together(self) -> bool:
        """Layers of a block that share codebooks are not divided among ranks: each comes to the same result."""
        return self.share == "block"

    def pick(self, options: Sequence[VQ], block: Block, layers: Sequence[str]) -> VQ:
        """The best of the options that keep to the budget. Raises ValueError if there is none."""
        if self.budget is None:
            raise ValueError(f"{len(options)} options and no `budget`; name one option, or the bits that a weight may take")
        if self.share == "block":
            layers = [name for names in self.units(block).values() for name in names]
        shapes = {name: block.shape(name) for name in layers}
        weights = sum(rows * columns for rows, columns in shapes.values())
        sizes = {}
        for option in options:
            formats = self.shared(block, dict.fromkeys(shapes, option))
            sizes[option] = sum(fmt.stored_bits(shapes[name]) for name, fmt in formats.items()) / weights
        fitting = [fmt for fmt in options if sizes[fmt] <= self.budget]
        if not fitting:
            least = min(sizes.values())
            raise ValueError(
                f"of the options none takes at most {self.budget:g} bits a weight, the least {least:.3f}; allow more"
            )
        return max(fitting, key=lambda fmt: (fmt.index_bits / fmt.vector, sizes[fmt]))

    def shared(self, block: Block, formats: Mapping[str, Format]) -> dict[str, Format]:
        """The formats of layers once they share codebooks: the first one lends its own to others of the same format."""
        unit_of = {name: unit for unit, names in self.units(block).items() for name in names}
        lenders: dict[object, str] = {}
        found: dict[str, Format] = {}
        for name, fmt in formats.items():
            assert isinstance(fmt, VQ)
            group = {"layer": name, "fused": unit_of[name], "block": ""}[self.share]
            lender = lenders.setdefault((group, fmt), name)
            found[name] = fmt if lender == name else fmt.borrowing(f"{block.prefix}.{lender}")
        return found

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format | OneOf]) -> Outcome:
        formats = self.shared(block, {name: fmt for name, (fmt,) in self.formats(block, stats, choice).items()})
        lender = {name: _lender(block, name, fmt) for name, fmt in formats.items()}
        edits: dict[str, Stored] = {}
        errors: dict[str, float] = {}
        warnings: list[str] = []
        waiting: dict[str, list[Layer]] = {}
        for layer in self.layers_of(block, stats, formats, warnings):
            group = waiting.setdefault(lender[layer.name], [])
            group.append(layer)
            if len(group) == sum(other == lender[layer.name] for other in lender.values()):
                tried = [self.solve_together(group, formats, damp, stats.notes) for damp in self.damps]
                best = min(tried, key=lambda found: sum(error for _, error in found.values()))
                edits |= {name: packed for name, (packed, _) in best.items()}
                errors |= {name: error for name, (_, error) in best.items()}
                del waiting[lender[layer.name]]
            del layer, group  # the next tap may be the widest
        return Outcome({name: edits[name] for name in formats}, errors, tuple(warnings))

    def solve_together(
        self, layers: Sequence[Layer], formats: Mapping[str, Format], damp: float, notes: Notes
    ) -> dict[str, tuple[QuantizedTensor, float]]:
        """Layers that share codebooks, and the losses tr((W - Q) H (W - Q)ᵀ) without damping, relative to tr(W H Wᵀ)."""
        formats_of = [fmt for fmt in (formats[layer.name] for layer in layers) if isinstance(fmt, VQ)]
        problems = [reduced(layer, fmt, damp) for layer, fmt in zip(layers, formats_of, strict=True)]
        solution = self.solution(problems, formats_of[0], damp, notes, f"{layers[0].name}.{damp:g}")
        found = {}
        for layer, problem, codes, fmt in zip(layers, problems, solution.codes, formats_of, strict=True):
            packed = problem.packed(replace(solution.grid, format=fmt), codes)
            energy = max(output_energy(layer.w_OI, layer.h_II), 1e-30)
            found[layer.name] = packed, output_energy(layer.w_OI - packed.dequantize(), layer.h_II) / energy
        return found

    def solution(self, problems: Sequence[Problem], fmt: VQ, damp: float, notes: Notes, key: str) -> "Solution":
        """Codebooks and codes, from where an interrupted run has left them under a key."""
        found = Solution.read(notes.load(key), fmt)
        if found is None:
            found = Solution(self.first_books(problems, fmt))
            notes.save(key, found.tensors())
        for p in problems[len(found.codes) :]:
            codes, _, _ = gptq(p.w_OI, p.factor(damp, 1), found.grid)
            found = replace(found, codes=(*found.codes, codes))
            notes.save(key, found.tensors())
        for turn in range(found.turns, self.refine):
            grid = solved(problems, found.codes, found.grid)
            codes_of = (recoded(p.w_OI, p.h_II, own, grid) for p, own in zip(problems, found.codes, strict=True))
            found = Solution(grid, tuple(codes_of), turn + 1)
            notes.save(key, found.tensors())
        return found

    def first_books(self, problems: Sequence[Problem], fmt: VQ) -> VectorGrid:
        """Codebooks by k-means of the vectors of all layers, each with the second moment of its input channel as weight."""
        x_ND = torch.cat([vectors(p.w_OI, fmt.vector) for p in problems])
        importance = [p.h_II.diagonal().expand(len(p.w_OI) // fmt.vector, -1).flatten() for p in problems]
        return fmt.books(x_ND, torch.cat(importance), search=self.search)


@dataclass(frozen=True)
class Solution:
    """How far layers that share codebooks have come."""

    grid: VectorGrid
    codes: tuple[Tensor, ...] = ()  # of the layers that error feedback has been through
    turns: int = 0  # that are done

    def tensors(self) -> dict[str, Tensor]:
        """As notes hold it."""
        books = {"codebook": self.grid.codebook_KD, "turns": torch.tensor(self.turns)}
        residual = {} if self.grid.residual_KD is None else {"residual": self.grid.residual_KD}
        return {**books, **residual, **{f"codes.{i}": codes for i, codes in enumerate(self.codes)}}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], fmt: VQ) -> "Solution | None":
        """From notes; None if there are none."""
        if not tensors:
            return None
        grid = VectorGrid(fmt, tensors["codebook"], tensors.get("residual"))
        codes = [tensors[f"codes.{i}"] for i in range(sum(name.startswith("codes.") for name in tensors))]
        return Solution(grid, tuple(codes), int(tensors["turns"]))


@torch.no_grad()
def solved(problems: Sequence[Problem], codes: Sequence[Tensor], grid: VectorGrid, steps: int = STEPS) -> VectorGrid:
    """The grid with the codebooks that leave the least sum of tr((W - Q) H (W - Q)ᵀ) with given codes, as far as `steps` go.

    Conjugate gradients, preconditioned by the moments of the inputs that an entry meets. The loss falls apart into one for
    each place in a vector, with one matrix for all.

    Args:
        problems: Weights and second moments.
        codes: [V, I] of each.
        grid: Grid that the codes are on. It is returned unchanged if its stored codebooks are no worse.
        steps: Number of steps of conjugate gradients.
    """
    maps = [linear_maps(own, grid) for own in codes]
    each = list(zip(problems, maps, strict=True))
    entries_KD = entries(grid)
    missed = [p.w_OI - gathered(entries_KD) for p, (gathered, _) in each]
    before = sum(output_energy(missed_OI, p.h_II) for missed_OI, p in zip(missed, problems, strict=True))
    left_KD = _sum(scattered(missed_OI @ p.h_II) for missed_OI, (p, (_, scattered)) in zip(missed, each, strict=True))
    scale_K1 = _sum(scattered(p.h_II.diagonal().expand(len(p.w_OI), -1))[:, :1] for p, (_, scattered) in each)
    scale_K1 = scale_K1.clamp_(min=1e-30)
    direction_KD, energies = torch.zeros_like(left_KD), []
    for _ in range(steps):
        scaled_KD = left_KD / scale_K1
        energies.append((left_KD.double() * scaled_KD).sum(0))
        going_D = energies[-1] > SOLVED * energies[0]  # beyond, rounding errors are all that is left
        if not going_D.any():
            break
        if len(energies) > 1:
            scaled_KD += (energies[-1] / energies[-2].clamp(min=1e-300)).float() * direction_KD
        direction_KD = scaled_KD
        bent_KD = _sum(scattered(gathered(direction_KD) @ p.h_II) for p, (gathered, scattered) in each)
        curvature_D = (direction_KD.double() * bent_KD).sum(0)
        pace_D = torch.where(going_D & (curvature_D > 0), energies[-1] / curvature_D.clamp(min=1e-300), 0.0).float()
        entries_KD, left_KD = entries_KD + pace_D * direction_KD, left_KD - pace_D * bent_KD
    entries_KD = stored(entries_KD)
    after = sum(output_energy(p.w_OI - gathered(entries_KD), p.h_II) for p, (gathered, _) in each)
    if not after < before:
        return grid
    count = len(grid.codebook_KD)
    residual_KD = None if grid.residual_KD is None else entries_KD[count:]
    return replace(grid, codebook_KD=entries_KD[:count], residual_KD=residual_KD)


def entries(grid: VectorGrid) -> Tensor:
    """Return the entries of both codebooks, one below the other."""
    return grid.codebook_KD if grid.residual_KD is None else torch.cat([grid.codebook_KD, grid.residual_KD])


def linear_maps(codes: Tensor, grid: VectorGrid) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From entries to the weight [O, I] that they make, and the transpose of this map."""
    fmt = grid.format
    numbers = [(codes & 2**fmt.bits - 1).flatten()]
    if grid.residual_KD is not None:
        numbers.append((codes >> fmt.bits).flatten() + len(grid.codebook_KD))

    def gathered(entries_KD: Tensor) -> Tensor:
        found = entries_KD[numbers[0]]
        for of_book in numbers[1:]:
            found = found + entries_KD[of_book]
        weight: Tensor = found.unflatten(0, codes.shape).transpose(1, 2).flatten(0, 1)
        return weight

    def scattered(values_OI: Tensor) -> Tensor:
        of_vectors, total = vectors(values_OI, fmt.vector), torch.zeros_like(entries(grid))
        for of_book in numbers:
            total.index_add_(0, of_book, of_vectors)
        return total

    return gathered, scattered


@torch.no_grad()
def recoded(w_OI: Tensor, h_II: Tensor, codes: Tensor, grid: VectorGrid) -> Tensor:
    """Codes whose loss is not above that of the given ones: one input channel after the other, each vector's best."""
    codes = codes.clone()
    slope_IO = h_II @ (w_OI - grid.decode(codes, 0)).T  # minus half the gradient by the values

    def recode(column: int, slope_CO: Tensor, h_CC: Tensor) -> Tensor:
        now = codes[:, column : column + 1]
        values = grid.decode(now, column)
        if h_CC <= 0:  # an input that no token has used may be anything: its codes stay
            return torch.zeros_like(values)
        wanted = values + slope_CO.T / h_CC
        new = grid.round(wanted, column)
        missed, missed_now = (
            (grid.decode(tried, column) - wanted).square().view(len(codes), -1).sum(1, keepdim=True) for tried in (new, now)
        )
        now.copy_(torch.where(missed < missed_now, new, now))
        return grid.decode(now, column) - values

    sweep(slope_IO, h_II, 1, recode)
    return codes


def _lender(block: Block, name: str, fmt: Format) -> str:
    """The layer of a block whose codebooks a layer has."""
    assert isinstance(fmt, VQ)
    return fmt.lender.removeprefix(f"{block.prefix}.") or name


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


EXPORT = VPTQ
