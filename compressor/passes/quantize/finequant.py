"""FineQuant: the coarsest groups that each layer tolerates, chosen from the weights alone.

The options of the recipe form a ladder, from the fewest stored bits (for example one group per row) to the most (for example
groups of 32). The rung of a unit is chosen

* by `tolerance`: the first rung whose error exceeds that of the next by no more than this fraction; or
* by `budget_bits_per_weight`: within a budget for the block. All units start on the coarsest rung. The step that lowers
  the relative errors most for each added bit is taken, until none fits.

Source: Kim et al., "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs", 2023, section 4.
It starts with one group per row and halves groups while that shrinks their ranges enough. Differences: errors are compared
instead of ranges, so scales may be fitted (compressor/passes/quantize/hqq.py). Layers that are fused when served use the
same rung. The budget is our addition.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from compressor.errors import RecipeError
from compressor.formats.base import Format, Option
from compressor.model.block import Block
from compressor.passes.quantize.hqq import HQQ
from compressor.passes.quantize.rounding import relative, rounded
from compressor.pipeline.contract import Outcome, Stats
from compressor.recipe.registry import node


@node
class FineQuant(HQQ):
    """Round to nearest, in groups as fine as each unit needs; no calibration.

    Args:
        tolerance: Fraction by which an error may exceed that of the next finer rung.
        budget_bits_per_weight: Maximum number of stored bits per weight of a block's layers. Replaces `tolerance`.
    """

    tolerance: float = 0.15
    budget_bits_per_weight: float | None = None
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.options) < 2:
            raise ValueError(f"options: {len(self.options)} where two or more are needed, from coarse groups to fine")
        if self.tolerance < 0:
            raise ValueError(f"tolerance: {self.tolerance} is negative")

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Option]) -> Outcome:
        units = self.units(block)
        if self.budget_bits_per_weight is None:
            taken = {unit: climb(self._ladder(block, units[unit]), self.tolerance) for unit in choice}
        else:  # the budget is for the block, so every rank considers all of its units
            weights = sum(block.weight(name).numel() for layers in units.values() for name in layers)
            ladders = {unit: self._ladder(block, layers) for unit, layers in units.items()}
            try:
                spent = spend(ladders, int(self.budget_bits_per_weight * weights))
            except ValueError as error:
                raise RecipeError(f"{block.prefix}: budget_bits_per_weight {self.budget_bits_per_weight}: {error}") from error
            taken = {unit: spent[unit] for unit in choice}
        return rounded(block, self.formats(block, stats, taken), self.fit)

    def _ladder(self, block: Block, layers: Sequence[str]) -> list["Rung"]:
        """Return a rung for each option that can store a unit's layers, from the fewest stored bits to the most."""
        rungs = []
        for fmt in self.options:
            try:
                bits = sum(fmt.stored_bits(block.shape(name)) for name in layers)
            except ValueError:  # groups do not divide a row: the plan skips this rung too
                continue
            error = 0.0
            for name in layers:
                weight = block.weight(name).float()
                grid = self.fit(fmt, weight)
                error += relative(grid.decode(grid.round(weight, 0), 0).sub_(weight), weight)
            rungs.append(Rung(fmt, bits, error))
        return sorted(rungs, key=lambda rung: rung.bits)


@dataclass(frozen=True)
class Rung:
    """One format's result on a unit."""

    format: Format
    bits: int  # stored
    error: float  # squared, relative to the weights, summed over the unit's layers


def climb(ladder: Sequence[Rung], tolerance: float) -> Format:
    """Return the first rung whose error exceeds that of the next by at most the fraction `tolerance`."""
    for rung, finer in pairwise(ladder):
        if rung.error <= (1 + tolerance) * finer.error:
            return rung.format
    return ladder[-1].format


def spend(ladders: Mapping[str, Sequence[Rung]], budget: int) -> dict[str, Format]:
    """Choose each unit's rung within a budget of stored bits, greedily by error saved for each added bit.

    Raises:
        ValueError: Not even the coarsest rungs fit.
    """
    taken = {unit: ladder[0] for unit, ladder in ladders.items()}
    left = budget - sum(rung.bits for rung in taken.values())
    if left < 0:
        raise ValueError(
            f"the coarsest options take {budget - left} bits, {budget} are allowed; raise it, or add a coarser one"
        )
    while True:
        steps = [
            ((taken[unit].error - rung.error) / (rung.bits - taken[unit].bits), unit, rung)
            for unit, ladder in ladders.items()
            for rung in ladder
            if 0 < rung.bits - taken[unit].bits <= left and rung.error < taken[unit].error
        ]
        if not steps:
            return {unit: rung.format for unit, rung in taken.items()}
        _, unit, rung = max(steps, key=lambda step: step[0])
        left -= rung.bits - taken[unit].bits
        taken[unit] = rung


EXPORT = FineQuant
