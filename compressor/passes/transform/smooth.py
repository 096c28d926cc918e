"""Smoothing: move the outliers of activations into the weights, where they do less harm when rounded.

    s_j = max |x_j| ** alpha / max |w_j| ** (1 - alpha)

divides channel j of the input of linear layers and multiplies column j of their weights. Meant for formats that round
activations.

Source: Xiao et al., "SmoothQuant", ICML 2023, equation 4. Difference: the inputs of down_proj and o_proj are smoothed too,
where the layer before can absorb the factors.

Shape suffixes: I in_features of the readers, W channels of the writer, O out_features.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from compressor.model.dataflow import Feed
from compressor.passes.transform.scaling import Scaling
from compressor.pipeline.calibration.stats import Peak
from compressor.pipeline.contract import Accumulator, Stats
from compressor.recipe.registry import node


@node
class Smooth(Scaling):
    """Balance the ranges of activations and weights.

    Args:
        alpha: Fraction of the range that moves to the weights, 0 to 1.
    """

    alpha: float = 0.5
    needs: ClassVar[tuple[type[Accumulator], ...]] = (Peak,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is not in 0 … 1")

    def factors(self, feed: Feed, weights: Mapping[str, Tensor], stats: Stats) -> Tensor:
        def peak(x_I: Tensor) -> Tensor:
            return x_I.view(-1, feed.repeats, feed.run).amax(1).flatten()

        activations = peak(stats[feed.readers[0], Peak].value)
        columns = peak(torch.stack([w_OI.abs().amax(0) for w_OI in weights.values()]).amax(0))
        s_W = activations**self.alpha / columns ** (1 - self.alpha)
        return torch.where((activations > 0) & (columns > 0), s_W, 1.0)


EXPORT = Smooth
