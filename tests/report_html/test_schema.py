"""Whatever a report.json holds, it is refused in one sentence or a page and a card can be made of it."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import full

from compressor.errors import OutputError
from compressor.report.card import model_card
from compressor.report.files import read_report
from compressor.report.html.page import render
from compressor.report.html.plots import plot_data
from compressor.report.html.schema import fault

SEARCH = {
    "best": "evolution",
    "contestants": [{"name": "evolution", "bits_per_weight": 3.0, "kl": 0.1, "seconds": 4.0}],
    "steps": [{"stage": "evolution", "number": 1, "seconds": 4.0, "fitness": 0.1}],
}
PRUNING = [{"pass": "soft_prompt", "kl": [0.2, 0.1], "tokens": 4}]
ODD = (None, True, "text", -1, 10**18, 1.5, float("nan"), float("inf"), [], {}, ["text"])


def places(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in nested data; of a list the first element stands for all."""
    if path:
        yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in inner:
        if path[:1] != ("recipe",):  # shown as it is
            yield from places(value, (*path, key))


WHOLE = full(search=SEARCH, pruning=PRUNING)


@pytest.mark.parametrize("path", list(places(WHOLE)), ids=lambda path: ".".join(map(str, path)))
def test_an_odd_value_is_refused_or_shown(path: tuple[str | int, ...]) -> None:
    for odd in ODD:
        report = copy.deepcopy(WHOLE)
        inner: Any = report
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = odd
        reason = fault(report)
        if reason is None:
            render([report])
            model_card(report)
        else:
            assert len(reason) < 200, reason


def test_a_whole_report_has_no_fault() -> None:
    assert fault(WHOLE) is None


def test_the_number_of_a_block_is_bounded(tmp_path: Path) -> None:
    """The page has a column for each block up to the largest."""
    report = copy.deepcopy(WHOLE)
    report["rows"][0]["layer"] = "model.layers.99999999999.mlp.up_proj"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match=r"rows\[0\]\.layer names block 99999999999"):
        read_report(tmp_path)


def test_plots_of_a_damaged_report_are_made_anew() -> None:
    """Plots that a file holds are not trusted: the page makes its own from the figures."""
    report = {**WHOLE, "plots": "nonsense"}
    assert render([report]) == render([WHOLE])
    assert plot_data([report]) == plot_data([WHOLE])
