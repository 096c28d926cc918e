"""Floating-point grids: fit scales that groups of input channels, or blocks, share. All floating-point formats use this.

    w[o, i] = element(code[o, i]) * scale[o // a, i // b] * factor

A scale is searched near the one that maps the group's largest weight to the largest number. With E4M3 scales the search
covers all scales within a factor of about two. For E2M1 that includes mapping the largest weight to 4, where the numbers are
denser. Each weight's error is weighted by the importance of its input channel.

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
    """Base class of floating-point formats: methods that follow from `checkpoint_parts` and `codes`."""

    part_names: ClassVar[tuple[str, ...]]
    activations: str | None

    @abstractmethod
    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """See `Format`."""

    @abstractmethod
    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        """See `Format`."""

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))

    @property
    def static_inputs(self) -> bool:
        return self.activations is not None and static_part(self.activations) is not None

    def input_parts(self) -> dict[str, PartSpec]:
        """Return the tensor stored for the activation scheme, if there is one."""
        part = None if self.activations is None else static_part(self.activations)
        return {} if part is None else {part: (torch.float32, (1,))}

    def input_number(self, packed: QuantizedTensor) -> float | None:
        """Return the number stored for the activation scheme; None if there is none."""
        return next((float(packed.parts[part]) for part in self.input_parts()), None)

    def stored_inputs(self, codes: FloatCodes) -> dict[str, Tensor]:
        """Return the tensor to store for the activation scheme, by name.

        Raises:
            RecipeError: the scheme needs a number from calibration, and the pass did not collect it.
        """
        if self.static_inputs and codes.inputs is None:
            raise RecipeError(f"activations: {self.activations} needs what layers read, which this pass does not look at")
        return {part: torch.tensor([codes.inputs], device=codes.codes_OI.device) for part in self.input_parts()}


@dataclass(frozen=True)
class FloatGrid:
    """Scales fitted to one weight. Codes are uint8, those of the element type."""

    format: Format
    element: Minifloat
    kind: ScaleType
    scale_NG: Tensor  # fp32, values that the stored type can hold
    group_size: int  # number of columns
    rows: int = 1  # number of output channels that share a scale
    factor: float = 1.0  # one for the weight: a power of two, so that no product with it is rounded
    inputs: float | None = None  # scale or divisor of activations, stored with the weight: see activations.py
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
        """Yield, for each group of some adjacent columns, its slice of them and its scale times the factor, [O, 1]."""
        (rows, count), size = shape, self.group_size
        for group in range(column // size, (column + count - 1) // size + 1):
            part = slice(max(group * size - column, 0), min((group + 1) * size - column, count))
            scale = self.scale_NG[:, group, None] * self.factor
            yield part, scale if self.rows == 1 else scale.repeat_interleave(self.rows, 0)[:rows]


@dataclass(frozen=True)
class FloatFit:
    """Settings of a fit.

    Args:
        element: Element type of the weights.
        kind: Number type of the scales.
        group_size: Number of adjacent input channels that share a scale; -1 for the whole row.
        rows: Number of output channels that share a scale; -1 for all.
        factor: Factor of the weight, see `FloatGrid`.
        inputs: Scale or divisor of activations, see `FloatGrid`.
    """

    element: Minifloat
    kind: ScaleType
    group_size: int
    rows: int = 1
    factor: float = 1.0
    inputs: float | None = None

    def grid(self, fmt: Format, w_OI: Tensor, importance_I: Tensor | None, search: bool) -> FloatGrid:
        """Fit a grid of a format to one weight; arguments and errors are those of `Format.fit`."""
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
        """Return the elements of each block, fp32 [N, G, E]; the last block is padded with rows of zeros."""
        whole = pad(w_OI.float(), (0, 0, 0, -len(w_OI) % rows))
        return whole.view(len(whole) // rows, rows, count, -1).transpose(1, 2).flatten(2)

    def _scales(self, w_NGE: Tensor, importance_GE: Tensor, search: bool) -> Tensor:
        """Return the scale of each block, [N, G]; a block of zeros gets the smallest that can be stored."""
        start = self.kind.ceiling(w_NGE.abs().amax(-1), self.element)
        best = self.kind.at(start)
        if not search:
            return best
        least = torch.full(start.shape, torch.inf, device=w_NGE.device)
        for offset in sorted(self.kind.around, key=abs):  # of equally good scales the nearest wins
            scale = self.kind.at(start + offset)
            missed = self.element.round(w_NGE / scale[..., None]).mul_(scale[..., None]).sub_(w_NGE)
            error = missed.square_().mul_(importance_GE).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best


def bytes_of(numbers: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return the codes, uint8, of numbers that are stored unpacked.

    Raises:
        SourceError: they have another dtype. Loaders accept any floating-point dtype, so this must be checked here.
    """
    if numbers.dtype != dtype:
        raise SourceError(f"{where} is stored as {numbers.dtype} where {dtype} is needed; get a sound copy")
    return numbers.view(torch.uint8)


def pairs(codes_OI: Tensor) -> Tensor:
    """Pack two 4-bit codes into a byte, [O, I / 2], the even column in the low bits."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpaired(bytes_OB: Tensor) -> Tensor:
    """Undo `pairs`; return codes [O, I]."""
    return torch.stack([bytes_OB & 15, bytes_OB >> 4], dim=2).flatten(1)
