"""Attention layers and MLPs as units of a search that may also drop them.

A level of such a sub-layer is either a combination of levels of the units inside it, or dropping it. Only combinations that
no other one beats in both size and sum of errors are kept, because an integer programme would never choose the others.
"""

import itertools
from collections.abc import Iterable, Sequence
from types import MappingProxyType

import torch

from compressor.formats.base import GONE
from compressor.model.block import Trial
from compressor.pipeline.contract import Plan
from compressor.pipeline.search.levels import Choice, Level, LevelDB, Together, Unit


class Joined:
    """Levels of a database, joined by sub-layer.

    Args:
        levels: Database that includes every sub-layer that may be dropped.
        kept: Plan whose combinations are kept, whatever their error.
    """

    def __init__(self, levels: LevelDB, kept: Plan = MappingProxyType({})) -> None:
        self.levels = levels
        inside = {part.name: [u for u in levels.units if u.name.startswith(f"{part.name}.")] for part in levels.parts}
        self._members = {name: [unit.name for unit in units] for name, units in inside.items() if units}
        made = [_joined(part, inside[part.name], kept) for part in levels.parts if part.name in self._members]
        self._choices = {unit.name: choices for unit, choices in made}
        joined = {name for names in self._members.values() for name in names}
        loose = [unit for unit in levels.units if unit.name not in joined]
        self.units: Sequence[Unit] = sorted([*(unit for unit, _ in made), *loose], key=lambda unit: unit.block)

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        """Return the trial of a level: the weights of all units inside, or the sub-layer dropped."""
        if unit not in self._members:
            return self.levels.trial(unit, level, device, dtype)
        choice = self._choices[unit][level]
        if choice is None:
            return Trial({}, {}, skips=(unit.rpartition(".")[2],))
        found = [self.levels.trial(n, at, device, dtype) for n, at in zip(self._members[unit], choice, strict=True)]
        return Trial(
            {name: new for trial in found for name, new in trial.weights.items()},
            {name: how for trial in found for name, how in trial.rounded.items()},
        )


def _joined(part: Unit, members: Sequence[Unit], kept_plan: Plan) -> tuple[Unit, list[Choice | None]]:
    """Return a sub-layer with its levels, the smallest first, and for each level the choice inside it (None: dropped)."""
    weights = sum(unit.weights for unit in members)
    found: list[tuple[Level, Choice | None]] = [(part.levels[0], None)]
    for choice in itertools.product(*(range(len(unit.levels)) for unit in members)):
        inside = [unit.levels[at] for unit, at in zip(members, choice, strict=True)]
        options = tuple((unit.name, level.option) for unit, level in zip(members, inside, strict=True))
        sums = (sum(level.error for level in inside), sum(level.distance for level in inside))
        found.append((Level(Together(options), sum(level.bits for level in inside), *sums), choice))
    kept = list(_best(sorted(found, key=lambda one: (one[0].bits, one[0].error)), kept_plan))
    unit = Unit(
        name=part.name,
        block=part.block,
        layers=tuple(layer for unit in members for layer in unit.layers),
        weights=weights,
        shift=members[0].shift,
        outliers=sum(unit.outliers * unit.weights for unit in members) / weights,
        trace=sum(unit.trace * unit.weights for unit in members) / weights,
        levels=tuple(level for level, _ in kept),
        seconds=sum(unit.seconds for unit in members),
    )
    return unit, [choice for _, choice in kept]


def _best(levels: Iterable[tuple[Level, Choice | None]], kept: Plan) -> Iterable[tuple[Level, Choice | None]]:
    """Yield the useful levels in the given order, by size.

    A level is useful if it drops the sub-layer, or if it has less error than every smaller one. Levels with the same option
    for all units and levels of the plan `kept` are useful too.
    """
    least = float("inf")
    for level, choice in levels:
        option = level.option
        special = isinstance(option, Together) and (option.alike is not None or set(option.options) <= set(kept.items()))
        if option == GONE or level.error < least or special:
            least = min(least, level.error)
            yield level, choice
