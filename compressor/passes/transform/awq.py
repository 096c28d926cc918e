"""Activation-aware scaling: enlarge the weights that large activations meet, so that rounding them costs less.

    s_j = rms(x_j) ** alpha        alpha = 0, 0.05, … 0.95, whichever leaves the smallest error of the layers' outputs

divides channel j of the input of linear layers and multiplies column j of their weights. There is no cost at run time.

Source: Lin et al., "AWQ", MLSys 2024, section 3.2. Differences:

* The error tr(E H Eᵀ) of the readers' outputs, H = XᵀX / T, is exact and needs no forward pass. The paper tries every alpha
  on the output of the attention, or of the MLP. The error of each reader is relative to its own output.
* The root mean square, from the diagonal of H, replaces the mean magnitude of a channel.
* Value heads shared by several query heads are scaled too, by the mean over these.
* Clipping is left to the format's search for scales.

Shape suffixes: I in_features of the readers, W channels of the writer, O out_features.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compressor.formats.base import Format
from compressor.model.dataflow import Feed
from compressor.passes.quantize.gptq import output_energy
from compressor.passes.transform.scaling import Scaling
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.contract import Accumulator, Stats
from compressor.recipe.registry import named, node

STEPS = 20  # number of values of alpha


@node
class AWQ(Scaling):
    """Scale channels so that rounding to a format loses least. A later pass does the rounding.

    Args:
        format: Format that the weights will be rounded to.
        search: Choose the format's scales by least error in each trial, as the later pass does.
    """

    format: Annotated[Format, named("format")]
    search: bool = False
    needs: ClassVar[tuple[type[Accumulator], ...]] = (Hessian,)

    def factors(self, feed: Feed, weights: Mapping[str, Tensor], stats: Stats) -> Tensor:
        h_II = stats[feed.readers[0], Hessian].value
        energies = {name: max(output_energy(w_OI, h_II), 1e-30) for name, w_OI in weights.items()}
        power_W = feed.gathered(h_II.diagonal())
        used = power_W > 0
        level = power_W[used].log().mean() if used.any() else 0.0
        logarithm_W = torch.where(used, (power_W.log() - level) / 2, 0.0)

        def cost(s_W: Tensor) -> float:
            s_I = feed.spread(s_W)
            return sum(output_energy(self._missed(w_OI, s_I), h_II) / energies[name] for name, w_OI in weights.items())

        return min((torch.exp(logarithm_W * (i / STEPS)) for i in range(STEPS)), key=cost)

    def _missed(self, w_OI: Tensor, s_I: Tensor) -> Tensor:
        """Return the error of a weight that is scaled, rounded and scaled back."""
        scaled_OI = w_OI * s_I
        grid = self.format.fit(scaled_OI, search=self.search)
        return grid.decode(grid.round(scaled_OI, 0), 0).sub_(scaled_OI).div_(s_I)


EXPORT = AWQ
