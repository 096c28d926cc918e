"""Shared fixtures: tiny checkpoints, built once in a session and not to be written to, and text to calibrate on."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import pytest
import tiny_models
import torch
from stock_server import StockServer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **options)`: the directory of a checkpoint, see `tiny_models.build`."""
    place = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def make(family: str, **options: Any) -> Path:
        return tiny_models.build(place / "-".join((family, *map(str, options.values()))), family, **options)

    return make


@pytest.fixture
def tiny_copy(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`tiny_copy(family, **options)`: a copy for this test alone."""
    return lambda family, **options: Path(shutil.copytree(tiny(family, **options), tmp_path / "copy"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the tiny models' tokenizer was trained on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_models.TEXT)
    return path


@pytest.fixture(scope="session")
def stock_server() -> Iterator[StockServer]:
    """Started when the first verification asks."""
    server = StockServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick_verification(request: pytest.FixtureRequest, stock_server: StockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifications that are not what is tested fork the process in which stock transformers answers."""
    if "verification" not in request.path.parts:
        monkeypatch.setattr("compressor.evaluation.verify.loaders.subprocess", stock_server)
