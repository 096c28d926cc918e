"""Give every reader damaged files: each has to succeed, or to say in one short sentence what is wrong.

Within five seconds, and without opening a file outside the directory.

    python -m hostile.campaign [MUTATIONS] [SEED] [READER ...]      with tests/ in PYTHONPATH
"""

import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile.readers import READERS, Reader, seeds

from compressor.errors import MAX_MESSAGE, CompressorError

SECONDS = 5
CODE = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/lib", "/etc/mime.types")


class HangError(BaseException):
    """A reader took too long; nothing that readers catch."""


class Watch:
    """The files that this process opens while it watches. An audit hook stays until the process ends: make one only."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.fsdecode(arguments[0]))

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Collect the names of files while the context is open."""
        self.opened = opened = []
        try:
            yield opened
        finally:
            self.opened = None


def outside(opened: list[str], directory: Path, known: set[str]) -> list[str]:
    """Names of opened files that are neither in a directory, nor known, nor code of Python or of the project."""
    root = Path(__file__).resolve().parents[2] / "compressor"
    allowed = (f"{directory.resolve()}/", f"{root}/", *CODE, *SYSTEM)
    return [name for name in opened if name not in known and not os.path.realpath(name).startswith(allowed)]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise HangError in the main thread when a time is over."""

    def stop(number: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(reader: Reader, directory: Path) -> str:
    """What comes of reading: `read`, `refused`, or what is wrong."""
    try:
        with limited(SECONDS), open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # noqa: PTH123
            reader.read(directory)
    except CompressorError as error:
        text = str(error)
        return "refused" if len(text) <= MAX_MESSAGE and "\n" not in text else f"FAULT message of {len(text)}: {text[:150]!r}"
    except HangError:
        return f"FAULT more than {SECONDS} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        places = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(at.filename).name}:{at.lineno}" for at in places if "/compressor/" in at.filename]
        return f"FAULT {type(error).__name__} at {own[-1] if own else '?'}: {str(error)[:150]!r}"
    return "read"


def damage(reader: Reader, whole: Path, place: Path, count: int, seed: int, watch: Watch) -> Iterator[tuple[int, str, float]]:
    """Read a number of damaged copies: the number of each, what came of it, seconds."""
    directory = Path(shutil.copytree(whole, place / "case"))
    file = directory / reader.file
    content = file.read_bytes()
    with watch.watching() as opened:
        came = attempt(reader, directory)
    assert came == "read", f"{reader.name}: the whole file is not read: {came}"
    known = set(opened)
    for number in range(count):
        draw = random.Random(f"{seed}-{reader.name}-{number}")
        file.write_bytes(reader.mutate(draw, content))
        started = time.perf_counter()
        with watch.watching() as opened:
            came = attempt(reader, directory)
        if stray := outside(opened, directory, known):
            came = f"FAULT opened {stray[0]}"
        yield number, came, time.perf_counter() - started
    shutil.rmtree(directory)


def campaign(mutations: int, seed: int, watch: Watch, names: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Read so many damaged files, allotted to the readers by their shares: the faults of each reader."""
    total = sum(reader.share for reader in READERS)
    faults: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        whole = seeds(Path(temporary))
        for reader in READERS:
            if names and reader.name not in names:
                continue
            count = round(mutations * reader.share / total)
            found = list(damage(reader, whole[reader.model], Path(temporary), count, seed, watch))
            faults[reader.name] = [f"{number}: {came}" for number, came, _ in found if came.startswith("FAULT")]
            outcomes = collections.Counter(came.split()[0] for _, came, _ in found)
            spent = [seconds for _, _, seconds in found]
            print(f"{reader.name:26s}{dict(outcomes)}  {sum(spent):.1f} s, at most {max(spent):.2f}", flush=True)
    return faults


if __name__ == "__main__":
    size, first, *chosen = (*sys.argv[1:], *("5000", "0")[len(sys.argv) - 1 :])
    result = campaign(int(size), int(first), Watch(), tuple(chosen))
    for reader_name, sentences in result.items():
        for sentence in sentences:
            print(f"{reader_name} {sentence}")
    sys.exit(any(result.values()))
