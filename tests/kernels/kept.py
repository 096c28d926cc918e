"""Where the tests keep what compilers and disassemblers made, between sessions, by a hash of everything that it depends on.

Compiling the kernels for every architecture takes minutes, and its result is a function of the sources, the options and the
compiler. `rm -r ~/.cache/compressor/tests` makes the next session compile everything again.
"""

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from compressor.runtime.kernels.cuda import cache


@functools.cache
def directory(name: str) -> Path:
    """Return a directory that outlives the session; a temporary one for a user who has no home."""
    base = cache.default_directory()
    place = base.parent / "tests" / name if base is not None else Path(tempfile.gettempdir(), "compressor-tests", name)
    place.mkdir(parents=True, exist_ok=True)
    return place


def text(make: Callable[[], str], *parts: object) -> str:
    """Return what `make` returns, from the file that an earlier call with the same parts has left."""
    file = directory("text") / hashlib.sha256(repr(parts).encode()).hexdigest()
    if not file.exists():
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(make())
        unfinished.replace(file)
    return file.read_text()


@functools.cache
def version(program: str) -> str:
    """Return what a compiler or a disassembler says of its version."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
