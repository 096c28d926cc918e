"""Built-in text that exists on every machine: the source files of the running Python's standard library.

One document is one file, code and docstrings together. The hash of a file's path decides whether it belongs to the held-out
split. So the split is the same for every Python version, and no module is used for both calibration (or training) and
evaluation.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from compressor.errors import CalibrationError

# Tables, generated files, and code that not every distribution of Python installs.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}
_HELD_OUT_SHARE = 13  # out of 256: about one file in twenty


def is_held_out(relative: str) -> bool:
    """Return whether the module at a path below the library's root (`json/decoder.py`) is held out for evaluation."""
    return in_held_out_share(f"held out: {relative}")


def in_held_out_share(text: str) -> bool:
    """Return whether a text is in the held-out share, one in twenty by hash. The answer is the same on every machine."""
    return hashlib.sha256(text.encode()).digest()[0] < _HELD_OUT_SHARE


def documents(held_out: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the path below the library's root and the text of each file, in path order.

    Args:
        held_out: Whether to yield the held-out files instead of all the others.

    Raises:
        CalibrationError: this Python has no source files of its library.
    """
    return ((path, read(path)) for path in paths(held_out))


def paths(held_out: bool = False) -> list[str]:
    """Return the paths below the library's root, in order. For arguments and errors see `documents`."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (found := _sources(root)):
        raise CalibrationError(
            f"{root}: this Python has no library sources to calibrate on; name a text file with --calibration"
        )
    return [path for path in found if is_held_out(path) == held_out]


def read(path: str) -> str:
    """Return the text of the file at a path below the library's root."""
    return Path(sysconfig.get_path("stdlib"), path).read_text(encoding="utf-8", errors="replace")


@cache
def _sources(root: Path) -> tuple[str, ...]:
    """Return the paths of all documents below a root, in order. Installed packages, often far more files, are not walked."""
    found = []
    for directory, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _LEFT_OUT]
        found += [Path(directory, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return tuple(path.relative_to(root).as_posix() for path in sorted(found))
