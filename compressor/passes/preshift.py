"""Pre-shifted exponent bias: channels with small activations are multiplied by powers of two, so that one scale serves all.

Layers then read x_j 2^k_j, and their weights are W_:j 2^-k_j: the norm or the layer before takes the factors up, exactly, and
nothing is left to do at run time. Meant for formats that round activations to floating-point numbers by one scale.

The scale a of the activations and the shifts are searched together. For each a, a channel takes the shift that costs least,

    c_j(k) = |W_:j|^2 E|round(x_j 2^k, a) 2^-k - x_j|^2 + E[x_j^2] |round(W_:j 2^-k) 2^k - W_:j|^2

the second part being what the shift takes from the weight, which is rounded afterwards; the a with the least sum is taken.

Source: Liu et al., "LLM-FP4", EMNLP 2023, section 4.3. What differs: shifts are chosen by the error that they leave, while
the paper takes those that bring the largest activations of channels together; there may be more of them than exponents.

Shape suffixes: I in_features of the readers, W channels of the writer, O out_features, K shifts, A scales.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compressor.activations import EIGHTHS, Seen, scales
from compressor.calibration.stats import Spread
from compressor.errors import RecipeError
from compressor.formats.float_group import FloatGroup
from compressor.model.feeds import Feed
from compressor.passes._scaling import Scaling
from compressor.registry import named, node
from compressor.types import Accumulator, Format, Stats

SHIFTS = 8  # tried: from 0 on


@node
class Preshift(Scaling):
    """Even out channels before activations are rounded by one scale; a later pass does the rounding.

    Args:
        format: What the layers will be rounded to: one with `activations: …-tensor`.
    """

    format: Annotated[Format, named("format")]
    needs: ClassVar[tuple[type[Accumulator], ...]] = (Spread,)

    def factors(self, feed: Feed, weights: Mapping[str, Tensor], stats: Stats) -> Tensor:
        if not isinstance(self.format, FloatGroup) or not self.format.static_inputs:
            raise RecipeError(
                f"preshift: {self.format.label} does not round activations by one scale; leave the pass out, or take "
                "`format: float_group` with `activations: e2m1-tensor`"
            )
        energy_I = torch.stack([w_OI.square().sum(0) for w_OI in weights.values()]).sum(0)
        seen = Seen(stats[feed.readers[0], Spread].value, energy_I)
        power_I = seen.magnitudes.energy()
        lost_KI = torch.stack([_missed(list(weights.values()), self.format, power_I, k) for k in range(SHIFTS)]) * power_I
        best_W, least = torch.zeros(0), torch.inf
        for element in self.format.input_elements:
            below = (SHIFTS - 1) * EIGHTHS
            missed_AI = seen.magnitudes.missed(element, scales(element, seen.peak(), below)) * energy_I.double()
            for a in range(len(missed_AI) - below):
                cost_KI = missed_AI[a::EIGHTHS][:SHIFTS] + lost_KI
                cost_KW = torch.stack([feed.gathered(cost_I) for cost_I in cost_KI])
                cost_W, shift_W = cost_KW.min(0)
                if (cost := float(cost_W.sum())) < least:
                    best_W, least = shift_W, cost
        return torch.exp2(-best_W.float())


def _missed(weights: list[Tensor], fmt: Format, power_I: Tensor, shift: int) -> Tensor:
    """Squared error of each column of some weights when they are shifted, then rounded by the scales of before, [I]."""
    missed_I = torch.zeros_like(power_I)
    for w_OI in weights:
        grid = fmt.fit(w_OI, power_I.float())
        small_OI = w_OI * 2.0**-shift
        missed_I += (grid.decode(grid.round(small_OI, 0), 0) * 2.0**shift - w_OI).square().sum(0)
    return missed_I


EXPORT = Preshift
