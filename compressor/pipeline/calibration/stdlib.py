"""The text that is on every machine: the source files of the running Python's standard library.

One document is one file, code and docstrings together. A file belongs to the held-out split by the hash of its path, so
the split is the same for every Python version and a module never trains, calibrates and evaluates at once.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compressor.errors import CalibrationError

# Tables and generated files, and code that not every distribution of Python installs.
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
_HELD_OUT_SHARE = 13  # of 256: about one file in twenty


def is_held_out(relative: str) -> bool:
    """Whether the module at this path below the library's root (`json/decoder.py`) is kept for evaluation."""
    return in_held_out_share(f"held out: {relative}")


def in_held_out_share(text: str) -> bool:
    """Whether a text falls into the share of one in twenty, by its hash: the same on every machine."""
    return hashlib.sha256(text.encode()).digest()[0] < _HELD_OUT_SHARE


def documents(held_out: bool = False) -> Iterator[tuple[str, str]]:
    """Pairs of path below the library's root and text, in path order; the held-out files, or all the others.

    Raises:
        CalibrationError: this Python carries no source files of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        found = True
        if is_held_out(relative.as_posix()) == held_out:
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")
    if not found:
        raise CalibrationError(
            f"{root}: this Python has no library sources to calibrate on; name a text file with --calibration"
        )
