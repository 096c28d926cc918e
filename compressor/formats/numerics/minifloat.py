"""Floating-point numbers of at most 8 bits, for weights and activations, and number types for their scales.

A `Minifloat` has a sign, E bits of exponent and M of mantissa. Exponent 0 is subnormal; the bias is 2^(E-1) - 1. Rounding is
to nearest, ties to the even multiple of the local spacing, and saturates. There are no infinities.

A `ScaleType` orders the positive numbers that a scale can be. A scale's neighbours are found by its place in that order.

Source: IEEE 754 for the construction; Micikevicius et al., "FP8 Formats for Deep Learning", 2022, and Rouhani et al.,
"Microscaling Data Formats", 2023, for the named types.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

FP32_BIAS, FP32_MANTISSA = 127, 23
INFINITY = 0x7F800000  # all exponent bits of an fp32 number


@dataclass(frozen=True, slots=True)
class Minifloat:
    """One element type.

    Args:
        exponent: Bits of the exponent, 1 to 7.
        mantissa: Bits of the mantissa; 3 to 8 together with sign and exponent.
        reserved: Number of largest magnitudes that are not used, because they stand for infinities and NaN.
    """

    exponent: int
    mantissa: int
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or not 3 <= self.bits <= 8:
            raise ValueError(
                f"e{self.exponent}m{self.mantissa}: a sign, 1 bit of exponent or more, and mantissa make 3 to 8 bits"
            )

    @staticmethod
    def parse(name: str) -> "Minifloat":
        """Return the element type of a name such as e2m1. Raises ValueError for any other text."""
        found = re.fullmatch(r"e(\d)m(\d)", name)
        if found is None:
            raise ValueError(f"`{name}` is no kind of number; write e2m1 for 2 bits of exponent and 1 of mantissa")
        exponent, mantissa = int(found[1]), int(found[2])
        return Minifloat(exponent, mantissa, RESERVED.get((exponent, mantissa), 0))

    @property
    def name(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Width in bits, sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        """The sign bit of a code."""
        return 1 << self.exponent + self.mantissa

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """Values of the codes 0, 1, 2 …, in rising order; without the reserved ones."""
        return _magnitudes(self)

    @property
    def largest(self) -> float:
        return self.magnitudes[-1]

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes, uint8, of the numbers nearest to x, fp32; zeros keep their sign."""
        size = x.abs().clamp_(max=self.largest)
        step, exponent = self._steps(size)
        code = (size / step).round_().int().add_(exponent << self.mantissa)
        return code.add_(torch.signbit(x), alpha=self.sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, fp32; NaN for reserved magnitudes."""
        half = [*self.magnitudes, *[float("nan")] * self.reserved]
        table = torch.tensor([*half, *(-value for value in half)], device=codes.device)
        return table[codes.int()]

    def round(self, x: Tensor) -> Tensor:
        """Return the numbers nearest to x, fp32; equal to decoding its codes."""
        held = x.clamp(-self.largest, self.largest)
        step, _ = self._steps(held)
        return (held / step).round_().mul_(step)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each of x, the spacing of the numbers near it, and their stored exponent, 0 for the smallest."""
        exponent = (x.contiguous().view(torch.int32) & INFINITY) >> FP32_MANTISSA
        exponent.sub_(FP32_BIAS + 1 - self.bias).clamp_(0, (1 << self.exponent) - 1)
        step = exponent + (FP32_BIAS + 1 - self.bias - self.mantissa) << FP32_MANTISSA
        return step.view(torch.float32), exponent


@cache
def _magnitudes(kind: Minifloat) -> tuple[float, ...]:
    found = []
    for code in range(kind.sign - kind.reserved):
        exponent, mantissa = divmod(code, 1 << kind.mantissa)
        whole = mantissa if exponent == 0 else mantissa + (1 << kind.mantissa)
        found.append(whole * 2.0 ** (max(exponent, 1) - kind.bias - kind.mantissa))
    return tuple(found)


RESERVED = {(4, 3): 1, (5, 2): 4}  # as on all GPUs: e4m3 has one NaN per sign; e5m2 has one infinity and three NaN
E2M1, E4M3, E5M2 = Minifloat(2, 1), Minifloat(4, 3, 1), Minifloat(5, 2, 4)


class ScaleType(Protocol):
    """Number type of scales: positive numbers, addressed by their place in rising order."""

    def nearest(self, scale: Tensor) -> Tensor: ...  # place of the number nearest to a positive one, int
    def at(self, place: Tensor) -> Tensor: ...  # number at a place, fp32; out of range: the first or last
    def stored(self, scale: Tensor) -> Tensor: ...  # numbers of this type, in the dtype they have on disk
    def ceiling(self, largest: Tensor, element: Minifloat) -> Tensor: ...  # place for a group with this largest weight
    @property
    def around(self) -> range: ...  # offsets from that place that are searched


@dataclass(frozen=True, slots=True)
class E4M3Scale:
    """E4M3. Its positive numbers are the codes 1 (2^-9) to 126 (448)."""

    @property
    def around(self) -> range:
        return range(-8, 8)

    def nearest(self, scale: Tensor) -> Tensor:
        return scale.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()

    def at(self, place: Tensor) -> Tensor:
        return place.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()

    def stored(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float8_e4m3fn)

    def ceiling(self, largest: Tensor, element: Minifloat) -> Tensor:
        return self.nearest(largest / element.largest)


@dataclass(frozen=True, slots=True)
class E8M0Scale:
    """Powers of two up to 2^120, so that 6 times a scale still fits fp32. The kernels support none above 2^9."""

    @property
    def around(self) -> range:
        return range(-2, 3)

    def nearest(self, scale: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(scale.clamp(2.0**LEAST, 2.0**MOST))  # mantissa in 0.5 … 1
        return exponent - (mantissa <= 0.75).int()

    def at(self, place: Tensor) -> Tensor:
        return (place.clamp(LEAST, MOST).int() + FP32_BIAS << FP32_MANTISSA).view(torch.float32)  # exponent bits only

    def stored(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float8_e8m0fnu)

    def ceiling(self, largest: Tensor, element: Minifloat) -> Tensor:
        """Return the exponent that puts the largest weight in 7/8 … 7/4 of the element's largest power of two.

        1 … 2, as in the specification, clips more weights.
        """
        exponent = largest.contiguous().view(torch.int32) + (1 << FP32_MANTISSA - 2) >> FP32_MANTISSA
        return exponent - FP32_BIAS - (torch.frexp(torch.tensor(element.largest))[1].item() - 1)


LEAST, MOST = -126, 120  # range of exponents of E8M0 scales


@dataclass(frozen=True, slots=True)
class RealScale:
    """bf16, which has 128 numbers for each power of two."""

    fine: int = 4  # stride of the search: try every n-th number

    @property
    def around(self) -> range:
        """Offsets from half to 5/4 of the scale that maps the largest weight to the largest number."""
        return range(-128, 33, self.fine)

    def nearest(self, scale: Tensor) -> Tensor:
        smallest, last = torch.finfo(torch.bfloat16).smallest_normal, torch.finfo(torch.bfloat16).max
        return scale.clamp(smallest, last).to(torch.bfloat16).view(torch.int16).int()

    def at(self, place: Tensor) -> Tensor:
        first, last = 1 << 7, (255 << 7) - 1  # the normal numbers
        return place.clamp(first, last).to(torch.int16).view(torch.bfloat16).float()

    def stored(self, scale: Tensor) -> Tensor:
        return scale.to(torch.bfloat16)

    def ceiling(self, largest: Tensor, element: Minifloat) -> Tensor:
        return self.nearest(largest / element.largest)
