"""Round to nearest: no calibration, the baseline that every other quantizer must beat."""

from collections.abc import Mapping

from compressor.formats.base import Format
from compressor.model.block import Block
from compressor.passes.quantize.rounding import WeightRounding, rounded
from compressor.pipeline.contract import Accumulator, Outcome, Stats
from compressor.recipe.registry import node


@node
class RTN(WeightRounding):
    """Round every weight to the nearest value of its group's grid."""

    search: bool = False

    @property
    def needs(self) -> tuple[type[Accumulator], ...]:
        return self.looks

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        return rounded(block, self.formats(block, stats, choice), lambda fmt, weight: fmt.fit(weight, search=self.search))


EXPORT = RTN
