"""NVIDIA's compute-sanitizer, which watches a program's kernels for accesses out of bounds and for races."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TOOLS = ("memcheck", "racecheck")
ERRORS = 9  # its exit status where it found something
SECONDS = 150
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


class Outcome(NamedTuple):
    """passed, failed or skipped, and why."""

    outcome: str
    detail: str


def find() -> str | None:
    """Where it is."""
    known = (str(Path(place) / "compute-sanitizer") for place in PLACES)
    return next((found for name in ("compute-sanitizer", *known) if (found := shutil.which(name))), None)


def watched(tool: str, command: Sequence[str]) -> Outcome:
    """Runs a program under one of its tools. The program's own failure, exit status 1, is one too."""
    sanitizer = find()
    if sanitizer is None:
        return Outcome("skipped", "not found")
    watching = [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS), *command]
    try:
        done = subprocess.run(watching, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome("skipped", f"took more than {SECONDS} s")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
    return judged(done.returncode, lines)


def judged(status: int, lines: Sequence[str]) -> Outcome:
    """Interpret an exit status: errors that it found, a check that failed, or a sanitizer that does not run here."""
    if status == 0:
        return Outcome("passed", "")
    if status in (1, ERRORS) and not any("not supported" in line for line in lines):
        return Outcome("failed", "\n    ".join(["", *lines[-20:]]))
    return Outcome("skipped", f"exit status {status}: {lines[-1].strip()}")
