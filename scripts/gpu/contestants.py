"""List what is timed: the ways to multiply by a weight of a format, the product in bf16, and other libraries."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rivals import Rival
from timing import Call, Gpu, copies
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from weights import layout_of, make, nbytes

from compressor.formats.numerics.codes import FloatCodes
from compressor.runtime.kernels import native
from compressor.runtime.kernels.cuda import instances
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.fp8_rows import Fp8Rows

FUSED, ALONE, UNPACKED, NATIVE, DENSE = "fused", "fused, without overlap", "dequantised", "native", "bf16"
FORMAT_OF_RIVALS = "4 bits"

Shape = tuple[int, int]


@dataclass(frozen=True)
class Contestant:
    """A way to multiply."""

    format: str
    kernel: str
    nbytes: int  # of one weight
    calls: Callable[[int], Sequence[Call]]  # products by each of its weights, for a number of tokens
    foreign: bool = False  # whose failure is a result

    @property
    def name(self) -> str:
        return f"{self.format}, {self.kernel}"


@dataclass(frozen=True)
class Weights:
    """Several of one shape and format."""

    format: str
    layout: Layout
    each: list[list[Tensor]]
    shape: Shape
    nbytes: int  # of one

    @staticmethod
    def random(name: str, shape: Shape, gpu: Gpu, count: int | None = None) -> "Weights":
        """As many as the cache does not hold, or `count`. One is random, the others are copies of it."""
        codes = make(name, *shape, gpu.device)
        layout = layout_of(codes)
        parts = layout.arrange(codes)
        size = nbytes(parts)
        count = count or copies(size, gpu.cache_bytes)
        each = [list(parts.values()), *([part.clone() for part in parts.values()] for _ in range(count - 1))]
        return Weights(name, layout, each, shape, size)


def fused(gpu: Gpu, weights: Weights, kernel: str = FUSED, tile: Tile | None = None) -> Contestant:
    """Our product, by the instance that it chooses or by a given one, whose kernels may overlap or not."""
    tiles = None if tile is None else (tile,)
    rows, columns = weights.shape

    def calls(tokens: int) -> list[Call]:
        kernels = gpu.kernels(weights.layout.name, tiles, kernel != ALONE)
        own = tile or instances.choose(weights.layout, tokens, rows, gpu.multiprocessors)
        x_MK = _activations(gpu, tokens, columns + -columns % weights.layout.chunk)
        y_MN = torch.empty(tokens, rows, dtype=torch.bfloat16, device=gpu.device)
        return [functools.partial(kernels.linear, x_MK, parts, y_MN, None, own) for parts in weights.each]

    return Contestant(weights.format, kernel, weights.nbytes, calls)


def unpacked(gpu: Gpu, weights: Weights) -> Contestant:
    """Dequantise, then multiply by the dense weight."""

    def calls(tokens: int) -> list[Call]:
        kernels = gpu.kernels(weights.layout.name)
        x_MK = _activations(gpu, tokens, weights.shape[1])
        w_NK = torch.empty(weights.shape, dtype=torch.bfloat16, device=gpu.device)

        def product(parts: list[Tensor]) -> None:
            kernels.dequantize(parts, w_NK)
            dense_linear(x_MK, w_NK)

        return [functools.partial(product, parts) for parts in weights.each]

    return Contestant(weights.format, UNPACKED, weights.nbytes, calls)


def natively(gpu: Gpu, weights: Weights) -> Contestant:
    """FP8 multiplied as it is by activations that are rounded to FP8 first."""
    rows, columns = weights.shape
    codes = make(weights.format, rows, columns, gpu.device)
    assert isinstance(codes, FloatCodes)
    layout = Fp8Rows.of(codes)
    assert layout is not None
    parts = list(layout.arrange(codes).values())
    each = [parts, *([part.clone() for part in parts] for _ in range(len(weights.each) - 1))]

    def calls(tokens: int) -> list[Call]:
        x_MK = _activations(gpu, tokens, columns)
        return [functools.partial(native.product, x_MK, own, layout, rows, None) for own in each]

    return Contestant(weights.format, NATIVE, weights.nbytes, calls)


def dense(gpu: Gpu, shape: Shape, count: int | None = None) -> Contestant:
    """The product in bf16."""
    first = torch.randn(shape, device=gpu.device).bfloat16()
    each = [first, *(first.clone() for _ in range((count or copies(first.nbytes, gpu.cache_bytes)) - 1))]

    def calls(tokens: int) -> list[Call]:
        x_MK = _activations(gpu, tokens, shape[1])
        return [functools.partial(dense_linear, x_MK, w_NK) for w_NK in each]

    return Contestant(DENSE, DENSE, first.nbytes, calls)


def foreign(gpu: Gpu, name: str, shape: Shape, rival: Rival) -> Contestant:
    """Another library's product."""

    def calls(tokens: int) -> list[Call]:
        x_MK = _activations(gpu, tokens, shape[1]).to(rival.dtype)
        return [functools.partial(product, x_MK) for product in rival.products]

    return Contestant(FORMAT_OF_RIVALS, name, rival.nbytes, calls, foreign=True)


def one_after_the_other(layers: Sequence[Contestant]) -> Contestant:
    """The layers of a block, block after block: of each the first weight, of each the second, …"""

    def calls(tokens: int) -> list[Call]:
        of_layer = [layer.calls(tokens) for layer in layers]
        return [call for block in zip(*of_layer, strict=True) for call in block]

    size = sum(layer.nbytes for layer in layers) // len(layers)
    return Contestant(layers[0].format, layers[0].kernel, size, calls)


def layout_named(name: str) -> Layout:
    """The layout of a format."""
    return layout_of(make(name, 128, 256))


def _activations(gpu: Gpu, tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device=gpu.device).bfloat16()
