"""Files that cannot be read are named, with the cause, before any work."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import CommandLine

CAPABILITIES_VERSION = 0x20080522
IGNORE_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, in the effective set
QUICK = ("--method", "rtn", "--group-size", 32, "--no-eval", "--no-verify")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def model(place: Path, tiny: Path) -> Path:
    (place / "parent").mkdir()
    return Path(shutil.copytree(tiny, place / "parent" / "model"))


def capabilities(call: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    """Call `capget` or `capset` for this thread."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    assert getattr(ctypes.CDLL(None), call)(header, sets) == 0


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """Let nobody read a path, root neither: it does without the capabilities to ignore permissions."""
    mode, before, without = path.stat().st_mode, (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    for sets in (before, without):
        capabilities("capget", sets)
    without[0] &= ~IGNORE_PERMISSIONS
    path.chmod(0)
    capabilities("capset", without)
    try:
        yield
    finally:
        capabilities("capset", before)
        path.chmod(mode)


FILES = (
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "LICENSE",
    "notes",
    "notes/history.json",
)


@pytest.mark.parametrize("name", [*FILES, "", ".."])
@pytest.mark.parametrize("verb", ["quantize", "dry run", "search"])
def test_a_source_that_must_not_be_read_is_refused_at_the_start(
    verb: str, name: str, model: Path, place: Path, compress: CommandLine
) -> None:
    options = {
        "quantize": ("quantize", model, *QUICK, "--out", place / "out"),
        "dry run": ("quantize", model, *QUICK, "--dry-run"),
        "search": ("search", model, "--bits", 3, "--out", place / "plan.yaml"),
    }
    with closed((model / name).resolve()):
        error = compress(*options[verb]).error
    named = model if name in ("", "..") else model / name
    assert error.startswith(str(named))
    assert error.endswith("cannot be read (permission denied)")
    assert not (place / "out.partial").exists()


@pytest.mark.parametrize("verb", ["eval", "inspect", "generate", "verify", "bench"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", ".."])
def test_every_verb_that_reads_a_model_says_so(verb: str, name: str, model: Path, compress: CommandLine) -> None:
    with closed((model / name).resolve()):
        error = compress(verb, model).error
    assert "permission denied" in error
    assert str(model) in error


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_must_not_be_read_is_named(name: str, model: Path, compress: CommandLine) -> None:
    with closed(model / name):
        assert compress("generate", model).error == f"{model / name}: cannot be read (permission denied)"


OTHERS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "--calibration": lambda model, file: ("quantize", model, "--method", "gptq", "--calibration", file.with_suffix(".jsonl")),
    "--data": lambda model, file: ("eval", model, "--data", file.with_suffix(".txt")),
    "--reference": lambda model, file: ("eval", model, "--reference", file),
    "--tasks": lambda model, file: ("eval", model, "--no-text", "--tasks", file.with_suffix(".jsonl")),
    "RECIPE": lambda model, file: ("run", file, model),
    "--plan": lambda model, file: ("run", model / "recipe.yaml", model, "--plan", file),
}


@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("inside", [True, False], ids=["the directory", "the file"])
def test_other_files_that_must_not_be_read_are_named(
    option: str, inside: bool, model: Path, place: Path, compress: CommandLine
) -> None:
    (model / "recipe.yaml").write_text("passes: [{pass: rtn, options: [{format: int_group, bits: 4, group_size: 32}]}]")
    (place / "data").mkdir()
    arguments = OTHERS[option](model, place / "data" / "file")
    file = next(argument for argument in arguments if str(argument).startswith(str(place / "data")))
    assert isinstance(file, Path)
    file.mkdir() if option == "--reference" else file.write_text("text")
    with closed(file.parent if inside else file):
        error = compress(*arguments).error
    assert error.startswith(str(file))
    assert "permission denied" in error


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_broken_link(path: Path) -> None:
    path.symlink_to("gone")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_pipe, "is a pipe where a file is needed"),
        (make_broken_link, "cannot be read (a broken symbolic link)"),
        (make_loop, f"cannot be read ({os.strerror(errno.ELOOP).lower()})"),
    ],
)
def test_what_is_no_file_is_named_for_what_it_is(
    make: Callable[[Path], None], words: str, name: str, model: Path, place: Path, compress: CommandLine
) -> None:
    (model / name).unlink()
    make(model / name)
    assert compress("quantize", model, *QUICK, "--out", place / "out").error == f"{model / name}: {words}"


@pytest.mark.parametrize("option", ["--calibration", "--data", "--reference", "RECIPE", "--plan"])
def test_a_name_that_is_too_long_is_one_sentence(option: str, model: Path, compress: CommandLine) -> None:
    (model / "recipe.yaml").write_text("passes: [{pass: rtn, options: [{format: int_group, bits: 4, group_size: 32}]}]")
    error = compress(*OTHERS[option](model, Path("x" * 5000))).error
    assert "file name too long" in error
    assert len(error) <= 300


def test_a_device_error_while_reading_is_said(model: Path, compress: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def fails(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", fails)
    assert compress("inspect", model).error == f"{model / 'model.safetensors'}: cannot be read (input/output error)"


def test_weights_of_other_frameworks_need_not_be_readable(model: Path, place: Path, compress: CommandLine) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / ".hidden").write_bytes(b"x")
    with closed(model / "pytorch_model.bin"):
        assert compress("quantize", model, *QUICK, "--dry-run").code == 0
