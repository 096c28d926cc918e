"""Histograms of the magnitudes in each channel of a layer's input, from which the error of any rounding can be estimated.

Bins are an eighth of a power of two wide, from 2^-16 to 2^16. Magnitudes beyond count in the first or the last bin.

Shape suffixes: T tokens, I in_features, B bins, K scales, P points within a bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.numerics.minifloat import FP32_BIAS, FP32_MANTISSA, Minifloat

FINE = 3  # number of mantissa bits that distinguish bins
FIRST, LAST = -16, 16  # exponents of two
BINS = (LAST - FIRST) << FINE
POINTS = 8  # number of points in a bin at which an error is computed


def bins(x: Tensor) -> Tensor:
    """Return the bin of each number, int64."""
    place = (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> FP32_MANTISSA - FINE
    return place.sub_(FP32_BIAS + FIRST << FINE).clamp_(0, BINS - 1).long()


@dataclass(frozen=True)
class Magnitudes:
    """Histogram of a layer's input, collected in calibration."""

    counts_IB: Tensor  # int64

    @property
    def largest(self) -> Tensor:
        """Upper bound of the magnitudes in each channel, fp32 [I]; zero if none was seen."""
        top = (self.counts_IB > 0).int() * torch.arange(1, BINS + 1, device=self.counts_IB.device, dtype=torch.int32)
        return torch.where(top.amax(1) > 0, _edges(self.counts_IB.device)[top.amax(1)], 0.0)

    def energy(self) -> Tensor:
        """Estimate the mean square of each channel, fp64 [I]."""
        return self._mean(_points(self.counts_IB.device).square().mean(1)[None])[0]

    def missed(self, element: Minifloat, scales: Sequence[float]) -> Tensor:
        """Estimate each channel's mean squared error when rounded to an element type with each of K scales, fp64 [K, I]."""
        points = _points(self.counts_IB.device)
        scale = torch.tensor(scales, device=points.device)[:, None, None]
        return self._mean((element.round(points / scale) * scale - points).square().mean(2))

    def _mean(self, of_bins_KB: Tensor) -> Tensor:
        shares_BI = self.counts_IB.T.double() / self.counts_IB.sum(1).clamp(min=1)
        return of_bins_KB.double() @ shares_BI


def _edges(device: torch.device) -> Tensor:
    """Return the lower edges of all bins and the upper edge of the last, fp32 [B + 1]."""
    place = torch.arange(BINS + 1, dtype=torch.int32, device=device) + (FP32_BIAS + FIRST << FINE)
    return (place << FP32_MANTISSA - FINE).view(torch.float32)


def _points(device: torch.device) -> Tensor:
    """Return points in each bin, evenly spread, fp32 [B, P]."""
    edges = _edges(device)
    within = (torch.arange(POINTS, device=device) + 0.5) / POINTS
    return edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * within
