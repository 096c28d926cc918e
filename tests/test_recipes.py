import json
from pathlib import Path

import pytest
import yaml

from compressor import api
from compressor.errors import RecipeError
from compressor.recipe.schema import Search, load_recipe, make_recipe, to_yaml

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SEARCH = ["search.tokens=512", "search.table_tokens=64", "search.rounds=1", "search.evolve.generations=1"]
QUICK = ["calibration.samples=4", "calibration.seq_len=32", "evaluation.samples=2"]
FEW = {"steps": 3, "learn": 3, "judged": 64, "batch": 2, "refine": 1}
CONTINUED = "int4-gptq"  # the recipe whose run ends with samples of text, as they all do: they are alike for every recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs(path, tiny, tmp_path):
    recipe = load_recipe(path)
    changes = [*QUICK, *(SEARCH if recipe.target is not None else [])]
    changes += [] if path.stem == CONTINUED else ["evaluation.generate=0"]
    for i, step in enumerate(recipe.passes):
        changes += [f"passes.{i}.{key}={count}" for key, count in FEW.items() if getattr(step, key, 0)]
        changes += [f"passes.{i}.{change}" for change in SEARCH if isinstance(getattr(step, "search", None), Search)]
        if isinstance(getattr(step, "sparsity", None), tuple):
            changes.append(f"passes.{i}.sparsity=[0.5, 0.9]")
    report = api.run(load_recipe(path, changes), tiny("llama", max_position_embeddings=256), tmp_path / "out", device="cpu")
    blocks = json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"]
    assert len(report.rows) == (7 * blocks if any(step.offers for step in recipe.passes) else 0)
    assert blocks == 2 or report.pruning
    assert report.quality["kl"] > 0
    assert bool(report.samples) == (path.stem == CONTINUED)
    assert [check for check in report.verification if check["outcome"] == "failed"] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_the_same_recipe(path):
    recipe = load_recipe(path)
    assert make_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_set_changes_a_key():
    recipe = make_recipe(base(), ["passes.0.damp=0.1", "passes.0.options.0.bits=3", "calibration.seed=7"])
    assert recipe.passes[0].damp == 0.1
    assert recipe.passes[0].options[0].bits == 3
    assert recipe.calibration.seed == 7


def test_set_can_switch_evaluation_off():
    assert make_recipe(base(), ["evaluation=null"]).evaluation is None


def base():
    return {"passes": [{"pass": "gptq", "options": [{"format": "int_group", "bits": 4}]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passses": []}, "did you mean `passes`"),
        ({"passes": []}, "passes: empty"),
        ({"passes": [{"pass": "gptqq"}]}, "no pass named `gptqq`; did you mean `gptq`"),
        ({"passes": [{"pass": "gptq", "dampp": 1, "options": [{"format": "int_group"}]}]}, "did you mean `damp`"),
        ({"passes": [{"pass": "gptq", "options": [{"format": "int_grup"}]}]}, "did you mean `int_group`"),
        ({"passes": [{"pass": "gptq", "options": [{"format": "int_group", "bits": 12}]}]}, "12 is not in 2 … 8"),
        ({"passes": [{"pass": "gptq", "options": [{"format": "int_group", "bits": "four"}]}]}, "valid integer"),
        ({"passes": [{"pass": "gptq", "options": []}]}, "options: empty"),
        ({"passes": [{"pass": "gptq", "damp": 2, "options": [{"format": "int_group"}]}]}, "damp: 2.0 is not in 0 … 1"),
        ({"passes": [{"options": []}]}, "the key `pass`"),
        ({"calibration": {"samples": 0}}, "samples: 0 is not a positive number"),
        ({"calibration": {"sample": 8}}, "did you mean `samples`"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(change, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe({**base(), **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["passes.3.damp=1", "passes.damp=1", "nothing", "=1"])
def test_a_set_that_does_not_fit_is_refused(change):
    with pytest.raises(RecipeError, match="--set"):
        make_recipe(base(), [change])
