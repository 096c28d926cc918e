"""E2M1 numbers with a scale per group of adjacent input channels, the scale a number of 8 bits: NVFP4 and MXFP4.

    w[o, i] = e2m1(code[o, i]) * scale[o, i // b] * factor

A scale is searched among those near to what puts the group's largest weight on the largest number, 6: all that are stored
differently within a factor of about two, so that a largest weight on 4, where the numbers are denser, is among them. Each
weight's error counts as much as its input channel matters.

Source: Rouhani et al., "Microscaling Data Formats", 2023; the search contains the choice of Cook et al., "Four Over Six",
2025. Rounding is to nearest, ties to the code whose last bit is 0, and saturates.

Shape suffixes: O out_features, I in_features, G groups in a row, E elements of a group, C adjacent columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor, log2
from typing import Protocol

import torch
from torch import Tensor

from compressor.codes import E2M1, Fp4Codes
from compressor.formats._int_grid import groups
from compressor.types import Format, QuantizedTensor

LARGEST = E2M1[-1]
SIGN = 8
AT_ONCE = 2**20  # elements searched together: bounds the temporaries
HALF_WAY = tuple((a + b) / 2 for a, b in pairwise(E2M1))
# Above bounds[k] a number rounds to code k + 1: half way, or the last fp32 number below that where k + 1 is the even one.
BOUNDS = tuple(h - 2.0 ** (floor(log2(h)) - 23) if k % 2 else h for k, h in enumerate(HALF_WAY))


class ScaleType(Protocol):
    """Numbers of 8 bits that scales are stored as; a scale goes by its place among the positive ones, in rising order."""

    def nearest(self, scale: Tensor) -> Tensor: ...  # place of the number nearest to a positive one, int
    def at(self, place: Tensor) -> Tensor: ...  # the number, fp32; the first or last where there is none
    def stored(self, scale: Tensor) -> Tensor: ...  # numbers that it holds, in 8 bits
    def ceiling(self, largest: Tensor) -> Tensor: ...  # place of the scale that is taken for a largest weight of a group
    @property
    def around(self) -> range: ...  # places from there that are searched


class E4M3:
    """Sign, four bits of exponent, three of mantissa; the positive ones are the codes 1 (2^-9) to 126 (448)."""

    around = range(-8, 8)

    def nearest(self, scale: Tensor) -> Tensor:
        return scale.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()

    def at(self, place: Tensor) -> Tensor:
        return place.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()

    def stored(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float8_e4m3fn)

    def ceiling(self, largest: Tensor) -> Tensor:
        return self.nearest(largest / LARGEST)


class E8M0:
    """Powers of two; 2^120 times 6 is a number still. The kernels take none above 2^9."""

    around = range(-2, 3)
    least, most = -126, 120

    def nearest(self, scale: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(scale.clamp(2.0**self.least, 2.0**self.most))  # mantissa in 0.5 … 1
        return exponent - (mantissa <= 0.75).int()

    def at(self, place: Tensor) -> Tensor:
        return (place.clamp(self.least, self.most).int() + 127 << 23).view(torch.float32)  # the bits of an exponent

    def stored(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float8_e8m0fnu)

    def ceiling(self, largest: Tensor) -> Tensor:
        """The power of two that puts the largest weight in 3.5 … 7: the specification's 4 … 8 would cut off more of it."""
        return torch.frexp(largest.clamp_min(2.0**self.least) * (8 / 7))[1] - 3


def nearest_codes(x: Tensor) -> Tensor:
    """The E2M1 number nearest to each of x, as uint8."""
    bounds = torch.tensor(BOUNDS, device=x.device)
    return torch.bucketize(x.abs().contiguous(), bounds).to(torch.uint8) + SIGN * torch.signbit(x).to(torch.uint8)


def values(codes: Tensor) -> Tensor:
    """What codes stand for, fp32."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.int()]


@dataclass(frozen=True)
class Fp4Grid:
    """Codes are uint8, 0 … 15, the sign in bit 3."""

    format: Format
    kind: ScaleType
    scale_OG: Tensor  # fp32, numbers that are stored as they are
    factor: float  # of the whole weight: a power of two, so that no product with it is rounded
    group_size: int
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        codes = torch.empty(w_OC.shape, dtype=torch.uint8, device=w_OC.device)
        for part, scale in self._groups(column, w_OC.shape[1]):
            codes[:, part] = nearest_codes(w_OC[:, part] / scale)
        return codes

    def decode(self, codes: Tensor, column: int) -> Tensor:
        decoded = values(codes)
        for part, scale in self._groups(column, codes.shape[1]):
            decoded[:, part] *= scale
        return decoded

    def refit(self, w_OC: Tensor, column: int) -> "Fp4Grid":
        return self  # a scale is shared with other columns

    @property
    def width(self) -> int:
        return self.group_size

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "Fp4Grid":
        group, scale_OG = column // self.group_size, self.scale_OG.clone()
        best_O = scale_OG[:, group] * (1 + slope_O / curvature_O).clamp(min=0)
        stored_O = self.kind.at(self.kind.nearest(torch.where(curvature_O > 0, best_O, 1.0)))
        scale_OG[:, group] = torch.where(curvature_O > 0, stored_O, scale_OG[:, group])
        return replace(self, scale_OG=scale_OG)

    def pack(self, codes: Tensor) -> QuantizedTensor:
        packed = Fp4Codes(codes, self.kind.stored(self.scale_OG), self.factor)
        return self.format.stored(packed, (codes.shape[0], codes.shape[1]))

    def _groups(self, column: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """The groups that adjacent columns lie in: which of them, and what their numbers are multiplied by, [O, 1]."""
        size = self.group_size
        for group in range(column // size, (column + count - 1) // size + 1):
            part = slice(max(group * size - column, 0), min((group + 1) * size - column, count))
            yield part, self.scale_OG[:, group, None] * self.factor


def fitted(
    fmt: Format, kind: ScaleType, group_size: int, factor: float, w_OI: Tensor, importance_I: Tensor | None, search: bool
) -> Fp4Grid:
    """The grid of a format for one weight; arguments and errors as of `Format.fit`."""
    columns = w_OI.shape[1]
    count = groups(columns, group_size)
    importance = torch.ones(columns, device=w_OI.device) if importance_I is None else importance_I.float()
    scales = [
        _scales(rows.float().unflatten(1, (count, -1)) / factor, importance.view(count, -1), kind, search)
        for rows in w_OI.split(max(1, AT_ONCE // columns))
    ]
    return Fp4Grid(fmt, kind, torch.cat(scales), factor, group_size)


def _scales(w_OGE: Tensor, importance_GE: Tensor, kind: ScaleType, search: bool) -> Tensor:
    """The scale [O, G] of each group; one of zeros gets the least that is stored."""
    start = kind.ceiling(w_OGE.abs().amax(-1))
    if not search:
        return kind.at(start)
    least = torch.full(start.shape, torch.inf, device=w_OGE.device)
    best = kind.at(start)
    for offset in sorted(kind.around, key=abs):  # of equals the nearest
        scale = kind.at(start + offset)
        missed = values(nearest_codes(w_OGE / scale[..., None])).mul_(scale[..., None]).sub_(w_OGE)
        error = missed.square_().mul_(importance_GE).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def pairs(codes_OI: Tensor) -> Tensor:
    """Two codes to a byte [O, I / 2], the even column in the low bits."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpaired(bytes_OB: Tensor) -> Tensor:
    """The codes again."""
    return torch.stack([bytes_OB & 15, bytes_OB >> 4], dim=2).flatten(1)
