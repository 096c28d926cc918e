"""Floating-point numbers that share a scale by groups of input channels, or by blocks: how every such format fits a weight.

    w[o, i] = element(code[o, i]) * scale[o // a, i // b] * factor

A scale is searched among those near to what puts the group's largest weight on the largest number. With E2M1 and E4M3 scales
that are all that are stored differently within a factor of about two, so that a largest weight on 4, where the numbers are
denser, is among them. Each weight's error counts as much as its input channel matters.

Source: Rouhani et al., "Microscaling Data Formats", 2023; Liu et al., "LLM-FP4", EMNLP 2023, whose exponent bias is the
logarithm of our scale; the search contains the choice of Cook et al., "Four Over Six", 2025.

Shape suffixes: O out_features, I in_features, N blocks of rows, G groups in a row, E elements of a group, C adjacent columns.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.errors import RecipeError, SourceError
from compressor.formats.base import Format, PartSpec, QuantizedTensor
from compressor.formats.numerics.activations import static_part
from compressor.formats.numerics.codes import FloatCodes, values
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import Minifloat, ScaleType

AT_ONCE = 2**20  # elements searched together: bounds the temporaries


class FloatFormat:
    """Base class of formats of floating-point numbers: what follows from the parts and the codes."""

    part_names: ClassVar[tuple[str, ...]]
    activations: str | None

    @abstractmethod
    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return the tensors on disk, as `Format` says."""

    @abstractmethod
    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        """Unpack a weight, as `Format` says."""

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))

    @property
    def static_inputs(self) -> bool:
        return self.activations is not None and static_part(self.activations) is not None

    def input_parts(self) -> dict[str, PartSpec]:
        """Return the tensors that are stored for the rounding of activations."""
        part = None if self.activations is None else static_part(self.activations)
        return {} if part is None else {part: (torch.float32, (1,))}

    def input_number(self, packed: QuantizedTensor) -> float | None:
        """The number that is stored of it."""
        return next((float(packed.parts[part]) for part in self.input_parts()), None)

    def stored_inputs(self, codes: FloatCodes) -> dict[str, Tensor]:
        """The part again.

        Raises:
            RecipeError: it was to be found in calibration, and nobody looked.
        """
        if self.static_inputs and codes.inputs is None:
            raise RecipeError(f"activations: {self.activations} needs what layers read, which this pass does not look at")
        return {part: torch.tensor([codes.inputs], device=codes.codes_OI.device) for part in self.input_parts()}


@dataclass(frozen=True)
class FloatGrid:
    """Codes are uint8, those of the element."""

    format: Format
    element: Minifloat
    kind: ScaleType
    scale_NG: Tensor  # fp32, numbers that are stored as they are
    group_size: int  # columns
    rows: int = 1  # output channels that share a scale
    factor: float = 1.0  # of the whole weight: a power of two, so that no product with it is rounded
    inputs: float | None = None  # stored with the weight: see compressor/formats/numerics/activations.py
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        codes = torch.empty(w_OC.shape, dtype=torch.uint8, device=w_OC.device)
        for part, scale in self._groups(column, w_OC.shape):
            codes[:, part] = self.element.encode(w_OC[:, part] / scale)
        return codes

    def decode(self, codes: Tensor, column: int) -> Tensor:
        decoded = self.element.decode(codes)
        for part, scale in self._groups(column, codes.shape):
            decoded[:, part] *= scale
        return decoded

    @property
    def width(self) -> int:
        return self.group_size

    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "FloatGrid":
        fit, scale_NG = FloatFit(self.element, self.kind, -1, self.rows, self.factor), self.scale_NG.clone()
        scale_NG[:, column // self.group_size] = fit.grid(self.format, w_OC, importance_C, search).scale_NG[:, 0]
        return replace(self, scale_NG=scale_NG)

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "FloatGrid":
        group, scale_NG = column // self.group_size, self.scale_NG.clone()
        slope, curvature = (pad(of, (0, -len(of) % self.rows)).view(-1, self.rows).sum(1) for of in (slope_O, curvature_O))
        best = scale_NG[:, group] * (1 + slope / curvature).clamp(min=0)
        stored = self.kind.at(self.kind.nearest(torch.where(curvature > 0, best, 1.0)))
        scale_NG[:, group] = torch.where(curvature > 0, stored, scale_NG[:, group])
        return replace(self, scale_NG=scale_NG)

    def pack(self, codes: Tensor) -> QuantizedTensor:
        scale = self.kind.stored(self.scale_NG)
        packed = FloatCodes(self.element, codes, scale, self.factor, self.rows, self.inputs)
        return self.format.stored(packed, (codes.shape[0], codes.shape[1]))

    def _groups(self, column: int, shape: torch.Size) -> Iterator[tuple[slice, Tensor]]:
        """The groups that adjacent columns lie in: which of them, and what their numbers are multiplied by, [O, 1]."""
        (rows, count), size = shape, self.group_size
        for group in range(column // size, (column + count - 1) // size + 1):
            part = slice(max(group * size - column, 0), min((group + 1) * size - column, count))
            scale = self.scale_NG[:, group, None] * self.factor
            yield part, scale if self.rows == 1 else scale.repeat_interleave(self.rows, 0)[:rows]


@dataclass(frozen=True)
class FloatFit:
    """The settings of a fit.

    Args:
        element: The numbers.
        kind: Numbers that scales are stored as.
        group_size: Adjacent input channels that share a scale; -1 for the whole row.
        rows: Output channels that share one; -1 for all.
        factor: Factor of the whole weight.
        inputs: Scale of the activations, as in `FloatGrid`.
    """

    element: Minifloat
    kind: ScaleType
    group_size: int
    rows: int = 1
    factor: float = 1.0
    inputs: float | None = None

    def grid(self, fmt: Format, w_OI: Tensor, importance_I: Tensor | None, search: bool) -> FloatGrid:
        """The grid of a format for one weight; arguments and errors as of `Format.fit`."""
        out, columns = w_OI.shape
        count, rows = groups(columns, self.group_size), out if self.rows == -1 else self.rows
        importance = torch.ones(columns, device=w_OI.device) if importance_I is None else importance_I.float()
        importance_GE = importance.view(count, 1, -1).expand(count, rows, -1).flatten(1)
        together = max(1, AT_ONCE // (columns * rows)) * rows
        scales = [
            self._scales(self._blocks(part, rows, count) / self.factor, importance_GE, search)
            for part in w_OI.split(together)
        ]
        return FloatGrid(fmt, self.element, self.kind, torch.cat(scales), columns // count, rows, self.factor, self.inputs)

    @staticmethod
    def _blocks(w_OI: Tensor, rows: int, count: int) -> Tensor:
        """The elements of each block, fp32 [N, G, E]; rows that are missing from the last are zero."""
        whole = pad(w_OI.float(), (0, 0, 0, -len(w_OI) % rows))
        return whole.view(len(whole) // rows, rows, count, -1).transpose(1, 2).flatten(2)

    def _scales(self, w_NGE: Tensor, importance_GE: Tensor, search: bool) -> Tensor:
        """The scale [N, G] of each block; one of zeros gets the least that is stored."""
        start = self.kind.ceiling(w_NGE.abs().amax(-1), self.element)
        best = self.kind.at(start)
        if not search:
            return best
        least = torch.full(start.shape, torch.inf, device=w_NGE.device)
        for offset in sorted(self.kind.around, key=abs):  # of equals the nearest
            scale = self.kind.at(start + offset)
            missed = self.element.round(w_NGE / scale[..., None]).mul_(scale[..., None]).sub_(w_NGE)
            error = missed.square_().mul_(importance_GE).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best


def bytes_of(numbers: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The codes of numbers that lie as they are, uint8.

    Raises:
        SourceError: they are of another kind: loaders take any floating-point dtype for another.
    """
    if numbers.dtype != dtype:
        raise SourceError(f"{where} is stored as {numbers.dtype} where {dtype} is needed; get a sound copy")
    return numbers.view(torch.uint8)


def pairs(codes_OI: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte [O, I / 2], the even column in the low bits."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpaired(bytes_OB: Tensor) -> Tensor:
    """The codes again."""
    return torch.stack([bytes_OB & 15, bytes_OB >> 4], dim=2).flatten(1)
