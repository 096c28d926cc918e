"""Unpacked content of a packed weight, independent of any byte layout: one code per element, and scales.

A format (compressor/formats) converts between codes and bytes on disk. A kernel layout (compressor/runtime/kernels/layouts)
arranges codes for fast multiplication, and restores them. Neither depends on the other.

Shape suffixes: O out_features, I in_features, V vectors in a column, D the length of one, P planes, N dense channels,
or numbers of a sparse weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.numerics.minifloat import Minifloat


@dataclass(frozen=True, slots=True)
class IntCodes:
    """Integers with scales and zero points shared by blocks of the weight.

        w[o, i] = (codes[o, i] - zero[o // a, i // b]) * scale[o // a, i // b],  scale and zero being [O / a, I / b]

    Groups of input channels within one output channel have a = 1. Groups of output channels within one input channel
    (AdaDim) have b = 1.
    """

    bits: int
    codes_OI: Tensor  # uint8, below 2**bits
    scale: Tensor  # in the dtype it is stored in: bf16, fp16 or fp32 [O / a, I / b]
    zero: Tensor  # uint8 [O / a, I / b]
    order_I: Tensor | None = None  # int64: column i multiplies input channel order[i]; None: channel i


@dataclass(frozen=True, slots=True)
class FloatCodes:
    """Floating-point numbers of at most 8 bits with scales shared by blocks of the weight.

    w[o, i] = element(codes[o, i]) * scale[o // a, i // b] * factor,  scale being [O' / a, I / b], O' the next multiple of a
    """

    element: Minifloat
    codes_OI: Tensor  # uint8
    scale: Tensor  # in the dtype it is stored in: float8_e4m3fn, float8_e8m0fnu, bf16 or fp32
    factor: float = 1.0  # one for the weight
    rows: int = 1  # a
    inputs: float | None = None  # scale or divisor of activations, if calibration fixed it


@dataclass(frozen=True, slots=True)
class VectorCodes:
    """Vectors of D output channels from a codebook, for each input channel (VPTQ), plus optional residual vectors.

    w[D v + d, i] = (codebook[index[v, i], d] + residual[residual_index[v, i], d]) * norm[i]

    The index i counts only the channels that are not dense.
    """

    index_VI: Tensor  # int32 [O / D, I], I being the input channels that are not dense
    codebook: Tensor  # bf16 [entries, D]
    residual_index_VI: Tensor | None = None
    residual: Tensor | None = None  # bf16 [entries, D]
    norm: Tensor | None = None  # bf16, [I] or [1] for all
    dense_ON: Tensor | None = None  # bf16, the channels that are kept dense
    channels_N: Tensor | None = None  # int32, numbers of the dense channels, ascending

    @property
    def columns(self) -> int:
        """Number of input channels of the weight, dense ones included."""
        return self.index_VI.shape[1] + (0 if self.channels_N is None else len(self.channels_N))


@dataclass(frozen=True, slots=True)
class SignCodes:
    """A sum of planes of signs, each with one scale per group of input channels.

    w[o, i] = sum over p of (1 - 2 negative[p, o, i]) * scale[p, o, i // b]
    """

    negative_POI: Tensor  # uint8, 0 or 1
    scale_POG: Tensor  # bf16


@dataclass(frozen=True, slots=True)
class DenseCodes:
    """The weight itself, held without loss."""

    w_OI: Tensor  # bf16


@dataclass(frozen=True, slots=True)
class SparseCodes:
    """The numbers of a weight that are kept; the others are zero."""

    stays_OI: Tensor  # bool, True where a number is kept
    values_N: Tensor  # row after row, in the dtype they are stored in: bf16, fp16 or fp32


Codes = IntCodes | FloatCodes | VectorCodes | SignCodes | DenseCodes | SparseCodes


def others(channels_N: Tensor, columns: int) -> Tensor:
    """Return the input channels that are not in `channels_N`, int64, ascending."""
    left = torch.ones(columns, dtype=torch.bool, device=channels_N.device)
    left[channels_N.long()] = False
    return left.nonzero()[:, 0]


def shape(codes: Codes) -> tuple[int, int]:
    """Return (out_features, in_features) of the weight."""
    match codes:
        case IntCodes():
            rows, columns = codes.codes_OI.shape
        case FloatCodes():
            rows, columns = codes.codes_OI.shape
        case VectorCodes():
            rows, columns = codes.codebook.shape[1] * codes.index_VI.shape[0], codes.columns
        case SignCodes():
            rows, columns = codes.negative_POI.shape[1:]
        case DenseCodes():
            rows, columns = codes.w_OI.shape
        case SparseCodes():
            rows, columns = codes.stays_OI.shape
    return rows, columns


def values(codes: Codes) -> Tensor:
    """Return the weight that codes stand for, fp32 [O, I]; each product and sum is rounded once."""
    match codes:
        case IntCodes():
            rows, columns = codes.codes_OI.shape
            a, b = rows // codes.scale.shape[0], columns // codes.scale.shape[1]
            weight = codes.codes_OI.float()
            scale, zero = codes.scale.float()[:, None, :, None], codes.zero.float()[:, None, :, None]
            weight.unflatten(1, (-1, b)).unflatten(0, (-1, a)).sub_(zero).mul_(scale)
            if codes.order_I is None:
                return weight
            return torch.empty_like(weight).index_copy_(1, codes.order_I, weight)
        case FloatCodes():
            elements = codes.element.decode(codes.codes_OI)
            scale = (codes.scale.float() * codes.factor).repeat_interleave(codes.rows, 0)[: len(elements), :, None]
            elements.unflatten(1, (codes.scale.shape[1], -1)).mul_(scale)
            return elements
        case VectorCodes():
            vectors = codes.codebook.float()[codes.index_VI]  # [V, I, D]
            if codes.residual is not None and codes.residual_index_VI is not None:
                vectors = vectors + codes.residual.float()[codes.residual_index_VI]
            rest = vectors.transpose(1, 2).flatten(0, 1).contiguous()
            if codes.norm is not None:
                rest *= codes.norm.float()
            if codes.dense_ON is None or codes.channels_N is None:
                return rest
            whole = rest.new_empty(len(rest), codes.columns)
            whole[:, others(codes.channels_N, codes.columns)] = rest
            whole[:, codes.channels_N.long()] = codes.dense_ON.float()
            return whole
        case SignCodes():
            signs = 1 - 2 * codes.negative_POI.float().unflatten(2, (codes.scale_POG.shape[2], -1))
            planes: Tensor = signs * codes.scale_POG.float()[..., None]
            return planes.flatten(2).sum(0)
        case DenseCodes():
            return codes.w_OI.float()
        case SparseCodes():
            return torch.zeros_like(codes.stays_OI, dtype=torch.float32).masked_scatter_(
                codes.stays_OI, codes.values_N.float()
            )
