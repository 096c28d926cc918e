"""Pre-shifted exponent bias: channels with small activations are multiplied by powers of two, so that one scale suits all.

Layers then read x_j 2^k_j, and their weights are W_:j 2^-k_j. The norm or the layer before absorbs the factors, exactly, so
there is no cost at run time. Meant for formats that round activations to floating-point numbers with one scale.

The scale a of the activations and the shifts are searched jointly. For each a, a channel gets the shift of least cost,

    c_j(k) = |W_:j|^2 E|round(x_j 2^k, a) 2^-k - x_j|^2 + E[x_j^2] |round(W_:j 2^-k) 2^k - W_:j|^2

where the second term is the precision that the weight, rounded afterwards, loses by the shift. The a with the least sum is
chosen. This takes three rounds. In each, the scales of the weights fit the shifts of the round before; the first round
considers activations only.

Source: Liu et al., "LLM-FP4", EMNLP 2023, section 4.3. Differences: shifts are chosen by the error that remains, while the
paper aligns the largest activations of channels. Shifts may exceed the range of the exponents.

Shape suffixes: I in_features of the readers, W channels of the writer, O out_features, K shifts, A scales.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Format
from compressor.formats.float_group import FloatGroup
from compressor.formats.numerics.activations import EIGHTHS, Seen, scales
from compressor.formats.numerics.minifloat import Minifloat
from compressor.model.dataflow import Feed
from compressor.passes.transform.scaling import Scaling
from compressor.pipeline.calibration.stats import Spread
from compressor.pipeline.contract import Accumulator, Stats
from compressor.recipe.registry import named, node

SHIFTS = 8  # number of shifts tried, from 0
ROUNDS = 3


@node
class Preshift(Scaling):
    """Equalize channels before activations are rounded with one scale. A later pass does the rounding.

    Args:
        format: Format that the layers will be rounded to, with `activations: …-tensor`.
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
        missed = [self._missed_inputs(seen, element) for element in self.format.input_elements]
        power_I = seen.magnitudes.energy()
        shift_W = torch.zeros(len(feed.gathered(energy_I)), dtype=torch.int64, device=energy_I.device)
        tried = [(self._cost(feed, missed, weights, power_I, shift_W)[1], shift_W)]
        lost_KI = torch.zeros(SHIFTS, 1, device=energy_I.device)  # the first round ignores what shifts cost the weights
        for _ in range(ROUNDS):
            shift_W = _best(feed, missed, lost_KI)[0]
            lost_KI, cost = self._cost(feed, missed, weights, power_I, shift_W)
            tried.append((cost, shift_W))
        return torch.exp2(-min(tried, key=lambda found: found[0])[1].float())

    def _missed_inputs(self, seen: Seen, element: Minifloat) -> Tensor:
        """Return the cost of rounding the inputs, by scale and shift, [A, K, I]."""
        below = (SHIFTS - 1) * EIGHTHS
        missed_AI = seen.magnitudes.missed(element, scales(element, seen.peak(), below)) * seen.energy_I.double()
        return torch.stack([missed_AI[a::EIGHTHS][:SHIFTS] for a in range(len(missed_AI) - below)])

    def _cost(
        self, feed: Feed, missed: Sequence[Tensor], weights: Mapping[str, Tensor], power_I: Tensor, shift_W: Tensor
    ) -> tuple[Tensor, float]:
        """Return the weights' error for each shift [K, I], with scales fitted to given shifts, and the cost of those."""
        shift_I = feed.spread(shift_W)
        lost_KI = torch.zeros(SHIFTS, len(power_I), dtype=torch.float64, device=power_I.device)
        for w_OI in weights.values():
            grid = self.format.fit(w_OI * torch.exp2(-shift_I.float()), search=False)
            for k in range(SHIFTS):
                small_OI = w_OI * 2.0**-k
                lost_KI[k] += (grid.decode(grid.round(small_OI, 0), 0) * 2.0**k - w_OI).square().sum(0) * power_I
        return lost_KI, _best(feed, missed, lost_KI, shift_I)[1]


def _best(feed: Feed, missed: Sequence[Tensor], lost_KI: Tensor, shift_I: Tensor | None = None) -> tuple[Tensor, float]:
    """Return shifts [W] and their total cost at the best scale of activations.

    Given shifts [I] are not changed, only their cost is computed.
    """
    found = []
    for missed_AKI in missed:
        for missed_KI in missed_AKI:
            cost_KI = missed_KI + lost_KI
            if shift_I is not None:
                found.append((shift_I, float(cost_KI.gather(0, shift_I[None]).sum())))
                continue
            cost_W, best_W = torch.stack([feed.gathered(cost_I) for cost_I in cost_KI]).min(0)
            found.append((best_W, float(cost_W.sum())))
    return min(found, key=lambda tried: tried[1])


EXPORT = Preshift
