"""`compress report`: the reports of one or several runs as a page."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Results of compression runs.", metavar="DIR…", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page. [default: report.html, in DIR if there is one, here if there are several]"),
    ] = None,
    as_json: a.Json = False,
) -> None:
    """Write what report.json tells as a page: one file that loads nothing, for the eye. Several models stand side by side.

    With --json, what its plots show is printed instead of its path.

    Example: `compress report model-int4 model-int3 --out page.html`
    """
    from compressor.model.journal import replace_text
    from compressor.report.files import read_report
    from compressor.report.html.page import render
    from compressor.report.html.plots import plot_data

    reports = [read_report(directory) for directory in directories]
    if out is None:
        out = (directories[0] if len(directories) == 1 else Path()) / "report.html"
    replace_text(out, render(reports))
    if as_json:
        print_json({"path": str(out), **plot_data(reports)})
    else:
        sys.stdout.write(f"{out}\n")
