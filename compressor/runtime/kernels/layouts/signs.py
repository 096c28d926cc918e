"""Planes of signs whose scaled sum is the weight: one bit for each weight and plane.

Columns of a chunk: 256. Parts, with P planes, R = ceil(N / 16), C = ceil(K / 256):

    negative   uint8 [R, C, P, 32, 16]   16 bytes of each lane and plane, below
    scales     int32 [R, G, P, 8]        of each group: the bf16 scale of row g, above it that of row g + 8

The bytes of a lane are four little-endian words. Step s lies in word s // 4; with e the even or odd column of a pair and
register i = half + 2 * (j // 2) as in `tile_order`, its bit is i + 4 (s % 4) + 16 e: one shift brings both columns of a
register to where a bf16 has its sign. A scale with its sign flipped or not is a plane's part of the weight: scales cost
nothing to apply, and a group need only hold a lane's run, 64 columns. Other sizes are divided further, if possible, with
equal scales.

Shape suffixes as in `tile_order`; P planes, N and K are out_features and in_features.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import SignCodes
from compressor.runtime.kernels.layouts import tile_order

CHUNK = 256
MOST_PLANES = 4  # with more, integers of as many bits are smaller and better


@dataclass(frozen=True)
class Signs:
    """One arrangement; its name says all of it."""

    planes: int  # 1 … 4
    group: int  # columns that share a scale; 0 for the whole row
    by_rows: ClassVar[bool] = True
    chunk: ClassVar[int] = CHUNK
    parts: ClassVar[tuple[str, ...]] = ("negative", "scales")

    @property
    def name(self) -> str:
        return f"signs{self.planes}-g{self.group}"

    @staticmethod
    def parse(name: str) -> "Signs | None":
        """The layout of this name, or None if it is another family's."""
        found = re.fullmatch(r"signs(\d+)-g(\d+)", name)
        return Signs(int(found[1]), int(found[2])) if found else None

    @staticmethod
    def of(codes: SignCodes) -> "Signs | None":
        """The layout that takes these codes, or None: too many planes, or groups that cut through a lane's run."""
        planes, _, columns = codes.negative_POI.shape
        groups = codes.scale_POG.shape[2]
        if planes > MOST_PLANES or codes.scale_POG.dtype != torch.bfloat16:
            return None
        if groups == 1:
            return Signs(planes, 0)
        size = columns // groups
        if size % CHUNK:
            size = math.gcd(size, CHUNK)
        return None if size % (CHUNK // 4) else Signs(planes, size)

    def arrange(self, codes: SignCodes) -> dict[str, Tensor]:
        """The parts."""
        return {"negative": _pack(codes.negative_POI), "scales": self._arrange_scales(codes)}

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> SignCodes:
        """The codes that were arranged, but for groups that were divided."""
        groups = shape[1] // self.group if self.group else 1
        words = parts["scales"]
        halves = torch.stack([words, words >> 16], 3).to(torch.int16).view(torch.bfloat16)  # [R, G, P, h, g]
        scale_PNG = halves.permute(2, 0, 3, 4, 1).flatten(1, 3)[:, : shape[0], :groups]
        return SignCodes(_unpack(parts["negative"], shape), scale_PNG.contiguous())

    def _arrange_scales(self, codes: SignCodes) -> Tensor:
        columns, given = codes.negative_POI.shape[2], codes.scale_POG.shape[2]
        repeats = columns // given // self.group if self.group else 1
        groups = tile_order.round_up(columns, CHUNK) // self.group if self.group else 1
        scale_PNG = codes.scale_POG.repeat_interleave(repeats, 2)
        scale_PNG = pad(scale_PNG, (0, groups - scale_PNG.shape[2], 0, -scale_PNG.shape[1] % tile_order.ROWS))
        bits = scale_PNG.view(torch.int16).int().unflatten(1, (-1, 2, 8)).permute(1, 4, 0, 2, 3)  # [R, G, P, h, g]
        words: Tensor = bits[..., 0, :] & 0xFFFF | bits[..., 1, :] << 16
        return words.contiguous()


def _pack(negative_PNK: Tensor) -> Tensor:
    """Bits as bytes [R, C, P, 32, 16]."""
    tiles = torch.stack([tile_order.split(plane, CHUNK) for plane in negative_PNK])  # [P, R, h, g, C, t, s, j]
    fields = tiles.unflatten(6, (4, 4)).unflatten(8, (2, 2))  # s as word and step of it, j as register and e
    bits = fields.permute(1, 4, 0, 3, 5, 6, 9, 7, 8, 2)  # R C P, g t, word e, step register h
    chunks = bits.shape[:3]
    places = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed: Tensor = (bits.reshape(*chunks, 32, 16, 8) * places).sum(-1, dtype=torch.uint8)
    return packed


def _unpack(negative: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `_pack`, uint8 [P, N, K]."""
    bits = negative[..., None] >> torch.arange(8, dtype=torch.uint8, device=negative.device) & 1
    fields = bits.view(*negative.shape[:3], 8, 4, 4, 2, 4, 2, 2).permute(2, 0, 9, 3, 1, 4, 5, 7, 8, 6)
    return torch.stack([tile_order.join(plane, shape) for plane in fields.flatten(6, 7).flatten(7, 8)])
