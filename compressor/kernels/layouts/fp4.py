"""E2M1 numbers (four bits) with a scale per group of 16 (NVFP4) or 32 (MXFP4) columns, or per row (LLM-FP4).

Parts: the codes as those of 4 bits in `_tiles`, with chunks of 64 columns, and with R = ceil(N / 16), C = ceil(K / 64)

    scales  uint8 [R, C, 32, 2]   groups of 16: of each lane's run, the E4M3 scale of row g and of row g + 8
            uint8 [R, C, 16, 2]   groups of 32: the same of each two neighbouring lanes, E8M0
            bf16  [16 R]          of each row
    factor  fp32  [1]             of the whole weight

Scales of groups are at most 2^9 in size, and numbers: a bf16 that is 2^126 times too small has then room for the product.

Shape suffixes as in `_tiles`; N and K are out_features and in_features, G groups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.codes import FloatCodes
from compressor.floats import E2M1
from compressor.kernels.layouts import _tiles

GROUP = {torch.float8_e4m3fn: 16, torch.float8_e8m0fnu: 32, torch.bfloat16: 0}  # columns; 0 for the whole row
NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0", torch.bfloat16: "bf16"}
LARGEST = 2.0**9


@dataclass(frozen=True)
class Fp4:
    """One arrangement; its name says all of it."""

    scale: str  # e4m3, e8m0 or bf16
    by_rows: ClassVar[bool] = False  # `factor` belongs to one weight

    @property
    def name(self) -> str:
        return f"fp4-g{self.group}-{self.scale}"

    @staticmethod
    def parse(name: str) -> "Fp4 | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"fp4-g\d+-(e4m3|e8m0|bf16)", name)
        return layout if found and (layout := Fp4(found[1])).name == name else None

    @property
    def chunk(self) -> int:
        """Columns of a tile."""
        return _tiles.CHUNK[4]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        return ("codes", "scales", "factor")

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 for the whole row."""
        return GROUP[self._dtype]

    @staticmethod
    def of(codes: FloatCodes) -> "Fp4 | None":
        """The layout that takes these codes, or None."""
        dtype, groups = codes.scale.dtype, codes.scale.shape[1]
        columns = codes.codes_OI.shape[1]
        if codes.element != E2M1 or codes.rows != 1 or dtype not in GROUP or groups * (GROUP[dtype] or columns) != columns:
            return None
        if GROUP[dtype] and not (codes.scale.float().abs() <= LARGEST).all():
            return None
        return Fp4(NAMES[dtype])

    def arrange(self, codes: FloatCodes) -> dict[str, Tensor]:
        """The parts."""
        scales = self._arrange_scales(codes.scale) if self.group else pad(codes.scale[:, 0], (0, -len(codes.scale) % 16))
        factor = torch.tensor([codes.factor], device=codes.codes_OI.device)
        return _tiles.pack_codes(codes.codes_OI, 4) | {"scales": scales, "factor": factor}

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> FloatCodes:
        """The codes that were arranged."""
        scales = parts["scales"]
        if self.group:
            of_rows = scales.unflatten(2, (8, -1)).permute(0, 4, 2, 1, 3)  # R, half, g, C, group
            scale = of_rows.reshape(16 * len(scales), -1)[: shape[0], : shape[1] // self.group].contiguous().view(self._dtype)
        else:
            scale = scales[: shape[0], None]
        return FloatCodes(E2M1, _tiles.unpack_codes(parts, 4, shape), scale, parts["factor"].item())

    @property
    def _dtype(self) -> torch.dtype:
        return next(dtype for dtype, name in NAMES.items() if name == self.scale)

    def _arrange_scales(self, scale_OG: Tensor) -> Tensor:
        groups = self.chunk // self.group
        rows = scale_OG.view(torch.uint8)
        whole = pad(rows, (0, -rows.shape[1] % groups, 0, -rows.shape[0] % _tiles.ROWS))
        of_rows = whole.view(-1, 2, 8, whole.shape[1] // groups, groups)  # R, half, g, C, group
        return of_rows.permute(0, 3, 2, 4, 1).flatten(2, 3).contiguous()
