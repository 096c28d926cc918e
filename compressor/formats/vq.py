"""Vector quantization: adjacent output channels of one input channel are replaced by a codebook entry, or a sum of two.

Bytes, for a weight [O, I] with V = O / vector and N = floor(I * outliers) of its input channels dense, J = I - N:

    weight_index      int32 [V, ceil(J * (bits + residual_bits) / 32)]   LSB-first bit stream of numbers along the input
                                                                         channels that are not dense; the low `bits` of a
                                                                         number are an entry, the others a residual
    weight_codebook   bf16  [2**bits, vector]
    weight_residual   bf16  [2**residual_bits, vector]   if there are residuals
    weight_norm       bf16  [J], or [1]                  if there are norms
    weight_dense      bf16  [O, N]                       the dense channels, if there are any
    weight_channels   int32 [N]                          their numbers, ascending

    w[vector v + d, i] = (codebook[index[v, i] % 2**bits, d] + residual[index[v, i] // 2**bits, d]) * norm[i]

Layers can share codebooks: one layer then stores them, and the others name that layer.

Only our own layout holds this format. The GPU kernels support vectors of 8 whose codebooks have at most 2**12 entries and
whose index has at most 16 bits. Everything else is dequantized at every call, which saves only memory.

Source: Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024.

Shape suffixes: O out_features, I in_features, C adjacent columns, V vectors in a column, N vectors, D their length,
K entries, B of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.errors import RecipeError, SourceError
from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.codebook import kmeans, near, nearest, sample, vectors
from compressor.formats.numerics.codes import Codes, VectorCodes, values
from compressor.recipe.registry import node

MOST_COLUMNS = 2**31  # number of columns of a grid that fits weights of any width
ITERATIONS = 20  # of k-means, when entries are searched
BEAM = 8  # number of nearest entries for which the best residual is searched
MOST_BITS, MOST_INDEX_BITS = 16, 31
SHORTEST, LONGEST = 1, 16
BOOKS = ("weight_codebook", "weight_residual")  # parts that a layer can lend
Norm = Literal["none", "layer", "channel"]


@node
class VQ:
    """Vectors of output channels, rounded to entries of one codebook or to sums of entries of two.

    Args:
        vector: Number of adjacent output channels that are rounded together, 1 to 16.
        bits: Bits of an index, 1 to 16; the codebook has 2**bits entries.
        residual_bits: Bits of the index into a second codebook, whose entries are added; 0 for none.
        norm: Factor of the vectors: none, one per layer, or one per input channel.
        outliers: Share of the input channels that are kept dense; their number is rounded down.
        lender: Full name of the layer whose codebooks are used; empty for its own. Set by passes that share codebooks.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_index", *BOOKS, "weight_norm", "weight_dense", "weight_channels")

    vector: int = 8
    bits: int = 12
    residual_bits: int = 0
    norm: Norm = "none"
    outliers: float = 0.0
    lender: str = ""

    def __post_init__(self) -> None:
        if not SHORTEST <= self.vector <= LONGEST:
            raise ValueError(f"vector: {self.vector} is not in {SHORTEST} … {LONGEST}")
        if not 1 <= self.bits <= MOST_BITS:
            raise ValueError(f"bits: {self.bits} is not in 1 … {MOST_BITS}")
        if not 0 <= self.residual_bits <= min(MOST_BITS, MOST_INDEX_BITS - self.bits):
            raise ValueError(
                f"residual_bits: {self.residual_bits} is not in 0 … {min(MOST_BITS, MOST_INDEX_BITS - self.bits)}"
            )
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers: {self.outliers:g} is not in 0 … 0.5")
        if self.lender and self.norm == "none":
            raise ValueError("lender: layers that share codebooks need norms; use `norm: layer` or `norm: channel`")

    @property
    def label(self) -> str:
        more = {"+": self.residual_bits, "n": self.norm[0] if self.norm != "none" else "", "o": f"{self.outliers:g}"}
        kept = "".join(f"{sign}{value}" for sign, value in more.items() if value not in (0, "", "0"))
        return f"vq{self.vector}k{self.bits}{kept}"

    @property
    def index_bits(self) -> int:
        """Bits of both indices together."""
        return self.bits + self.residual_bits

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns = shape
        if rows % self.vector:
            near_by = max(d for d in range(1, self.vector + 1) if rows % d == 0)
            raise ValueError(
                f"out_features {rows} is not a multiple of vector {self.vector}; use a divisor such as {near_by}"
            )
        dense = self.dense_channels(columns)
        parts: dict[str, PartSpec] = {
            "weight_index": (torch.int32, (rows // self.vector, bitpack.words(columns - dense, self.index_bits)))
        }
        if not self.lender:
            parts |= self.borrowed_parts(shape)
        if self.norm != "none":
            parts["weight_norm"] = (torch.bfloat16, (1 if self.norm == "layer" else columns - dense,))
        if dense:
            parts |= {"weight_dense": (torch.bfloat16, (rows, dense)), "weight_channels": (torch.int32, (dense,))}
        return parts

    def borrowed_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        sizes = zip(BOOKS, (self.bits, self.residual_bits), strict=True)
        return {name: (torch.bfloat16, (2**bits, self.vector)) for name, bits in sizes if bits}

    def borrowing(self, lender: str) -> "VQ":
        return replace(self, lender=lender)

    @property
    def inner(self) -> "VQ":
        """The format without norms and dense channels, with codebooks of its own."""
        return replace(self, norm="none", outliers=0.0, lender="")

    def dense_channels(self, columns: int) -> int:
        """Return how many of a layer's input channels are kept dense."""
        return int(columns * self.outliers)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> "VectorGrid":
        """Fit codebooks by k-means to the weight's vectors, and to their residuals; `search` runs several iterations.

        Raises:
            RecipeError: the format has norms, dense channels or a lender, which only `vptq` can choose.
        """
        self.checkpoint_parts((w_OI.shape[0], w_OI.shape[1]))
        if self.norm != "none" or self.outliers or self.lender:
            raise RecipeError(f"{self.label}: only `vptq` chooses norms and dense channels; leave out `norm` and `outliers`")
        importance_I = torch.ones(w_OI.shape[1], device=w_OI.device) if importance_I is None else importance_I.float()
        weight_N = importance_I.expand(w_OI.shape[0] // self.vector, -1).flatten()
        return replace(self.books(vectors(w_OI.float(), self.vector), weight_N, search=search), columns=w_OI.shape[1])

    def books(self, x_ND: Tensor, weight_N: Tensor, *, search: bool = True) -> "VectorGrid":
        """Fit codebooks to vectors [N, D] with weights [N], for any number of columns."""
        x_ND, weight_N = sample(x_ND, weight_N)
        iterations = ITERATIONS if search else 1
        codebook_KD = stored(kmeans(x_ND, weight_N, 2**self.bits, iterations=iterations)[0])
        residual_KD = None
        if self.residual_bits:
            left_ND = x_ND - codebook_KD[nearest(x_ND, codebook_KD)]
            residual_KD = stored(kmeans(left_ND, weight_N, 2**self.residual_bits, iterations=iterations)[0])
        return VectorGrid(self, codebook_KD, residual_KD)

    def codes(self, packed: QuantizedTensor) -> VectorCodes:
        columns, parts = packed.shape[1], packed.parts
        index = bitpack.unpack(parts["weight_index"], self.index_bits, columns - self.dense_channels(columns)).int()
        main = VectorCodes(
            index & 2**self.bits - 1,
            parts["weight_codebook"],
            norm=parts.get("weight_norm"),
            dense_ON=parts.get("weight_dense"),
            channels_N=parts.get("weight_channels"),
        )
        self._check(main, columns)
        if not self.residual_bits:
            return main
        return replace(main, residual_index_VI=index >> self.bits, residual=parts["weight_residual"])

    def _check(self, codes: VectorCodes, columns: int) -> None:
        """Refuse dense channels that are not ascending or not within the weight. Raises SourceError."""
        if (found := codes.channels_N) is not None and not found.is_meta:
            following = torch.cat([found.new_tensor([-1]), found, found.new_tensor([columns])]).diff()
            if not bool((following > 0).all()):
                raise SourceError(
                    f"{self.label}: weight_channels are not ascending numbers below {columns}; the file is damaged"
                )

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, VectorCodes)
        index, parts = codes.index_VI.int(), {"weight_codebook": codes.codebook}
        if codes.residual is not None and codes.residual_index_VI is not None:
            index, parts["weight_residual"] = index | codes.residual_index_VI.int() << self.bits, codes.residual
        more = {"weight_norm": codes.norm, "weight_dense": codes.dense_ON, "weight_channels": codes.channels_N}
        parts |= {name: part for name, part in more.items() if part is not None}
        return QuantizedTensor(self, shape, {"weight_index": bitpack.pack(index, self.index_bits), **parts})

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


@dataclass(frozen=True)
class VectorGrid:
    """Codebooks fitted to one weight. Codes are int32 [V, C]: the entry's number in the low bits, the residual's above."""

    format: VQ
    codebook_KD: Tensor  # fp32, values that bf16 can hold
    residual_KD: Tensor | None = None
    columns: int = MOST_COLUMNS
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
        return self.format.stored(self.vector_codes(codes), (codes.shape[0] * self.format.vector, codes.shape[1]))

    def vector_codes(self, codes: Tensor) -> VectorCodes:
        """Return what is stored for codes, except norms and dense channels."""
        found = VectorCodes(codes & 2**self.format.bits - 1, self.codebook_KD.bfloat16())
        if self.residual_KD is None:
            return found
        return replace(found, residual_index_VI=codes >> self.format.bits, residual=self.residual_KD.bfloat16())


def stored(codebook_KD: Tensor) -> Tensor:
    """Round a codebook to bf16, as it will be read back; fp32."""
    return codebook_KD.bfloat16().float()


EXPORT = VQ
