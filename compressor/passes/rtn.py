"""Round to nearest: no calibration, the baseline that every other quantizer must beat."""

from collections.abc import Mapping
from typing import ClassVar

from compressor.passes._rounding import WeightRounding, relative
from compressor.registry import node
from compressor.types import Accumulator, Block, Format, Outcome, Stats


@node
class RTN(WeightRounding):
    """Round every weight to the nearest value of its group's grid."""

    search: bool = False
    needs: ClassVar[tuple[type[Accumulator], ...]] = ()

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        units, edits, errors = self.units(block), {}, {}
        for unit, option in choice.items():
            for name in units[unit]:
                weight = block.weight(name).float()
                grid = option.fit(weight, search=self.search)
                edits[name] = grid.pack(grid.round(weight, 0))
                errors[name] = relative(edits[name].dequantize().sub_(weight), weight)
        return Outcome(edits, errors)


EXPORT = RTN
