"""Compiled kernels on disk, by key: written whole or not at all, checked when read, and never needed.

A file is the sha256 of the rest, a line of JSON (the kernels' names in the cubin by name expression), and the cubin.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

DIGEST_BYTES = 32
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cubin:
    """Machine code of several kernels."""

    code: bytes
    names: dict[str, str]  # name expression -> name in the code


def default_directory() -> Path | None:
    """Where compiled kernels are kept if nobody says otherwise; None for a user who has no home, as some containers' have."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "compressor" / "kernels"
    except RuntimeError as error:
        _tell(Path("~/.cache"), str(error))
        return None


def key_of(*parts: object) -> str:
    """A file name for what a compilation depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read(directory: Path, key: str) -> Cubin | None:
    """Return a kept compilation; None if it is missing or damaged."""
    try:
        data = (directory / key).read_bytes()
    except OSError:
        return None
    digest, rest = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        log.warning("%s: damaged; its kernels are compiled again", directory / key)
        return None
    names, _, code = rest.partition(b"\n")
    return Cubin(code, json.loads(names))


def write(directory: Path, key: str, cubin: Cubin) -> None:
    """Keeps it, if that is possible. Processes that do so at once write the same, and the last one's stays."""
    rest = json.dumps(cubin.names).encode() + b"\n" + cubin.code
    unfinished = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=key[:16], suffix=".partial", delete=False) as file:
            unfinished = Path(file.name)
            file.write(hashlib.sha256(rest).digest() + rest)
        unfinished.replace(directory / key)
    except OSError as error:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        _tell(directory, str(error))


@functools.cache
def _tell(directory: Path, reason: str) -> None:
    """Once for each directory and reason."""
    log.warning("%s: compiled kernels cannot be kept there (%s); each process compiles them anew", directory, reason)
