"""AdaDim without error feedback: each layer is rounded to nearest in the format that leaves the smaller error.

With calibration this is the error of the layer's output, as in the paper; without, the error of its weights. See
compressor/passes/quantize/adadim.py.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from compressor.formats.base import Format, OneOf, QuantizedTensor, Stored
from compressor.model.block import Block
from compressor.passes.quantize.gptq import output_energy
from compressor.passes.quantize.rounding import WeightRounding, relative
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.contract import Accumulator, Outcome, Stats
from compressor.recipe.registry import node


@node
class AdaDimRTN(WeightRounding):
    """Round to nearest in the best of the options.

    Args:
        calibrated: Choose by the error of outputs on calibration text. False reads no text and uses the error of weights.
    """

    search: bool = False
    calibrated: bool = True
    chooses: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[type[Accumulator], ...]:
        """Return the Hessian if calibrated, and the statistics that the options need."""
        return (Hessian, *self.looks) if self.calibrated else self.looks

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, OneOf]) -> Outcome:
        formats = self.formats(block, stats, choice)
        edits: dict[str, Stored] = {}
        errors: dict[str, float] = {}
        for layers in stats.taps(formats):
            h_II = stats[layers[0], Hessian].value if self.calibrated else None
            for name in layers:
                tried = [self._rounded(block.weight(name).float(), fmt, h_II) for fmt in formats[name]]
                edits[name], errors[name] = min(tried, key=lambda found: found[1])
        return Outcome(edits, errors)

    def _rounded(self, w_OI: Tensor, fmt: Format, h_II: Tensor | None) -> tuple[QuantizedTensor, float]:
        """Return a weight rounded to a format, and its relative error."""
        grid = fmt.fit(w_OI, None if h_II is None else h_II.diagonal(), search=self.search)
        packed = grid.pack(grid.round(w_OI, 0))
        missed = packed.dequantize().sub_(w_OI)
        if h_II is None:
            return packed, relative(missed, w_OI)
        return packed, output_energy(missed, h_II) / max(output_energy(w_OI, h_II), 1e-30)


EXPORT = AdaDimRTN
