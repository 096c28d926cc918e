"""Tell how an interrupted command is continued: the user's own command line, with --resume."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from compressor.cli._say import under_torchrun

RESUMABLE = ("quantize", "run", "prune", "fit")  # have the option --resume
CONTINUES = ("search",)  # goes on when it is started again


def again() -> str:
    """Return the part of a sentence that says how the command of this process is continued."""
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    if verb not in (*RESUMABLE, *CONTINUES):
        return "nothing is left to resume, run it again"
    command = started_as()
    if verb in RESUMABLE and "--resume" not in command:
        command.insert(command.index("--") if "--" in command[-len(sys.argv) :] else len(command), "--resume")
    return f"resume with: {shlex.join(command)}"


def started_as() -> list[str]:
    """Return the command line that the user typed, as far as it can be known; under torchrun it is the launcher's."""
    arguments = sys.argv[1:]
    if under_torchrun():
        launched = _command_of(os.getppid())
        if launched[-len(arguments) :] == arguments:
            return _typed(launched)
    if Path(sys.argv[0]).name == "__main__.py":
        return [sys.orig_argv[0], "-m", "compressor", *arguments]
    return _typed([sys.argv[0], *arguments])


def _typed(command: list[str]) -> list[str]:
    """A console script as it is typed: without its interpreter, and by its name where the shell finds it."""
    if len(command) > 1 and Path(command[0]).name.startswith("python") and Path(command[1]).name == "torchrun":
        command = command[1:]
    name = Path(command[0]).name
    return [name if shutil.which(name) == command[0] else command[0], *command[1:]]


def _command_of(process: int) -> list[str]:
    import psutil

    try:
        return list(psutil.Process(process).cmdline())
    except psutil.Error:
        return []
