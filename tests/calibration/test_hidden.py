"""Hidden states that lie in a file are the same, and the runs too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tensors

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError
from compressor.pipeline import memory_estimate as forecasting
from compressor.pipeline.calibration.hidden import OnDisk, keeping, shapes
from compressor.recipe.schema import make_recipe

BATCHES = [torch.randn(2, 3, 4), torch.randn(1, 5, 4).bfloat16(), torch.randn(2, 3, 4)]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    found = OnDisk(tmp_path, BATCHES)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, BATCHES, strict=True))
    assert torch.equal(found[-1], BATCHES[-1])
    assert len(found[1:]) == 2
    assert shapes(found) == shapes(BATCHES) == [(2, 3, 4), (1, 5, 4), (2, 3, 4)]


def test_a_batch_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    found = OnDisk(tmp_path, BATCHES)
    found[0] = BATCHES[2] + 1
    assert torch.equal(found[0], BATCHES[2] + 1)
    assert torch.equal(found[1], BATCHES[1])


def test_a_slice_of_a_transpose_is_written_as_it_reads(tmp_path: Path) -> None:
    x = torch.arange(24.0).view(4, 2, 3).transpose(0, 1)
    assert torch.equal(OnDisk(tmp_path, [x])[0], x)


def test_no_file_is_left_and_none_has_a_name(tmp_path: Path) -> None:
    found = OnDisk(tmp_path, BATCHES)
    assert not list(tmp_path.iterdir())
    del found
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"^calibration\.on_disk: .*nowhere.*; make room there or name another directory"
    ):
        keeping(str(tmp_path / "nowhere"))(BATCHES)


@pytest.mark.parametrize("step", [{"pass": "gptq", "asymmetric_calibration": 0.5}, {"pass": "gptq"}], ids=str)
def test_a_run_gives_the_same_weights(
    step: dict[str, object], tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """Compare runs on two batches of calibration text."""
    results = []
    for place in (None, str(tmp_path)):
        data = {
            "passes": [
                {**step, "refine": 1, "options": [{"format": "int_group", "bits": 3, "group_size": 32}]},
                {"pass": "learned", "steps": 3},
            ],
            "calibration": {"source": str(text_file), "samples": 20, "seq_len": 256, "on_disk": place},
            "evaluation": None,
        }
        out = tmp_path / f"out-{place is None}"
        api.run(make_recipe(data), tiny("llama", max_position_embeddings=256), out, device="cpu", verify=False)
        results.append(tensors(out))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_forecast_counts_what_stays_in_memory() -> None:
    def expected(place: str | None) -> int:
        calibration = {"samples": 10_000, "seq_len": 256, "on_disk": place}
        rounding = {"pass": "gptq", "options": [{"format": "int_group", "bits": 4}]}
        recipe = make_recipe({"passes": [rounding], "calibration": calibration, "evaluation": None})
        return api.forecast(recipe, DEMO_MODEL, device="cpu", dtype="float32").expected_peak_memory_bytes

    assert expected(None) - expected("/tmp") > 0.9 * 10_000 * 256 * 256 * 4


@pytest.mark.parametrize(("available", "counted"), [(2**40, True), (2**20, False)])
def test_the_forecast_counts_the_whole_model_where_it_is_to_write_samples(
    available: int, counted: bool, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "available_memory", lambda device: available)
    monkeypatch.setattr(forecasting, "dense_bytes", lambda source: 2**38)

    def expected(generate: int) -> int:
        rounding = {"pass": "rtn", "options": [{"format": "int_group", "bits": 4, "group_size": 32}]}
        recipe = make_recipe({"passes": [rounding], "evaluation": {"generate": generate}})
        return api.forecast(recipe, tiny("llama"), device="cpu", dtype="float32").expected_peak_memory_bytes

    assert (expected(2) > 2**38) == counted
    assert expected(0) < 2**38
