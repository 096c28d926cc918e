"""`compress quantize --method NAME` and what is taken without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor import api
from compressor.errors import RecipeError
from compressor.methods import FLOATS, METHODS
from compressor.registry import describe
from compressor.report import Report

FAST = {"learned": ["steps"], "rotate": ["learn"]}  # what takes long, by pass


def run(method: str, model: Path, text: Path, place: Path, **options: Any) -> Report:
    calibrated = METHODS[method].calibrated
    recipe = api.quantize_recipe(
        method=method,
        calibrated=calibrated,
        calibration=str(text) if calibrated else None,
        samples=4,
        seq_len=32,
        evaluate=False,
        changes=[
            f"passes.{i}.{key}=2" for i, step in enumerate(METHODS[method].passes) for key in FAST.get(step["pass"], ())
        ],
        **options,
    )
    return api.run(recipe, model, place / "out", verify=False, device="cpu")


def names(**options: object) -> list[str]:
    return [step["pass"] for step in describe(api.quantize_recipe(**options).passes)]  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_are_trained(bits: int) -> None:
    assert names(bits=bits) == ["gptq", "learned"]


@pytest.mark.parametrize("bits", [5, 8])
def test_many_bits_need_no_training(bits: int) -> None:
    assert names(bits=bits) == ["gptq"]


@pytest.mark.parametrize("fmt", FLOATS)
def test_floats_are_rounded_with_feedback_or_searched(fmt: str) -> None:
    assert names(fmt=fmt) == ["gptq"]
    (step,) = describe(api.quantize_recipe(fmt=fmt, calibrated=False).passes)
    assert (step["pass"], step["search"], step["options"]) == ("rtn", True, [{"format": fmt}])


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].integers])
def test_each_that_can_runs_on_floats(method: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    report = run(method, tiny("llama"), text_file, tmp_path, fmt="nvfp4")
    assert {row.option for row in report.rows} == {"nvfp4"}


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].integers])
def test_one_for_integers_is_refused_for_floats(method: str) -> None:
    with pytest.raises(RecipeError, match=f"--method {method} --format mxfp4: .* is for integers; take one of gptq, awq"):
        api.quantize_recipe(fmt="mxfp4", method=method, calibrated=METHODS[method].calibrated)


@pytest.mark.parametrize("chosen", [{"bits": 3}, {"group_size": 16}, {"symmetric": False}], ids=str)
def test_floats_leave_nothing_to_choose(chosen: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--format nvfp4: has 4 bits, groups of a size of its own"):
        api.quantize_recipe(fmt="nvfp4", **chosen)


def test_a_misspelt_format_is_suggested() -> None:
    with pytest.raises(RecipeError, match="--format: no format named `nvpf4`; did you mean `nvfp4`"):
        api.quantize_recipe(fmt="nvpf4")


@pytest.mark.parametrize("method", METHODS)
def test_each_runs_and_all_its_layers_get_the_bits(
    method: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run(method, tiny("llama"), text_file, tmp_path, bits=3, group_size=32)
    assert {row.option.removesuffix("-ic") for row in report.rows} == {"int3g32"}
    assert len(report.rows) == len({row.layer for row in report.rows}) == 7 * 2


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].calibrated])
def test_one_that_reads_text_is_refused_where_none_may_be_read(method: str) -> None:
    with pytest.raises(RecipeError, match=f"--method {method} --no-calibration: .* leave out one"):
        api.quantize_recipe(4, method=method, calibrated=False)


def test_a_misspelt_one_is_suggested() -> None:
    with pytest.raises(RecipeError, match="did you mean `learned`"):
        api.quantize_recipe(4, method="learnd")
