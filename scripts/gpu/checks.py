"""Compare one kernel at a time: products and dequantized weights. Nothing but the kernels needs a GPU here."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from parity import in_stored_order, product, steps_apart  # type: ignore[import-not-found] # of tests/kernels
from tolerance import TOLERANCE, error  # type: ignore[import-not-found]
from torch import Tensor
from weights import layout_of, make

from compressor.formats.numerics.activations import IN_PRODUCTS
from compressor.formats.numerics.codes import Codes, DenseCodes, FloatCodes, IntCodes, values
from compressor.runtime.kernels import native
from compressor.runtime.kernels.cuda import instances
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.fp8_rows import Fp8Rows

MARGIN = 64  # elements before and after an output, which leave it as aligned as it was


class Kernels(Protocol):
    """`program.Program`, or what stands in for it."""

    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None: ...
    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None: ...


Load = Callable[[Layout, bool], Kernels]  # of a layout, and whether kernels may overlap


class Finding(NamedTuple):
    """An error, and how large it may be."""

    what: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # which nan is not


def worst(findings: Sequence[Finding], count: int) -> list[Finding]:
    """The first few of those that are furthest off."""
    return sorted(findings, key=lambda finding: -math.inf if math.isnan(finding.error) else -finding.error)[:count]


@dataclass(frozen=True)
class Case:
    """A weight: what it stands for, and as the kernels want it."""

    name: str
    codes: Codes
    layout: Layout
    parts: list[Tensor]
    rows: int
    columns: int

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def on(self, device: torch.device) -> "Case":
        """The same with its parts on a device; the codes stay where they are."""
        return replace(self, parts=[part.to(device) for part in self.parts])

    def problem(self, tokens: int, *, bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Activations as a kernel takes them, a bias, and the product in fp64."""
        home = _device_of(self.codes)
        x_MK = torch.randn(tokens, self.columns, device=home).bfloat16()
        bias_N = torch.randn(self.rows, device=home).bfloat16() if bias else None
        exact = product(x_MK, self.codes, bias_N)
        stored = in_stored_order(x_MK, self.codes, self.layout.chunk).to(self.device)
        return stored, None if bias_N is None else bias_N.to(self.device), exact

    def compared(self, what: str, found: Tensor, expected: Tensor) -> Finding:
        """The error of a product."""
        off = error(found.to(expected.device), expected)
        return Finding(f"{self.name} {self.rows} x {self.columns}, {what}", off, TOLERANCE)


def laid_out(name: str, rows: int, columns: int, device: torch.device) -> Case:
    """A random weight of a format."""
    codes = make(name, rows, columns, str(device))
    layout = layout_of(codes)
    return Case(name, codes, layout, list(layout.arrange(codes).values()), rows, columns)


def products(case: Case, load: Load, tokens: Sequence[int]) -> Iterator[Finding]:
    """By all instances that the layout has, with and without bias, overlapping and not."""
    for count in tokens:
        for bias in (False, True):
            x_MK, bias_N, expected = case.problem(count, bias=bias)
            for overlapping in (False, True):
                kernels = load(case.layout, overlapping)
                for tile in instances.tiles(case.layout):
                    y_MN, whole = poisoned(count, case.rows, case.device)
                    kernels.linear(x_MK, case.parts, y_MN, bias_N, tile)
                    what = f"{count} tokens, {'with bias, ' * bias}{'overlapping, ' * overlapping}{tile}"
                    yield case.compared(what, y_MN, expected)
                    yield Finding(f"{case.name}: {what}, elements written outside", written_outside(whole), 0)


def dequantised(case: Case, load: Load) -> Iterator[Finding]:
    """The weight itself: one bf16 apart at most, as a scale may be rounded before the product is; without loss none."""
    expected = values(case.codes).bfloat16()
    order = case.codes.order_I if isinstance(case.codes, IntCodes) else None
    expected = expected if order is None else expected[:, order]
    for overlapping in (False, True):
        w_NK, whole = poisoned(case.rows, case.columns, case.device)
        load(case.layout, overlapping).dequantize(case.parts, w_NK)
        what = f"{case.name} {case.rows} x {case.columns}, dequantised{', overlapping' * overlapping}"
        apart = steps_apart(w_NK.to(expected.device), expected)
        yield Finding(f"{what}, bf16 numbers apart", apart, 0 if isinstance(case.codes, DenseCodes) else 1)
        yield Finding(f"{what}, elements written outside", written_outside(whole), 0)


def natively(name: str, rows: int, columns: int, device: torch.device, tokens: Sequence[int]) -> Iterator[Finding]:
    """Products by a weight of FP8 as the tensor cores take it, of activations that are rounded first."""
    codes = make(name, rows, columns, str(device))
    assert isinstance(codes, FloatCodes)
    layout = Fp8Rows.of(codes)
    assert layout is not None
    case = Case(f"{name}, native", codes, layout, list(layout.arrange(codes).values()), rows, columns)
    for count in tokens:
        x_MK, bias_N, _ = case.problem(count, bias=True)
        expected = product(IN_PRODUCTS[native.WAY](x_MK[:, :columns].float()), codes, bias_N)
        yield case.compared(f"{count} tokens", native.product(x_MK, case.parts, layout, rows, bias_N), expected)


def poisoned(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An output full of NaN, and the larger tensor that it lies in."""
    whole = torch.full((rows * columns + 2 * MARGIN,), math.nan, dtype=torch.bfloat16).to(device)
    return whole[MARGIN:-MARGIN].view(rows, columns), whole


def written_outside(whole: Tensor) -> int:
    """How many elements of the margins are no longer NaN."""
    margins = torch.stack([whole[:MARGIN].cpu(), whole[-MARGIN:].cpu()])
    return int((~margins.isnan()).sum())


def _device_of(codes: Any) -> torch.device:
    tensors = (getattr(codes, field.name) for field in fields(codes))
    return next(tensor.device for tensor in tensors if isinstance(tensor, Tensor))
