"""Statistics a pass can ask for. A pass may also define its own; the stream only needs the three methods.

Shape suffixes: T tokens, I in_features.
"""

import torch
from torch import Tensor


class Hessian:
    """Second moment of a layer's input, XᵀX / T: the Hessian of its squared output error, up to a factor.

    Products of a batch are fp32, their sum fp64: the order of summation, and so the number of ranks, then hardly matters,
    and millions of tokens lose nothing. Only the upper triangle is kept up while summing.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        self.total += upper_gram(x_TI.float())
        self.tokens += len(x_TI)

    def tensors(self) -> list[Tensor]:
        return [self.total, self.tokens]

    @property
    def count(self) -> int:
        """Tokens seen."""
        return int(self.tokens)

    @property
    def value(self) -> Tensor:
        """fp32 [I, I]; zero if no token was seen."""
        mean = self.total.div(self.tokens.clamp(min=1)).float().triu_()
        return mean + mean.triu(1).T


def upper_gram(x_TI: Tensor) -> Tensor:
    """XᵀX in fp32, of which only the upper triangle is meaningful: each strip of rows starts at its own first column."""
    width = x_TI.shape[1]
    gram = torch.zeros(width, width, device=x_TI.device)
    strip = max(128, -(-width // 4))
    for lo in range(0, width, strip):
        gram[lo : lo + strip, lo:] = x_TI[:, lo : lo + strip].T @ x_TI[:, lo:]
    return gram
