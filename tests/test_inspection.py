"""What `inspect` says is in a directory, and what can load it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import change_config, tensors

from compressor import api
from compressor.cli import main
from compressor.recipe.build import quantize_recipe
from compressor.recipe.schema import make_recipe
from compressor.report.compatibility import Runtime
from compressor.report.inspect import Inspection, inspect_model

EVERYWHERE = {"compressor": True, "transformers": True, "vLLM": True, "SGLang": True, "llama.cpp": False}


@pytest.fixture
def rounded(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`rounded(**options)`: what rounding makes of a small Llama."""

    def make(bits: int = 4, group_size: int = 64, symmetric: bool = True) -> Path:
        recipe = quantize_recipe(bits, method="rtn", group_size=group_size, symmetric=symmetric, evaluate=False)
        api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        return tmp_path / "out"

    return make


def loading(found: Inspection) -> dict[str, bool]:
    return {runtime.name: runtime.loads for runtime in found.runtimes}


def runtime(found: Inspection, name: str) -> Runtime:
    return next(runtime for runtime in found.runtimes if runtime.name == name)


def test_every_stored_tensor_is_listed_once_and_the_shares_are_of_all_bytes(rounded: Callable[..., Path]) -> None:
    path = rounded()
    found, stored = inspect_model(path), tensors(path)
    parts = [part for tensor in found.tensors for part in tensor.parts]
    assert sorted(part.name for part in parts) == sorted(stored)
    assert {part.name: part.shape for part in parts} == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert found.size_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert sum(map(found.share, found.tensors)) == pytest.approx(1)
    assert sum(map(found.share, found.kinds)) == pytest.approx(1)


def test_the_bits_of_a_packed_layer_count_scales_and_shape(rounded: Callable[..., Path]) -> None:
    found = inspect_model(rounded(bits=4, group_size=64))
    layer = next(tensor for tensor in found.tensors if tensor.name == "model.layers.1.mlp.up_proj.weight")
    assert (layer.kind, layer.weights) == ("packed int4g64", 256 * 128)
    assert layer.bits == 4 + 16 / 64 + 2 * 64 / (256 * 128)
    assert {part.name.rpartition(".")[2]: part.dtype for part in layer.parts} == {
        "weight_packed": "I32",
        "weight_scale": "BF16",
        "weight_shape": "I64",
    }


def test_a_vision_tower_counts_as_outside_the_blocks(tiny: Callable[..., Path]) -> None:
    found = inspect_model(tiny("gemma3_vision"))
    assert next(kind.weights for kind in found.kinds if kind.name == "outside the blocks") > 0
    embedding = next(tensor for tensor in found.tensors if tensor.name.endswith("embed_tokens.weight"))
    assert embedding.kind == "embedding and head"


class TestRuntimes:
    def test_a_dense_model_loads_everywhere_but_in_a_reader_of_gguf(self, tiny: Callable[..., Path]) -> None:
        found = inspect_model(tiny("llama"))
        assert loading(found) == EVERYWHERE
        assert "convert_hf_to_gguf.py" in runtime(found, "llama.cpp").reason

    @pytest.mark.parametrize("bits", [4, 8])
    def test_the_usual_widths_load_everywhere(self, bits: int, rounded: Callable[..., Path]) -> None:
        assert loading(inspect_model(rounded(bits))) == EVERYWHERE

    def test_what_was_only_read_says_so(self, tiny: Callable[..., Path]) -> None:
        tried = {runtime.name for runtime in inspect_model(tiny("llama")).runtimes if runtime.tried}
        assert tried == {"compressor", "transformers"}

    def test_three_bits_need_recent_software(self, rounded: Callable[..., Path]) -> None:
        found = inspect_model(rounded(bits=3))
        assert loading(found) == {**EVERYWHERE, "SGLang": False}
        assert "0.18 or newer" in runtime(found, "transformers").reason
        assert "Humming" in runtime(found, "vLLM").reason
        assert "4, 8 bits, this model has layers of 3" in runtime(found, "SGLang").reason

    def test_zero_points_are_for_our_own_loader(self, rounded: Callable[..., Path]) -> None:
        found = inspect_model(rounded(symmetric=False))
        assert [name for name, loads in loading(found).items() if loads] == ["compressor"]
        assert "random weights" in runtime(found, "transformers").reason

    def test_a_group_size_that_no_kernel_takes(self, rounded: Callable[..., Path]) -> None:
        found = inspect_model(rounded(group_size=16))
        assert loading(found) == {**EVERYWHERE, "vLLM": False, "SGLang": False}
        assert "group_size 16 is none of -1, 32, 64, 128" in runtime(found, "vLLM").reason

    def test_fused_layers_that_are_stored_differently(self, tiny: Callable[..., Path], tmp_path: Path) -> None:
        option = {"format": "int_group", "bits": 4, "group_size": 64}
        recipe = make_recipe(
            {"passes": [{"pass": "rtn", "options": [option], "ignore": ["lm_head", "k_proj"]}], "evaluation": None},
            (),
            "options",
        )
        api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        found = inspect_model(tmp_path / "out")
        assert loading(found) == {**EVERYWHERE, "vLLM": False, "SGLang": False}
        assert "model.layers.0.self_attn.qkv_proj: " in runtime(found, "vLLM").reason
        assert "dense and int4g64" in runtime(found, "vLLM").reason

    def test_an_architecture_is_named(self, tiny_copy: Callable[..., Path]) -> None:
        path = tiny_copy("llama")
        change_config(path, architectures=["SomethingForCausalLM"])
        assert "SomethingForCausalLM" in runtime(inspect_model(path), "vLLM").reason


def test_the_command_lists_runtimes_and_tensors(
    rounded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", "inspect", str(rounded()), "--tensors"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("model.layers.1.mlp.up_proj.weight: weight_packed I32 [256, 16], weight_scale") for line in lines
    )
    assert [line.split()[:2] for line in lines[-5:]] == [
        ["compressor", "loads"],
        ["transformers", "loads"],
        ["vLLM", "loads"],
        ["SGLang", "loads"],
        ["llama.cpp", "does"],
    ]
