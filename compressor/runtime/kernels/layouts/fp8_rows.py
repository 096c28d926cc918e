"""E4M3 numbers row by row, as tensor cores multiply them by E4M3 activations.

Parts, with R = ceil(N / 16) and columns padded to a multiple of 16 with zeros:

    codes   uint8 [R, 16, K]
    scales  fp32  [R, 16]     of each row, though all shared one

Shape suffixes: N and K are out_features and in_features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import FloatCodes
from compressor.formats.numerics.minifloat import E4M3
from compressor.runtime.kernels.layouts.floats import NAMES, REALS
from compressor.runtime.kernels.layouts.tile_order import ROWS


@dataclass(frozen=True)
class Fp8Rows:
    """One arrangement; its name says all of it."""

    scale: str  # the kind that scales are stored as: bf16, fp16 or fp32
    chunk: ClassVar[int] = 16  # columns that products take together
    by_rows: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales")

    @property
    def name(self) -> str:
        return f"fp8-rows-{self.scale}"

    @staticmethod
    def parse(name: str) -> "Fp8Rows | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"fp8-rows-(bf16|fp16|fp32)", name)
        return Fp8Rows(found[1]) if found else None

    @staticmethod
    def of(codes: FloatCodes) -> "Fp8Rows | None":
        """The layout that takes these codes, or None."""
        kind, groups = NAMES.get(codes.scale.dtype), codes.scale.shape[1]
        return Fp8Rows(kind) if codes.element == E4M3 and kind in REALS and groups == 1 and codes.factor == 1 else None

    def arrange(self, codes: FloatCodes) -> dict[str, Tensor]:
        """The parts."""
        rows, columns = codes.codes_OI.shape
        whole = pad(codes.codes_OI, (0, -columns % self.chunk, 0, -rows % ROWS))
        scale = pad(codes.scale.float()[:, 0].repeat_interleave(codes.rows)[:rows], (0, -rows % ROWS))
        return {"codes": whole.view(-1, ROWS, whole.shape[1]), "scales": scale.view(-1, ROWS)}

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> FloatCodes:
        """The codes that were arranged, but for scales that rows shared, of which each row has one now."""
        rows, columns = shape
        scale = parts["scales"].flatten()[:rows, None].to(REALS[self.scale])
        return FloatCodes(E4M3, parts["codes"].flatten(0, 1)[:rows, :columns].contiguous(), scale)
