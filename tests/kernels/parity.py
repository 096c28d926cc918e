"""What a product by a packed weight is compared with, and the numbers that it is made of."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.formats.numerics.codes import Codes, IntCodes, values


def activations(tokens: int, columns: int) -> Tensor:
    """bf16 [M, K], of which no column is alike."""
    return torch.randn(tokens, columns).bfloat16()


def int_codes(bits: int, rows: int, columns: int, a: int, b: int, dtype: torch.dtype = torch.bfloat16) -> IntCodes:
    """Random codes with a scale and a zero point for each a rows and b columns."""
    grid = (rows // a, columns // b)
    codes, zero = (torch.randint(0, 2**bits, size, dtype=torch.uint8) for size in ((rows, columns), grid))
    return IntCodes(bits, codes, (0.01 * torch.rand(grid) + 0.001).to(dtype), zero)


def in_stored_order(x_MK: Tensor, codes: Codes, chunk: int) -> Tensor:
    """The activations as a kernel takes them: columns in the order of the weight's, with zeros up to a whole chunk."""
    order = codes.order_I if isinstance(codes, IntCodes) else None
    stored = x_MK if order is None else x_MK[:, order]
    return pad(stored, (0, -stored.shape[1] % chunk)).contiguous()


def product(x_MK: Tensor, codes: Codes, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias in fp64."""
    exact = x_MK.double() @ values(codes).double().T
    return exact if bias_N is None else exact + bias_N.double()


def steps_apart(a: Tensor, b: Tensor) -> int:
    """How many bf16 numbers the two are apart where they are furthest apart; 0 and -0 are one."""

    def place(numbers: Tensor) -> Tensor:
        bits = numbers.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((place(a) - place(b)).abs().max())
