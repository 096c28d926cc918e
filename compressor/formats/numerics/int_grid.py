"""Integer grids: fit scales and zero points that groups of input channels share. All formats of integers use this.

Scales are searched to minimise the squared error of the group's weights, each weighted by the importance of its input
channel. Source: Frantar et al., "GPTQ" (ICLR 2023), the range-shrinking search of the authors' code. The weighting, the
sign and the refinement around the best step are ours.

A symmetric grid has one more value below zero than above. A negative scale mirrors it, which matters at 2 and 3 bits.

Shape suffixes: O out_features, I in_features, G groups in a row, E elements of a group, K scales tried, C adjacent columns.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.formats.base import Format, QuantizedTensor
from compressor.formats.numerics.codes import IntCodes

COARSE = tuple(1 - 0.05 * i for i in range(15))  # shares of the full range that are tried
FINE = tuple(0.01 * i for i in (0, -4, -3, -2, -1, 1, 2, 3, 4))  # offsets that are then tried around the best share
AT_ONCE = 2**20  # elements searched together: few enough for a cache, and bounds the temporaries
LEAST = {torch.bfloat16: torch.finfo(torch.bfloat16).smallest_normal, torch.float16: 2.0**-24}  # least scale above zero


def rescaled(scale: Tensor, slope: Tensor, curvature: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply scales by max(0, 1 + slope / curvature), and round to a dtype; keep those whose curvature is 0."""
    found = (scale * (1 + slope / curvature).clamp(min=0)).to(dtype).float()
    found = found.abs().clamp(LEAST[dtype], torch.finfo(dtype).max).copysign(scale)
    return torch.where(curvature > 0, found, scale)


def groups(features: int, group_size: int, axis: str = "in_features") -> int:
    """Return the number of groups in a row (in a column if axis is `out_features`); 1 if group_size is -1.

    Raises:
        ValueError: group_size does not divide the number of features.
    """
    size = features if group_size == -1 else group_size
    if features % size:
        near = max(d for d in range(1, min(size, features) + 1) if features % d == 0)
        whole = "row" if axis == "in_features" else "column"
        raise ValueError(
            f"{axis} {features} is not a multiple of group_size {size}; "
            f"use a divisor such as {near}, or -1 for the whole {whole}"
        )
    return features // size


@dataclass(frozen=True)
class IntGrid:
    """Scales and zero points fitted to one weight. Codes are uint8 in [0, 2**bits)."""

    format: Format
    bits: int
    scale_OG: Tensor  # fp32, values that the stored dtype can hold
    zero_OG: Tensor  # fp32, integral, in code units
    group_size: int  # number of columns
    scale_dtype: torch.dtype
    symmetric: bool  # True: no zero points are stored
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        codes = torch.empty(w_OC.shape, dtype=torch.uint8, device=w_OC.device)
        for part, scale, zero in self._groups(column, w_OC.shape[1]):
            codes[:, part] = (w_OC[:, part] / scale).add_(zero).round_().clamp_(0, 2**self.bits - 1)
        return codes

    def decode(self, codes: Tensor, column: int) -> Tensor:
        values = torch.empty(codes.shape, device=codes.device)
        for part, scale, zero in self._groups(column, codes.shape[1]):
            values[:, part] = (codes[:, part] - zero).mul_(scale)
        return values

    @property
    def width(self) -> int:
        return self.group_size

    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "IntGrid":
        fit, group = IntFit(self.bits, -1, self.symmetric, self.scale_dtype), column // self.group_size
        fitted, scale_OG, zero_OG = (
            fit.grid(self.format, w_OC, importance_C, search),
            self.scale_OG.clone(),
            self.zero_OG.clone(),
        )
        scale_OG[:, group], zero_OG[:, group] = fitted.scale_OG[:, 0], fitted.zero_OG[:, 0]
        return replace(self, scale_OG=scale_OG, zero_OG=zero_OG)

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "IntGrid":
        group, scale_OG = column // self.group_size, self.scale_OG.clone()
        scale_OG[:, group] = rescaled(scale_OG[:, group], slope_O, curvature_O, self.scale_dtype)
        return replace(self, scale_OG=scale_OG)

    def pack(self, codes: Tensor) -> QuantizedTensor:
        scale, zero = self.scale_OG.to(self.scale_dtype), self.zero_OG.to(torch.uint8)
        return self.format.stored(IntCodes(self.bits, codes, scale, zero), (codes.shape[0], codes.shape[1]))

    def _groups(self, column: int, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield, for each group of some adjacent columns, its slice of them and its scale and zero point [O, 1]."""
        size = self.group_size
        for group in range(column // size, (column + count - 1) // size + 1):
            part = slice(max(group * size - column, 0), min((group + 1) * size - column, count))
            yield part, self.scale_OG[:, group, None], self.zero_OG[:, group, None]


@dataclass(frozen=True)
class IntFit:
    """Settings of a fit.

    Args:
        bits: Width of a code.
        group_size: Number of adjacent input channels that share a scale; -1 for the whole row.
        symmetric: Whether zero points are 2**(bits - 1) and scales may be negative.
        scale_dtype: Data type in which scales are stored: bf16 or fp16.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype

    def grid(self, fmt: Format, w_OI: Tensor, importance_I: Tensor | None, search: bool) -> IntGrid:
        """Fit a grid of a format to one weight; arguments and errors are those of `Format.fit`."""
        columns = w_OI.shape[1]
        count = groups(columns, self.group_size)
        importance = torch.ones(columns, device=w_OI.device) if importance_I is None else importance_I.float()
        importance_GE = importance.view(count, -1)
        fitted = [
            self._fit_rows(chunk.float().unflatten(1, (count, -1)), importance_GE, search)
            for chunk in w_OI.split(max(1, AT_ONCE // columns))
        ]
        scale, zero = (torch.cat(part).contiguous() for part in zip(*fitted, strict=True))
        return IntGrid(fmt, self.bits, scale, zero, columns // count, self.scale_dtype, self.symmetric)

    def _fit_rows(self, w_OGE: Tensor, importance_GE: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Return scale and zero point [O, G] for some rows."""
        if not search:
            return self._range(w_OGE, torch.ones(()), torch.ones(()))
        signs = (1.0, -1.0) if self.symmetric else (1.0,)
        coarse = torch.tensor(list(itertools.product(COARSE, signs)), device=w_OGE.device)[..., None, None]
        share, sign = self._least(w_OGE, importance_GE, coarse[:, 0], coarse[:, 1])
        fine = torch.tensor(FINE, device=w_OGE.device)[:, None, None]
        share, sign = self._least(w_OGE, importance_GE, share + fine, sign.expand(len(fine), *sign.shape))
        return self._range(w_OGE, share, sign)

    def _least(self, w_OGE: Tensor, importance_GE: Tensor, shares: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of the range and the sign with the least error, [O, G]; of equal ones the first.

        Args:
            w_OGE: Weights.
            importance_GE: Importance of each element's input channel.
            shares: K shares to try, [K, O, G], or [K, 1, 1] for all groups.
            signs: Their signs, of the same shape.
        """
        least = torch.full(w_OGE.shape[:2], torch.inf, device=w_OGE.device)
        share, sign = torch.ones_like(least), torch.ones_like(least)
        together = max(1, AT_ONCE // w_OGE.numel())
        for tried in zip(shares.split(together), signs.split(together), strict=True):
            error_KOG = self._error(w_OGE, importance_GE, *self._range(w_OGE, *tried))
            error = error_KOG.amin(0)
            first = (error_KOG > error).long().cumprod(0).sum(0, keepdim=True)
            better = error < least
            share, sign = (
                torch.where(better, new.expand_as(error_KOG).gather(0, first)[0], old)
                for new, old in zip(tried, (share, sign), strict=True)
            )
            least = torch.minimum(error, least)
        return share, sign

    def _range(self, w_OGE: Tensor, share: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (rounded as stored) and zero point when `share` of the group's range is represented."""
        top = 2**self.bits - 1
        if self.symmetric:
            scale = self._stored(w_OGE.abs().amax(-1) * (2 * share / top))
            return scale * sign, torch.full_like(scale, 2 ** (self.bits - 1))
        low, high = w_OGE.amin(-1).clamp(max=0), w_OGE.amax(-1).clamp(min=0)
        scale = self._stored((high - low) * (share / top))
        return scale, (-low * share / scale).round().clamp(0, top)

    def _error(self, w_OGE: Tensor, importance_GE: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """Return the weighted squared error of rounding to a grid, [O, G], with leading dimension K if scales have it."""
        scale, zero = scale_OG[..., None], zero_OG[..., None]
        codes = (w_OGE / scale).add_(zero).round_().clamp_(0, 2**self.bits - 1)
        missed = codes.sub_(zero).mul_(scale).sub_(w_OGE)
        return missed.square_().mul_(importance_GE).sum(-1)

    def _stored(self, scale: Tensor) -> Tensor:
        """Round a scale as it will be read back. A group of zeros gets 1; underflow gives the least scale above zero."""
        rounded = scale.to(self.scale_dtype).float()
        return torch.where(scale == 0, 1.0, rounded.clamp(LEAST[self.scale_dtype], torch.finfo(self.scale_dtype).max))
