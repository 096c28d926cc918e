"""Statistics of layer inputs that a pass can request. A pass may also define its own: see `Accumulator`.

Shape suffixes: T tokens, I in_features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.formats.numerics.histogram import BINS, Magnitudes, bins
from compressor.pipeline.contract import Group

AT_ONCE = 2**22  # numbers counted at once, to bound temporary memory


class Hessian:
    """Second moment of a layer's input, XᵀX / T: the Hessian of the squared output error, up to a factor.

    Products within a batch are fp32, and their sum is fp64. So millions of tokens lose no precision, and the order of
    summation, which depends on the number of ranks, hardly matters. Only the upper triangle is summed, a strip of rows at a
    time, so that no second matrix of this size is ever in memory.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        x = x_TI.float()
        for rows in strips(len(self.total)):
            self.total[rows, rows.start :] += x[:, rows].T @ x[:, rows.start :]
        self.tokens += len(x_TI)

    def merge(self, ranks: Group) -> None:
        """Add the tokens of other ranks."""
        ranks.sum_([self.total, self.tokens])

    @property
    def count(self) -> int:
        """Number of tokens seen."""
        return int(self.tokens)

    @property
    def value(self) -> Tensor:
        """The second moment, fp32 [I, I]; zero if no token was seen."""
        mean = torch.empty_like(self.total, dtype=torch.float32)
        for rows in strips(len(mean)):
            mean[rows, rows.start :] = self.total[rows, rows.start :] / self.tokens.clamp(min=1)
            square = mean[rows, rows]
            square.copy_(square.triu() + square.triu(1).T)
            mean[rows.stop :, rows] = mean[rows, rows.stop :].T
        return mean


class Mean:
    """Mean of each channel of a layer's input."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        self.total += x_TI.float().sum(0)
        self.tokens += len(x_TI)

    def merge(self, ranks: Group) -> None:
        """Add the tokens of other ranks."""
        ranks.sum_([self.total, self.tokens])

    @property
    def value(self) -> Tensor:
        """The mean, fp32 [I]; zero if no token was seen."""
        return (self.total / self.tokens.clamp(min=1)).float()


class Peak:
    """Largest magnitude of each channel of a layer's input."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.value = torch.zeros(in_features, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        low, high = x_TI.aminmax(dim=0)
        self.value = torch.maximum(self.value, torch.maximum(-low, high).float())

    def merge(self, ranks: Group) -> None:
        """Add the tokens of other ranks."""
        ranks.max_([self.value])


class Spread:
    """Histogram of magnitudes for each channel of a layer's input."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.counts_IB = torch.zeros(in_features, BINS, dtype=torch.int64, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        channel, size = torch.arange(x_TI.shape[1], device=x_TI.device) * BINS, self.counts_IB.numel()
        for x in x_TI.split(max(1, AT_ONCE // x_TI.shape[1])):
            self.counts_IB += torch.bincount((bins(x) + channel).flatten(), minlength=size).view_as(self.counts_IB)

    def merge(self, ranks: Group) -> None:
        """Add the tokens of other ranks."""
        ranks.sum_([self.counts_IB])

    @property
    def value(self) -> Magnitudes:
        """The histogram over all tokens."""
        return Magnitudes(self.counts_IB)


class Mismatch:
    """Change of a layer's input by the compression of earlier layers, projected onto the input: M = (X_dense - X)ᵀ X / T.

    With the Hessian H, W (H + M) is the product of the dense model's outputs with the current inputs. Products are fp32 and
    sums fp64, as in `Hessian`.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update_pair(self, x_TI: Tensor, dense_TI: Tensor) -> None:
        """Add the inputs of T tokens."""
        x = x_TI.float()
        missing_IT = (dense_TI.float() - x).T
        for rows in strips(len(self.total)):
            self.total[rows] += missing_IT[rows] @ x
        self.tokens += len(x_TI)

    def merge(self, ranks: Group) -> None:
        """Add the tokens of other ranks."""
        ranks.sum_([self.total, self.tokens])

    @property
    def value(self) -> Tensor:
        """The matrix M, fp32 [I, I]; zero if no token was seen."""
        return (self.total / self.tokens.clamp(min=1)).float()


def strips(width: int) -> Iterator[slice]:
    """Yield strips of rows of a matrix, to be processed one at a time. The upper triangle starts at column `rows.start`."""
    size = max(128, -(-width // 8))
    for start in range(0, width, size):
        yield slice(start, min(start + size, width))
