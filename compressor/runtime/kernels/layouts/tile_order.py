"""The order of a weight's elements that every layout of the kernels shares: fragments of `mma.m16n8k16`.

A weight [N, K] is cut into tiles of 16 rows and `chunk` columns. A warp multiplies by one tile at a time, and lane
l = 4 g + t of it (g < 8, t < 4) holds the rows g and g + 8, and of the columns the run t * chunk / 4 … (t + 1) * chunk / 4.
So a lane's activations are adjacent, its weights are too, and one load of 16 bytes gives what the tensor core takes: step s
of a tile uses four columns of each run, 4 s + j (j < 4), in the registers

    a0 = row g, j 0 and 1    a1 = row g + 8, j 0 and 1    a2 = row g, j 2 and 3    a3 = row g + 8, j 2 and 3

The columns are thereby permuted within a chunk, for weights and activations alike, which leaves sums of products as they are.

Codes of 2, 3, 4 and 8 bits lie in chunks of 128, 128, 64 and 32 columns, as the tensors

    codes   uint8 [R, C, 32, 16]   16 bytes of each lane, below
    high    uint8 [R, C, 32, 8]    3 bits only: the third bit of every code

The bytes of a lane are four little-endian words. With e the even or odd column of a pair (j = e or j = 2 + e) and
register i = 0 … 3 as above (i = half + 2 * (j // 2)):

    4 bits   word s holds step s:             code (i, e) in bits 4 (i + 4 e) …
    2 bits   word s // 2 holds steps s:       code (i, e) in bits 2 (i + 4 (s % 2) + 8 e) …
    3 bits   the low two bits as for 2; the third of step s in word s // 4 of `high`, bit i + 4 (s % 4) + 16 e
    8 bits   word 2 s + half:                 column j in byte j

so that shifting a word and masking it gives both columns of register i in the halves of the result.

Shape suffixes: R tiles of rows, C chunks of columns, g t as above, h the half (row g or g + 8), s steps, j columns of a step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16
CHUNK = {2: 128, 3: 128, 4: 64, 8: 32}  # columns, by the bits of a code


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def split(values_NK: Tensor, chunk: int) -> Tensor:
    """[N, K] as [R, h, g, C, t, s, j], padded with zeros to whole tiles; a view where nothing is padded."""
    rows, columns = values_NK.shape
    whole = pad(values_NK, (0, -columns % chunk, 0, -rows % ROWS))
    return whole.view(-1, 2, 8, whole.shape[1] // chunk, 4, chunk // 16, 4)


def join(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `split`: the first [N, K] of tiles [R, h, g, C, t, s, j]."""
    rows, chunks, steps = 16 * tiles.shape[0], tiles.shape[3], tiles.shape[5]
    return tiles.reshape(rows, chunks * steps * 16)[: shape[0], : shape[1]]


def code_parts(bits: int) -> tuple[str, ...]:
    """Names of the tensors that codes of a width lie in."""
    return ("codes", "high") if bits == 3 else ("codes",)


def pack_codes(codes_NK: Tensor, bits: int) -> dict[str, Tensor]:
    """uint8 codes of 2, 3, 4 or 8 bits as the kernels read them."""
    tiles = split(codes_NK, CHUNK[bits])
    parts = {"codes": _PACK[bits](tiles)}
    return parts | {"high": _pack_high(tiles >> 2)} if bits == 3 else parts


def unpack_codes(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `pack_codes`."""
    tiles = _UNPACK[bits](parts["codes"])
    return join(tiles | _unpack_high(parts["high"]) << 2 if bits == 3 else tiles, shape)


def lanes(tiles: Tensor) -> Tensor:
    """Bytes [R, g, C, t, …] as lanes [R, C, 32, bytes]."""
    moved = tiles.transpose(1, 2).contiguous()
    return moved.view(*moved.shape[:2], 32, -1)


def unlanes(codes: Tensor, *of_lane: int) -> Tensor:
    """Lanes [R, C, 32, bytes] as [R, g, C, t, *of_lane]."""
    return codes.view(*codes.shape[:2], 8, 4, *of_lane).transpose(1, 2)


def _pack8(tiles: Tensor) -> Tensor:
    return lanes(tiles.permute(0, 2, 3, 4, 5, 1, 6))  # R g C t, s half j


def _unpack8(codes: Tensor) -> Tensor:
    return unlanes(codes, 2, 2, 4).permute(0, 5, 1, 2, 3, 4, 6)


def _pack4(tiles: Tensor) -> Tensor:
    nibbles = tiles[:, 0] | tiles[:, 1] << 4  # row g below row g + 8; [R, g, C, t, s, j]
    return lanes(nibbles[..., [0, 2, 1, 3]])


def _unpack4(codes: Tensor) -> Tensor:
    nibbles = unlanes(codes, 4, 4)[..., [0, 2, 1, 3]]
    return torch.stack([nibbles & 15, nibbles >> 4], 1)


def _pack2(tiles: Tensor) -> Tensor:
    low = tiles & 3
    j = [low[..., j] for j in range(4)]  # [R, half, g, C, t, s]
    byte = [j[e][:, 0] | j[e][:, 1] << 2 | j[2 + e][:, 0] << 4 | j[2 + e][:, 1] << 6 for e in range(2)]  # [R, g, C, t, s]
    pairs = [one.unflatten(-1, (4, 2)) for one in byte]  # word, parity of the step
    return lanes(torch.stack(pairs, -2))  # word, e, parity


def _unpack2(codes: Tensor) -> Tensor:
    byte = unlanes(codes, 4, 2, 2).transpose(-1, -2).flatten(-3, -2)  # [R, g, C, t, s, e]
    halves = [torch.stack([byte >> 2 * half & 3, byte >> 4 + 2 * half & 3], -2).flatten(-2) for half in range(2)]
    return torch.stack(halves, 1)


def _pack_high(bit: Tensor) -> Tensor:
    """Third bits [R, half, g, C, t, s = 8, j]: of each pair of steps one byte for the even and one for the odd columns."""
    steps = []
    for e in range(2):
        four = bit[:, 0, ..., e] | bit[:, 1, ..., e] << 1 | bit[:, 0, ..., 2 + e] << 2 | bit[:, 1, ..., 2 + e] << 3
        two = four.unflatten(-1, (2, 2, 2))  # word, byte of the half, parity of the step
        steps.append(two[..., 0] | two[..., 1] << 4)
    return lanes(torch.stack(steps, -2))  # word, e, byte


def _unpack_high(high: Tensor) -> Tensor:
    byte = unlanes(high, 2, 2, 2).transpose(-1, -2)  # [R, g, C, t, word, byte, e]
    four = torch.stack([byte & 15, byte >> 4], -2).flatten(-4, -2)  # [R, g, C, t, s, e]
    halves = [torch.stack([four >> half & 1, four >> 2 + half & 1], -2).flatten(-2) for half in range(2)]
    return torch.stack(halves, 1)


_PACK = {2: _pack2, 3: _pack2, 4: _pack4, 8: _pack8}
_UNPACK = {2: _unpack2, 3: _unpack2, 4: _unpack4, 8: _unpack8}
