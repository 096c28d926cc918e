"""Integers of 2, 3, 4 or 8 bits (5 to 7 lie as 8) with, for each input channel, groups of output channels (AdaDim).

Parts: the codes as in `tile_order`, and, with K padded to whole chunks,

    scales  bf16 [N / a, K]
    zeros   bf16 [N / a, K]   128 + zero, at 8 bits zero

The kernel multiplies an input channel's activation by its scale, rounds to bf16, and multiplies that by codes less zero. A
tile's rows are all of one group: a, the rows that share a scale, is a multiple of 16, or all rows.

Shape suffixes as in `tile_order`; N and K are out_features and in_features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import IntCodes
from compressor.runtime.kernels.layouts import tile_order


@dataclass(frozen=True)
class InputGroups:
    """One arrangement; its name says all of it."""

    bits: int  # 2, 3, 4 or 8
    group: int  # rows that share a scale; 0 for all
    ordered: bool = False
    by_rows: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"int{self.bits}-rows{self.group}-bf16{'-ordered' if self.ordered else ''}"

    @staticmethod
    def parse(name: str) -> "InputGroups | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"int([2348])-rows(\d+)-bf16(-ordered)?", name)
        return InputGroups(int(found[1]), int(found[2]), found[3] is not None) if found else None

    @property
    def chunk(self) -> int:
        """Columns of a tile."""
        return tile_order.CHUNK[self.bits]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        return (*tile_order.code_parts(self.bits), "scales", "zeros", *(["order"] if self.ordered else []))

    @staticmethod
    def of(codes: IntCodes) -> "InputGroups | None":
        """The layout that takes these codes, or None."""
        rows, columns = codes.codes_OI.shape
        groups = codes.scale.shape[0]
        if codes.scale.shape[1] != columns or columns == 1 or codes.scale.dtype != torch.bfloat16:
            return None
        if groups > 1 and rows // groups % tile_order.ROWS:
            return None
        bits = codes.bits if codes.bits <= 4 else 8
        return InputGroups(bits, rows // groups if groups > 1 else 0, codes.order_I is not None)

    def arrange(self, codes: IntCodes) -> dict[str, Tensor]:
        """The parts."""
        missing = (0, -codes.codes_OI.shape[1] % self.chunk)
        parts = tile_order.pack_codes(codes.codes_OI, self.bits)
        parts["scales"] = pad(codes.scale, missing).contiguous()
        parts["zeros"] = pad((codes.zero.float() + self._bias).bfloat16(), missing)
        if codes.order_I is not None:
            parts["order"] = codes.order_I.int()
        return parts

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> IntCodes:
        """The codes that were arranged, but for widths of 5 to 7, which are 8 now."""
        scale, zero = (parts[name][:, : shape[1]] for name in ("scales", "zeros"))
        order = parts["order"].long() if self.ordered else None
        codes = tile_order.unpack_codes(parts, self.bits, shape)
        return IntCodes(self.bits, codes, scale, (zero.float() - self._bias).to(torch.uint8), order)

    @property
    def _bias(self) -> int:
        """Return the number that stored zero points are raised by, which decoding adds to a code."""
        return 0 if self.bits == 8 else 128
