"""Progress elsewhere than on a terminal: a line as a stage begins, and lines within long steps. The clock is set by hand."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from compressor.cli._show import QUIET, PlainLines, progress
from compressor.pipeline.job import Event
from compressor.runtime.bench import Load, take_turns
from compressor.runtime.measure import Taken


class Lines:
    """What was written, and a clock."""

    def __init__(self) -> None:
        self.time, self.lines = 100.0, list[str]()
        self.plain = PlainLines(self.lines.append, lambda: self.time)


@pytest.fixture
def shown() -> Lines:
    return Lines()


def test_a_stage_is_named_as_it_begins(shown: Lines) -> None:
    shown.plain.tell(Event("bench", 0, 24, "loading demo"))
    assert len(shown.lines) == 1
    assert shown.lines[0].startswith("bench step 1/24, loading demo")


def test_steps_within_a_stage_are_no_lines_of_their_own(shown: Lines) -> None:
    for done in range(5):
        shown.plain.tell(Event("compress", 0, 4, f"layer {done}"))
    assert len(shown.lines) == 1
    shown.plain.tell(Event("compress", 1, 4))
    assert len(shown.lines) == 2


def test_a_long_step_is_told_of_again_and_again(shown: Lines) -> None:
    shown.plain.tell(Event("bench", 3, 24, "demo, prefill, batch 32"))
    for _ in range(3):
        shown.time += QUIET - 1
        shown.plain.beat()
        shown.time += 1
        shown.plain.beat()
    assert [line.rpartition(", for ")[2] for line in shown.lines[1:]] == ["10.0 s so far", "20.0 s so far", "30.0 s so far"]
    assert all("demo, prefill, batch 32" in line for line in shown.lines)


def test_before_the_first_event_the_model_is_being_read(shown: Lines) -> None:
    shown.time += QUIET
    shown.plain.beat()
    assert shown.lines == ["reading the model, for 10.0 s so far"]


def test_bench_says_what_runs_before_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    """Each measurement finds on stderr what was said of it, or of the round that it is part of."""
    said: list[str] = []

    @dataclass
    class Slow:
        name: str

        def ask(self, method: str, *arguments: object) -> object:
            said.append(capsys.readouterr().err)
            return 1.0 if method == "best" else Taken(0.1, 1)

    load = Load((1,), 8, 4, 1)
    with progress() as tell:
        take_turns(
            {"demo": Slow("demo")}, Slow("memory"), load, lambda done, total, what: tell(Event("bench", done, total, what))
        )
    assert said[0].startswith("bench step 1/4, demo, prefill, batch 1")


def test_a_process_that_imports_for_long_says_so() -> None:
    code = "import time; from compressor.cli import _show; _show.OPENING = 0.0\nwith _show.opening(): time.sleep(0.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "starting: importing torch and transformers\n")
