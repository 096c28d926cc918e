"""VPTQ: GPTQ for vectors of output channels, followed by alternating updates of codebooks and indices.

Within an input channel the loss weighs all directions alike, so the entry nearest to a vector is the best. Error feedback
runs from input channel to input channel, with the code of GPTQ.

Source: Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024.
Differences:

* Entry and residual are chosen jointly, among the few nearest entries.
* Afterwards two updates alternate. All codebook entries are set to the least squares solution of the layers' objective, then
  each index to the best one given the others. No update raises the loss.
* Dense channels compensate for the errors of the others: compressor/passes/quantize/vectors.py.

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

STEPS = 10  # of conjugate gradients; each multiplies a matrix of the weight's size by the Hessian
SOLVED = 1e-10  # squared residual at which to stop, relative to the first
Share = Literal["layer", "fused", "block"]


@node
class VPTQ(GPTQ):
    """Vector quantization with error feedback, for `vq` formats. Other fields are those of `gptq`.

    Args:
        refine: Number of alternations of least squares over codebooks and a sweep over indices.
        budget: Maximum number of bits per weight of a layer, including its codebooks. Of the options within it, each layer
            gets one with the most index bits, and among those the one with the largest codebooks.
        share: Layers that share codebooks: none (`layer`), those that are fused when served (`fused`), or all of a block
            (`block`). Meant for layers so small that codebooks are a large part of their size.
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
        """Return whether every rank compresses all layers, with equal results, because a block shares codebooks."""
        return self.share == "block"

    def pick(self, options: Sequence[VQ], block: Block, layers: Sequence[str]) -> VQ:
        """Return the best option within the budget.

        Raises:
            ValueError: There is none, or `budget` is not set.
        """
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
        """Return formats with shared codebooks: the first layer of a group lends its own to others of the same format."""
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
            del layer, group  # free memory first: the next tap may be the widest
        return Outcome({name: edits[name] for name in formats}, errors, tuple(warnings))

    def solve_together(
        self, layers: Sequence[Layer], formats: Mapping[str, Format], damp: float, notes: Notes
    ) -> dict[str, tuple[QuantizedTensor, float]]:
        """Round layers that share codebooks.

        Returns:
            Each layer's packed weight and loss tr((W - Q) H (W - Q)ᵀ), without damping, relative to tr(W H Wᵀ).
        """
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
        """Compute codebooks and codes. Progress is stored under a key, from which an interrupted run resumes."""
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
        """Return codebooks by k-means of all layers' vectors, weighted by the second moments of their input channels."""
        x_ND = torch.cat([vectors(p.w_OI, fmt.vector) for p in problems])
        importance = [p.h_II.diagonal().expand(len(p.w_OI) // fmt.vector, -1).flatten() for p in problems]
        return fmt.books(x_ND, torch.cat(importance), search=self.search)


@dataclass(frozen=True)
class Solution:
    """Progress of layers that share codebooks."""

    grid: VectorGrid
    codes: tuple[Tensor, ...] = ()  # of the layers already rounded with error feedback
    turns: int = 0  # number of refinements done

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store in notes."""
        books = {"codebook": self.grid.codebook_KD, "turns": torch.tensor(self.turns)}
        residual = {} if self.grid.residual_KD is None else {"residual": self.grid.residual_KD}
        return {**books, **residual, **{f"codes.{i}": codes for i, codes in enumerate(self.codes)}}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], fmt: VQ) -> "Solution | None":
        """Return the progress stored in notes, or None if there is none."""
        if not tensors:
            return None
        grid = VectorGrid(fmt, tensors["codebook"], tensors.get("residual"))
        codes = [tensors[f"codes.{i}"] for i in range(sum(name.startswith("codes.") for name in tensors))]
        return Solution(grid, tuple(codes), int(tensors["turns"]))


@torch.no_grad()
def solved(problems: Sequence[Problem], codes: Sequence[Tensor], grid: VectorGrid, steps: int = STEPS) -> VectorGrid:
    """Refit codebooks to given codes: minimise the sum of tr((W - Q) H (W - Q)ᵀ) by some steps of conjugate gradients.

    The preconditioner is the sum of the second moments of the inputs that an entry is multiplied by. The loss separates into
    one problem for each place in a vector, all with the same matrix.

    Args:
        problems: Weights and second moments.
        codes: Codes [V, I] of each problem.
        grid: Grid of the codes. It is returned unchanged unless the new codebooks, as stored, lower the loss.
        steps: Maximum number of steps of conjugate gradients.
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
        going_D = energies[-1] > SOLVED * energies[0]  # below that, only rounding errors remain
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
    """Return the linear map from entries [K, D] to the weight [O, I], and its transpose."""
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
    """Set each vector's code to the best one, one input channel after the other. The loss does not rise."""
    codes = codes.clone()
    slope_IO = h_II @ (w_OI - grid.decode(codes, 0)).T  # minus half the gradient with respect to the values

    def recode(column: int, slope_CO: Tensor, h_CC: Tensor) -> Tensor:
        now = codes[:, column : column + 1]
        values = grid.decode(now, column)
        if h_CC <= 0:  # no token used this input: keep its codes
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
    """Return the layer of a block whose codebooks a layer uses."""
    assert isinstance(fmt, VQ)
    return fmt.lender.removeprefix(f"{block.prefix}.") or name


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


EXPORT = VPTQ
