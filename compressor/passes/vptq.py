"""VPTQ: GPTQ for vectors of output channels, whose codebooks and indices are then improved in turns.

Within an input channel all directions count alike, so that the entry nearest to a vector is the best, and error feedback goes
from input channel to input channel as in GPTQ: its core does it.

Source: Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024. What
differs:

* Entry and residual are chosen together, for the few nearest entries.
* Afterwards, in turns, all entries of the codebooks are set to the least squares solution of the layer's objective, and each
  index to the best given the others. No step raises the loss.

Shape suffixes: O out_features, I in_features, V vectors in a column, D their length, K entries of both codebooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats._codebook import vectors
from compressor.formats.vq import VQ, VectorGrid, stored
from compressor.passes._refine import sweep
from compressor.passes.gptq import GPTQ, output_energy
from compressor.registry import node
from compressor.types import Grid

STEPS = 10  # of conjugate gradients, each a product of the weight's size with the Hessian
SOLVED = 1e-10  # of the first squared residual


@node
class VPTQ(GPTQ):
    """Vector quantization with error feedback: fields as of `gptq`, formats `vq`.

    Args:
        refine: Turns of least squares over codebooks and of a sweep over indices.
        budget: Bits that a weight of a layer may take, its codebooks counted: of several options, each layer gets the one
            with the most bits of index that keeps to it, and of these the one with the largest codebooks.
    """

    budget: float | None = None

    def pick(self, options: Sequence[VQ], shapes: Sequence[tuple[int, int]]) -> VQ:
        """The best of the options that keep to the budget. Raises ValueError if there is none."""
        if self.budget is None:
            raise ValueError(f"{len(options)} options and no `budget`; name one option, or the bits that a weight may take")
        weights = sum(rows * columns for rows, columns in shapes)
        sizes = {fmt: sum(fmt.stored_bits(shape) for shape in shapes) / weights for fmt in options}
        fitting = [fmt for fmt in options if sizes[fmt] <= self.budget]
        if not fitting:
            least = min(sizes.values())
            raise ValueError(
                f"of the options none takes at most {self.budget:g} bits a weight, the least {least:.3f}; allow more"
            )
        return max(fitting, key=lambda fmt: (fmt.index_bits / fmt.vector, sizes[fmt]))

    def refined(self, w_OI: Tensor, h_II: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if not isinstance(grid, VectorGrid):
            raise RecipeError("vptq: only `vq` has codebooks; use `gptq` for other formats")
        for _ in range(self.refine):
            grid = solved(w_OI, h_II, codes, grid)
            codes = recoded(w_OI, h_II, codes, grid)
        return codes, grid


@torch.no_grad()
def solved(w_OI: Tensor, h_II: Tensor, codes: Tensor, grid: VectorGrid, steps: int = STEPS) -> VectorGrid:
    """The grid with the codebooks that leave the least tr((W - Q) H (W - Q)ᵀ) with the given codes, as far as `steps` go.

    Conjugate gradients, preconditioned by the moments of the inputs that an entry meets. The loss falls apart into one for
    each place in a vector, with one matrix for all.

    Args:
        w_OI: Weight, fp32; not modified.
        h_II: Second moment of the layer's input, fp32; not modified.
        codes: [V, I].
        grid: That they are on; it is returned as it was if its codebooks as they are stored are not worse.
        steps: Of conjugate gradients.
    """
    entries_KD, gathered, scattered = linear_maps(codes, grid)
    missed_OI = w_OI - gathered(entries_KD)
    before = output_energy(missed_OI, h_II)
    left_KD = scattered(missed_OI @ h_II)
    scale_K1 = scattered(h_II.diagonal().expand(len(w_OI), -1))[:, :1].clamp_(min=1e-30)
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
        bent_KD = scattered(gathered(direction_KD) @ h_II)
        curvature_D = (direction_KD.double() * bent_KD).sum(0)
        pace_D = torch.where(going_D & (curvature_D > 0), energies[-1] / curvature_D.clamp(min=1e-300), 0.0).float()
        entries_KD, left_KD = entries_KD + pace_D * direction_KD, left_KD - pace_D * bent_KD
    entries_KD = stored(entries_KD)
    after = output_energy(w_OI - gathered(entries_KD), h_II)
    if not after < before:
        return grid
    count = len(grid.codebook_KD)
    residual_KD = None if grid.residual_KD is None else entries_KD[count:]
    return replace(grid, codebook_KD=entries_KD[:count], residual_KD=residual_KD)


def linear_maps(codes: Tensor, grid: VectorGrid) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """All entries, one codebook below the other, the weight [O, I] that entries make, and the transpose of this map."""
    fmt, books = grid.format, [grid.codebook_KD]
    numbers = [(codes & 2**fmt.bits - 1).flatten()]
    if grid.residual_KD is not None:
        numbers.append((codes >> fmt.bits).flatten() + len(grid.codebook_KD))
        books.append(grid.residual_KD)

    def gathered(entries_KD: Tensor) -> Tensor:
        found = entries_KD[numbers[0]]
        for of_book in numbers[1:]:
            found = found + entries_KD[of_book]
        weight: Tensor = found.unflatten(0, codes.shape).transpose(1, 2).flatten(0, 1)
        return weight

    def scattered(values_OI: Tensor) -> Tensor:
        of_vectors, total = vectors(values_OI, fmt.vector), torch.zeros_like(torch.cat(books))
        for of_book in numbers:
            total.index_add_(0, of_book, of_vectors)
        return total

    return torch.cat(books), gathered, scattered


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


EXPORT = VPTQ
