"""Attentions and MLPs as units of a search, where one may also go as a whole.

A level is a level of each unit inside, or that the sub-layer goes. Of all combinations those stay that no other one beats in
size and in the sum of errors: what an integer programme would ever take.
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
    """Levels of a database, joined.

    Args:
        levels: With every sub-layer that may go.
        kept: A plan whose combinations are kept, whatever they lose.
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
        """All weights of a level, or that the sub-layer goes."""
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
    """A sub-layer with its levels, the smallest first, and the levels inside that each is; None: it goes."""
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
    """Yield the useful levels, by size: those that lose less than every smaller one, those of one option for all, those of a
    plan.
    """
    least = float("inf")
    for level, choice in levels:
        option = level.option
        special = isinstance(option, Together) and (option.alike is not None or set(option.options) <= set(kept.items()))
        if option == GONE or level.error < least or special:
            least = min(least, level.error)
            yield level, choice
