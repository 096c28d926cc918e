"""transformers' own `from_pretrained` keeps packed weights packed once this package is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import exact, some_tokens, tensors
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from compressor import api
from compressor.runtime.hf_quantizer import stock
from compressor.runtime.packed_linear import PackedLinear, PackedWeight

Tiny = Callable[..., Path]


RECIPES = {
    "compressed-tensors": {"format": "int_group", "bits": 4},
    "gptq": {"format": "gptq_int", "bits": 4},
    "compressor": {"format": "int_group", "bits": 4, "symmetric": False},
}


@pytest.fixture(scope="module", params=RECIPES)
def packed(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits, in two layouts that stock transformers knows, and in our own."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(json.dumps({"passes": [{"pass": "rtn", "options": [RECIPES[request.param]]}], "evaluation": None}))
    out = tmp_path_factory.mktemp("packed") / "int4"
    assert api.run(recipe, tiny("llama_tied"), out, verify=False).layout == request.param
    return out


def loaded(path: Path, **options: object) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    return model


def on_reference(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.kernel = "reference"
    return model


def test_its_linear_layers_are_packed_and_fused(packed: Path) -> None:
    layers = [m for m in loaded(packed).modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 2 * 7
    assert sorted(layer.packed.takers for layer in layers) == sorted(2 * [1, 1, 2, 2, 3, 3, 3])


@torch.no_grad()
def test_it_computes_what_our_own_loader_does(packed: Path) -> None:
    assert torch.equal(on_reference(loaded(packed))(some_tokens()).logits, exact(packed)(some_tokens()).logits)


def test_it_saves_as_it_was(packed: Path, tmp_path: Path) -> None:
    loaded(packed).save_pretrained(tmp_path)
    before, after = tensors(packed), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    config, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, packed))
    assert config["quantization_config"] == original["quantization_config"]


@torch.no_grad()
def test_what_was_saved_loads_again(packed: Path, tmp_path: Path) -> None:
    loaded(packed).save_pretrained(tmp_path)
    assert torch.equal(exact(tmp_path)(some_tokens()).logits, exact(packed)(some_tokens()).logits)


@pytest.fixture(scope="module")
def known(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that stock transformers knows."""
    out = tmp_path_factory.mktemp("known") / "int4"
    api.quantize(tiny("llama"), out, bits=4, method="rtn", evaluate=False, verify=False)
    return out


class TestLeavingItToTransformers:
    def test_while_asked_to(self, known: Path) -> None:
        with stock():
            model = loaded(known)
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        assert any(isinstance(module, PackedLinear) for module in loaded(known).modules())

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_where_a_dense_model_is_asked_for(self, known: Path) -> None:
        model = loaded(known, quantization_config=CompressedTensorsConfig(dequantize=True))
        assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear

    def test_what_we_cannot_read(self, known: Path) -> None:
        """A scheme of floats goes to transformers, whatever it then makes of it."""
        from transformers.quantizers.auto import AutoHfQuantizer

        from compressor.runtime.hf_quantizer import PackedQuantizer

        config = json.loads((known / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_0"]["weights"] |= {"type": "float", "num_bits": 8}
        config["config_groups"]["group_0"]["format"] = "float-quantized"
        config["format"] = "float-quantized"
        assert not isinstance(AutoHfQuantizer.from_config(config, pre_quantized=True), PackedQuantizer)


@pytest.mark.parametrize("first", ["compressor", "transformers"])
def test_the_order_of_the_imports_makes_no_difference(first: str) -> None:
    second = {"compressor": "transformers", "transformers": "compressor"}[first]
    code = f"""
import {first}, {second}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
print("compressor" in known, known["gptq"].__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "compressor.runtime.hf_quantizer"]
