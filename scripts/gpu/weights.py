"""Random weights in the formats that the kernels take, to check and to time them with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.formats.numerics.codes import Codes, DenseCodes, FloatCodes, IntCodes, SignCodes, VectorCodes
from compressor.formats.numerics.minifloat import E2M1, E4M3, Minifloat
from compressor.runtime.kernels.layouts import Layout, layout_for

Make = Callable[[int, int, torch.device], Codes]  # of out_features, in_features, and where


class Format(NamedTuple):
    """How to make a weight, and what its out_features and in_features are multiples of."""

    make: Make
    rows: int = 1
    columns: int = 1


def _integers(bits: int, a: int, b: int, dtype: torch.dtype = torch.bfloat16, ordered: bool = False) -> Format:
    """With a scale for each a rows and b columns; 0 stands for all of them."""

    def make(rows: int, columns: int, device: torch.device) -> Codes:
        grid = (rows // (a or rows), columns // (b or columns))
        codes, zero = (_below(2**bits, shape, device) for shape in ((rows, columns), grid))
        scale = ((0.5 + torch.rand(grid, device=device)) * 2.0**-bits / columns**0.5).to(dtype)
        return IntCodes(bits, codes, scale, zero, torch.randperm(columns, device=device) if ordered else None)

    return Format(make, a or 1, b or 1)


def _floats(element: Minifloat, dtype: torch.dtype, group: int, block: int = 1) -> Format:
    """With scales of a dtype for each group of columns (0 for the whole row) of a block of rows."""

    def make(rows: int, columns: int, device: torch.device) -> Codes:
        shape = (-(-rows // block), columns // group if group else 1)
        scale = (2.0 ** (torch.randint(-3, 4, shape, device=device) - element.bias - 6)).to(dtype)
        size = _below(len(element.magnitudes), (rows, columns), device)
        codes = size + _below(2, (rows, columns), device) * element.sign
        return FloatCodes(element, codes, scale, 0.1 / columns**0.5 if dtype == torch.float8_e4m3fn else 1.0, block)

    return Format(make, columns=group or 1)


def _vectors(bits: int, residual_bits: int = 0) -> Format:
    def make(rows: int, columns: int, device: torch.device) -> Codes:
        def part(of: int, size: float) -> tuple[Tensor, Tensor]:
            index = torch.randint(0, 2**of, (rows // 8, columns), dtype=torch.int32, device=device)
            return index, (size * torch.randn(2**of, 8, device=device)).bfloat16()

        own = part(bits, columns**-0.5)
        return VectorCodes(*own, *part(residual_bits, 0.2 * columns**-0.5)) if residual_bits else VectorCodes(*own)

    return Format(make, rows=8)


def _signs(planes: int, group: int) -> Format:
    def make(rows: int, columns: int, device: torch.device) -> Codes:
        scale = torch.rand(planes, rows, columns // group if group else 1, device=device) / columns**0.5
        return SignCodes(_below(2, (planes, rows, columns), device), scale.bfloat16())

    return Format(make, columns=group or 1)


def _dense(rows: int, columns: int, device: torch.device) -> Codes:
    """Normal, but for a weight in a thousand that is 0."""
    w_OI = torch.randn(rows, columns, device=device).bfloat16() / columns**0.5
    return DenseCodes(w_OI.masked_fill(torch.rand(rows, columns, device=device) < 1e-3, 0))


def _below(limit: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(0, limit, shape, dtype=torch.uint8, device=device)


FORMATS: dict[str, Format] = {
    "int4-g128": _integers(4, 1, 128),
    "int4-g32": _integers(4, 1, 32),
    "int4-row-fp16-ordered": _integers(4, 1, 0, torch.float16, ordered=True),
    "int3-g128": _integers(3, 1, 128),
    "int2-g64": _integers(2, 1, 64),
    "int2-g128-fp16": _integers(2, 1, 128, torch.float16),
    "int8-g128": _integers(8, 1, 128),
    "int4-rows16": _integers(4, 16, 1),
    "int3-rows-ordered": _integers(3, 0, 1, ordered=True),
    "int2-rows16": _integers(2, 16, 1),
    "int8-rows16": _integers(8, 16, 1),
    "nvfp4": _floats(E2M1, torch.float8_e4m3fn, 16),
    "mxfp4": _floats(E2M1, torch.float8_e8m0fnu, 32),
    "mxfp8": _floats(E4M3, torch.float8_e8m0fnu, 32),
    "fp4-row": _floats(E2M1, torch.bfloat16, 0),
    "fp4-g32": _floats(E2M1, torch.bfloat16, 32),
    "e1m2-g128": _floats(Minifloat(1, 2), torch.bfloat16, 128),
    "fp8-row": _floats(E4M3, torch.bfloat16, 0),
    "fp8-block": _floats(E4M3, torch.float32, 128, 128),
    "e2m3-row": _floats(Minifloat(2, 3), torch.float16, 0),
    "vectors12": _vectors(12),
    "vectors8+8": _vectors(8, 8),
    "signs1-g128": _signs(1, 128),
    "signs3-row": _signs(3, 0),
    "lossless": Format(_dense),
}
# Those of which speed is asked: of each family one or two that are in use.
MEASURED: dict[str, Format] = {
    **{name: FORMATS[name] for name in ("int4-g128", "int3-g128", "int2-g64", "int8-g128")},
    "int4-rows128": _integers(4, 128, 1),
    **{name: FORMATS[name] for name in ("nvfp4", "mxfp4", "mxfp8", "fp8-row", "vectors12", "signs1-g128", "lossless")},
}


def make(name: str, rows: int, columns: int, device: str = "cpu") -> Codes:
    """A weight of a format."""
    return (FORMATS | MEASURED)[name].make(rows, columns, torch.device(device))


def layout_of(codes: Codes) -> Layout:
    """How the kernels want it."""
    layout = layout_for(codes)
    assert layout is not None
    return layout


def nbytes(parts: dict[str, Tensor]) -> int:
    """Bytes that a product reads of a weight: all of them, as no layout holds what it does not need."""
    return sum(part.nbytes for part in parts.values())
