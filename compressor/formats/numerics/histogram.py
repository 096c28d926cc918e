"""How often each channel of a layer's input has each magnitude: enough to know what rounding it in any way would cost.

Bins are an eighth of a power of two wide, from 2^-16 to 2^16; what lies beyond counts in the first or the last of them.

Shape suffixes: T tokens, I in_features, B bins, K ways of rounding, P points within a bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.numerics.minifloat import FP32_BIAS, FP32_MANTISSA, Minifloat

FINE = 3  # bits of the mantissa that tell bins apart
FIRST, LAST = -16, 16  # powers of two
BINS = (LAST - FIRST) << FINE
POINTS = 8  # in a bin, at which an error is computed


def bins(x: Tensor) -> Tensor:
    """The bin of each number, int64."""
    place = (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> FP32_MANTISSA - FINE
    return place.sub_(FP32_BIAS + FIRST << FINE).clamp_(0, BINS - 1).long()


@dataclass(frozen=True)
class Magnitudes:
    """Histogram of the magnitudes of an input in calibration."""

    counts_IB: Tensor  # int64

    @property
    def largest(self) -> Tensor:
        """No number in a channel was larger than that; zero if none was seen."""
        top = (self.counts_IB > 0).int() * torch.arange(1, BINS + 1, device=self.counts_IB.device, dtype=torch.int32)
        return torch.where(top.amax(1) > 0, _edges(self.counts_IB.device)[top.amax(1)], 0.0)

    def energy(self) -> Tensor:
        """Mean square of each channel, fp64 [I]."""
        return self._mean(_points(self.counts_IB.device).square().mean(1)[None])[0]

    def missed(self, element: Minifloat, scales: Sequence[float]) -> Tensor:
        """Mean squared error of each channel when it is rounded to numbers of a kind times each of K scales, fp64 [K, I]."""
        points = _points(self.counts_IB.device)
        scale = torch.tensor(scales, device=points.device)[:, None, None]
        return self._mean((element.round(points / scale) * scale - points).square().mean(2))

    def _mean(self, of_bins_KB: Tensor) -> Tensor:
        shares_BI = self.counts_IB.T.double() / self.counts_IB.sum(1).clamp(min=1)
        return of_bins_KB.double() @ shares_BI


def _edges(device: torch.device) -> Tensor:
    """Where bins begin, and the last ends, fp32 [B + 1]."""
    place = torch.arange(BINS + 1, dtype=torch.int32, device=device) + (FP32_BIAS + FIRST << FINE)
    return (place << FP32_MANTISSA - FINE).view(torch.float32)


def _points(device: torch.device) -> Tensor:
    """Points in each bin, evenly spread, fp32 [B, P]."""
    edges = _edges(device)
    within = (torch.arange(POINTS, device=device) + 0.5) / POINTS
    return edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * within
