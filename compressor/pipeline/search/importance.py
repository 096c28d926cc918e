"""Baseline allocations, which do not score complete models: by errors of single units, and by importance of layers.

* LIM and ZD: Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
  Bit-Levels", 2024. LIM ranks units by how much a block changes the direction of its input, ZD by the share of weights far
  above the mean. The least important units get fewer bits first.
* Hessian trace: Dong et al., "HAWQ-V2", NeurIPS 2020, equation 5, with the second moment of a layer's input instead of the
  Hessian of the loss.
* OWL: Yin et al., "Outlier Weighed Layerwise Sparsity", ICML 2024, section 3.2, for pruning single weights. Here outliers are
  determined per layer, in the paper per block.
"""

from collections.abc import Callable, Mapping, Sequence

from compressor.formats.sparse_bitmask import SparseBitmask
from compressor.pipeline.search.allocate import Budget, BudgetError, Table, by_order, milp
from compressor.pipeline.search.levels import Choice, Level, Together, Unit

SPREAD = 0.08  # lambda of OWL
STEPS = 400  # number of shares of kept weights to try
GOLDEN = 0.6180339887  # its multiples modulo 1 are evenly spread


def uniform(units: Sequence[Unit], budget: Budget) -> Choice:
    """Give all units the same option. Spend the rest of the budget on the next option for units spread over the model."""
    return by_order(_sorted(range(len(units)), lambda unit: unit * GOLDEN % 1), ladder(units), budget)


def by_shift(units: Sequence[Unit], budget: Budget) -> Choice:
    """LIM: lower units first in blocks that change the direction of their input least."""
    return by_order(_sorted(range(len(units)), lambda unit: units[unit].shift), ladder(units), budget)


def by_outliers(units: Sequence[Unit], budget: Budget) -> Choice:
    """ZD: lower units first that have the smallest share of weights far above the mean."""
    return by_order(_sorted(range(len(units)), lambda unit: units[unit].outliers), ladder(units), budget)


def by_trace(units: Sequence[Unit], budget: Budget) -> Choice:
    """Solve the integer programme on the squared error of weights times the mean curvature."""
    return milp([{j: unit.trace * level.distance for j, level in enumerate(unit.levels)} for unit in units], budget)


def by_error(units: Sequence[Unit], budget: Budget) -> Choice:
    """Solve the integer programme on errors of the block's output."""
    return milp(errors(units), budget)


def by_salience(units: Sequence[Unit], budget: Budget) -> Choice:
    """OWL: keep more weights in blocks with a larger share of outlying weights.

    Before rounding to the nearest level, the shares of kept weights differ by at most 2 * `SPREAD` between blocks.

    Raises:
        BudgetError: the option of a level is not a SparseBitmask, or no choice fits.
    """
    if any(not isinstance(level.option, SparseBitmask) for unit in units for level in unit.levels):
        raise BudgetError("OWL is for weights that stay or go")
    budget.check()
    weights = sum(unit.weights for unit in units)
    by_block: dict[int, list[Unit]] = {}
    for unit in units:
        by_block.setdefault(unit.block, []).append(unit)
    share = {
        block: sum(unit.salience * unit.weights for unit in some) / sum(unit.weights for unit in some)
        for block, some in by_block.items()
    }
    low, high = min(share.values()), max(share.values())
    scaled = {block: 2 * SPREAD * (value - low) / max(high - low, 1e-30) for block, value in share.items()}
    mean = sum(scaled[unit.block] * unit.weights for unit in units) / weights

    def choice(stays: float) -> Choice:
        return tuple(_nearest(unit, stays + scaled[unit.block] - mean) for unit in units)

    fitting = [found for step in range(STEPS + 1) if budget.fits(found := choice(step / STEPS))]
    if not fitting:
        raise BudgetError("OWL: nothing fits")
    return max(fitting, key=lambda found: next(iter(budget.used(found).values())))


def _nearest(unit: Unit, stays: float) -> int:
    """Return the level whose share of kept weights is nearest to `stays`."""
    shares = [level.option.stays_of_all for level in unit.levels if isinstance(level.option, SparseBitmask)]
    return min(range(len(shares)), key=lambda j: abs(shares[j] - stays))


def errors(units: Sequence[Unit]) -> Table:
    """Return the error of the block's output, by unit and level."""
    return [{j: level.error for j, level in enumerate(unit.levels)} for unit in units]


def ladder(units: Sequence[Unit]) -> list[list[int | None]]:
    """Return a rung per option, by rising bits per weight: the level of that option for each unit; None if it has none.

    Levels that mix options inside a unit are left out.
    """
    at = [{level.option.label: j for j, level in enumerate(unit.levels) if _single(level)} for unit in units]
    sizes: dict[str, list[float]] = {}
    for unit, levels in zip(units, at, strict=True):
        for label, j in levels.items():
            sizes.setdefault(label, []).append(unit.levels[j].bits / unit.weights)
    rungs = sorted(sizes, key=lambda label: (sum(sizes[label]) / len(sizes[label]), label))
    return [[levels.get(label) for levels in at] for label in rungs]


def _single(level: Level) -> bool:
    return not isinstance(level.option, Together) or level.option.alike is not None


def _sorted(units: Sequence[int], key: Callable[[int], float]) -> list[int]:
    return sorted(units, key=lambda unit: (key(unit), unit))


ALLOCATORS: Mapping[str, Callable[[Sequence[Unit], Budget], Choice]] = {
    "uniform": uniform,
    "LIM": by_shift,
    "ZD": by_outliers,
    "Hessian trace": by_trace,
    "block errors": by_error,
    "OWL": by_salience,
}
