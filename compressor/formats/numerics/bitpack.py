"""Dense packing of unsigned codes of 1 to 31 bits into 32-bit words, least significant bit first.

Code j of a row occupies bits j * bits … (j + 1) * bits of the row's bit stream. Word k holds bits 32k … 32k + 31. A code may
straddle two words. 32 codes fill exactly `bits` words: packing and unpacking loop over the 32 positions of such a run, and
process all runs of all rows at once.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 32


def words(n: int, bits: int) -> int:
    """Return the number of 32-bit words that n codes take."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis.

    Args:
        codes: Codes, uint8 or int [..., n], values in [0, 2**bits).
        bits: Width of one code, 1 to 31.

    Returns:
        int32, [..., ceil(n * bits / 32)]; unused high bits of the last word are zero.
    """
    n = codes.shape[-1]
    runs = pad(codes, (0, -n % RUN)).unflatten(-1, (-1, RUN))
    packed = torch.zeros(*runs.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for j in range(RUN):
        word, shift = divmod(j * bits, 32)
        code = runs[..., j].int()
        packed[..., word] |= code << shift
        if shift + bits > 32:
            packed[..., word + 1] |= code >> (32 - shift)
    return packed.flatten(-2)[..., : words(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`; return [..., n], uint8 for at most 8 bits, else int32."""
    missing = -(-n // RUN) * bits - packed.shape[-1]
    runs = pad(packed, (0, missing)).unflatten(-1, (-1, bits))
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.empty(*runs.shape[:-1], RUN, dtype=dtype, device=packed.device)
    mask = 2**bits - 1
    for j in range(RUN):
        word, shift = divmod(j * bits, 32)
        code = runs[..., word] >> shift  # arithmetic shift: the sign bits that it shifts in are masked off below
        if shift + bits > 32:
            low = 32 - shift
            code = (code & (2**low - 1)) | (runs[..., word + 1] << low)
        codes[..., j] = (code & mask).to(dtype)
    return codes.flatten(-2)[..., :n]
