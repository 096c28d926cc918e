"""OWL, against its formula, and layers with shares of weights of their own in a search."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import change_tensors
from transformers import AutoModelForCausalLM

import compressor
from compressor import api
from compressor.errors import RecipeError
from compressor.formats.base import Format
from compressor.formats.int_group import IntGroup
from compressor.formats.sparse_bitmask import SparseBitmask
from compressor.pipeline.search.allocate import Budget, BudgetError
from compressor.pipeline.search.importance import SPREAD, by_salience
from compressor.pipeline.search.levels import Level, Unit
from compressor.pipeline.search.measure import _outstanding
from compressor.recipe.schema import make_recipe

SIZE = 10_000
FINE: Sequence[Format] = [SparseBitmask(sparsity=float(Fraction(percent, 200))) for percent in range(190, 9, -1)]
QUICK = {"tokens": 256, "table_tokens": 64, "rounds": 1, "evolve": {"generations": 1, "offspring": 2, "stages": [[1, 64]]}}


def unit(block: int, salience: float, options: Sequence[Format] = FINE) -> Unit:
    """With so many bits as weights stay, and no others."""
    bits = [round(SIZE * (1 - option.sparsity)) if isinstance(option, SparseBitmask) else 4 for option in options]
    levels = tuple(Level(option, size, 0.0, 0.0) for option, size in zip(options, bits, strict=True))
    return Unit(f"b{block}", block, ("layer",), SIZE, 0.0, 0.0, 0.0, levels, salience=salience)


def budget(units: Sequence[Unit], stays: float) -> Budget:
    costs = [[level.bits for level in one.levels] for one in units]
    return Budget({"bits": costs}, {"bits": int(stays * SIZE * len(units))})


@pytest.mark.parametrize("stays", [0.3, 0.5, 0.8])
def test_blocks_keep_more_by_their_share_of_outstanding_weights(stays: float) -> None:
    saliences = (0.01, 0.05, 0.03, 0.02)
    units = [unit(block, salience) for block, salience in enumerate(saliences)]
    kept = [units[i].levels[at].bits / SIZE for i, at in enumerate(by_salience(units, budget(units, stays)))]
    assert stays - 0.01 < sum(kept) / len(kept) <= stays
    mean = sum(saliences) / len(saliences)
    for share, salience in zip(kept, saliences, strict=True):  # from the least to the most: twice lambda
        assert share - sum(kept) / 4 == pytest.approx(2 * SPREAD * (salience - mean) / 0.04, abs=0.006)


def test_levels_that_are_no_shares_are_not_its_business() -> None:
    units = [unit(block, 0.1, [IntGroup(bits=bits, group_size=32) for bits in (2, 3)]) for block in range(2)]
    with pytest.raises(BudgetError, match="OWL is for weights that stay or go"):
        by_salience(units, budget(units, 0.5))


def test_outstanding_weights_are_counted_by_what_they_do() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 8, generator=random), torch.randn(10, 8, generator=random)]
    squares = torch.randn(8, generator=random).square() * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    scores = [abs(float(w[o, i])) * float(squares[i]) ** 0.5 for w in weights for o in range(len(w)) for i in range(8)]
    mean = sum(scores) / len(scores)
    expected = sum(score > 5 * mean for score in scores) / len(scores)
    assert expected > 0
    assert _outstanding(weights, squares) == expected


def recipe(text: Path, **changes: Any) -> Any:
    step = {"pass": "prune_weights", "score": "wanda", "refit": False, "sparsity": [0.25, 0.5, 0.75], **changes}
    calibration = {"source": str(text), "samples": 4, "seq_len": 32}
    data = {"passes": [step], "calibration": calibration, "evaluation": None}
    return lambda **more: make_recipe({**data, **more})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_layer_gets_a_share_and_all_together_keep_to_the_bits(
    dtype: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    width = 32 if dtype == "float32" else 16
    wanted = 0.55 * width + 1 + 0.6  # those that stay, the mask, the offsets of rows
    made = recipe(text_file)(target={"bits": wanted}, search=QUICK)
    report = api.run(made, tiny("llama", dtype=dtype), tmp_path / "out")
    assert report.search is not None
    assert "OWL" in {one["name"] for one in report.search["contestants"]}
    assert 0.9 * wanted < report.bits_per_weight <= wanted
    assert len({row.option for row in report.rows}) > 1
    assert {row.option.endswith("fp32") for row in report.rows} == {dtype == "float32"}
    assert "failed" not in {check["outcome"] for check in report.verification}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len({entry["sparsity"] for entry in config["quantization_config"]["layers"].values()}) > 1
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama", dtype=dtype), dtype=torch.float32)
    for name, module in compressor.load(tmp_path / "out", dtype=torch.float32, dense=True).named_modules():
        if name in {row.layer for row in report.rows}:
            kept = module.weight != 0
            assert torch.equal(module.weight[kept], dense.get_submodule(name).weight[kept])  # nothing was fitted again


def test_several_shares_need_something_that_chooses(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"3 options \(sparse25-fp32, sparse50-fp32, sparse75-fp32\) and nothing that choos"
    ):
        api.run(recipe(text_file)(), tiny("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"stored": "dense"}, "there is nothing to choose"), ({"sparsity": []}, "name at least one share")],
)
def test_shares_that_make_no_sense(change: dict[str, Any], said: str, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(text_file, **change)()


@pytest.mark.parametrize("stored", ["bitmask", "dense"])
def test_a_dtype_that_no_option_is_for_is_refused_before_anything_is_done(
    stored: str, tiny_copy: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny_copy("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    change_tensors(model, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(
        RecipeError, match=r"layers\.1\.self_attn\.o_proj: stored as float64, for which the pass has no option"
    ):
        api.forecast(recipe(text_file, sparsity=0.5, stored=stored)(), model, tmp_path / "out")
