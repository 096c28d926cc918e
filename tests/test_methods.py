"""`compress quantize --method NAME` and what is taken without it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor import api
from compressor.errors import RecipeError
from compressor.recipe import presets, registry
from compressor.recipe.build import quantize_recipe
from compressor.recipe.presets import METHODS
from compressor.recipe.registry import describe
from compressor.report.record import Report

FAST = {"steps": 2, "learn": 2, "refine": 1}  # settings that take long, and what they are set to


def run(method: str, model: Path, text: Path, place: Path, **options: Any) -> Report:
    calibrated = METHODS[method].calibrated
    recipe = quantize_recipe(
        method=method,
        calibrated=calibrated,
        calibration=str(text) if calibrated else None,
        samples=4,
        seq_len=32,
        evaluate=False,
        **options,
    )
    quick = [replace(step, **{key: few for key, few in FAST.items() if getattr(step, key, 0)}) for step in recipe.passes]  # type: ignore[type-var]
    recipe = replace(recipe, passes=tuple(quick))
    return api.run(recipe, model, place / "out", verify=False, device="cpu")


def names(**options: object) -> list[str]:
    return [step["pass"] for step in describe(quantize_recipe(**options).passes)]  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_are_trained(bits: int) -> None:
    assert names(bits=bits) == ["gptq", "learned"]


@pytest.mark.parametrize("bits", [5, 8])
def test_many_bits_need_no_training(bits: int) -> None:
    assert names(bits=bits) == ["gptq"]


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("nvfp4", ["gptq", "learned"]),
        ("mxfp4", ["gptq", "learned"]),
        ("fp4", ["adadim", "learned"]),
        ("fp8", ["gptq"]),
        ("mxfp8", ["gptq"]),
    ],
)
def test_floats_have_a_default(fmt: str, expected: list[str]) -> None:
    assert names(fmt=fmt) == expected
    (step,) = describe(quantize_recipe(fmt=fmt, calibrated=False).passes)
    assert (step["pass"], step["search"]) == ("rtn", True)
    assert len(step["options"]) == 1


def test_shifts_are_for_activations_that_one_scale_serves() -> None:
    assert names(fmt="fp4", activations=4) == ["preshift", "adadim", "learned"]
    assert names(fmt="fp4", activations=16) == ["adadim", "learned"]


@pytest.mark.parametrize(
    ("fmt", "bits", "ways"),
    [
        ("int", 8, {8: "int8-bytes-a8"}),
        ("int", 4, {8: "int4g128-a8"}),
        ("nvfp4", None, {4: "nvfp4-nvfp4", 8: "nvfp4-fp8"}),
        ("mxfp4", None, {4: "mxfp4-mxfp4", 8: "mxfp4-mxfp8"}),
        ("fp4", None, {4: "e2m1-fp4-tensor", 8: "e2m1-fp8-tensor"}),
        ("fp8", None, {8: "fp8-channel-fp8"}),
        ("mxfp8", None, {8: "mxfp8-mxfp8"}),
    ],
)
def test_activations_of_some_bits(fmt: str, bits: int | None, ways: dict[int, str]) -> None:
    for wanted in (4, 8):
        if wanted in ways:
            recipe = quantize_recipe(bits, fmt=fmt, activations=wanted)
            assert recipe.passes[-2 if len(recipe.passes) > 1 else 0].options[0].label == ways[wanted]
        else:
            with pytest.raises(
                RecipeError, match=f"--format {fmt} --activations {wanted}: these weights go with activations of .*16 bits"
            ):
                quantize_recipe(bits, fmt=fmt, activations=wanted)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].only is None])
def test_each_that_can_runs_on_floats(method: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    report = run(method, tiny("llama"), text_file, tmp_path, fmt="nvfp4")
    assert {row.option for row in report.rows} == {"nvfp4"}


def test_numbers_of_the_best_kind_with_rounded_activations(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run("fpq", tiny("llama"), text_file, tmp_path, fmt="fp4", activations=4)
    assert {row.option[:4] for row in report.rows} <= {"e2m1", "e1m2", "e3m0"}
    assert {row.option[5:] for row in report.rows} <= {"e2m1-tensor", "e1m2-tensor", "e3m0-tensor"}


def test_vectors_are_chosen_by_their_method_or_their_format(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    assert names(method="vptq") == ["vptq"]
    assert names(method="vptq-learned") == names(fmt="vq") == names(fmt="vq", bits=2.25) == ["vptq", "learned"]
    report = run("vptq", tiny("llama"), text_file, tmp_path, bits=3.5)
    assert all(row.option.startswith("vq") for row in report.rows)
    assert report.bits_per_weight <= 3.5


def one_layer(shape: tuple[int, int]) -> tuple[Any, list[str]]:
    """A block with a layer, and this."""
    return SimpleNamespace(prefix="block", layers={"one": None}, shape=lambda name: shape), ["one"]


def test_layers_take_what_keeps_to_the_budget() -> None:
    step: Any = quantize_recipe(2.25, method="vptq").passes[0]
    for shape in ((4096, 4096), (512, 512), (256, 256)):
        sizes = {fmt: fmt.stored_bits(shape) / (shape[0] * shape[1]) for fmt in step.options}
        picked = step.pick(step.options, *one_layer(shape))
        assert sizes[picked] <= 2.25
        rates = {fmt: fmt.index_bits / fmt.vector for fmt, size in sizes.items() if size <= 2.25}
        assert rates[picked] == max(rates.values())
    assert step.pick(step.options, *one_layer((4096, 4096))).index_bits == 17


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bits": 2.5}, "--format int --bits 2.5: a fraction of a bit is for --format vq"),
        ({"fmt": "vq", "bits": 5}, "--format vq --bits 5: vectors are for 1 to 4 bits a weight"),
        ({"fmt": "vq", "group_size": 64}, "--format vq: has neither groups nor zero points"),
        ({"fmt": "vq", "activations": 8}, "--format vq: has neither groups nor zero points"),
        ({"fmt": "vq", "method": "gptq"}, "--method gptq --format vq: .* take one of vptq"),
        ({"fmt": "int", "method": "vptq"}, "--method vptq --format int: .* take one of learned"),
        ({"fmt": "vq", "calibrated": False}, "--method vptq-learned --no-calibration"),
    ],
    ids=str,
)
def test_what_vectors_leave_no_choice_of_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize_recipe(**chosen)


def test_a_budget_that_no_option_keeps_to_says_what_would() -> None:
    step: Any = quantize_recipe(1, method="vptq").passes[0]
    with pytest.raises(ValueError, match=r"none takes at most 1 bits a weight, the least \d+\.\d+; allow more"):
        step.pick(step.options, *one_layer((8, 8)))


@pytest.mark.parametrize("method", [name for name in METHODS if "mxfp4" not in (METHODS[name].only or ("mxfp4",))])
def test_one_for_other_numbers_is_refused(method: str) -> None:
    with pytest.raises(RecipeError, match=f"--method {method} --format mxfp4: .* not for these numbers; take one of learned"):
        quantize_recipe(fmt="mxfp4", method=method, calibrated=METHODS[method].calibrated)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"fmt": "nvfp4", "bits": 3}, "--format nvfp4 --bits 3: these numbers have 4 bits"),
        ({"fmt": "fp8", "bits": 4}, "--format fp8 --bits 4: these numbers have 8 bits"),
        ({"fmt": "nvfp4", "group_size": 16}, "--format nvfp4: has no zero points, and groups of a size of its own"),
        ({"fmt": "mxfp4", "symmetric": False}, "--format mxfp4: has no zero points, and groups"),
        ({"fmt": "fp4", "symmetric": False}, "--format fp4: has no zero points; leave out --asymmetric"),
        ({"fmt": "nvpf4"}, "--format: no format named `nvpf4`; did you mean `nvfp4`"),
        ({"fmt": "nvfp4", "activations": 4, "calibrated": False}, "--activations 4 --no-calibration: nvfp4 needs a scale"),
    ],
    ids=str,
)
def test_what_leaves_no_choice_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize_recipe(**chosen)


def test_groups_of_fp4_can_be_chosen() -> None:
    recipe = quantize_recipe(fmt="fp4", group_size=32)
    assert [option.label for option in recipe.passes[0].options] == ["e2m1g32", "e1m2g32", "e3m0g32"]


@pytest.mark.parametrize("method", [name for name in METHODS if "int" in (METHODS[name].only or ("int",))])
def test_each_runs_and_all_its_layers_get_the_bits(
    method: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run(method, tiny("llama"), text_file, tmp_path, bits=3, group_size=32)
    assert {row.option.removesuffix("-ic") for row in report.rows} == {"int3g32"}
    assert len(report.rows) == len({row.layer for row in report.rows}) == 7 * 2


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].calibrated and name != "fpq"])
def test_one_that_reads_text_is_refused_where_none_may_be_read(method: str) -> None:
    with pytest.raises(RecipeError, match=f"--method {method} --no-calibration: .* leave out one"):
        quantize_recipe(4, method=method, calibrated=False)


def test_a_misspelt_one_is_suggested() -> None:
    with pytest.raises(RecipeError, match="did you mean `learned`"):
        quantize_recipe(4, method="learnd")


@pytest.mark.parametrize("bits", [n / 10 for n in range(22, 81)])
def test_a_search_among_integers_has_options_on_both_sides(bits: float) -> None:
    """Else a mean of so many bits could not be come near to."""
    options = [
        registry.build("format", spec) for step in presets.ladder(["int"], bits, []) for spec in step.get("options", ())
    ]
    sizes = [option.stored_bits((1024, 1024)) / 1024**2 for option in options]
    assert min(sizes) <= bits <= max(sizes)
    assert len({option.bits for option in options}) > 1
