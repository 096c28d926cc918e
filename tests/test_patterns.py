"""Which patterns of layers match nothing, and how they are found among changes to a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.pipeline.patterns import check_patterns
from compressor.recipe.schema import changed_patterns, load_recipe, make_recipe

RECIPES = Path(compressor.__file__).parents[1] / "recipes"
FORMAT = {"format": "int_group", "bits": 4, "group_size": 32}


def passes(**fields: Any) -> Any:
    return make_recipe({"passes": [{"pass": "rtn", "options": [FORMAT], **fields}]}).passes


@pytest.mark.parametrize(
    "change",
    [
        "passes.0.ignore=[typo]",
        "passes.0.ignore.1=typo",
        "passes.0.ignore=typo",
        "passes.0={pass: rtn, ignore: [typo]}",
        "passes.0.layers=[typo]",
    ],
)
def test_patterns_are_found_in_every_way_to_set_them(change: str) -> None:
    assert changed_patterns([change, "passes.0.damp=0.1"]) == ["typo"]


@pytest.mark.parametrize("key", ["layers", "ignore"])
def test_a_pattern_of_a_recipe_that_matches_nothing_is_a_warning(key: str, tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), torch.device("cpu"))
    assert check_patterns(source, passes(**{key: ["*.q_proj", "qkv_porj"]})) == [
        f"{key} `qkv_porj`: matches no layer of the model; did you mean `v_proj` or `q_proj` or `k_proj`?"
    ]


@pytest.mark.parametrize(
    "pattern", ["lm_head", "*", "embed_tokens", "input_layernorm", "re:layers\\.1\\.", "model.layers.0.mlp.*"]
)
def test_what_stays_as_it_is_may_be_ignored(pattern: str, tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), torch.device("cpu"))
    assert check_patterns(source, passes(ignore=[pattern]), [pattern]) == []


def test_layers_outside_the_blocks_are_none_to_work_on(tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), torch.device("cpu"))
    with pytest.raises(RecipeError, match="layers `embed_tokens`: matches no layer"):
        check_patterns(source, passes(layers=["*.q_proj", "embed_tokens"]), ["embed_tokens"])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma3_vision"])
def test_defaults_are_not_warned_of(family: str, tiny: Callable[..., Path]) -> None:
    assert check_patterns(ModelSource(tiny(family), torch.device("cpu")), passes()) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_match_a_llama(recipe: Path, tiny: Callable[..., Path]) -> None:
    assert check_patterns(ModelSource(tiny("llama"), torch.device("cpu")), load_recipe(recipe).passes) == []
