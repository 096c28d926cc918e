"""Half-quadratic fit: scales and zero points that keep sum |w - s (q - z)|^p small, from the weights alone.

For a given p the sum is minimised by alternation. Codes are rounded to nearest. Then the scale is fitted by least squares,
each error weighted by |error|^(p - 2). Zero points, where stored, try their neighbours. The best result so far is kept.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (HQQ), 2023. Differences:

* Half-quadratic splitting in the multiplicative form (Geman and Reynolds, 1992); HQQ uses the additive one. No penalty has
  to grow, and for p up to 2 a fit of the scale cannot raise the sum for the codes it is fitted to.
* Scales are fitted and zero points are integers, as our formats store them. HQQ keeps scales and moves fp16 zero points.
* The start is the least squared error that the search finds, and p is 2.4. A p below 2 sacrifices large weights to the many
  small ones, which costs KL divergence at every width that was measured (recipes/int4-data-free.yaml).

Shape suffixes: O out_features, I in_features, G groups in a row, E elements of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Format
from compressor.formats.numerics.int_grid import AT_ONCE, LEAST, IntGrid
from compressor.model.block import Block
from compressor.passes.quantize.rounding import WeightRounding, rounded
from compressor.pipeline.contract import Accumulator, Outcome, Stats
from compressor.recipe.registry import node

NEGLIGIBLE = 1e-3  # errors below this fraction of a scale are weighted as if they were this large


@node
class HQQ(WeightRounding):
    """Round to nearest on grids fitted for the least p-norm error; no calibration.

    Args:
        norm: Exponent p.
        steps: Maximum number of rounds of improvement.
    """

    norm: float = 2.4
    steps: int = 10
    needs: ClassVar[tuple[type[Accumulator], ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm <= 8:
            raise ValueError(f"norm: {self.norm} is not above 0 and at most 8")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is not a positive number")

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        return rounded(block, self.formats(block, stats, choice), self.fit)

    def fit(self, fmt: Format, w_OI: Tensor) -> IntGrid:
        """Return the grid of a format fitted to a weight, fp32 [O, I]."""
        grid = fmt.fit(w_OI, search=self.search)
        if not isinstance(grid, IntGrid):
            raise RecipeError(f"{fmt.label}: this format has no scales of integers to fit; use `rtn`, or another format")
        return half_quadratic(w_OI, grid, norm=self.norm, steps=self.steps)


def half_quadratic(w_OI: Tensor, grid: IntGrid, *, norm: float, steps: int) -> IntGrid:
    """Improve a grid: the p-norm error does not rise in any group.

    Args:
        w_OI: Weight, fp32; not modified.
        grid: Grid fitted to the weight, as the start.
        norm: Exponent p.
        steps: Maximum number of rounds. It stops early when no group improves.
    """
    columns, count = w_OI.shape[1], grid.scale_OG.shape[1]
    rows = max(1, AT_ONCE // columns)
    parts = (tensor.split(rows) for tensor in (w_OI.unflatten(1, (count, -1)), grid.scale_OG, grid.zero_OG))
    fitted = [_Groups(w, scale, grid, norm).improve(zero, steps) for w, scale, zero in zip(*parts, strict=True)]
    scale_OG, zero_OG = (torch.cat(part) for part in zip(*fitted, strict=True))
    return replace(grid, scale_OG=scale_OG, zero_OG=zero_OG)


@dataclass(frozen=True)
class _Groups:
    """Some rows of a weight. Errors are in units of the first scale, so that their powers do not overflow fp32."""

    w_OGE: Tensor
    first_OG: Tensor  # the scale of the initial grid
    grid: IntGrid
    norm: float

    def improve(self, zero: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return the best scale and zero point [O, G] found within `steps` rounds."""
        scale = self.first_OG
        least = self._loss(scale, zero)
        for _ in range(steps):
            before = least
            around = scale, zero
            for shift in (0,) if self.grid.symmetric else (0, -1, 1):
                tried_zero = (around[1] + shift).clamp(0, 2**self.grid.bits - 1)
                tried_scale = self._refit(self._refit(around[0], tried_zero), tried_zero)
                loss = self._loss(tried_scale, tried_zero)
                better = loss < least
                least = torch.where(better, loss, least)
                scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
            if torch.equal(least, before):
                break
        return scale, zero

    def _rounded(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes minus their zero point, and errors [O, G, E]."""
        top = 2**self.grid.bits - 1
        steps = (self.w_OGE / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, top).sub_(zero[..., None])
        return steps, (self.w_OGE - steps * scale[..., None]).div_(self.first_OG[..., None])

    def _loss(self, scale: Tensor, zero: Tensor) -> Tensor:
        return self._rounded(scale, zero)[1].abs_().pow_(self.norm).sum(-1)

    def _refit(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the stored-precision scale that fits best the codes that the given scale produces."""
        steps, error = self._rounded(scale, zero)
        weighted = error.abs_().clamp_(min=NEGLIGIBLE).pow_(self.norm - 2).mul_(steps)
        energy = (weighted * steps).sum(-1)
        ratio = (weighted * (self.w_OGE / self.first_OG[..., None])).sum(-1) / energy
        stored = (ratio * self.first_OG).to(self.grid.scale_dtype).float()
        usable = (energy > 0) & stored.isfinite() & (stored.abs() >= LEAST[self.grid.scale_dtype])
        return torch.where(usable, stored, scale)


EXPORT = HQQ
