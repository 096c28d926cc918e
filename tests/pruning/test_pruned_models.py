"""What is taken away, against transformers' own models with the same weights put in by hand."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import some_tokens, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.passes.prune.depth import even, least
from compressor.passes.prune.prunable import find_parts
from compressor.passes.prune.shapes import parameters, shapes
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
WIDE = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
ALIKE = {"rtol": 0, "atol": 3e-5}


@dataclass(frozen=True)
class Data:
    """Where calibration text comes from, briefly."""

    text: Path

    def recipe(self, *passes: dict[str, Any]) -> Any:
        calibration = {"source": str(self.text), "samples": 6, "seq_len": 32}
        return make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})


@pytest.fixture
def data(text_file: Path) -> Data:
    return Data(text_file)


def edited(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A checkpoint of one file with some of its tensors changed."""
    file = path / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return path


def logits(path: Path) -> Tensor:
    """By transformers alone, without this package's loader."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(some_tokens()).logits


@pytest.mark.parametrize("family", WIDE)
def test_channels_that_are_never_used_go_and_nothing_changes(
    family: str, tiny_copy: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    def silence(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if name.endswith("mlp.up_proj.weight"):
                tensor[::2] = 0

    model = edited(tiny_copy(family), silence)
    step = {"pass": "prune_width", "ratio": 0.5, "of": "mlp", "multiple": 1}
    report = api.run(data.recipe(step), model, tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 128
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), **ALIKE)
    assert all(part["error"] < 1e-9 for part in report.pruning[0]["parts"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_groups_of_heads_that_nobody_reads_go_and_nothing_changes(
    family: str, tiny_copy: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    def silence(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if name.endswith("self_attn.o_proj.weight"):
                tensor[:, : tensor.shape[1] // 2] = 0  # of two groups, the first

    model = edited(tiny_copy(family), silence)
    source = ModelSource(model, CPU)
    attention, mlp = find_parts(source, source.block(0, load=False))
    cost = {p.name: 2 * p.parameters(source.block(0, load=False)) for p in (attention, mlp)}
    ratio = cost["self_attn"] / parameters(source)
    step = {"pass": "prune_width", "ratio": ratio, "multiple": 256}  # channels go by 256 or not at all
    api.run(data.recipe(step), model, tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (1, 2, 256)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), **ALIKE)


@pytest.mark.parametrize("by", ["even", "cosine", "search"])
def test_without_blocks_a_model_is_what_passing_them_over_gives(
    by: str, tiny: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    model = tiny("llama", num_hidden_layers=4)
    search = (
        {"search": {"tokens": 512, "table_tokens": 64, "rounds": 1, "evolve": {"generations": 0}}} if by == "search" else {}
    )
    step = {"pass": "prune_depth", "ratio": 0.5, "of": "blocks", "by": by, **search}
    (report,) = api.run(data.recipe(step), model, tmp_path / "out", verify=False).pruning
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dense.model.layers = torch.nn.ModuleList(b for i, b in enumerate(dense.model.layers) if i not in report["gone"])
    with torch.no_grad():
        expected = dense(some_tokens(), use_cache=False).logits
    assert len(report["gone"]) == 2
    torch.testing.assert_close(logits(tmp_path / "out"), expected, **ALIKE)


def test_a_shortened_model_generates_with_a_cache_what_it_does_without(
    tiny: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    step = {"pass": "prune_depth", "ratio": 0.3, "of": "blocks", "by": "even"}
    api.run(data.recipe(step), tiny("gemma3"), tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    some = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(some_tokens()[:1, :8], use_cache=True, **some),
        model.generate(some_tokens()[:1, :8], use_cache=False, **some),
    )


def test_what_a_config_derives_from_the_number_of_a_block_stays_with_the_block(
    tiny_copy: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    model = tiny_copy("gemma3")
    config = json.loads((model / "config.json").read_text())
    assert config.pop("layer_types") == ["sliding_attention", "sliding_attention", "full_attention"]
    (model / "config.json").write_text(json.dumps({**config, "sliding_window_pattern": 3}))
    step = {"pass": "prune_depth", "ratio": 0.3, "of": "blocks", "by": "even"}
    (report,) = api.run(data.recipe(step), model, tmp_path / "out", verify=False).pruning
    assert report["gone"] == [1]
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.layer_types
    assert made == ["sliding_attention", "full_attention"]


def test_numbers_of_heads_that_an_architecture_does_not_take_are_no_shapes(tiny: Callable[..., Path]) -> None:
    """Six heads of 16 in a width of 128, which Llama's config refuses, and Qwen3's does not."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    kept = {}
    for family in ("llama", "qwen3"):
        found = shapes(ModelSource(tiny(family, **heads), CPU), 0.2, "blocks", heads=True, multiple=1)
        kept[family] = [shape.keep["self_attn"] for shape in found]
    assert 3 in kept["qwen3"]
    assert 3 not in kept["llama"]
    assert 2 in kept["llama"]


@pytest.mark.parametrize("name", ["prune_width", "prune_depth"])
def test_a_ratio_of_nothing_changes_no_bit(name: str, tiny: Callable[..., Path], tmp_path: Path, data: Data) -> None:
    api.run(data.recipe({"pass": name, "ratio": 0}), tiny("llama"), tmp_path / "out")
    before, after = tensors(tiny("llama")), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)


@pytest.mark.parametrize("of", ["model", "blocks", "mlp"])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_what_goes_is_the_share_that_was_asked_for(of: Any, ratio: float, tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), CPU)
    whole, counted = parameters(source), parameters(source, of)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    assert whole == sum(p.numel() for p in model.parameters())
    for shape in shapes(source, ratio, of, heads=True, multiple=1):
        config = {**source.raw_config, **shape.config}
        built = AutoModelForCausalLM.from_config(type(model.config)(**config))
        assert sum(p.numel() for p in built.parameters()) == shape.parameters
        over = (whole - shape.parameters) - ratio * counted
        assert over >= 0
        assert over < 2 * 3 * 128 or shape.keep["mlp"] == 256  # a channel of both blocks, or heads alone


def test_narrower_and_shorter_and_rounded_in_one_run(tiny: Callable[..., Path], tmp_path: Path, data: Data) -> None:
    passes = (
        {"pass": "prune_depth", "ratio": 0.25, "of": "blocks", "by": "cosine"},
        {"pass": "prune_width", "ratio": 0.25, "of": "mlp", "multiple": 32},
        {"pass": "gptq", "options": [{"format": "int_group", "bits": 4, "group_size": 32}]},
    )
    report = api.run(data.recipe(*passes), tiny("llama", num_hidden_layers=4), tmp_path / "out")
    assert [check["outcome"] for check in report.verification if check["outcome"] == "failed"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 192)
    assert len(report.rows) == 3 * 7
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(some_tokens()).logits.isfinite().all()


def test_a_turned_model_can_be_narrowed(tiny: Callable[..., Path], tmp_path: Path, data: Data) -> None:
    step = {"pass": "prune_width", "ratio": 0.25, "of": "mlp", "multiple": 32}
    api.run(data.recipe({"pass": "rotate"}, step), tiny("llama"), tmp_path / "turned", verify=False)
    api.run(data.recipe(step), tiny("llama"), tmp_path / "plain", verify=False)
    torch.testing.assert_close(logits(tmp_path / "turned"), logits(tmp_path / "plain"), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([{"pass": "prune_width", "ratio": 0.99}], "cannot be taken from width alone, the most is 0."),
        ([{"pass": "prune_depth", "ratio": 0.9}], "more than blocks can without the last of them going too"),
        ([{"pass": "prune_width", "ratio": 0.2, "score": "cfsp"}], "set heads: false"),
        (
            [{"pass": "rtn", "options": [{"format": "int_group", "bits": 8}]}, {"pass": "prune_width", "ratio": 0.1}],
            "put it before",
        ),
        ([{"pass": "rotate", "online": True}, {"pass": "prune_depth", "ratio": 0.1}], "leave out online: true"),
    ],
)
def test_what_cannot_be_done_is_refused(
    passes: list[dict[str, Any]], said: str, tiny: Callable[..., Path], tmp_path: Path, data: Data
) -> None:
    with pytest.raises(RecipeError, match=said):
        api.run(data.recipe(*passes), tiny("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_blocks_of_another_build_are_refused(family: str, tiny: Callable[..., Path], tmp_path: Path, data: Data) -> None:
    with pytest.raises(RecipeError, match="prune_depth"):
        api.run(data.recipe({"pass": "prune_width", "ratio": 0.2}), tiny(family), tmp_path / "out")


def test_evenly_spaced_blocks_keep_the_first_and_the_last() -> None:
    for blocks in range(3, 40):
        for count in range(1, blocks - 1):
            kept = [i for i, level in enumerate(even(blocks, count)) if level]
            assert len(kept) == blocks - count
            assert (kept[0], kept[-1]) == (0, blocks - 1)
            gaps = [b - a for a, b in itertools.pairwise(kept)]
            assert max(gaps) - min(gaps) <= 1


def test_the_blocks_that_turn_least_go() -> None:
    assert least([0.4, 0.1, 0.3, 0.1], 2) == (1, 0, 1, 0)
