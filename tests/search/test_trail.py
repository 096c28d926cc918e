"""A search that was cut short anywhere in its trail comes to the same end as one that was left alone."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from compressor.errors import OutputError
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.allocate import Budget
from compressor.pipeline.search.clock import Clock
from compressor.pipeline.search.find import Contestant, improve
from compressor.pipeline.search.levels import Choice
from compressor.pipeline.search.trail import Trail
from compressor.recipe.schema import Evolve, Search

UNITS, LEVELS = 6, 4
BUDGET = Budget({"bits": [[1, 2, 3, 4]] * UNITS}, {"bits": 15})
WAYS = {"uniform": (1,) * UNITS, "front": (3, 3, 3, 0, 0, 0), "back": (0, 0, 0, 3, 3, 3), "mixed": (0, 3, 0, 3, 0, 3)}
SETTINGS = Search(table_tokens=8, rounds=3, evolve=Evolve(generations=4, offspring=6, stages=((3, 8), (1, 16)), patience=4))


class Toy:
    """A loss that is known for every choice, and depends on the samples."""

    samples, seq_len, pace = 16, 4, 0.0

    def __init__(self) -> None:
        self.scored: list[Choice] = []

    def __call__(self, choices: Sequence[Choice], samples: Sequence[int]) -> list[float]:
        self.scored += choices
        return [
            sum(
                (LEVELS - level) ** 2 * (1 + (unit * 7 + sample * 3) % 5)
                for unit, level in enumerate(choice)
                for sample in samples
            )
            / len(samples)
            + 0.1 * abs(choice[0] - choice[-1])
            for choice in choices
        ]


def searched(path: Path) -> tuple[list[Contestant], list[Choice]]:
    """What a search comes to, without its seconds, and what it scored."""
    toy = Toy()
    clock = Clock.of(None, time.monotonic(), Ranks())
    found = improve(WAYS, UNITS, BUDGET, toy, SETTINGS, Trail(path), clock=clock, tell=lambda event: None)  # type: ignore[arg-type]
    return [Contestant(one.name, one.choice, one.bits_per_weight, one.kl, 0.0) for one in found], toy.scored


def test_a_trail_cut_after_any_line_is_finished_to_the_same_end(tmp_path: Path) -> None:
    trail = tmp_path / "search.jsonl"
    whole, _ = searched(trail)
    lines = trail.read_text().splitlines(keepends=True)
    assert len(lines) > len(WAYS) + 2
    for count in range(len(lines)):
        trail.write_text("".join(lines[:count]))
        again, _ = searched(trail)
        assert again == whole, count
        trail.write_text("".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        again, _ = searched(trail)
        assert again == whole, f"{count} and a half"


def test_a_finished_trail_scores_nothing_but_the_last_word(tmp_path: Path) -> None:
    _, all_scored = searched(tmp_path / "search.jsonl")
    again, scored = searched(tmp_path / "search.jsonl")
    assert len(scored) < len(all_scored) / 4
    assert {one.choice for one in again} <= set(scored)


def test_a_trail_of_other_choices_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = tmp_path / "search.jsonl"
    searched(trail)
    monkeypatch.setitem(WAYS, "uniform", (0,) * UNITS)
    expected, _ = searched(tmp_path / "fresh.jsonl")
    again, _ = searched(trail)
    assert again == expected


def test_a_changed_step_is_refused(tmp_path: Path) -> None:
    trail = tmp_path / "search.jsonl"
    searched(trail)
    trail.write_text(trail.read_text().replace('"scored": 1', '"scored": 2', 1))
    with pytest.raises(OutputError, match=r"search\.jsonl:\d+: is not as a run"):
        searched(trail)


def test_a_kept_number_that_is_none_is_refused(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "search.jsonl")
    trail.once("training", 5.0, 0.25)
    (tmp_path / "search-training-5.0.json").write_text('"x"')
    with pytest.raises(OutputError, match="holds no number"):
        trail.once("training", 5.0, 0.25)
