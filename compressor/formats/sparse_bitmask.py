"""Sparse weights: the numbers that are kept, and a bit mask of their positions; all others are zero.

Bytes, for a weight [O, I] of which N numbers are kept:

    compressed   bf16, fp16 or fp32  [N]         numbers that are kept, row after row
    bitmask      uint8 [O, ceil(I / 8)]          1 where a number is kept; LSB first along the input channels
    row_offsets  int64 [O]                       start of each row in `compressed`
    shape        int64 [2]                       (O, I)

N is known before any weight is read. With `sparsity` it is O (I - round(I * sparsity)), and rows may differ. With a pattern
N:M, N of every M adjacent weights of a row are kept. A number that is kept may be zero itself.

This is the layout `sparse-bitmask` of compressed-tensors, byte for byte. Its versions up to 0.12 could read it; the versions
that transformers requires now cannot. So our own layout (compressor/model/hf_config/quantization_config.py) names it. There
is no kernel for it: each call makes the dense weight.

Shape suffixes: O out_features, I in_features, C adjacent columns, N numbers that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.errors import SourceError
from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.codes import Codes, SparseCodes, values
from compressor.recipe.registry import node

COLUMNS = 128  # number of columns whose weights compete with each other, when there is no pattern
Number = Literal["bfloat16", "float16", "float32"]
NUMBERS: Mapping[Number, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, ""),
    "float16": (torch.float16, "-fp16"),
    "float32": (torch.float32, "-fp32"),
}  # dtype, and the end of the label


@node
class SparseBitmask:
    """Unstructured or N:M sparse weights.

    Args:
        sparsity: Share of the weights that are dropped, in [0, 1).
        pattern: N:M, as an alternative to `sparsity`: keep N of every M adjacent weights of a row. Put it in quotes, because
            YAML reads 2:4 as a number.
        dtype: Data type of the numbers.
    """

    part_names: ClassVar[tuple[str, ...]] = ("compressed", "bitmask", "row_offsets", "shape")

    sparsity: float | None = None
    pattern: str | int | None = None
    dtype: Number = "bfloat16"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            given = "neither is" if self.sparsity is None else f"{self.sparsity:g}, and pattern {self.pattern}, are"
            raise ValueError(f"sparsity: {given} given; name either a share, or a pattern such as '2:4'")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity:g} is not from 0 up to, without, 1")
        if self.pattern is not None and not 1 <= self.group[0] < self.group[1]:
            raise ValueError(f"pattern: {self.pattern} keeps {self.group[0]} of {self.group[1]} weights; N:M has 1 <= N < M")

    @property
    def group(self) -> tuple[int, int]:
        """N and M of a pattern."""
        stay, colon, of = str(self.pattern).partition(":")
        if not (colon and stay.isdecimal() and of.isdecimal()):
            raise ValueError(f"pattern: {self.pattern} is not two numbers such as '2:4', in quotes")
        return int(stay), int(of)

    @property
    def label(self) -> str:
        amount = f"{self.group[0]}of{self.group[1]}" if self.sparsity is None else f"{100 * self.sparsity:g}"
        return f"sparse{amount}{NUMBERS[self.dtype][1]}"

    @property
    def stays_of_all(self) -> float:
        """Share of the weights that are kept."""
        return self.group[0] / self.group[1] if self.sparsity is None else 1 - self.sparsity

    def gone(self, columns: int) -> int:
        """Return how many weights of a row are dropped, on average over the rows.

        Raises:
            ValueError: none would be kept, or the pattern does not divide a row.
        """
        if self.sparsity is not None:
            gone = round(columns * self.sparsity)
            if gone == columns:
                raise ValueError(f"in_features {columns} are too few for sparsity {self.sparsity:g} to leave one; lower it")
            return gone
        stay, of = self.group
        if columns % of:
            raise ValueError(f"in_features {columns} is not a multiple of {of}, as pattern {self.pattern} needs; use another")
        return columns // of * (of - stay)

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns = shape
        return {
            "compressed": (NUMBERS[self.dtype][0], (rows * (columns - self.gone(columns)),)),
            "bitmask": (torch.uint8, (rows, -(-columns // 8))),
            "row_offsets": (torch.int64, (rows,)),
            "shape": (torch.int64, (2,)),
        }

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> "SparseGrid":
        """Keep the weights with the largest w² · importance, in each group of a pattern, or over all rows of 128 columns."""
        score_OI = w_OI.float().square()
        score_OI = score_OI if importance_I is None else score_OI * importance_I
        if self.sparsity is None:
            return self.keeping(self.stays(score_OI))
        grid = self.keeping(torch.ones_like(score_OI, dtype=torch.bool))
        parts = [grid.best(part, number * COLUMNS) for number, part in enumerate(score_OI.split(COLUMNS, dim=1))]
        return replace(grid, stays_OI=torch.cat(parts, dim=1))

    def keeping(self, stays_OI: Tensor) -> "SparseGrid":
        """Return the grid that keeps the given weights, bool [O, I]; their number must be the one that `gone` implies."""
        return SparseGrid(self, stays_OI, COLUMNS if self.sparsity is not None else self.group[1])

    def stays(self, score_OI: Tensor, *, by_row: bool = True) -> Tensor:
        """Choose the weights to keep by score, bool [O, I]: in each group of a pattern, else in each row or over all rows."""
        if self.sparsity is None:
            stay, of = self.group
            return ~lowest(score_OI.unflatten(1, (-1, of)), of - stay).flatten(1)
        rows, gone = score_OI.shape[0], self.gone(score_OI.shape[1])
        if by_row:
            return ~lowest(score_OI, gone)
        return ~lowest(score_OI.flatten(), rows * gone).view_as(score_OI)

    def codes(self, packed: QuantizedTensor) -> SparseCodes:
        parts, columns = packed.parts, packed.shape[1]
        words = pad(parts["bitmask"], (0, -parts["bitmask"].shape[1] % 4)).view(torch.int32)
        stays_OI = bitpack.unpack(words, 1, columns).bool()
        if not stays_OI.is_meta and int(stays_OI.sum()) != len(parts["compressed"]):
            raise SourceError(
                f"{self.label}: bitmask has {int(stays_OI.sum())} numbers, compressed {len(parts['compressed'])}; "
                "the file is damaged"
            )
        return SparseCodes(stays_OI, parts["compressed"])

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, SparseCodes)
        counts_O = codes.stays_OI.sum(1)
        words = bitpack.pack(codes.stays_OI, 1)
        parts = {
            "compressed": codes.values_N,
            "bitmask": words.view(torch.uint8)[:, : -(-shape[1] // 8)].contiguous(),
            "row_offsets": counts_O.cumsum(0) - counts_O,
            "shape": torch.tensor(shape),
        }
        return QuantizedTensor(self, shape, parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


@dataclass(frozen=True)
class SparseGrid:
    """The weights to keep. Codes are the numbers as they are stored, [O, C], zero where they are dropped."""

    format: SparseBitmask
    stays_OI: Tensor  # bool
    width: int
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        stays_OC = self.stays_OI[:, column : column + w_OC.shape[1]]
        return torch.where(stays_OC, w_OC, 0).to(NUMBERS[self.format.dtype][0])

    def decode(self, codes: Tensor, column: int) -> Tensor:
        return codes.float()

    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "SparseGrid":
        stays_OI = self.stays_OI.clone()
        stays_OI[:, column : column + w_OC.shape[1]] = self.best(w_OC.float().square() * importance_C, column)
        return replace(self, stays_OI=stays_OI)

    def best(self, score_OC: Tensor, column: int) -> Tensor:
        """Choose the weights to keep in some columns by score, bool [O, C].

        Without a pattern, each run of columns drops its share of the weight's total, over all rows together.
        """
        if self.format.sparsity is None:
            return self.format.stays(score_OC)
        (rows, columns), end = self.stays_OI.shape, column + score_OC.shape[1]
        whole = rows * self.format.gone(columns)
        return ~lowest(score_OC.flatten(), whole * end // columns - whole * column // columns).view_as(score_OC)

    def pack(self, codes: Tensor) -> QuantizedTensor:
        rows, columns = codes.shape
        return self.format.stored(SparseCodes(self.stays_OI, codes[self.stays_OI]), (rows, columns))


def lowest(score: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest scores along the last axis; of equal scores, the first."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.argsort(dim=-1, stable=True)[..., :count], True)


EXPORT = SparseBitmask
