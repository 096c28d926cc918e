"""Finished parts of long work, each safely on disk: what a run that is broken off goes on from.

    DIR/lock  DIR/journal.jsonl  DIR/<part>.safetensors  …

The journal's first line is a fingerprint: what must be the same for another run to go on from here. Each further line names a
part that is on disk, with what else is to be known of it. A line cut short by a kill does not count.
"""

import contextlib
import fcntl
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
from compressor.reading import cause, elide

LOCK, JOURNAL = "lock", "journal.jsonl"


class Journal:
    """The finished parts of one run.

    Args:
        directory: Where they lie.
        fingerprint: Of the run.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, str]) -> None:
        self.directory, self.fingerprint = directory, dict(fingerprint)
        self.finished: dict[str, dict[str, Any]] = {}  # part -> its line
        self._lock: TextIO | None = None

    def lock(self, where: Path, remedy: str = "choose another --out") -> None:
        """Take the directory, made if it is not there, until `release`.

        Args:
            where: That a message names.
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
        """What was left here, the fingerprint first; nothing if there is no journal."""
        return read_journal(self.directory / JOURNAL)

    def resume(self, where: Path, remedy: str) -> None:
        """Go on from what was left here; nothing if that is nothing.

        Args:
            where: That a message names.
            remedy: If it was left by another run.

        Raises:
            OutputError: it was.
        """
        lines = self.lines()
        if lines:
            check_fingerprint(lines[0], self.fingerprint, where, remedy)
        for line in lines[1:]:
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
        replace_text(self.directory / JOURNAL, "".join(json.dumps(line) + "\n" for line in whole))

    def add(self, part: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Put a finished part on disk, then its record in the journal."""
        save(self.part(part), tensors)
        with writing(self.part(part)):
            sync(self.directory)
            with (self.directory / JOURNAL).open("a") as journal:
                journal.write(json.dumps({"part": part, **record}) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.finished[part] = {"part": part, **record}

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        tensors: dict[str, Tensor] = load_file(self.part(part))
        return tensors

    def part(self, part: str) -> Path:
        """The file of a part."""
        return self.directory / f"{part}.safetensors"


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """While a file that this project wrote is read: what is wrong with it, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); it is damaged: give --overwrite to start again") from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none if there is no journal."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the kill came in the middle of this line
    return lines


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
