"""Roundings that can be trained: latent numbers that are rounded to codes, and the scales of these.

A code rounds a latent number that starts at the weight itself (where the code is the nearest one), or just inside the code
that an earlier pass chose; the gradient passes the rounding as if it were not there.

Shape suffixes: O out_features, I in_features.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.codes import FloatCodes, IntCodes
from compressor.floats import E4M3Scale

KEPT = 0.45  # distance from its code, in steps of the grid, at which a latent starts at the most


@dataclass
class Rounding:
    """The trainable rounding of one weight: w = scale * round(latent)."""

    latent_OI: Tensor  # fp32, in units of the scale
    scale: Tensor  # fp32, one per block of the weight

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    @abstractmethod
    def step(self) -> float:
        """How far codes are apart, on average, in units of the scale."""

    @abstractmethod
    def rounded(self) -> tuple[Tensor, Tensor]:
        """What the latents are rounded to, and where a latent is within the range of the codes, [O, I]."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """One value per block -> one per weight, [O, I]."""

    @abstractmethod
    def gathered(self, values_OI: Tensor) -> Tensor:
        """Sums over each block, as `scale` lies."""

    @abstractmethod
    def stored_scale(self) -> Tensor:
        """The scale as it will be read back, fp32, with all that it is multiplied by."""

    @abstractmethod
    def result(self) -> IntCodes | FloatCodes:
        """What is stored."""

    def weight(self) -> Tensor:
        """fp32 [O, I]."""
        return self.rounded()[0].mul_(self.spread(self.stored_scale()))

    def slopes(self, by_weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by latent and by scale, from that by the weight: rounding counts as the identity."""
        rounded, inside = self.rounded()
        return by_weight_OI * self.spread(self.stored_scale()) * inside, self.gathered(by_weight_OI * rounded)


@dataclass
class IntRounding(Rounding):
    """Latents are in steps of the grid, counted from the zero point, which is fixed."""

    codes: IntCodes  # of the start

    @classmethod
    def at(cls, codes: IntCodes, w_OI: Tensor) -> "IntRounding":
        """Where an earlier pass left a weight `w_OI`."""
        scale = codes.scale.float()
        found = cls(torch.empty(0), scale, codes)
        steps = codes.codes_OI.float() - found.spread(codes.zero.float())
        aside = (w_OI.float() / found.spread(scale) - steps).clamp_(-KEPT, KEPT)
        return replace(found, latent_OI=steps.add_(aside))

    @property
    def bits(self) -> int:
        return self.codes.bits

    @property
    def step(self) -> float:
        return 1.0

    def rounded(self) -> tuple[Tensor, Tensor]:
        low, high = self._limits()
        return self.latent_OI.round().clamp_(low, high), (self.latent_OI > low - 0.5) & (self.latent_OI < high + 0.5)

    def spread(self, values: Tensor) -> Tensor:
        (rows, columns), (down, across) = self.codes.codes_OI.shape, values.shape
        return values.repeat_interleave(rows // down, 0).repeat_interleave(columns // across, 1)

    def gathered(self, values_OI: Tensor) -> Tensor:
        down, across = self.scale.shape
        sums: Tensor = values_OI.unflatten(1, (across, -1)).sum(2).unflatten(0, (down, -1)).sum(1)
        return sums

    def stored_scale(self) -> Tensor:
        return self.scale.to(self.codes.scale.dtype).float()

    def result(self) -> IntCodes:
        codes = self.rounded()[0].sub_(self._limits()[0]).to(torch.uint8)
        return replace(self.codes, codes_OI=codes, scale=self.scale.to(self.codes.scale.dtype))

    def _limits(self) -> tuple[Tensor, Tensor]:
        """The least and the largest code, counted from the zero point, [O, I]."""
        low = -self.spread(self.codes.zero.float())
        return low, low + (2**self.codes.bits - 1)


@dataclass
class FloatRounding(Rounding):
    """Latents are in units of the scale; powers of two that serve as scales are too far apart to be trained, and stay."""

    codes: FloatCodes  # of the start

    @classmethod
    def at(cls, codes: FloatCodes, w_OI: Tensor) -> "FloatRounding":
        """Where an earlier pass left a weight `w_OI`."""
        found = cls(torch.empty(0), codes.scale.float(), codes)
        gaps = torch.tensor(codes.element.magnitudes, device=w_OI.device).diff()
        place = (codes.codes_OI & codes.element.sign - 1).int()
        below, above = torch.cat([gaps[:1], gaps])[place], torch.cat([gaps, gaps[-1:]])[place]
        numbers = codes.element.decode(codes.codes_OI)
        sign = torch.where(torch.signbit(numbers), -1.0, 1.0)
        aside = (w_OI.float() / found.spread(found.stored_scale()) - numbers).mul_(sign)  # outwards
        return replace(found, latent_OI=numbers + sign * aside.clamp(-KEPT * below, KEPT * above))

    @property
    def bits(self) -> int:
        return self.codes.element.bits

    @property
    def step(self) -> float:
        return 2 * self.codes.element.largest / float(2**self.bits - 1)

    def rounded(self) -> tuple[Tensor, Tensor]:
        numbers = self.codes.element.magnitudes
        inside = self.latent_OI.abs() < numbers[-1] + (numbers[-1] - numbers[-2]) / 2
        return self.codes.element.round(self.latent_OI), inside

    def spread(self, values: Tensor) -> Tensor:
        rows, columns = self.codes.codes_OI.shape
        return values.repeat_interleave(self.codes.rows, 0)[:rows].repeat_interleave(columns // values.shape[1], 1)

    def gathered(self, values_OI: Tensor) -> Tensor:
        by_group = values_OI.unflatten(1, (self.scale.shape[1], -1)).sum(2)
        whole = pad(by_group, (0, 0, 0, -len(by_group) % self.codes.rows))
        sums: Tensor = whole.unflatten(0, (-1, self.codes.rows)).sum(1)
        return sums * self.codes.factor

    def stored_scale(self) -> Tensor:
        return self._scales().float() * self.codes.factor

    def result(self) -> FloatCodes:
        return replace(self.codes, codes_OI=self.codes.element.encode(self.latent_OI), scale=self._scales())

    def _scales(self) -> Tensor:
        """As they are stored."""
        dtype = self.codes.scale.dtype
        if dtype == torch.float8_e8m0fnu:
            return self.codes.scale
        if dtype == torch.float8_e4m3fn:
            kind = E4M3Scale()
            return kind.stored(kind.at(kind.nearest(self.scale)))
        return self.scale.to(dtype)
