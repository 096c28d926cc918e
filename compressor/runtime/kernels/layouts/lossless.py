"""bf16 weights in 12 bits each, without loss: the exponents of a row are nearly all within 16 of each other.

A bf16 is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa lie as a byte; of the exponent lie 4 bits, the
difference from the row's base, chosen so that as many as possible of the row's exponents are base … base + 15. Consecutive,
because then a sum decodes them where 16 others would take a table; per row, because rows differ in size. The rest (zeros and
subnormals among them, infinities and NaN) are escapes: the bits in their place are 0, which reads 2^(base - 127), and a list
says what they are. Any weight can be arranged, bit for bit; `of` refuses one of which more than 1 % would be escapes.

Columns of a chunk: 64. Parts, with R = ceil(N / 16) and C = ceil(K / 64):

    tiles     uint8 [R, C, 3, 32, 16]   of each lane signs and mantissas of steps 0 and 1, of steps 2 and 3, exponents
    bases     uint8 [R, 8, 2]           of rows g and g + 8: 1 … 239, so that base + 15 is a finite number's
    starts    int32 [16 R + 1]          where a row's escapes begin, and the last one's end
    escapes   int32 [E, 2]              column and bf16, by rows and columns

The bytes are little-endian words as in `tile_order`: signs and mantissas as codes of 8 bits are (step s, half h in word 2 s +
h, column j in byte j, the sign in bit 7), exponents as those of 4 bits are.

Shape suffixes as in `tile_order`; N and K are out_features and in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import DenseCodes
from compressor.runtime.kernels.layouts import tile_order

CHUNK = 64
WINDOW = 16  # exponents that 4 bits tell apart
LARGEST_BASE = 239
MOST_ESCAPES = 0.01  # of all weights: then they take 0.64 bits each, and are still few to a row
_BLOCK = 1 << 22  # weights whose exponents are counted at a time


@dataclass(frozen=True)
class Lossless:
    """The one arrangement."""

    by_rows: ClassVar[bool] = False  # the escapes are one list
    chunk: ClassVar[int] = CHUNK
    parts: ClassVar[tuple[str, ...]] = ("tiles", "bases", "starts", "escapes")
    name: ClassVar[str] = "lossless12"

    @staticmethod
    def parse(name: str) -> "Lossless | None":
        """The layout, or None if the name is another family's."""
        return Lossless() if name == Lossless.name else None

    @staticmethod
    def of(codes: DenseCodes) -> "Lossless | None":
        """The layout, or None if this weight has too many escapes to be worth it."""
        if codes.w_OI.dtype != torch.bfloat16:
            return None
        exponents_NK = _exponents(codes.w_OI)
        escapes = int((_differences(exponents_NK, _bases(exponents_NK)) >= WINDOW).sum())
        return Lossless() if escapes <= MOST_ESCAPES * exponents_NK.numel() else None

    def arrange(self, codes: DenseCodes) -> dict[str, Tensor]:
        """The parts."""
        bits_NK, exponents_NK = codes.w_OI.view(torch.int16), _exponents(codes.w_OI)
        bases_N = _bases(exponents_NK)
        differences_NK = _differences(exponents_NK, bases_N)
        escaped_NK = differences_NK >= WINDOW
        rows_padded = tile_order.round_up(len(bases_N), tile_order.ROWS)
        ends_N = escaped_NK.sum(1).cumsum(0).int()
        return {
            "tiles": _pack(
                (bits_NK >> 8 & 128 | bits_NK & 127).to(torch.uint8).masked_fill(escaped_NK, 0),
                differences_NK.masked_fill(escaped_NK, 0),
            ),
            "bases": pad(bases_N, (0, rows_padded - len(bases_N))).view(-1, 2, 8).transpose(1, 2).contiguous(),
            "starts": torch.cat([ends_N.new_zeros(1), ends_N, ends_N[-1:].expand(rows_padded - len(ends_N))]),
            "escapes": torch.stack([escaped_NK.nonzero()[:, 1].int(), bits_NK[escaped_NK].int() & 0xFFFF], 1),
        }

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> DenseCodes:
        """The weight that was arranged."""
        bytes_NK, differences_NK = _unpack(parts["tiles"], shape)
        bases_N = parts["bases"].transpose(1, 2).flatten()[: shape[0]].int()
        exponents_NK = differences_NK.int() + bases_N[:, None]
        bits_NK = ((bytes_NK.int() & 128) << 8 | exponents_NK << 7 | bytes_NK & 127).to(torch.int16)
        counts_N = parts["starts"].diff()[: shape[0]]
        rows_E = torch.arange(shape[0], device=counts_N.device).repeat_interleave(counts_N)
        bits_NK[rows_E, parts["escapes"][:, 0].long()] = parts["escapes"][:, 1].to(torch.int16)
        return DenseCodes(bits_NK.view(torch.bfloat16))


def _exponents(w_NK: Tensor) -> Tensor:
    return (w_NK.contiguous().view(torch.int16) >> 7 & 255).to(torch.uint8)


def _differences(exponents_NK: Tensor, bases_N: Tensor) -> Tensor:
    """Exponents less their row's base. Those below it wrap around, to 17 at least, as no base is above 239."""
    return exponents_NK - bases_N[:, None]


def _bases(exponents_NK: Tensor) -> Tensor:
    """Return the base of each row that leaves the fewest escapes, uint8 [N]."""
    return torch.cat([_bases_of_block(block) for block in exponents_NK.split(max(1, _BLOCK // exponents_NK.shape[1]))])


def _bases_of_block(exponents_NK: Tensor) -> Tensor:
    rows = exponents_NK.shape[0]
    first = 256 * torch.arange(rows, device=exponents_NK.device)
    counts = torch.bincount((exponents_NK + first[:, None]).flatten(), minlength=256 * rows).view(rows, 256)
    below = pad(counts.cumsum(1), (1, 0))  # [rows, 257]: exponents below each number
    within = below[:, 1 + WINDOW : LARGEST_BASE + WINDOW + 1] - below[:, 1 : LARGEST_BASE + 1]
    return (within.argmax(1) + 1).to(torch.uint8)


def _pack(bytes_NK: Tensor, differences_NK: Tensor) -> Tensor:
    tiles = tile_order.split(bytes_NK, CHUNK).permute(0, 2, 3, 4, 5, 1, 6)  # R g C t, s h j
    low = tile_order.lanes(tiles).unflatten(3, (2, 16)).transpose(2, 3)
    tiles = tile_order.split(differences_NK, CHUNK)
    high = tile_order.lanes((tiles[:, 0] | tiles[:, 1] << 4)[..., [0, 2, 1, 3]])
    return torch.cat([low, high[:, :, None]], 2)


def _unpack(tiles: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inverse of `_pack`."""
    low = tiles[:, :, :2].transpose(2, 3).flatten(3)
    bytes_NK = tile_order.join(tile_order.unlanes(low, 4, 2, 4).permute(0, 5, 1, 2, 3, 4, 6), shape)
    nibbles = tile_order.unlanes(tiles[:, :, 2].contiguous(), 4, 4)[..., [0, 2, 1, 3]]
    return bytes_NK, tile_order.join(torch.stack([nibbles & 15, nibbles >> 4], 1), shape)
