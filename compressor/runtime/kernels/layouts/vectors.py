"""Vectors of 8 output channels out of a codebook, which a kernel holds in shared memory.

Columns of a chunk: 128. Parts, with R = ceil(N / 16) and C = ceil(K / 128):

    index      int16 [R, C, 32, 8]   of each lane and step, the 16 bits of a word, below
    codebook   bf16 [2**bits, 8]     filled up with zeros
    residual   bf16 [2**residual_bits, 8]   if there is one

A word is the index of a vector, above it that of the residual's. One instruction, `ldmatrix.x4.trans`, takes from every lane
the address of 16 bytes, and gives each the fragment that it feeds to the tensor core: it looks the vectors up and transposes
them. Row `l % 8` of matrix `l // 8` comes from lane l, so the lane's word of step s is that of

    rows 8 h … 8 h + 7 of the tile and column 4 s + j of run t,  where l = 16 (j // 2) + 8 h + 2 t + j % 2

Missing rows and columns take entry 0: the rows are not stored, and the columns meet activations of 0.

Codebooks of more than 2**12 entries have no layout. They take over 64 KB, which leaves an SM no room for the blocks that hide
its memory's latency; and looked up in L2, each 8 weights fetch a sector of 32 bytes, twice what 8 weights of bf16 take, from
a cache that is not twice as fast as memory: such a kernel would lose to the dense weight. Nor have two indices a layout that
take more than 16 bits together.

Shape suffixes as in `tile_order`; V vectors of 8 output channels, N and K are out_features and in_features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import VectorCodes

CHUNK = 128
MOST_BITS = 12  # of an index: 64 KB of shared memory
WORD_BITS = 16  # of both indices
LENGTH = 8  # of a vector
ENTRY_BYTES = 16


@dataclass(frozen=True)
class Vectors:
    """One arrangement; its name says all of it."""

    bits: int  # of an index, 1 … 12
    residual_bits: int = 0  # of the residual's; 0: there is none
    by_rows: ClassVar[bool] = False  # two weights have two codebooks
    chunk: ClassVar[int] = CHUNK

    @property
    def name(self) -> str:
        return f"vectors{self.bits}{f'+{self.residual_bits}' if self.residual_bits else ''}"

    @staticmethod
    def parse(name: str) -> "Vectors | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"vectors(\d+)(?:\+(\d+))?", name)
        return Vectors(int(found[1]), int(found[2] or 0)) if found else None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        return ("index", "codebook", *(["residual"] if self.residual_bits else []))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block that multiplies."""
        return (ENTRY_BYTES << self.bits) + (ENTRY_BYTES << self.residual_bits if self.residual_bits else 0)

    @staticmethod
    def of(codes: VectorCodes) -> "Vectors | None":
        """The layout that takes these codes, or None: other vectors, norms, or the codebook is too large (above)."""
        if (
            codes.norm is not None
            or codes.dense_ON is not None
            or codes.codebook.shape[1] != LENGTH
            or codes.codebook.dtype != torch.bfloat16
        ):
            return None
        bits = _bits(codes.codebook)
        residual_bits = _bits(codes.residual) if codes.residual is not None else 0
        fits = max(bits, residual_bits) <= MOST_BITS and bits + residual_bits <= WORD_BITS
        return Vectors(bits, residual_bits) if fits else None

    def arrange(self, codes: VectorCodes) -> dict[str, Tensor]:
        """The parts."""
        words_VK = codes.index_VI.int()
        if codes.residual_index_VI is not None:
            words_VK = words_VK | codes.residual_index_VI.int() << self.bits
        parts = {"index": _pack(words_VK), "codebook": _filled(codes.codebook, self.bits)}
        return parts if codes.residual is None else parts | {"residual": _filled(codes.residual, self.residual_bits)}

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> VectorCodes:
        """The codes that were arranged; the codebooks are filled up with zeros."""
        words_VK = _unpack(parts["index"], shape)
        index_VK = words_VK & 2**self.bits - 1
        if not self.residual_bits:
            return VectorCodes(index_VK, parts["codebook"])
        return VectorCodes(index_VK, parts["codebook"], words_VK >> self.bits, parts["residual"])


def _bits(codebook: Tensor) -> int:
    """Return the bits of an index, at least 1."""
    return max(1, (codebook.shape[0] - 1).bit_length())


def _filled(codebook: Tensor, bits: int) -> Tensor:
    return pad(codebook, (0, 0, 0, 2**bits - codebook.shape[0])).contiguous()


def _pack(words_VK: Tensor) -> Tensor:
    """Words as lanes [R, C, 32, 8]."""
    vectors, columns = words_VK.shape
    whole = pad(words_VK, (0, -columns % CHUNK, 0, vectors % 2)).to(torch.int16)
    tiles = whole.view(-1, 2, whole.shape[1] // CHUNK, 4, 8, 2, 2)  # R h C t s, j as register and e
    return tiles.permute(0, 2, 5, 1, 3, 6, 4).contiguous().view(tiles.shape[0], tiles.shape[2], 32, 8)


def _unpack(index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `_pack`, int32 [V, K]."""
    row_tiles, chunks = index.shape[:2]
    tiles = index.view(row_tiles, chunks, 2, 2, 4, 2, 8).permute(0, 3, 1, 4, 6, 2, 5)
    words_VK = tiles.reshape(2 * row_tiles, chunks * CHUNK)[: shape[0] // 8, : shape[1]]
    return words_VK.int() & 0xFFFF
