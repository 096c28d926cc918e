"""List the instances of the kernel templates that a layout has, and choose the one for a product.

What the numbers of a tile mean, and how many registers they cost, is at the top of linear.cuh. The choices below follow from
registers and bytes on their way; `scripts/gpu/bench` measures them.
"""

import functools
from typing import NamedTuple

from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.floats import Floats
from compressor.runtime.kernels.layouts.input_groups import InputGroups
from compressor.runtime.kernels.layouts.int_groups import IntGroups
from compressor.runtime.kernels.layouts.lossless import Lossless
from compressor.runtime.kernels.layouts.signs import Signs
from compressor.runtime.kernels.layouts.vectors import Vectors

ROWS, TOKENS = 16, 8  # of the tensor core's product
WARPS = 8
MANY_ROW_TILES = 8  # to each multiprocessor: more than twice what it holds at a time


class Tile(NamedTuple):
    """The numbers of `linear`'s template."""

    nt: int  # eights of tokens
    rb: int  # rows of tiles of a block
    warps: int
    pf: int  # tiles of a warp on their way from memory


def decoder(layout: Layout) -> str:
    """The C++ type that decodes a layout."""
    match layout:
        case IntGroups():
            inner = 0 < layout.group < layout.chunk
            return f"IntGroups<{layout.bits}, {int(layout.scale == 'fp16')}, {int(inner)}>"
        case InputGroups():
            return f"InputGroups<{layout.bits}>"
        case Floats():
            element = layout.element
            return f"Floats<{element.exponent}, {element.mantissa}, {layout.scale.upper()}, {int(layout.inner)}>"
        case Vectors():
            return f"Vectors<{layout.bits}, {layout.residual_bits}>"
        case Signs():
            return f"Signs<{layout.planes}>"
        case Lossless():
            return "Lossless"
    raise AssertionError(f"no decoder for {layout.name}")


def group(layout: Layout) -> int:
    """`group` of the kernels' arguments."""
    return layout.group if isinstance(layout, IntGroups | InputGroups | Floats | Signs) else 0


def shared_bytes(layout: Layout) -> int:
    """Dynamic shared memory of a block."""
    return layout.shared_bytes if isinstance(layout, Vectors) else 0


def linear_name(layout: Layout, tile: Tile) -> str:
    """The name expression of an instance."""
    return f"linear<{decoder(layout)}, {', '.join(map(str, tile))}>"


def dequantize_name(layout: Layout) -> str:
    """Return the name of the kernel that dequantizes."""
    return f"dequantize<{decoder(layout)}>"


def tiles(layout: Layout) -> tuple[Tile, ...]:
    """All that `choose` may choose, for any product by this layout."""
    deep, flat = _depth(layout), -(-_depth(layout) // 2)
    if isinstance(layout, Vectors):  # a block copies the codebook first: few blocks, and room for it beside the sums
        return (Tile(1, 1, WARPS, deep), Tile(1, 2, WARPS, flat), Tile(2, 2, WARPS, flat), Tile(4, 1, WARPS, flat))
    few = (Tile(1, 1, WARPS, deep), Tile(1, 2, WARPS, flat), Tile(2, 1, WARPS, deep))
    return (*few, Tile(4, 1, WARPS, flat), Tile(8, 1, WARPS, 1 if layout.chunk > 64 else flat))


@functools.cache  # every launch asks
def choose(layout: Layout, tokens: int, rows: int, multiprocessors: int) -> Tile:
    """The instance for a product of this many tokens and output channels."""
    known = tiles(layout)
    enough = [tile for tile in known if TOKENS * tile.nt >= tokens] or [known[-1]]
    fitting = [tile for tile in enough if tile.nt == enough[0].nt]
    busy = MANY_ROW_TILES if not isinstance(layout, Vectors) else 1
    return fitting[-1] if -(-rows // ROWS) >= busy * multiprocessors else fitting[0]


def _depth(layout: Layout) -> int:
    """Tiles on their way where there are registers for them: of 16 bytes a lane four, and more bytes mean fewer tiles."""
    match layout:
        case InputGroups():  # which hold their columns' scales and zero points, too
            return 2 if layout.bits in (4, 8) else 1
        case Signs():
            return -(-4 // layout.planes)
        case Lossless():
            return 3  # with 2, ptxas spills for 16 tokens
        case _:
            return 4
