"""Write the one sentence that a command ends with, as the last line that the user sees."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

LAST_LINE = Path(__file__).with_name("_last_line.py")


def say(sentence: str) -> None:
    """Write a sentence to stderr: of several ranks only the first to fail does, and after all that torchrun writes."""
    if "WORLD_SIZE" in os.environ and not _first_to_fail():
        return
    if not (under_torchrun() and _write_late(sentence)):
        _write(sentence)


def under_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _write(sentence: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()


def _write_late(sentence: str) -> bool:
    """Start a process that writes the sentence once the launcher has ended; return whether it could be started."""
    command = [sys.executable, "-I", "-S", str(LAST_LINE), str(os.getppid()), sentence]
    try:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        return False
    return True


def _first_to_fail() -> bool:
    from compressor.pipeline.ranks import first_to_fail

    return first_to_fail()
