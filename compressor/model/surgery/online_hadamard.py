"""Activations turned by a Hadamard matrix in front of a layer whose weight was turned by it before: x H · (W H)ᵀ = x Wᵀ.

No channel then stands out among those that share a scale, neither in the activations nor in the weight. Where the layer
reads a product (of up and gate), nothing that comes before can be turned in its stead, so it is done when the model runs.

H is block diagonal, each block the Sylvester matrix of a power of two, normalised: symmetric, and its own inverse.

Source: Ashkboos et al., "QuaRot", NeurIPS 2024, section 4, stage 1c.

Shape suffixes: X anything, N in_features, K size of a block.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

FACTOR = (
    64  # a larger block is a Kronecker product of matrices of at most this size: two short products instead of a long one
)
MATRIX = "hadamard"  # the buffer of a module that is given turned activations
Blocks = Mapping[str, int]  # layers whose activations are turned, by name, with the size of the blocks


def largest_block(in_features: int) -> int:
    """The largest power of two that divides a number."""
    return in_features & -in_features


def sylvester(size: int) -> Tensor:
    """The Hadamard matrix of a power of two, fp64 [size, size], of ones and minus ones; its corners are the smaller ones."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")  # even where meta is the default
    matrix = two[:1, :1]
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    return matrix


def turned(x_XN: Tensor, size: int, signs: Tensor | None = None) -> Tensor:
    """x H in the dtype of x.

    Args:
        x_XN: Anything whose last axis is a multiple of the block.
        size: K, of the block: a power of two.
        signs: The Sylvester matrix of min(K, 64), of ones and minus ones, in the dtype and on the device of x.
    """
    signs = sylvester(min(size, FACTOR)).to(x_XN) if signs is None else signs
    y = x_XN.reshape(-1, size)
    for factor in _factors(size):  # each turns the last axis and moves it to the front: all come back to their places
        matrix = signs[:factor, :factor] * 2.0 ** -(factor.bit_length() // 2)  # exact in every dtype
        y = (y.reshape(len(y), -1, factor) @ matrix).transpose(1, 2).reshape(len(y), -1)
    rest = size**-0.5 * prod(2.0 ** (factor.bit_length() // 2) for factor in _factors(size))
    return (y if rest == 1 else y * rest).reshape(x_XN.shape)


def _factors(size: int) -> list[int]:
    """Sizes of the matrices whose Kronecker product is that of a power of two."""
    factors = []
    while size > 1:
        factors.append(min(size, FACTOR))
        size //= factors[-1]
    return factors


def turn_inputs(module: nn.Module, blocks: Blocks) -> None:
    """Have the named layers inside a module be given turned activations from now on, before any other hook sees them."""
    for name, size in blocks.items():
        layer = module.get_submodule(name)
        device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
        place = device if device is not None and device.type != "meta" else torch.device("cpu")
        layer.register_buffer(MATRIX, sylvester(min(size, FACTOR)).float().to(place), persistent=False)
        layer.register_forward_pre_hook(_Turn(size), prepend=True)


class _Turn:
    """The hook."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (turned(given[0], self.size, getattr(module, MATRIX).to(given[0].dtype)), *given[1:])
