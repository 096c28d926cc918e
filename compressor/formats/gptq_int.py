"""Integers of 2, 3, 4 or 8 bits in the layout of GPTQ checkpoints, which many programs read and write.

Bytes, for a weight [O, I] with G = I / group_size groups in a row:

    qweight  int32 [ceil(I * bits / 32), O]   codes, LSB-first bit stream along the input channels
    qzeros   int32 [G, ceil(O * bits / 32)]   zero points, LSB-first bit stream along the output channels
    scales   fp16  [G, O]
    g_idx    int32 [I]                        the group of each input channel; auto-round leaves it out

    w[o, i] = (code[o, i] - zero[g_idx[i], o]) * scale[g_idx[i], o]

With `gptq` as checkpoint_format, 1 is subtracted from the zero points before they are stored; with `gptq_v2` it is not. The
subtraction works on 32-bit words: a zero point of 0 borrows from the next one, and adding to the word restores both. At 3
bits zero points straddle words, so 1 is subtracted from each zero point separately. This follows GPTQModel 7.6. Loaders
disagree on zero points of 0, so asymmetric models are portable only as `gptq_v2`.

Shape suffixes: O out_features, I in_features, G groups in a row.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.codes import Codes, IntCodes, values
from compressor.formats.numerics.int_grid import IntFit, IntGrid, groups
from compressor.recipe.registry import node

BITS = (2, 3, 4, 8)
SCALE_DTYPE = torch.float16


@node
class GptqInt:
    """Integers in the GPTQ layout.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Number of input channels that share a scale; -1 for the whole row.
        symmetric: Whether all zero points are 2**(bits - 1), the only ones that vLLM's kernels take.
        checkpoint_format: `gptq` stores zero points minus 1, `gptq_v2` unchanged.
        g_idx: Whether the group of each input channel is stored. Groups fitted here consist of adjacent channels.
    """

    part_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    g_idx: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits} is none of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is neither -1 (the whole row) nor a positive number")

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        variant = ("" if self._minus_one else "-v2") + ("" if self.g_idx else "-noidx")
        return f"gptq{self.bits}{'' if self.symmetric else 'a'}{group}{variant}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns, count = *shape, groups(shape[1], self.group_size)
        parts: dict[str, PartSpec] = {
            "qweight": (torch.int32, (bitpack.words(columns, self.bits), rows)),
            "qzeros": (torch.int32, (count, bitpack.words(rows, self.bits))),
            "scales": (SCALE_DTYPE, (count, rows)),
        }
        return parts | {"g_idx": (torch.int32, (columns,))} if self.g_idx else parts

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> IntGrid:
        return IntFit(self.bits, self.group_size, self.symmetric, SCALE_DTYPE).grid(self, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> IntCodes:
        (rows, columns), parts = packed.shape, packed.parts
        codes = bitpack.unpack(parts["qweight"].T, self.bits, columns)
        zero = bitpack.unpack(self._shifted(parts["qzeros"], rows, 1), self.bits, rows).T.contiguous()
        order = self._order(parts["g_idx"], parts["scales"].shape[0]) if self.g_idx else None
        codes = codes.contiguous() if order is None else codes[:, order]
        return IntCodes(self.bits, codes, parts["scales"].T.contiguous(), zero, order)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, IntCodes)
        assert self.g_idx or codes.order_I is None
        columns, count = shape[1], codes.scale.shape[1]
        group = torch.arange(columns, dtype=torch.int32, device=codes.scale.device) // (columns // count)
        natural, g_idx = codes.codes_OI, group
        if codes.order_I is not None:
            natural = torch.empty_like(natural).index_copy_(1, codes.order_I, natural)
            g_idx = torch.empty_like(group).index_copy_(0, codes.order_I, group)
        parts = {
            "qweight": bitpack.pack(natural, self.bits).T.contiguous(),
            "qzeros": self._shifted(bitpack.pack(codes.zero.T, self.bits), shape[0], -1),
            "scales": codes.scale.T.contiguous(),
        }
        return QuantizedTensor(self, shape, parts | {"g_idx": g_idx} if self.g_idx else parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))

    @property
    def portable(self) -> bool:
        """Whether all programs that read this layout get the same weights."""
        return self.symmetric or not self._minus_one

    @property
    def _minus_one(self) -> bool:
        return self.checkpoint_format == "gptq"

    def _shifted(self, qzeros: Tensor, rows: int, by: int) -> Tensor:
        """Add `by` to each of the packed zero points [G, words], if they are stored minus 1."""
        if not self._minus_one:
            return qzeros
        if 32 % self.bits:
            zeros = bitpack.unpack(qzeros, self.bits, rows)
            return bitpack.pack(zeros.int() + by & 2**self.bits - 1, self.bits)
        return qzeros + by * sum(1 << bit for bit in range(0, 32, self.bits))

    def _order(self, g_idx: Tensor, count: int) -> Tensor | None:
        """Return the input channels sorted by group, stably; None if they are already in that order.

        Raises:
            SourceError: the groups are not of one size.
        """
        columns = len(g_idx)
        even = torch.arange(columns, dtype=torch.int32, device=g_idx.device) // (columns // count)
        if torch.equal(g_idx, even):
            return None
        by_group, order = g_idx.sort(stable=True)
        if not torch.equal(by_group, even):
            raise SourceError(
                f"{self.label}: g_idx does not put {columns // count} of {columns} input channels into each group; "
                "uneven groups cannot be read, use the original model"
            )
        return order


EXPORT = GptqInt
