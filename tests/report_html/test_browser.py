"""The page in headless Chromium: every plot is drawn, and nothing is complained of."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reports import full, quality, report, rows
from test_page import HOSTILE, poisoned

from compressor.report.html.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to look at the page with")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
    "--dump-dom",
)


@pytest.fixture
def seen(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """`seen(html)`: the page's elements after its script ran, and what was written to the console."""

    def look(html: str) -> tuple[str, list[str]]:
        page = tmp_path / "page.html"
        page.write_text(html, encoding="utf-8")
        command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return look


def drawn(elements: str) -> int:
    found = re.search(r'<html[^>]* data-drawn="(\d+)"', elements)
    return int(found[1]) if found else 0


def without_parts() -> dict[str, Any]:
    return report(quality=None, calibration=None, recipe=None)


MIXED = [*rows(2), {**rows(1)[0], "layer": "model.layers.40.mlp.up_proj", "option": "int8", "bits_per_weight": 8.1}]
PAGES = {
    "one": ([full()], 6),
    "several": ([full("demo-a"), full("demo-b", size_bytes=2_000_000, quality=quality(400.0, 2.5))], 8),
    "without-parts": ([without_parts()], 2),
    "without-the-original": ([report(quality=quality(kl=None))], 4),
    "without-loss": ([report(quality=quality(16.5, 0.0), rows=[{**row, "error": 0.0} for row in rows()])], 6),
    "without-layers": ([report(rows=[])], 4),
    "mixed-and-deep": ([report(rows=MIXED)], 6),
}


@pytest.mark.parametrize("name", PAGES)
def test_all_plots_are_drawn(name: str, seen: Callable[..., tuple[str, list[str]]]) -> None:
    reports, count = PAGES[name]
    elements, console = seen(render(reports))
    assert console == []
    assert drawn(elements) == count
    assert elements.count('class="plot js-plotly-plot"') == count
    maps = sum(bool(one["rows"]) for one in reports) * 2
    assert elements.count('class="heatmaplayer mlayer"><g class="hm">') == maps
    assert "NaN" not in re.sub(r"<script.*?</script>", "", elements, flags=re.DOTALL)


def test_hostile_text_is_shown_as_text(seen: Callable[..., tuple[str, list[str]]]) -> None:
    elements, console = seen(render([poisoned(full())]))
    assert console == []
    assert drawn(elements) == 6
    assert not re.search(r"<img|<[^>]+ onerror", re.sub(r"<script.*?</script>", "", elements, flags=re.DOTALL))
    assert HOSTILE.split("<img", maxsplit=1)[0].replace("<", "&lt;").replace(">", "&gt;") in elements


def test_an_error_in_the_page_is_noticed(seen: Callable[..., tuple[str, list[str]]]) -> None:
    """The test of this test."""
    elements, console = seen(render([report()]).replace('id="error-0"', 'id="elsewhere"'))
    assert console
    assert drawn(elements) == 0


def test_the_network_is_refused(seen: Callable[..., tuple[str, list[str]]]) -> None:
    _, console = seen(render([report()]).replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">'))
    assert any("Content Security Policy" in line for line in console)
