"""What is left out where time is short."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.formats.int_group import IntGroup
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.clock import MEASURING, WRITING, Clock
from compressor.pipeline.search.find import in_time
from compressor.pipeline.search.levels import Level, Unit
from compressor.pipeline.search.measure import affordable
from compressor.pipeline.search.trail import Trail
from compressor.pipeline.target_search import shortened
from compressor.recipe.schema import make_recipe

BLOCKS, FIXED = 10, 1.0
UNITS = [
    Unit(
        "u",
        0,
        ("l",),
        1024,
        0.0,
        0.0,
        0.0,
        tuple(Level(IntGroup(bits=b, group_size=32), b * 1024, 0.0, 0.0) for b in (2, 3, 4, 8)),
    )
]
SECONDS = {level.option.label: 2.0 for level in UNITS[0].levels}


def kept(left: float, wanted: float) -> list[int]:
    """Bits of the options that are measured."""
    found = affordable(UNITS, SECONDS, FIXED, BLOCKS, left, wanted)
    return [level.option.bits for level in UNITS[0].levels if level.option.label in found]


def needed(options: int) -> float:
    """Seconds that allow so many options, and not one more."""
    return BLOCKS * (FIXED + 2 * options) / MEASURING + WRITING * BLOCKS * (FIXED + 2)


def test_all_options_are_measured_if_time_allows() -> None:
    assert kept(math.inf, 3) == kept(needed(4) + 1e-6, 3) == [2, 3, 4, 8]


@pytest.mark.parametrize(
    ("wanted", "options", "expected"), [(3.2, 2, [3, 4]), (3.2, 3, [2, 3, 4]), (2.1, 2, [2, 3]), (7, 2, [4, 8])]
)
def test_the_nearest_stay_and_one_that_fits(wanted: float, options: int, expected: list[int]) -> None:
    assert kept(needed(options) + 1e-6, wanted) == expected


def test_one_that_fits_stays_though_others_are_nearer() -> None:
    assert kept(needed(2) + 1e-6, 3.99) == [3, 4]


def test_two_options_are_the_least() -> None:
    with pytest.raises(RecipeError, match=r"two options of every layer take 50 s .* allow 1\.0 minutes more"):
        kept(needed(2) - 60, 3)


@dataclass(frozen=True)
class Counting(Clock):
    """Has so many seconds left each time it is asked."""

    lefts: tuple[float, ...] = ()

    def left(self) -> float:
        return next(self.__dict__.setdefault("rest", iter(self.lefts)))


def test_steps_stop_where_one_more_would_be_too_long() -> None:
    clock = Counting(0.0, 0.0, Ranks(), (10.0, 7.0, 4.0, 1.0))
    assert list(in_time(iter(range(9)), clock, 1.0)) == [0, 1, 2]


def test_not_one_step_without_time_for_it() -> None:
    assert list(in_time(iter(range(9)), Counting(0.0, 0.0, Ranks(), (1.0,)), 2.0)) == []


def test_steps_end_by_themselves_without_a_deadline() -> None:
    assert list(in_time(iter(range(3)), Clock.of(None, 0.0, Ranks()), 1e9)) == [0, 1, 2]


def test_what_is_reserved_is_not_left() -> None:
    started = time.monotonic()
    assert 500 < Clock.of(10, started, Ranks()).keeping(90).left() <= 510


def test_what_there_was_time_for_is_not_asked_again(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "search.jsonl")
    assert trail.once("training", 5.0, 0.25) == 0.25
    assert Trail(tmp_path / "search.jsonl").once("training", 5.0, 0.75) == 0.25
    assert trail.once("training", 9.0, 0.75) == 0.75


def test_training_is_shortened_or_left_out() -> None:
    recipe = make_recipe({"passes": [{"pass": "gptq", "options": [{"format": "int_group", "bits": 4}]}, {"pass": "learned"}]})
    whole = shortened(recipe, 0.5)
    assert [getattr(step, "steps", None) for step in whole.passes] == [None, 100]
    assert len(shortened(recipe, 0.05).passes) == 1
