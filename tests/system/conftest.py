"""Fixtures of the system tests."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import CommandLine, build_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Arithmetic then does not depend on how many cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, not to be changed."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A model directory of the test's own."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a result goes; not there yet."""
    return tmp_path / "out"


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)
