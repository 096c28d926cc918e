"""Integers of 2 to 8 bits with one scale, and for the asymmetric kind one zero point, per group of input channels.

Bytes, for a weight [O, I] with G = I / group_size groups in a row:

    weight_packed      int32 [O, ceil(I * bits / 32)]   codes, LSB-first bit stream along the input channels
    weight_scale       bf16  [O, G]                     may be negative: see below
    weight_shape       int64 [2]                        (O, I)
    weight_zero_point  int32 [ceil(O * bits / 32), G]   asymmetric only: zero points, packed along the output channels

    w[o, i] = (code[o, i] - zero[o, i // group_size]) * scale[o, i // group_size],  zero = 2**(bits - 1) if symmetric

The symmetric kind is byte for byte the `pack-quantized` layout of compressed-tensors (0.18 and later), which stock
transformers and vLLM load. A symmetric grid has one value more on its lower side; a negative scale turns it round, which
matters at 2 and 3 bits.

Scales are searched to minimise the squared error of the group's weights, each weighted by the importance of its input
channel. Source: Frantar et al., "GPTQ" (ICLR 2023), the range-shrinking search of the authors' code; the
weighting, the sign and the refinement around the best step are ours.

Shape suffixes: O out_features, I in_features, G groups in a row, E elements of a group, C adjacent columns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats import _bits
from compressor.registry import node
from compressor.types import QuantizedTensor

SCALE_DTYPE = torch.bfloat16  # exact in float32 too, and in float16 above 2e-5
COARSE = tuple(1 - 0.05 * i for i in range(15))  # shares of the full range that are tried
FINE = tuple(0.01 * i for i in (-4, -3, -2, -1, 1, 2, 3, 4))  # then these around the best of them
AT_ONCE = 2**20  # elements searched together: few enough for a cache, and bounds the temporaries


@node
class IntGroup:
    """Args:
    bits: Width of a code, 2 to 8.
    group_size: Adjacent input channels that share a scale; -1 for the whole row.
    symmetric: False stores a zero point per group; only this project's own loader reads it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits} is not in 2 … 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is neither -1 (the whole row) nor a positive number")

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits}{'' if self.symmetric else 'a'}{group}"

    def groups(self, shape: tuple[int, int]) -> int:
        """Groups in a row. Raises ValueError if they do not divide it."""
        in_features = shape[1]
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            near = max(d for d in range(1, min(size, in_features) + 1) if in_features % d == 0)
            raise ValueError(
                f"in_features {in_features} is not a multiple of group_size {size}; "
                f"use a divisor such as {near}, or -1 for the whole row"
            )
        return in_features // size

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns, groups = *shape, self.groups(shape)
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (rows, _bits.words(columns, self.bits))),
            "weight_scale": (SCALE_DTYPE, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = (torch.int32, (_bits.words(rows, self.bits), groups))
        return parts

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        if not self.symmetric:
            return None  # packed zero points do not reload in transformers
        strategy: dict[str, Any] = {"strategy": "channel", "group_size": None}
        if self.group_size != -1:
            strategy = {"strategy": "group", "group_size": self.group_size}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, **strategy, "dynamic": False}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> "IntGrid":
        """Scales and zero points of every group.

        Args:
            w_OI: The weight, any float dtype.
            importance_I: Weight of each input channel's squared error, such as the Hessian's diagonal; equal if None.
            search: False takes them from the range of the group alone.

        Raises:
            ValueError: group_size does not divide in_features.
        """
        rows, columns = w_OI.shape
        groups = self.groups((rows, columns))
        importance = torch.ones(columns, device=w_OI.device) if importance_I is None else importance_I.float()
        importance_GE = importance.view(groups, -1)
        fitted = [
            self._fit_rows(chunk.float().unflatten(1, (groups, -1)), importance_GE, search)
            for chunk in w_OI.split(max(1, AT_ONCE // columns))
        ]
        scale, zero = (torch.cat(part).contiguous() for part in zip(*fitted, strict=True))
        return IntGrid(self, scale, zero)

    def _fit_rows(self, w_OGE: Tensor, importance_GE: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point [O, G] of some rows."""
        best = self._range(w_OGE, 1.0, 1)
        if not search:
            return best
        signs = (1, -1) if self.symmetric else (1,)
        least = self._error(w_OGE, importance_GE, *best)
        share = torch.ones_like(least)
        sign = torch.ones_like(least)
        for stage in (COARSE, FINE):
            around_share, around_sign = share.clone(), sign.clone()
            for step in stage:
                for turn in signs if stage is COARSE else (1,):
                    tried_share = torch.full_like(share, step) if stage is COARSE else around_share + step
                    tried_sign = torch.full_like(sign, turn) if stage is COARSE else around_sign
                    found = self._range(w_OGE, tried_share, tried_sign)
                    error = self._error(w_OGE, importance_GE, *found)
                    better = error < least
                    least = torch.where(better, error, least)
                    share, sign = torch.where(better, tried_share, share), torch.where(better, tried_sign, sign)
                    best = (torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1]))
        return best

    def _range(self, w_OGE: Tensor, share: Tensor | float, sign: Tensor | int) -> tuple[Tensor, Tensor]:
        """Scale (rounded as stored) and zero point when `share` of the group's range is represented."""
        top = 2**self.bits - 1
        if self.symmetric:
            scale = _stored(w_OGE.abs().amax(-1) * (2 * share / top))
            return scale * sign, torch.full_like(scale, 2 ** (self.bits - 1))
        low, high = w_OGE.amin(-1).clamp(max=0), w_OGE.amax(-1).clamp(min=0)
        scale = _stored((high - low) * (share / top))
        return scale, (-low * share / scale).round().clamp(0, top)

    def _error(self, w_OGE: Tensor, importance_GE: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """Weighted squared error [O, G] of rounding to a grid."""
        scale, zero = scale_OG[..., None], zero_OG[..., None]
        codes = (w_OGE / scale).add_(zero).round_().clamp_(0, 2**self.bits - 1)
        missed = codes.sub_(zero).mul_(scale).sub_(w_OGE)
        return missed.square_().mul_(importance_GE).sum(-1)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        rows, columns = packed.shape
        codes = _bits.unpack(packed.parts["weight_packed"], self.bits, columns).float()
        scale = packed.parts["weight_scale"].float()
        zero: Tensor | float = float(2 ** (self.bits - 1))
        if not self.symmetric:
            zero = _bits.unpack(packed.parts["weight_zero_point"].T, self.bits, rows).T.float()[..., None]
        values: Tensor = codes.unflatten(1, (scale.shape[1], -1)).sub_(zero).mul_(scale[..., None]).flatten(1)
        return values


@dataclass(frozen=True)
class IntGrid:
    """Codes are uint8 in [0, 2**bits)."""

    format: IntGroup
    scale_OG: Tensor  # fp32, values that bf16 holds
    zero_OG: Tensor  # fp32, integral, in code units
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        codes = torch.empty(w_OC.shape, dtype=torch.uint8, device=w_OC.device)
        for part, scale, zero in self._groups(column, w_OC.shape[1]):
            codes[:, part] = (w_OC[:, part] / scale).add_(zero).round_().clamp_(0, 2**self.format.bits - 1)
        return codes

    def decode(self, codes: Tensor, column: int) -> Tensor:
        values = torch.empty(codes.shape, device=codes.device)
        for part, scale, zero in self._groups(column, codes.shape[1]):
            values[:, part] = (codes[:, part] - zero).mul_(scale)
        return values

    def pack(self, codes: Tensor) -> QuantizedTensor:
        rows, columns = codes.shape
        parts = {
            "weight_packed": _bits.pack(codes, self.format.bits),
            "weight_scale": self.scale_OG.to(SCALE_DTYPE),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not self.format.symmetric:
            parts["weight_zero_point"] = _bits.pack(self.zero_OG.T.to(torch.uint8), self.format.bits).T.contiguous()
        return QuantizedTensor(self.format, (rows, columns), parts)

    def _groups(self, column: int, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The groups that adjacent columns lie in: which of them, and the group's scale and zero point [O, 1]."""
        size = column + count if self.format.group_size == -1 else self.format.group_size
        for group in range(column // size, (column + count - 1) // size + 1):
            part = slice(max(group * size - column, 0), min((group + 1) * size - column, count))
            yield part, self.scale_OG[:, group, None], self.zero_OG[:, group, None]


def _stored(scale: Tensor) -> Tensor:
    """The scale as it will be read back; a group of zeros gets 1, one that underflows the smallest normal number."""
    rounded = scale.to(SCALE_DTYPE).float()
    return torch.where(scale == 0, 1.0, rounded.clamp(min=torch.finfo(SCALE_DTYPE).smallest_normal))


EXPORT = IntGroup
