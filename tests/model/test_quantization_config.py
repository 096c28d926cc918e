"""What `quantization_config` may say, and what of it is refused because it would be read wrongly."""

import json
from pathlib import Path

import pytest
import torch

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError, SourceError
from compressor.formats.int_group import IntGroup
from compressor.inspection import inspect_model
from compressor.model import quantization_config
from compressor.model.source import ModelSource
from compressor.output import default_out

INT4 = IntGroup(bits=4, group_size=128)


def compressed_tensors(**changes):
    config = quantization_config.write({"layer": INT4}, ["layer", "lm_head"], [])
    config["config_groups"]["group_0"].update(changes.pop("group", {}))
    config["config_groups"]["group_0"]["weights"].update(changes.pop("weights", {}))
    return {"quantization_config": {**config, **changes}}


def test_what_is_written_is_read_back():
    assert quantization_config.reader(compressed_tensors(), "here")("layer") == INT4


def test_several_formats_go_into_groups_of_named_layers():
    int8 = IntGroup(bits=8, group_size=-1)
    config = {"quantization_config": quantization_config.write({"a": INT4, "b": int8, "c": INT4}, ["a", "b", "c", "d"], [])}
    read = quantization_config.reader(config, "here")
    assert [read(layer) for layer in "abc"] == [INT4, int8, INT4]
    assert config["quantization_config"]["ignore"] == ["d"]


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"actorder": "group"}},
        {"group": {"format": "int-quantized"}},
        {"group": {"input_activations": {"num_bits": 8}}},
        {"weights": {"type": "float"}},
        {"weights": {"strategy": "tensor"}},
        {"quant_method": "gptq"},
    ],
    ids=str,
)
def test_a_scheme_that_would_be_misread_is_refused(changes):
    with pytest.raises(SourceError, match="here: "):
        quantization_config.reader(compressed_tensors(**changes), "here")


def test_a_checkpoint_cannot_name_a_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"quantization_config": {"quant_method": "compressor", "layers": {"layer": {"format": "payload.x"}}}}
    with pytest.raises(SourceError, match="no format named"):
        quantization_config.reader(config, "here")


def test_the_report_and_inspect_agree_on_a_tied_model(tmp_path):
    report = api.quantize(DEMO_MODEL, tmp_path / "out", method="rtn", evaluate=False, device="cpu", verify=False)
    found = inspect_model(tmp_path / "out")
    assert found.model_bits_per_weight == pytest.approx(report.model_bits_per_weight)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_the_result_of_a_linked_model_lies_beside_the_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert default_out(tmp_path / "link", {"unit": INT4}) == tmp_path / "link-int4g128"
    assert default_out(Path("/a/model/"), {"unit": INT4}) == Path("/a/model-int4g128")


def test_another_model_below_the_model_is_not_copied(tmp_path):
    import shutil

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    for name in ("first", "second"):
        api.quantize(tmp_path / "model", tmp_path / "model" / name, method="rtn", evaluate=False, device="cpu", verify=False)
    assert not (tmp_path / "model" / "second" / "first").exists()


def test_a_group_size_that_no_width_allows_says_what_would(tiny):
    recipe = api.quantize_recipe(4, method="rtn", group_size=96)
    with pytest.raises(RecipeError, match=r"every layer here is 128 or 256 wide, a multiple of 128"):
        api.forecast(recipe, tiny("llama"), device="cpu")


def test_a_wrong_regular_expression_is_refused():
    with pytest.raises(RecipeError, match="not a regular expression"):
        api.quantize_recipe(4, ignore=("re:(",))


def test_blocks_that_are_told_more_than_hidden_states_are_refused(tiny, monkeypatch):
    source = ModelSource(tiny("llama"), torch.device("cpu"))
    forward = type(source.model.base_model).forward

    def telling(self, input_ids=None, **kwargs):
        for layer in self.layers:
            call = layer.forward
            layer.forward = lambda hidden, _call=call, **kw: _call(hidden, told=input_ids, **kw)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(source.model.base_model), "forward", telling)
    with pytest.raises(SourceError, match="cannot be streamed"):
        source.arguments((1, 8))


def test_integers_in_place_of_real_weights_are_refused(tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"{name} is stored as torch.int8"):
        ModelSource(tmp_path / "model", torch.device("cpu")).block(0)


def test_parts_that_would_not_be_read_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    api.quantize(DEMO_MODEL, tmp_path / "out", method="rtn", evaluate=False, device="cpu", verify=False)
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(256, dtype=torch.int32)
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="weight_g_idx is not part of int4g128"):
        ModelSource(tmp_path / "out", torch.device("cpu")).block(0)
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
