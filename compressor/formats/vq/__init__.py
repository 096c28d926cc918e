"""Vector quantization: adjacent output channels of an input channel together become an entry of a codebook, or a sum of two.

Bytes, for a weight [O, I] with V = O / vector:

    weight_index      int32 [V, ceil(I * (bits + residual_bits) / 32)]   LSB-first bit stream along the input channels, of
                                                                         numbers whose low `bits` name an entry, the others
                                                                         a residual
    weight_codebook   bf16  [2**bits, vector]
    weight_residual   bf16  [2**residual_bits, vector]   if there are residuals

    w[vector v + d, i] = codebook[index[v, i] % 2**bits, d] + residual[index[v, i] // 2**bits, d]

No other layout holds it; our own does. The GPU kernels multiply by vectors of 8 whose codebooks have at most 2**12 entries
and whose index has at most 16 bits; all else is dequantised at every call, which saves memory only.

Source: Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024.

Shape suffixes: O out_features, I in_features, C adjacent columns, V vectors in a column, N vectors, D their length,
K entries, B of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.codes import Codes, VectorCodes, values
from compressor.formats import _bits
from compressor.formats._codebook import kmeans, near, nearest, sample, vectors
from compressor.registry import node
from compressor.types import PartSpec, QuantizedTensor

ITERATIONS = 20  # of k-means, where entries are searched
BEAM = 8  # entries to which the best residual is sought
MOST_BITS, MOST_INDEX_BITS = 16, 31
SHORTEST, LONGEST = 1, 16


@node
class VQ:
    """Args:
    vector: Adjacent output channels that are rounded together, 1 to 16.
    bits: Of an index: the codebook has 2**bits entries, 1 to 16.
    residual_bits: Of the index of a second codebook, whose entries are added; 0 for none.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_index", "weight_codebook", "weight_residual")

    vector: int = 8
    bits: int = 12
    residual_bits: int = 0

    def __post_init__(self) -> None:
        if not SHORTEST <= self.vector <= LONGEST:
            raise ValueError(f"vector: {self.vector} is not in {SHORTEST} … {LONGEST}")
        if not 1 <= self.bits <= MOST_BITS:
            raise ValueError(f"bits: {self.bits} is not in 1 … {MOST_BITS}")
        if not 0 <= self.residual_bits <= min(MOST_BITS, MOST_INDEX_BITS - self.bits):
            raise ValueError(
                f"residual_bits: {self.residual_bits} is not in 0 … {min(MOST_BITS, MOST_INDEX_BITS - self.bits)}"
            )

    @property
    def label(self) -> str:
        return f"vq{self.vector}k{self.bits}" + (f"+{self.residual_bits}" if self.residual_bits else "")

    @property
    def index_bits(self) -> int:
        """Of both indices."""
        return self.bits + self.residual_bits

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns = shape
        if rows % self.vector:
            near_by = max(d for d in range(1, self.vector + 1) if rows % d == 0)
            raise ValueError(
                f"out_features {rows} is not a multiple of vector {self.vector}; use a divisor such as {near_by}"
            )
        parts: dict[str, PartSpec] = {
            "weight_index": (torch.int32, (rows // self.vector, _bits.words(columns, self.index_bits))),
            "weight_codebook": (torch.bfloat16, (2**self.bits, self.vector)),
        }
        residual: PartSpec = (torch.bfloat16, (2**self.residual_bits, self.vector))
        return parts | {"weight_residual": residual} if self.residual_bits else parts

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> "VectorGrid":
        """Codebooks by k-means of the weight's vectors, and of what is left of these; `search` iterates it."""
        self.checkpoint_parts((w_OI.shape[0], w_OI.shape[1]))
        importance_I = torch.ones(w_OI.shape[1], device=w_OI.device) if importance_I is None else importance_I.float()
        weight_N = importance_I.expand(w_OI.shape[0] // self.vector, -1).flatten()
        x_ND, weight_N = sample(vectors(w_OI.float(), self.vector), weight_N)
        iterations = ITERATIONS if search else 1
        codebook_KD = stored(kmeans(x_ND, weight_N, 2**self.bits, iterations=iterations)[0])
        residual_KD = None
        if self.residual_bits:
            left_ND = x_ND - codebook_KD[nearest(x_ND, codebook_KD)]
            residual_KD = stored(kmeans(left_ND, weight_N, 2**self.residual_bits, iterations=iterations)[0])
        return VectorGrid(self, codebook_KD, residual_KD, w_OI.shape[1])

    def codes(self, packed: QuantizedTensor) -> VectorCodes:
        index = _bits.unpack(packed.parts["weight_index"], self.index_bits, packed.shape[1]).int()
        main = VectorCodes(index & 2**self.bits - 1, packed.parts["weight_codebook"])
        if not self.residual_bits:
            return main
        return replace(main, residual_index_VI=index >> self.bits, residual=packed.parts["weight_residual"])

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, VectorCodes)
        index, parts = codes.index_VI.int(), {"weight_codebook": codes.codebook}
        if codes.residual is not None and codes.residual_index_VI is not None:
            index, parts["weight_residual"] = index | codes.residual_index_VI.int() << self.bits, codes.residual
        return QuantizedTensor(self, shape, {"weight_index": _bits.pack(index, self.index_bits), **parts})

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


@dataclass(frozen=True)
class VectorGrid:
    """Codes are int32 [V, C]: an entry's number, above it that of its residual."""

    format: VQ
    codebook_KD: Tensor  # fp32, numbers that bf16 holds
    residual_KD: Tensor | None
    columns: int
    step: int = 1

    @property
    def width(self) -> int:
        return self.columns

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        x_ND = vectors(w_OC, self.format.vector)
        if self.residual_KD is None:
            return nearest(x_ND, self.codebook_KD).int().view(-1, w_OC.shape[1])
        tried_NB = near(x_ND, self.codebook_KD, min(BEAM, len(self.codebook_KD)))
        left = (x_ND[:, None] - self.codebook_KD[tried_NB]).flatten(0, 1)
        best = nearest(left, self.residual_KD)
        missed_NB = (left - self.residual_KD[best]).square().sum(1).view(tried_NB.shape)
        first_N1 = missed_NB.argmin(1, keepdim=True)
        both_NB = tried_NB | best.view(tried_NB.shape) << self.format.bits
        codes: Tensor = both_NB.gather(1, first_N1).int().view(-1, w_OC.shape[1])
        return codes

    def decode(self, codes: Tensor, column: int) -> Tensor:
        found_VCD = self.codebook_KD[codes & 2**self.format.bits - 1]
        if self.residual_KD is not None:
            found_VCD = found_VCD + self.residual_KD[codes >> self.format.bits]
        values_OC: Tensor = found_VCD.transpose(1, 2).flatten(0, 1)
        return values_OC

    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "VectorGrid":
        return self.format.fit(w_OC, importance_C, search=search)

    def pack(self, codes: Tensor) -> QuantizedTensor:
        found = VectorCodes(codes & 2**self.format.bits - 1, self.codebook_KD.bfloat16())
        if self.residual_KD is not None:
            found = replace(found, residual_index_VI=codes >> self.format.bits, residual=self.residual_KD.bfloat16())
        return self.format.stored(found, (codes.shape[0] * self.format.vector, codes.shape[1]))


def stored(codebook_KD: Tensor) -> Tensor:
    """As it will be read back."""
    return codebook_KD.bfloat16().float()


EXPORT = VQ
