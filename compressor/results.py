"""report.json and report.html of a model directory: written together, read, and added to later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import OutputError
from compressor.model.writer import replace_text
from compressor.report_html.model import NEEDED
from compressor.report_html.page import render
from compressor.report_html.plots import plot_data

REPORT, PAGE = "report.json", "report.html"


def written(report: Mapping[str, Any]) -> dict[str, str]:
    """The two files of a report, by name. What the page's plots show stands in the report as `plots`."""
    whole = {**report, "plots": plot_data([report])}
    return {REPORT: json.dumps(whole, indent=1) + "\n", PAGE: render([whole])}


def read_report(directory: Path) -> dict[str, Any]:
    """The report of the run that wrote a model.

    Raises:
        OutputError: there is none that can be read.
    """
    file = directory / REPORT
    if not file.is_file():
        raise OutputError(f"{directory}: no {REPORT} here; it is written by `compress quantize` and `compress run`")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read as JSON ({error}); compress again") from error
    missing = [key for key in NEEDED if not isinstance(report, dict) or key not in report]
    if missing:
        raise OutputError(
            f"{file}: not a report of a run, {len(missing)} of {len(NEEDED)} needed keys are missing "
            f"({', '.join(missing)}); compress again"
        )
    assert isinstance(report, dict)
    return report


def amend(directory: Path, **fields: Any) -> None:
    """Put later measurements into a model's report and its page; all else stays."""
    for name, text in written({**read_report(directory), **fields}).items():
        replace_text(directory / name, text)
