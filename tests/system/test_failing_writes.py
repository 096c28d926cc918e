"""Each call that changes files fails once: OUT is absent or whole, a sentence says so, and going on gives the same bytes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine, contents

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
QUICK = ("--method", "rtn", "--no-eval", "--no-verify")
CALLS: dict[str, tuple[Any, str]] = {
    "mkdir": (Path, "mkdir"),
    "open": (Path, "open"),
    "write_text": (Path, "write_text"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
    "rmtree": (shutil, "rmtree"),
    "copyfile": (shutil, "copyfile"),
    "fsync": (os, "fsync"),
}
CODES = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS)


class Failing:
    """Has the n-th call below a directory fail, and counts them."""

    def __init__(self, work: Callable[..., Any], below: Path, number: int) -> None:
        self.work, self.below, self.number, self.count = work, below, number, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        place = arguments[0]
        if isinstance(place, int):
            place = Path(f"/proc/self/fd/{place}").readlink()
        if str(place).startswith(str(self.below)):
            self.count += 1
            if self.count == self.number:
                code = CODES[self.number % len(CODES)]
                raise OSError(code, os.strerror(code), str(place))
        return self.work(*arguments, **options)

    def __get__(self, instance: Any, _: type) -> Callable[..., Any]:
        return lambda *arguments, **options: self(instance, *arguments, **options)


def fail(monkeypatch: pytest.MonkeyPatch, call: str, below: Path, number: int) -> Failing:
    owner, name = CALLS[call]
    failing = Failing(getattr(owner, name), below, number)
    monkeypatch.setattr(owner, name, failing)
    return failing


NUMBERS = os.environ.get("FAILING_WRITES", "1 2 7")  # each number up to 60: FAILING_WRITES="$(seq -s' ' 60)"


@pytest.mark.parametrize("number", [int(number) for number in NUMBERS.split()])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_out_absent_or_whole(
    call: str, number: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine, good: Any
) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    with monkeypatch.context() as patched:
        fail(patched, call, out.parent, number)
        result = compress("quantize", tiny, "--out", out, *QUICK)
    if result.code == 0:
        assert contents(out, REPORTS) == good
        assert ("is whole, but" in result.err) == out.with_name("out.partial").exists(), result.err
        return
    assert len(result.late_error) <= 300
    assert not out.exists()
    assert compress("quantize", tiny, "--out", out, *QUICK, "--resume").code == 0
    assert contents(out, REPORTS) == good


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from harness import command

    out = tmp_path_factory.mktemp("good") / "out"
    assert command(("quantize", tiny, "--out", out, *QUICK)) == 0
    return contents(out, REPORTS)


@pytest.mark.parametrize("place", ["out.partial", "out.pruning"])
def test_what_cannot_be_removed_of_a_whole_run_is_warned_of(
    place: str, tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
) -> None:
    remove = shutil.rmtree

    def failing(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name == place:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", failing)
    result = compress(
        "prune", tiny, "--out", out, "--ratio", 0.25, "--samples", 4, "--seq-len", 64, "--no-eval", "--no-verify"
    )
    assert result.code == 0, result.err
    assert f"warning: {out}: is whole, but {out.with_name(place)} " in result.err


def test_what_was_to_be_replaced_comes_back(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
) -> None:
    compress("quantize", tiny, "--out", out, *QUICK)
    before, rename = contents(out), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    result = compress("quantize", tiny, "--out", out, *QUICK, "--overwrite")
    assert "cannot be written" in result.late_error
    assert contents(out) == before
