"""A signal ends a command with one sentence, a status of its own, and a run that resumes to the same bytes."""

import contextlib
import importlib
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
from harness import DEADLINE, CommandLine, Fate, Fork, contents

from compressor.pipeline import blocks

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
QUICK = ("--method", "rtn", "--no-eval", "--no-verify")


def stops_itself(number: int, module: str, function: str, calls: int) -> None:
    """Send this process a signal when a function is called for the n-th time, before it works."""
    signal.signal(number, signal.SIG_DFL)  # the tests may run where it is ignored, as below nohup
    place, seen = importlib.import_module(module), []
    work = getattr(place, function)

    def stopped(*arguments: object, **options: object) -> object:
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), number)
        return work(*arguments, **options)

    setattr(place, function, stopped)


def does_not_end(number: int) -> None:
    """Send this process a signal that the command does not follow."""
    from compressor.cli import _ending

    _ending.PATIENCE = 0.2

    def waiting(*_: object) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(DEADLINE)

    blocks.compress_block = waiting


POINTS: dict[str, Fate] = {
    "in a block": (stops_itself, (signal.SIGTERM, "compressor.pipeline.blocks", "compress_block", 3)),
    "before the shards": (stops_itself, (signal.SIGTERM, "compressor.model.shards", "assemble", 1)),
    "while files are copied": (stops_itself, (signal.SIGTERM, "compressor.pipeline.write_model", "copy_other_files", 1)),
    "while OUT is published": (stops_itself, (signal.SIGTERM, "compressor.model.writer", "sync", 3)),
}


@pytest.fixture
def expected(tiny: Path, tmp_path: Path, compress: CommandLine) -> dict[str, bytes]:
    assert compress("quantize", tiny, "--out", tmp_path / "one", *QUICK).code == 0
    return contents(tmp_path / "one", REPORTS)


@pytest.mark.parametrize("point", POINTS)
def test_sigterm_leaves_a_run_that_resumes_to_the_same_bytes(
    point: str, tiny: Path, out: Path, tmp_path: Path, expected: dict[str, bytes], compress: CommandLine
) -> None:
    stopped = Fork(tmp_path / "log", "quantize", tiny, "--out", out, *QUICK, fate=POINTS[point]).result()
    assert (stopped.code, out.exists()) == (143, False), stopped
    said = stopped.err.splitlines()[-1]
    assert said.startswith("interrupted by SIGTERM; resume with: "), said
    assert compress(*shlex.split(said.partition("resume with: ")[2])[1:]).code == 0
    assert contents(out, REPORTS) == expected


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_each_signal_has_its_status(number: int, status: int, tiny: Path, out: Path, tmp_path: Path) -> None:
    fate = (stops_itself, (number, "compressor.pipeline.blocks", "compress_block", 1))
    stopped = Fork(tmp_path / "log", "quantize", tiny, "--out", out, *QUICK, fate=fate).result()
    assert (stopped.code, stopped.err.count("interrupted by")) == (status, 1)


def test_a_command_that_does_not_follow_is_ended(tiny: Path, out: Path, tmp_path: Path) -> None:
    before = time.monotonic()
    fork = Fork(tmp_path / "log", "quantize", tiny, "--out", out, *QUICK, fate=(does_not_end, (signal.SIGTERM,)))
    assert fork.result().code == 143
    assert time.monotonic() - before < DEADLINE / 8


def test_handlers_are_as_before(tiny: Path, compress: CommandLine) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    compress("inspect", tiny)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
