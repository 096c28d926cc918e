"""Integers of 2, 3, 4 or 8 bits (5 to 7 lie as 8) with groups along the input channels of an output channel.

Parts, with R = ceil(N / 16): the codes as in `tile_order`, and

    scales  int32 [R, G, 16]   of each row and group: the scale's 16 bits, above them bf16(128 + zero), at 8 bits bf16(zero)

A group is a multiple of the chunk, or divides it into parts of which each lane's run lies in one: other group sizes are
divided further, where possible, with equal scales. `order_I` of the codes becomes a part `order`, int32 [K].

Shape suffixes as in `tile_order`; N and K are out_features and in_features, G groups.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import IntCodes
from compressor.runtime.kernels.layouts import tile_order

SCALES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class IntGroups:
    """One arrangement; its name says all of it."""

    bits: int  # 2, 3, 4 or 8
    group: int  # columns that share a scale; 0 for the whole row
    scale: str  # bf16 or fp16
    ordered: bool = False
    by_rows: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group}-{self.scale}{'-ordered' if self.ordered else ''}"

    @staticmethod
    def parse(name: str) -> "IntGroups | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"int(\d)-g(\d+)-(bf16|fp16)(-ordered)?", name)
        return IntGroups(int(found[1]), int(found[2]), found[3], found[4] is not None) if found else None

    @property
    def chunk(self) -> int:
        """Columns of a tile."""
        return tile_order.CHUNK[self.bits]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        return (*tile_order.code_parts(self.bits), "scales", *(["order"] if self.ordered else []))

    @staticmethod
    def of(codes: IntCodes) -> "IntGroups | None":
        """The layout that takes these codes, or None."""
        rows, columns = codes.codes_OI.shape
        if codes.scale.shape[0] != rows or codes.scale.dtype not in SCALES:
            return None
        bits = codes.bits if codes.bits <= 4 else 8
        size = columns // codes.scale.shape[1]
        if codes.scale.shape[1] > 1 and size % tile_order.CHUNK[bits]:
            size = math.gcd(size, tile_order.CHUNK[bits])
            if size % (tile_order.CHUNK[bits] // 4):
                return None
        return IntGroups(bits, size if codes.scale.shape[1] > 1 else 0, SCALES[codes.scale.dtype], codes.order_I is not None)

    def arrange(self, codes: IntCodes) -> dict[str, Tensor]:
        """The parts."""
        parts = tile_order.pack_codes(codes.codes_OI, self.bits) | {"scales": self._arrange_scales(codes)}
        if codes.order_I is not None:
            parts["order"] = codes.order_I.int()
        return parts

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> IntCodes:
        """The codes that were arranged, but for groups that were divided and widths of 5 to 7, which are 8 now."""
        groups = shape[1] // self.group if self.group else 1
        words = parts["scales"].transpose(1, 2).flatten(0, 1)[: shape[0], :groups]
        dtype = next(dtype for dtype, name in SCALES.items() if name == self.scale)
        scale = words.to(torch.int16).view(dtype)
        zero = (words >> 16).to(torch.int16).view(torch.bfloat16).float() - self._bias
        order = parts["order"].long() if self.ordered else None
        return IntCodes(self.bits, tile_order.unpack_codes(parts, self.bits, shape), scale, zero.to(torch.uint8), order)

    @property
    def _bias(self) -> int:
        """Return the number that stored zero points are raised by, which decoding adds to a code."""
        return 0 if self.bits == 8 else 128

    def _arrange_scales(self, codes: IntCodes) -> Tensor:
        columns = codes.codes_OI.shape[1]
        size = columns // codes.scale.shape[1]
        repeats = size // self.group if self.group else 1
        zero = (codes.zero.float() + self._bias).bfloat16().view(torch.int16).int() << 16
        words: Tensor = (zero | codes.scale.view(torch.int16).int() & 0xFFFF).repeat_interleave(repeats, 1)
        groups = tile_order.round_up(columns, self.chunk) // self.group if self.group else 1
        words = pad(words, (0, groups - words.shape[1], 0, -words.shape[0] % tile_order.ROWS))
        words = words.unflatten(0, (-1, tile_order.ROWS))
        return words.transpose(1, 2).contiguous()
