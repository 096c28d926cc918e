"""Trainable roundings: latent numbers that are rounded to codes, and the scales of the codes.

A latent starts at the weight itself if an earlier pass chose the nearest code, otherwise just inside the range of the chosen
code. The gradient treats rounding as the identity (straight-through).

Shape suffixes: O out_features, I in_features, N vectors, D their length, B candidate entries, K codebooks.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from math import log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codebook import near, nearest, vectors
from compressor.formats.numerics.codes import FloatCodes, IntCodes, VectorCodes, others, values
from compressor.formats.numerics.minifloat import E4M3Scale

AGAIN, TRIED = 20, 8  # number of steps between searches for the nearest entries, and number of candidates
KEPT = 0.45  # maximum initial distance of a latent from its code, in steps of the grid


@dataclass
class Rounding:
    """The trainable rounding of one weight."""

    latent_OI: Tensor  # fp32
    scale: Tensor  # fp32: scales or codebook entries, the other trained tensor

    @property
    @abstractmethod
    def bits(self) -> float:
        """Return the number of bits per weight, without scales."""

    @property
    def length(self) -> int:
        """Return the number of adjacent output channels that share a code."""
        return 1

    @property
    @abstractmethod
    def step(self) -> float:
        """Return the average distance between neighbouring values that latents are rounded to."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the rounded weight, fp32 [O, I]."""

    @abstractmethod
    def slopes(self, by_weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of latents and scales from that of the weight. Rounding counts as the identity."""

    @abstractmethod
    def result(self) -> IntCodes | FloatCodes | VectorCodes:
        """Return the codes to store."""

    def moved(self, steps: int) -> "Rounding":
        """Return the rounding after some steps of training, with the same trained tensors."""
        return self


@dataclass
class ScaledRounding(Rounding):
    """A rounding w = scale * round(latent). Latents are in units of the scale; each block of the weight has one scale."""

    @abstractmethod
    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the rounded latents, and a mask of the latents within the range of the codes, [O, I]."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Expand one value per block to one per weight, [O, I]."""

    @abstractmethod
    def gathered(self, values_OI: Tensor) -> Tensor:
        """Sum over each block, in the layout of `scale`."""

    @abstractmethod
    def stored_scale(self) -> Tensor:
        """Return the scale as it will be loaded, fp32, including all factors."""

    def weight(self) -> Tensor:
        return self.rounded()[0].mul_(self.spread(self.stored_scale()))

    def slopes(self, by_weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        rounded, inside = self.rounded()
        return by_weight_OI * self.spread(self.stored_scale()) * inside, self.gathered(by_weight_OI * rounded)


@dataclass
class IntRounding(ScaledRounding):
    """A rounding to integers. Latents are in steps of the grid, counted from the zero point, which is fixed."""

    codes: IntCodes  # initial codes

    @classmethod
    def at(cls, codes: IntCodes, w_OI: Tensor) -> "IntRounding":
        """Start from the codes that an earlier pass chose for a weight `w_OI`."""
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
        """Return the smallest and the largest code, counted from the zero point, [O, I]."""
        low = -self.spread(self.codes.zero.float())
        return low, low + (2**self.codes.bits - 1)


@dataclass
class FloatRounding(ScaledRounding):
    """A rounding to floating-point codes. Power-of-two scales are not trained, because they are too far apart."""

    codes: FloatCodes  # initial codes

    @classmethod
    def at(cls, codes: FloatCodes, w_OI: Tensor) -> "FloatRounding":
        """Start from the codes that an earlier pass chose for a weight `w_OI`."""
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
        """Return the scales in the stored dtype."""
        dtype = self.codes.scale.dtype
        if dtype == torch.float8_e8m0fnu:
            return self.codes.scale
        if dtype == torch.float8_e4m3fn:
            kind = E4M3Scale()
            return kind.stored(kind.at(kind.nearest(self.scale)))
        return self.scale.to(dtype)


@dataclass
class VectorRounding(Rounding):
    """A rounding to vectors of codebooks. Latents are weights without norms and dense channels, which do not change.

    `scale` holds the entries of all codebooks, one below the other. Layers that share codebooks train the same tensor. A
    vector is rounded to the nearest of some candidate entries. These are searched again every `AGAIN` steps only, because
    neither vectors nor entries move far in between.
    """

    codes: VectorCodes  # initial codes
    tried_NBK: Tensor  # int64: B candidates for each vector, each a sum of K entries, as rows of `scale`

    @classmethod
    def at(cls, codes: VectorCodes, w_OI: Tensor) -> "VectorRounding":
        """Start from the codes that an earlier pass chose for a weight `w_OI`.

        A latent vector starts half way between code and weight if that rounds to the same code, otherwise at the code.
        """
        books = [codes.codebook] if codes.residual is None else [codes.codebook, codes.residual]
        bare = replace(codes, norm=None, dense_ON=None, channels_N=None)
        found = cls(values(bare), torch.cat(books).float(), codes, torch.empty(0, dtype=torch.int64))
        start_OI = found.latent_OI
        found = replace(found, latent_OI=start_OI.lerp(found._inside(w_OI.float(), 1 / found._norm()), 0.5)).moved(0)
        same_OI = (found._vectors() == start_OI).unflatten(0, (-1, found.length)).all(1, keepdim=True)
        latent_OI = torch.where(
            same_OI, found.latent_OI.unflatten(0, (-1, found.length)), start_OI.unflatten(0, (-1, found.length))
        )
        return replace(found, latent_OI=latent_OI.flatten(0, 1).contiguous()).moved(0)

    @property
    def length(self) -> int:
        return self.codes.codebook.shape[1]

    @property
    def bits(self) -> float:
        entries = [len(self.codes.codebook), *([] if self.codes.residual is None else [len(self.codes.residual)])]
        return sum(log2(count) for count in entries) / self.length

    @property
    def step(self) -> float:
        """Return the step of a uniform grid with as many bits over four standard deviations of the latents."""
        return 4 * float(self.latent_OI.std()) / 2**self.bits

    def moved(self, steps: int) -> "VectorRounding":
        if steps % AGAIN:
            return self
        x_ND, count = vectors(self.latent_OI, self.length), len(self.codes.codebook)
        books = self._entries().split([count, len(self.scale) - count])
        tried_NB = near(x_ND, books[0], min(TRIED, count))
        if self.codes.residual is None:
            return replace(self, tried_NBK=tried_NB[..., None])
        left = (x_ND[:, None] - books[0][tried_NB]).flatten(0, 1)
        return replace(self, tried_NBK=torch.stack([tried_NB, nearest(left, books[1]).view(tried_NB.shape) + count], 2))

    def weight(self) -> Tensor:
        rest_OR = self._vectors() * self._norm()
        if self.codes.dense_ON is None or self.codes.channels_N is None:
            return rest_OR
        whole_OI = rest_OR.new_empty(len(rest_OR), self.codes.columns)
        whole_OI[:, others(self.codes.channels_N, self.codes.columns)] = rest_OR
        whole_OI[:, self.codes.channels_N.long()] = self.codes.dense_ON.float()
        return whole_OI

    def slopes(self, by_weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        by_weight_OI = self._inside(by_weight_OI, self._norm())
        of_vectors, total = vectors(by_weight_OI, self.length), torch.zeros_like(self.scale)
        for of_book in self._chosen().unbind(1):
            total.index_add_(0, of_book, of_vectors)
        return by_weight_OI, total

    def result(self) -> VectorCodes:
        count, shape = len(self.codes.codebook), self.codes.index_VI.shape
        chosen_NK, books = self._chosen().int(), self._entries().to(self.codes.codebook.dtype)
        main = replace(self.codes, index_VI=chosen_NK[:, 0].view(shape), codebook=books[:count])
        if self.codes.residual is None:
            return main
        return replace(main, residual_index_VI=(chosen_NK[:, 1] - count).view(shape), residual=books[count:])

    def _chosen(self) -> Tensor:
        """Return the nearest candidate of each vector, [N, K]."""
        missed = self._entries()[self.tried_NBK].sum(2) - vectors(self.latent_OI, self.length)[:, None]
        best_N = missed.square_().sum(2).argmin(1)
        return self.tried_NBK[torch.arange(len(best_N), device=best_N.device), best_N]

    def _entries(self) -> Tensor:
        """Return the entries as they will be loaded."""
        return self.scale.to(self.codes.codebook.dtype).float()

    def _norm(self) -> Tensor:
        """Return the factor of the entries."""
        return torch.ones(1, device=self.scale.device) if self.codes.norm is None else self.codes.norm.float()

    def _inside(self, values_OI: Tensor, factor: Tensor) -> Tensor:
        """Return the columns that are not dense, times a factor."""
        found = self.codes.channels_N
        return (values_OI if found is None else values_OI[:, others(found, self.codes.columns)]) * factor

    def _vectors(self) -> Tensor:
        """Return the weight made of the chosen entries, without norms and dense channels."""
        chosen_ND = self._entries()[self._chosen()].sum(1)
        weight: Tensor = chosen_ND.unflatten(0, self.codes.index_VI.shape).transpose(1, 2).flatten(0, 1)
        return weight
