"""report.json, its page and the card of a model directory: written together, read, and added to later."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compressor.access import check_readable
from compressor.errors import OutputError
from compressor.model.journal import replace_text, writing
from compressor.reading import read_json_object
from compressor.report.card import model_card
from compressor.report.html.page import render
from compressor.report.html.plots import plot_data
from compressor.report.html.schema import fault
from compressor.report.record import at_the_top

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"


def completed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as it is saved: with what its page's plots show, and with the figures of its `quality` at the top."""
    return {**report, **at_the_top(report.get("quality")), "plots": plot_data([report])}


def written(report: Mapping[str, Any]) -> dict[str, str]:
    """The two files of a completed report, by name."""
    return {REPORT: json.dumps(report, indent=1) + "\n", PAGE: render([report], plots=report["plots"])}


def read_report(directory: Path) -> dict[str, Any]:
    """The report of the run that wrote a model.

    Raises:
        OutputError: there is none that can be read, or it is not such as runs write.
    """
    file = directory / REPORT
    check_readable([file], OutputError)
    if not file.is_file():
        raise OutputError(f"{directory}: no {REPORT} here; it is written by `compress quantize` and `compress run`")
    report = read_json_object(file, OutputError, "compress again")
    if (reason := fault(report)) is not None:
        raise OutputError(f"{file}: not a report of a run, {reason}; compress again")
    return report


def check_amendable(directory: Path, *, judged: bool, compared: bool) -> dict[str, Any]:
    """The report that later measurements are to go into.

    Args:
        directory: Model directory.
        judged: Whether a new `quality` takes the place of the run's.
        compared: Whether that has a KL divergence.

    Raises:
        OutputError: there is no report, or it would lose the KL divergence that it has.
    """
    report = read_report(directory)
    if judged and not compared and (report.get("quality") or {}).get("kl") is not None:
        raise OutputError(
            f"{directory / REPORT}: has the KL divergence from the original, which the new figures lack; "
            "give --reference, or leave out --save"
        )
    return report


def amend(directory: Path, **fields: Any) -> None:
    """Put later measurements into a model's report, its page and its card; all else stays.

    Of `tasks` those with the same name and metric are replaced, others stay too. Of several that do so at once each waits.

    Raises:
        OutputError: see check_amendable.
    """
    with _alone(directory):
        compared = fields.get("quality", {}).get("kl") is not None
        report = check_amendable(directory, judged="quality" in fields, compared=compared)
        if "tasks" in fields:
            fields["tasks"] = _merged(report.get("tasks") or (), fields["tasks"])
        whole = completed({**report, **fields})
        for name, text in {**written(whole), CARD: model_card(whole)}.items():
            replace_text(directory / name, text)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock on a directory."""
    with writing(directory):
        opened = os.open(directory, os.O_RDONLY)
    try:
        with writing(directory):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # nothing was written to it
            os.close(opened)


def _merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({(row["task"], row["metric"]): row for row in (*old, *new)}.values())
