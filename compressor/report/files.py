"""Report files of a model directory (report.json, its page, the model card): write them together, read and amend them."""

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
    """Return a report as it is saved: with the data of its plots, and the figures of `quality` at the top level."""
    return {**report, **at_the_top(report.get("quality")), "plots": plot_data([report])}


def written(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the contents of the two files of a completed report, by file name."""
    return {REPORT: json.dumps(report, indent=1) + "\n", PAGE: render([report], plots=report["plots"])}


def read_report(directory: Path) -> dict[str, Any]:
    """Read the report of the run that wrote a model.

    Raises:
        OutputError: there is no readable report, or it is not in the form that runs write.
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
    """Return the report that later measurements will be added to, if they can be.

    Args:
        directory: Model directory.
        judged: Whether a new `quality` replaces the run's.
        compared: Whether the new `quality` has a KL divergence.

    Raises:
        OutputError: there is no report, or it would lose its KL divergence.
    """
    report = read_report(directory)
    if judged and not compared and (report.get("quality") or {}).get("kl") is not None:
        raise OutputError(
            f"{directory / REPORT}: has the KL divergence from the original, which the new figures lack; "
            "give --reference, or leave out --save"
        )
    return report


def amend(directory: Path, **fields: Any) -> None:
    """Add later measurements to a model's report, its page and its card; keep everything else.

    Rows of `tasks` with the same task and metric are replaced, other rows are kept. Concurrent callers wait for each other.

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
        with suppress(OSError):  # nothing was written through this descriptor
            os.close(opened)


def _merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({(row["task"], row["metric"]): row for row in (*old, *new)}.values())
