"""Allocations that look at no whole model: by the errors of single units, and by how important layers are said to be.

Two orders after Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
Bit-Levels", 2024: LIM, how far a block turns what enters it, and ZD, the share of weights far above the mean; the least
important units get fewer bits first. Hessian trace: Dong et al., "HAWQ-V2", NeurIPS 2020, equation 5, with the second moment
of a layer's input in the place of the Hessian of the loss.
"""

from collections.abc import Callable, Mapping, Sequence

from compressor.search.allocate import Budget, Table, by_order, milp
from compressor.search.levels import Choice, Level, Together, Unit

GOLDEN = 0.6180339887  # multiples of it, modulo 1, are spread evenly


def uniform(units: Sequence[Unit], budget: Budget) -> Choice:
    """The same option for all, and of what is left one more for units spread evenly over the model."""
    return by_order(_sorted(range(len(units)), lambda unit: unit * GOLDEN % 1), ladder(units), budget)


def by_shift(units: Sequence[Unit], budget: Budget) -> Choice:
    """LIM: blocks that turn their input least are lowered first."""
    return by_order(_sorted(range(len(units)), lambda unit: units[unit].shift), ladder(units), budget)


def by_outliers(units: Sequence[Unit], budget: Budget) -> Choice:
    """ZD: units with the fewest weights far above the mean are lowered first."""
    return by_order(_sorted(range(len(units)), lambda unit: units[unit].outliers), ladder(units), budget)


def by_trace(units: Sequence[Unit], budget: Budget) -> Choice:
    """The integer programme on the squared error of weights times the mean curvature."""
    return milp([{j: unit.trace * level.distance for j, level in enumerate(unit.levels)} for unit in units], budget)


def by_error(units: Sequence[Unit], budget: Budget) -> Choice:
    """The integer programme on errors of the block's output."""
    return milp(errors(units), budget)


def errors(units: Sequence[Unit]) -> Table:
    """What each level of each unit does to the output of its block."""
    return [{j: level.error for j, level in enumerate(unit.levels)} for unit in units]


def ladder(units: Sequence[Unit]) -> list[list[int | None]]:
    """Options from the fewest bits a weight up, and the level that each is for each unit; mixtures inside a unit are none."""
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
}
