"""The state of the calling process: other threads, defaults and modes change nothing, and are as they were afterwards."""

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor.recipe.schema import make_recipe

ROUNDED = [{"pass": "gptq", "refine": 1, "options": [{"format": "int_group", "bits": 4, "group_size": 32}]}]
TRAINED = [
    {"pass": "prune_width", "ratio": 0.2, "multiple": 32, "score": "magnitude"},
    {"pass": "recover", "steps": 2, "batch": 2, "rank": 4},
    *ROUNDED,
    {"pass": "learned", "steps": 2},
]


def weights(model: Path, out: Path, text: Path, passes: list[dict[str, Any]]) -> bytes:
    """The weight file of a short run."""
    data = {
        "passes": passes,
        "calibration": {"source": str(text), "samples": 2, "seq_len": 32},
        "evaluation": None,
    }
    compressor.run(make_recipe(data), model, out, verify=False, device="cpu")
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return weights(tiny("llama", num_hidden_layers=1), tmp_path_factory.mktemp("alone") / "out", text_file, TRAINED)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def seeds(number: int) -> Iterator[None]:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)
    yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "a device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "warnings are errors": warnings_as_errors,
    "deterministic algorithms": deterministic,  # the rest change nothing here, but must be put back
    "matmul precision": lambda: matmul_precision("medium"),
    "other seeds": lambda: seeds(7),
}


@pytest.mark.parametrize("state", [*STATES][:8])
def test_the_state_of_the_caller_does_not_change_what_training_writes(
    state: str, trained: bytes, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny("llama", num_hidden_layers=1)
    with STATES[state]():
        written = weights(model, tmp_path / "out", text_file, TRAINED)
    assert written == trained


def test_the_state_of_the_caller_is_what_it_was(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    def state() -> list[Any]:
        return [
            *(
                torch.get_default_dtype(),
                torch.get_default_device(),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            ),
            *(torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
            *(torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]),
            *(list(warnings.filters), torch.is_inference_mode_enabled()),
        ]

    with contextlib.ExitStack() as states:
        for name in (
            "other seeds",
            "float64",
            "deterministic algorithms",
            "matmul precision",
            "warnings are errors",
            "autocast",
        ):
            states.enter_context(STATES[name]())
        before = state()
        weights(tiny("llama", num_hidden_layers=1), tmp_path / "out", text_file, TRAINED)
        assert state() == before


def test_runs_in_several_threads_write_what_each_writes_alone(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model, written, failed = tiny("llama", num_hidden_layers=1), {}, []

    def work(number: int) -> None:
        try:
            written[number] = weights(model, tmp_path / f"out{number}", text_file, ROUNDED)
            compressor.load(tmp_path / f"out{number}")
        except BaseException as error:  # whatever it is, the test tells
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(written.values()) == {weights(model, tmp_path / "alone", text_file, ROUNDED)}


def test_a_callback_may_use_the_api(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = []

    def tell(event: object) -> None:
        seen.append(compressor.load(tiny("llama", num_hidden_layers=1)))

    compressor.quantize(
        tiny("llama", num_hidden_layers=1),
        tmp_path / "out",
        method="rtn",
        group_size=32,
        evaluate=False,
        verify=False,
        tell=tell,
    )
    assert seen


def test_a_model_loaded_in_inference_mode_can_be_trained(tiny: Callable[..., Path]) -> None:
    with torch.inference_mode():
        model = compressor.load(tiny("llama", num_hidden_layers=1))
    assert not any(parameter.is_inference() for parameter in model.parameters())
