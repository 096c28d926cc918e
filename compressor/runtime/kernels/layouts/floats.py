"""Floating-point numbers of 3 to 8 bits with a scale per group of columns or per row.

Parts, with R = ceil(N / 16) and C = ceil(K / chunk): the codes as in `tile_order`, in 4 bits or in 8 with the sign on top,
chunks being 64 or 32 columns, and

    scales  of reals   bf16, fp16 or fp32 [R, G, 16]   of each row and group, though several rows shared one
            of bytes   uint8 [R, C, L, 2]              of each group of a chunk, the one of row g and that of row g + 8:
                                                       E4M3 of 16 columns of 4 bits (L = 32), E8M0 of 32 columns (L = 16, or
                                                       8 for codes of 8 bits)
    factor  fp32 [1]                                   of the whole weight; E4M3 only

A group of reals is a multiple of the chunk, or, in bf16, divides it into parts of which each lane's run lies in one.

Bytes as scales of 4-bit codes are at most 2^9 in size: a bf16 that is 2^126 times too small has then room for the product.

Shape suffixes as in `tile_order`; N and K are out_features and in_features, G groups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import FloatCodes
from compressor.formats.numerics.minifloat import E2M1, Minifloat
from compressor.runtime.kernels.layouts import tile_order

REALS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BYTES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}
GROUP = {"e4m3": 16, "e8m0": 32}  # columns of a byte
NAMES = {dtype: name for name, dtype in (REALS | BYTES).items()}
LARGEST = 2.0**9


@dataclass(frozen=True)
class Floats:
    """One arrangement; its name says all of it."""

    element: Minifloat
    scale: str  # the kind: e4m3, e8m0, bf16, fp16 or fp32
    group: int  # columns that share a scale; 0 for the whole row

    @property
    def name(self) -> str:
        return f"{self.element.name}-g{self.group}-{self.scale}"

    @staticmethod
    def parse(name: str) -> "Floats | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"(e\dm\d)-g(\d+)-(e4m3|e8m0|bf16|fp16|fp32)", name)
        return Floats(Minifloat.parse(found[1]), found[3], int(found[2])) if found else None

    @property
    def bits(self) -> int:
        """Return the bits of a code: 4 or 8."""
        return 4 if self.element.bits <= 4 else 8

    @property
    def chunk(self) -> int:
        """Columns of a tile."""
        return tile_order.CHUNK[self.bits]

    @property
    def inner(self) -> bool:
        """A group is smaller than a chunk: the scale has to be on the weights."""
        return 0 < self.group < self.chunk

    @property
    def by_rows(self) -> bool:
        """`factor` belongs to one weight."""
        return self.scale != "e4m3"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        return ("codes", "scales") if self.by_rows else ("codes", "scales", "factor")

    @staticmethod
    def of(codes: FloatCodes) -> "Floats | None":
        """The layout that takes these codes, or None."""
        columns, groups = codes.codes_OI.shape[1], codes.scale.shape[1]
        kind, size = NAMES.get(codes.scale.dtype), columns // groups
        if kind is None or (kind != "e4m3" and codes.factor != 1):
            return None
        layout = Floats(codes.element, kind, 0 if kind in REALS and groups == 1 else size)
        return layout if (layout._takes_reals() if kind in REALS else layout._takes_bytes(codes)) else None

    def _takes_reals(self) -> bool:
        in_runs = self.scale == "bf16" and self.group and self.chunk % self.group == 0 and self.group % (self.chunk // 4) == 0
        return self.group % self.chunk == 0 or bool(in_runs)

    def _takes_bytes(self, codes: FloatCodes) -> bool:
        if self.group != GROUP[self.scale] or codes.rows != 1 or codes.scale.float().isnan().any():
            return False
        if self.bits == 8:
            return self.scale == "e8m0"
        return self.element == E2M1 and bool((codes.scale.float().abs() <= LARGEST).all())

    def arrange(self, codes: FloatCodes) -> dict[str, Tensor]:
        """The parts."""
        sign, magnitude = codes.codes_OI & self.element.sign, codes.codes_OI & self.element.sign - 1
        top = sign << (self.bits - self.element.bits) | magnitude
        scales = self._arrange_reals(codes) if self.scale in REALS else self._arrange_bytes(codes.scale)
        parts = tile_order.pack_codes(top, self.bits) | {"scales": scales}
        return parts if self.by_rows else parts | {"factor": torch.tensor([codes.factor], device=top.device)}

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> FloatCodes:
        """The codes that were arranged, but for scales that rows shared, of which each row has one now."""
        top = tile_order.unpack_codes(parts, self.bits, shape)
        sign, magnitude = top & 1 << self.bits - 1, top & self.element.sign - 1
        codes = sign >> (self.bits - self.element.bits) | magnitude
        groups = shape[1] // self.group if self.group else 1
        if self.scale in REALS:
            scale = parts["scales"].transpose(1, 2).flatten(0, 1)[: shape[0], :groups]
        else:
            of_rows = parts["scales"].unflatten(2, (8, -1)).permute(0, 4, 2, 1, 3)  # R, half, g, C, group
            whole = of_rows.reshape(16 * len(of_rows), -1)[: shape[0], :groups]
            scale = whole.contiguous().view(BYTES[self.scale])
        return FloatCodes(self.element, codes, scale, 1.0 if self.by_rows else parts["factor"].item())

    def _arrange_reals(self, codes: FloatCodes) -> Tensor:
        rows, columns = codes.codes_OI.shape
        of_rows = codes.scale.repeat_interleave(codes.rows, 0)[:rows]
        groups = tile_order.round_up(columns, self.chunk) // self.group if self.group else 1
        whole = pad(of_rows, (0, groups - of_rows.shape[1], 0, -rows % tile_order.ROWS))
        tiles: Tensor = whole.unflatten(0, (-1, tile_order.ROWS))
        return tiles.transpose(1, 2).contiguous()

    def _arrange_bytes(self, scale_OG: Tensor) -> Tensor:
        groups = self.chunk // self.group
        rows = scale_OG.view(torch.uint8)
        whole = pad(rows, (0, -rows.shape[1] % groups, 0, -rows.shape[0] % tile_order.ROWS))
        of_rows = whole.view(-1, 2, 8, whole.shape[1] // groups, groups)  # R, half, g, C, group
        return of_rows.permute(0, 3, 2, 4, 1).flatten(2, 3).contiguous()
