"""`compress quantize --method NAME` and what is taken without it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor import api
from compressor.errors import RecipeError
from compressor.methods import METHODS
from compressor.registry import describe
from compressor.report import Report

FAST = {"learned": ["steps"], "rotate": ["learn"]}  # what takes long, by pass


def names(**options: object) -> list[str]:
    return [step["pass"] for step in describe(api.quantize_recipe(**options).passes)]  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_are_trained(bits: int) -> None:
    assert names(bits=bits) == ["gptq", "learned"]


@pytest.mark.parametrize("bits", [5, 8])
def test_many_bits_need_no_training(bits: int) -> None:
    assert names(bits=bits) == ["gptq"]


@pytest.mark.parametrize("method", METHODS)
def test_each_runs_and_all_its_layers_get_the_bits(
    method: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = api.quantize_recipe(
        3,
        method=method,
        calibrated=METHODS[method].calibrated,
        group_size=32,
        calibration=str(text_file) if METHODS[method].calibrated else None,
        samples=4,
        seq_len=32,
        evaluate=False,
        changes=[
            f"passes.{i}.{key}=2" for i, step in enumerate(METHODS[method].passes) for key in FAST.get(step["pass"], ())
        ],
    )
    report: Report = api.run(recipe, tiny("llama"), tmp_path / "out", verify=False, device="cpu")
    assert {row.option.removesuffix("-ic") for row in report.rows} == {"int3g32"}
    assert len(report.rows) == len({row.layer for row in report.rows}) == 7 * 2


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].calibrated])
def test_one_that_reads_text_is_refused_where_none_may_be_read(method: str) -> None:
    with pytest.raises(RecipeError, match=f"--method {method} --no-calibration: .* leave out one"):
        api.quantize_recipe(4, method=method, calibrated=False)


def test_a_misspelt_one_is_suggested() -> None:
    with pytest.raises(RecipeError, match="did you mean `learned`"):
        api.quantize_recipe(4, method="learnd")
