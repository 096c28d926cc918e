"""Finished parts of long work, each safely on disk: what a run that is broken off goes on from.

    DIR/lock  DIR/journal.jsonl  DIR/<part>.safetensors  …

The journal's first line is a fingerprint: what must be the same for another run to go on from here. Each further line names a
part that is on disk, with what else is to be known of it. Every line carries its own checksum (`seal`), so that a line that
was changed later cannot be taken for what a run wrote. A last line that a kill has cut short does not count.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import OutputError
from compressor.reading import cause, elide, parse_json, read_bytes

LOCK, JOURNAL = "lock", "journal.jsonl"
DAMAGED = "give --overwrite to start again, or remove its directory"
SEAL = "seal"  # key of a line's checksum


class Journal:
    """The finished parts of one run.

    Args:
        directory: Where they lie.
        fingerprint: Fingerprint of the run.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, str]) -> None:
        self.directory, self.fingerprint = directory, dict(fingerprint)
        self.finished: dict[str, dict[str, Any]] = {}  # part -> its line
        self._lock: TextIO | None = None

    def lock(self, where: Path, remedy: str = "choose another --out") -> None:
        """Take the directory, made if it is not there, until `release`.

        Args:
            where: Place that a message names.
            remedy: But for waiting.

        Raises:
            OutputError: another run has it.
        """
        with writing(where):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / LOCK).open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise OutputError(f"{where}: another run is writing here; wait for it or {remedy}") from error

    def release(self) -> None:
        """Let go of it. Nothing was written to the lock, and it is free even if the system reports that closing failed."""
        assert self._lock is not None
        with contextlib.suppress(OSError):
            self._lock.close()

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of an earlier run, the fingerprint first; none if there is no journal."""
        return read_journal(self.directory / JOURNAL)

    def resume(self, where: Path, remedy: str) -> None:
        """Go on from what was left here; nothing if that is nothing.

        Args:
            where: Place that a message names.
            remedy: If it was left by another run.

        Raises:
            OutputError: it was.
        """
        lines = self.lines()
        if lines:
            check_fingerprint(lines[0], self.fingerprint, where, remedy)
        for number, line in enumerate(lines[1:], 2):
            if not isinstance(line.get("part"), str):
                raise OutputError(f"{self.directory / JOURNAL}:{number}: names no part; {DAMAGED}")
            if not self.part(line["part"]).is_file():
                break
            self.finished[line["part"]] = line
        self._begin()

    def start(self) -> None:
        """Begin anew, and remove what was left here."""
        for file in self.directory.iterdir():
            if file.name != LOCK:
                file.unlink()
        self._begin()

    def _begin(self) -> None:
        whole = [self.fingerprint, *self.finished.values()]
        replace_text(self.directory / JOURNAL, "".join(map(sealed, whole)))

    def add(self, part: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Put a finished part on disk, then its record in the journal."""
        save(self.part(part), tensors)
        with writing(self.part(part)):
            sync(self.directory)
            with (self.directory / JOURNAL).open("a") as journal:
                journal.write(sealed({"part": part, **record}))
                journal.flush()
                os.fsync(journal.fileno())
        self.finished[part] = {"part": part, **record}

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        return load_tensors(self.part(part))

    def part(self, part: str) -> Path:
        """The file of a part."""
        return self.directory / f"{part}.safetensors"


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """While a file that this project wrote is read: what is wrong with it, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{elide(str(path), 150)}: cannot be read ({cause(error)}); it is damaged: {DAMAGED}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file that this project wrote; raise OutputError if it is damaged."""
    with sound(path):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


def sealed(line: Mapping[str, Any]) -> str:
    """Return a line of a journal: JSON with its own checksum, ended by a line break."""
    return json.dumps({**line, SEAL: _checksum(line)}) + "\n"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal without their checksums; none if there is no journal.

    Raises:
        OutputError: the file cannot be read, or a line is not as a run wrote it.
    """
    if not path.exists():
        return []
    *whole, _ = read_bytes(path, OutputError).split(
        b"\n"
    )  # behind the last line break: nothing, or what a kill has cut short
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(whole, 1):
        line = parse_json(text, f"{path}:{number}", OutputError, DAMAGED)
        if not isinstance(line, dict) or line.pop(SEAL, None) != _checksum(line):
            raise OutputError(f"{elide(str(path), 150)}:{number}: is not as a run of this version wrote it; {DAMAGED}")
        lines.append(line)
    return lines


def _checksum(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16]


def check_fingerprint(found: Mapping[str, Any], expected: Mapping[str, str], where: Path, remedy: str) -> None:
    """Refuse to go on from another run's results, naming what differs."""
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        raise OutputError(f"{where}: cannot resume, {' and '.join(differing)} changed since the interrupted run; {remedy}")


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one step, safely on the disk; in the place of what was there."""
    unfinished = path.with_suffix(".unfinished")
    with writing(path), removed_if_failing(unfinished):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, {"format": "pt"})
        sync(unfinished)
        unfinished.rename(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below a path, such as a full disk or a missing permission, into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        where = elide(str(path), 150)
        raise OutputError(f"{where}: cannot be written ({cause(error)}); make room or choose another --out") from error


@contextlib.contextmanager
def removed_if_failing(unfinished: Path) -> Iterator[None]:
    """Remove a file that could not be finished; what stopped it is raised, not that it cannot be removed either."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def remove_leftovers(place: Path, whole: Path, warn: Callable[[str], None]) -> None:
    """Remove a directory that a run worked in, once its result is whole.

    Args:
        place: Directory to remove; it need not be there.
        whole: Result of the run.
        warn: Called with a sentence if it cannot be removed, which costs room on the disk and nothing else.
    """
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        return
    except OSError as error:
        names = elide(str(whole), 100), elide(str(place), 100)
        warn(
            f"{names[0]}: is whole, but {names[1]} that it was made in cannot be removed ({cause(error)}); remove it by hand"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: it is the old one or the new one, never half of it."""
    if path.is_dir():
        raise OutputError(f"{path}: is a directory where a file is to be written; name a file in it")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with writing(path), removed_if_failing(unfinished):
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.rename(path)


def sync(path: Path) -> None:
    """Put a file, or a directory's list of names, safely on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
