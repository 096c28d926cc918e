"""Dense packing of unsigned codes of 1 to 8 bits into 32-bit words, least significant bit first.

Code j of a row occupies bits j * bits … (j + 1) * bits of the row's bit stream; word k holds bits 32k … 32k + 31. A code may
straddle two words. 8 codes fill exactly `bits` bytes and fit one 64-bit integer, so both directions go through the first
`bits` bytes of little-endian integers that hold 8 codes each.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 8


def words(n: int, bits: int) -> int:
    """32-bit words that n codes take."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis.

    Args:
        codes: uint8 or int, [..., n], values in [0, 2**bits).
        bits: Width of one code, 1 to 8.

    Returns:
        int32, [..., ceil(n * bits / 32)]; unused high bits of the last word are zero.
    """
    n = codes.shape[-1]
    runs = pad(codes, (0, -n % 32)).unflatten(-1, (-1, RUN))  # 32 codes fill whole words
    eight = runs[..., 0].long()
    for j in range(1, RUN):
        eight |= runs[..., j].long() << (j * bits)
    packed: Tensor = eight.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2).contiguous().view(torch.int32)
    return packed[..., : words(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack`; returns uint8, [..., n]."""
    missing = -(-n // 32) * bits - packed.shape[-1]
    runs = pad(packed, (0, missing)).contiguous().view(torch.uint8).unflatten(-1, (-1, bits))
    eight = pad(runs, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = torch.empty(*runs.shape[:-1], RUN, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for j in range(RUN):
        codes[..., j : j + 1] = (eight >> (j * bits)) & mask  # arithmetic: the sign bits it drags in are masked off
    return codes.flatten(-2)[..., :n]
