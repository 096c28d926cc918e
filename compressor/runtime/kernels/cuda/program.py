"""The kernels of a layout on one device: compiled, loaded, and launched on tensors."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import KernelError
from compressor.runtime.kernels.cuda import instances, nvrtc, sources
from compressor.runtime.kernels.cuda.driver import Kernel, driver
from compressor.runtime.kernels.cuda.instances import ROWS, TOKENS, Tile
from compressor.runtime.kernels.layouts import Layout, named

ARGUMENTS = "4P4i"  # `Arguments` of linear.cuh
MULTIPLY = (ARGUMENTS, "P", "P", "P", "i", "i")
DEQUANTIZE = (ARGUMENTS, "P", "i", "i")
PARTS = 4
DEQUANTIZE_WARPS = 8
DEQUANTIZE_BLOCKS = 8  # to each multiprocessor
ALIGNMENT = 16


@dataclass(frozen=True)
class Program:
    """Its kernels."""

    layout: Layout
    multiprocessors: int
    multiply: Mapping[Tile, Kernel]
    unpack: Kernel

    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        """y = x W^T + bias, on the current stream of the current device."""
        tokens, columns = x_MK.shape
        rows = y_MN.shape[1]
        if x_MK.data_ptr() % ALIGNMENT:  # a view into the middle of something
            x_MK = x_MK.clone()
        grid = (_ceil(_ceil(rows, ROWS), tile.rb), _ceil(tokens, TOKENS * tile.nt))
        self.multiply[tile](
            grid,
            torch.cuda.current_stream().cuda_stream,
            *self._arguments(parts, rows, columns),
            x_MK.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y_MN.data_ptr(),
            tokens,
            rows,
        )

    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        """w = the weight, on the current stream of the current device."""
        rows, columns = w_NK.shape
        chunks = _ceil(columns, self.layout.chunk)
        blocks = min(_ceil(_ceil(rows, ROWS) * chunks, DEQUANTIZE_WARPS), DEQUANTIZE_BLOCKS * self.multiprocessors)
        arguments = self._arguments(parts, rows, chunks * self.layout.chunk)
        self.unpack((blocks, 1), torch.cuda.current_stream().cuda_stream, *arguments, w_NK.data_ptr(), rows, columns)

    def _arguments(self, parts: Sequence[Tensor], rows: int, columns: int) -> tuple[int, ...]:
        given = parts[:-1] if getattr(self.layout, "ordered", False) else parts  # the order is the caller's
        pointers = [part.data_ptr() for part in given]
        return (*pointers, *[0] * (PARTS - len(pointers)), rows, columns, instances.group(self.layout), 0)


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of what a device runs; `a` is for all of its instructions, not only those that later ones have, too."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def load(
    name: str,
    device: int,
    tiles: tuple[Tile, ...] | None = None,
    overlapping: bool = True,
    directory: Path = sources.HERE,
) -> Program:
    """Compiles and loads a layout's kernels, once.

    Args:
        name: Name of the layout.
        device: torch's number of the GPU.
        tiles: Instances of `linear`; None for those that `instances.choose` chooses from.
        overlapping: May kernels start while the one before still runs? Only some devices can do that.
        directory: Directory of the sources.

    Raises:
        KernelError: they cannot be compiled or loaded, or a CUDA graph is being captured, which forbids it.
    """
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"CUDA graph: the kernels for {name} are not loaded yet; run the model once before it is captured, "
            "or call compressor.runtime.kernels.cuda.prepare"
        )
    layout = named(name)
    properties = torch.cuda.get_device_properties(device)
    tiles = tiles or instances.tiles(layout)
    expressions = [*(instances.linear_name(layout, tile) for tile in tiles), instances.dequantize_name(layout)]
    cubin = nvrtc.compiled(sources.text(layout, directory), expressions, architecture((properties.major, properties.minor)))
    module, shared = driver().load(cubin.code, device), instances.shared_bytes(layout)
    overlapping = overlapping and properties.major >= 9

    def kernel(expression: str, parameters: tuple[str, ...], warps: int) -> Kernel:
        return module.kernel(cubin.names[expression], parameters, 32 * warps, shared_bytes=shared, overlapping=overlapping)

    multiply = {tile: kernel(instances.linear_name(layout, tile), MULTIPLY, tile.warps) for tile in tiles}
    return Program(
        layout,
        properties.multi_processor_count,
        multiply,
        kernel(instances.dequantize_name(layout), DEQUANTIZE, DEQUANTIZE_WARPS),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
