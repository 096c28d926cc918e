"""Models without some of their attentions and MLPs, against the same models with these writing zeros."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import change_config, some_tokens, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import compressor
from compressor import api
from compressor.errors import RecipeError, SourceError
from compressor.model.block import Trial
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import NoAttention, NoMLP
from compressor.passes.prune.depth import Depth
from compressor.pipeline.plan_file import read_plan
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
FAMILIES = ("llama", "llama_biased", "qwen3", "gemma2", "gemma3", "phi3", "olmo2")
GONE = ("model.layers.0.self_attn", "model.layers.1.mlp")
WRITERS = {"self_attn": "o_proj", "mlp": "down_proj"}
ALIKE = {"rtol": 0, "atol": 2e-5}


def silenced(path: Path, gone: Sequence[str]) -> PreTrainedModel:
    """transformers' own model whose sub-layers add zeros."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name in gone:
        writer = model.get_submodule(f"{name}.{WRITERS[name.rpartition('.')[2]]}")
        for parameter in writer.parameters():
            parameter.data.zero_()
    return model


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


def written(model: Path, out: Path, gone: Sequence[str], *passes: dict[str, object]) -> Path:
    """A model without them, through a plan."""
    plan = out.with_name("plan.yaml")
    options = [{"format": "int_group", "bits": 8, "group_size": 32}]
    source = ModelSource(model, CPU)
    units = [f"{block.prefix}.{unit}" for block in source.blocks() for unit in _units(block.layers)]
    kept = [unit for unit in units if not unit.startswith(tuple(gone))]
    lines = [f"{unit}: {{format: int_group, bits: 8, group_size: 32}}" for unit in kept]
    plan.write_text("\n".join([*lines, *(f"{name}: {{keep: 0, of: 1}}" for name in gone)]) + "\n")
    api.run(make_recipe({"passes": [{"pass": "rtn", "options": options}], "evaluation": None}), model, out, plan=plan)
    return out


def _units(layers: object) -> Sequence[str]:
    from compressor.model.architecture import fused_groups

    return list(fused_groups(layers))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_them_computes_what_one_does_in_which_they_write_zeros(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = written(tiny(family), tmp_path / "out", GONE)
    source, model = ModelSource(out, CPU), compressor.load(out, dtype=torch.float32, dense=True)
    assert source.absent == set(GONE)
    assert not any(name.startswith(GONE) for name in tensors(out))
    expected = silenced(tiny(family), GONE)
    for name, parameter in model.state_dict().items():  # of the rounded weights
        expected.state_dict()[name].copy_(parameter)
    torch.testing.assert_close(logits(model, some_tokens()), logits(expected, some_tokens()), **ALIKE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_it_generates_with_a_cache_what_it_does_without(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = compressor.load(written(tiny(family), tmp_path / "out", GONE), kernel="reference", dtype=torch.float32)
    some = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    start = some_tokens()[:1, :8]
    with_cache, without = (model.generate(start, use_cache=cached, **some) for cached in (True, False))
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), **ALIKE)


def test_transformers_loads_it_once_the_package_is_imported(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = written(tiny("llama"), tmp_path / "out", GONE)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn, NoAttention)
    assert isinstance(model.model.layers[1].mlp, NoMLP)
    exact = compressor.load(out, dtype=torch.float32)
    torch.testing.assert_close(logits(model, some_tokens()), logits(exact, some_tokens()), **ALIKE)
    model.save_pretrained(tmp_path / "again")
    again = compressor.load(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(again, some_tokens()), logits(exact, some_tokens()), **ALIKE)


@pytest.mark.parametrize("gone", [("model.layers.0.self_attn", "model.layers.0.mlp"), ("model.layers.1.mlp",)])
def test_trying_is_what_is_written(gone: Sequence[str], tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), CPU)
    x = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(0))
    index = int(gone[0].split(".")[2])
    block = source.block(index)
    tried = block.trying(*(Trial({}, {}, skips=(name.rpartition(".")[2],)) for name in gone))(x)
    before = block.forward(x)
    for name in gone:
        leaf = name.rpartition(".")[2]
        block.weight(f"{leaf}.{WRITERS[leaf]}").zero_()
    torch.testing.assert_close(tried, block.forward(x), **ALIKE)
    assert not torch.equal(tried, before)


def test_the_weights_of_what_is_skipped_are_not_asked_for(tiny: Callable[..., Path]) -> None:
    block = ModelSource(tiny("llama"), CPU).block(0)
    x, nothing = torch.randn(1, 4, 128), torch.zeros(1)
    trial = Trial({"mlp.down_proj": nothing}, {}, skips=("mlp",))
    torch.testing.assert_close(block.trying(trial)(x), block.trying(Trial({}, {}, skips=("mlp",)))(x))


def test_blocks_of_another_build_cannot_do_without(tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="whole blocks may"):
        _ = Depth(ModelSource(tiny("gpt2"), CPU), "sublayers").units


@pytest.mark.parametrize("absent", [["model.layers.0.nothing"], ["model.layers.7.mlp"], "mlp", [1]])
def test_a_config_that_names_nonsense_is_refused(absent: object, tiny_copy: Callable[..., Path]) -> None:
    path = tiny_copy("llama")
    change_config(path, quantization_config={"quant_method": "compressor", "version": 1, "layers": {}, "absent": absent})
    with pytest.raises(SourceError, match=r"left out|no list of names"):
        ModelSource(path, CPU)


@pytest.mark.parametrize("entry", ["{keep: 1, of: 1}", "{keep: x, of: [1]}", "{keep: 5, of: 9}"])
def test_a_plan_that_keeps_something_else_is_refused(entry: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"model.layers.0.mlp: {entry}\n")
    with pytest.raises(RecipeError, match="an attention or MLP that goes has keep: 0, of: 1"):
        read_plan(tmp_path / "plan.yaml")


def test_a_model_without_some_can_be_quantized_and_its_plan_applied_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    gone = ("model.layers.0.self_attn", "model.layers.0.mlp")
    calibration = {"source": "builtin", "samples": 2, "seq_len": 32}
    rounding = {"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 32}]}
    recipe = make_recipe({"passes": [rounding], "evaluation": None, "calibration": calibration})
    source = ModelSource(tiny("llama"), CPU)
    dense = tmp_path / "dense"
    plan = tmp_path / "gone.yaml"
    units = [f"model.layers.1.{unit}" for unit in _units(source.block(1, load=False).layers)]
    lines = [f"{name}: {{keep: 0, of: 1}}" for name in gone]
    lines += [f"{unit}: {{format: int_group, bits: 8, group_size: 32}}" for unit in units]
    plan.write_text("\n".join(lines))
    assert api.forecast(recipe, tiny("llama"), plan=plan).size_bytes > 0
    sub = make_recipe(
        {
            "passes": [{"pass": "prune_depth", "ratio": 0.1, "parts": "sublayers", "by": "even"}],
            "evaluation": None,
            "calibration": calibration,
        }
    )
    api.run(sub, tiny("llama"), dense, verify=False)
    assert ModelSource(dense, CPU).absent
    api.run(recipe, dense, tmp_path / "packed")
    api.run(recipe, dense, tmp_path / "again", plan=tmp_path / "packed" / "plan.yaml")
    one, two = tensors(tmp_path / "packed"), tensors(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_that_names_nonsense_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has model.layers.9.mlp go, which is no attention or MLP"):
        written(tiny("llama"), tmp_path / "out", ["model.layers.9.mlp"])
