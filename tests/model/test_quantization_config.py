"""What `quantization_config` may say, and what of it is refused because it would be read wrongly."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError, SourceError
from compressor.formats.gptq_int import GptqInt
from compressor.formats.int_group import IntGroup
from compressor.model.hf_config import quantization_config
from compressor.model.source import ModelSource
from compressor.pipeline.write_model import default_out
from compressor.recipe.build import quantize_recipe
from compressor.report.inspect import inspect_model

INT4 = IntGroup(bits=4, group_size=128)


def compressed_tensors(**changes):
    config = quantization_config.write({"layer": INT4}, ["layer", "lm_head"], [])
    config["config_groups"]["group_0"].update(changes.pop("group", {}))
    config["config_groups"]["group_0"]["weights"].update(changes.pop("weights", {}))
    return {"quantization_config": {**config, **changes}}


def read(config, layer="layer", stored=()):
    return quantization_config.reader({"quantization_config": config}, "here")(layer, set(stored))


def test_what_is_written_is_read_back():
    assert read(compressed_tensors()["quantization_config"]) == INT4


@pytest.mark.parametrize(
    "config",
    [
        {**compressed_tensors(group={"targets": [r"re:([\w.]+)+!"]})["quantization_config"]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"-:([\w.]+)+!": {}}},
    ],
)
def test_expressions_with_exponentially_many_ways_are_matched_at_once(config):
    started = time.process_time()
    read_layer = quantization_config.reader({"quantization_config": config}, "here")
    for number in range(100):
        with contextlib.suppress(SourceError):  # no layer is meant
            read_layer(f"model.layers.{number}.self_attn.q_proj", set())
    assert time.process_time() - started < 2


@pytest.mark.parametrize("method", [{}, [], 5, "x" * 10**5, "a\nb", None])
def test_a_method_that_is_no_known_name_is_refused(method):
    with pytest.raises(SourceError, match=r"quantized with method .* cannot be read; use the original model"):
        read({"quant_method": method})


def test_long_values_are_elided_and_the_remedy_stays():
    config = compressed_tensors(weights={"num_bits": "x" * 10**5})["quantization_config"]
    with pytest.raises(SourceError, match=r"^here: .*x…x.*use the original model$") as refused:
        read(config)
    assert len(str(refused.value)) <= 300


def test_several_formats_go_into_groups_of_named_layers():
    int8 = IntGroup(bits=8, group_size=-1)
    config = quantization_config.write({"a": INT4, "b": int8, "c": INT4}, ["a", "b", "c", "d"], [])
    assert [read(config, layer) for layer in "abc"] == [INT4, int8, INT4]
    assert config["ignore"] == ["d"]
    assert config["format"] == "pack-quantized"


def test_layers_with_a_byte_for_each_code_are_a_group_of_their_own_layout():
    int8 = IntGroup(bits=8, group_size=-1, packed=False)
    config = quantization_config.write({"a": INT4, "b": int8}, ["a", "b"], [])
    assert [read(config, layer) for layer in "ab"] == [INT4, int8]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]


def test_a_name_goes_before_an_expression_and_that_before_all_layers():
    def group(bits, *targets):
        weights = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": True}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    groups = {"0": group(2, "Linear"), "1": group(3, "re:.*down"), "2": group(4, "b.down")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert [read(config, layer).bits for layer in ("a.up", "a.down", "b.down")] == [2, 3, 4]


def test_an_activation_order_that_leaves_nothing_stored_is_read():
    for order in ("static", "weight", None):
        assert read(compressed_tensors(weights={"actorder": order})["quantization_config"]) == INT4


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"actorder": "group"}},
        {"group": {"format": "float-quantized"}},
        {"group": {"format": "int-quantized", "input_activations": {"num_bits": 8}}},
        {"group": {"input_activations": {"num_bits": 8}}},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"weights": {"type": "float"}},
        {"weights": {"strategy": "tensor"}},
        {"quant_method": "awq"},
        {"config_groups": {"W4A16": ["Linear"]}},
    ],
    ids=str,
)
def test_a_scheme_that_would_be_misread_is_refused(changes):
    with pytest.raises(SourceError, match="here: "):
        quantization_config.reader(compressed_tensors(**changes), "here")


def gptq(**changes):
    common = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return {**common, "checkpoint_format": "gptq", **changes}


def auto_round(**changes):
    common = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
    return {**common, "packing_format": "auto_round:auto_gptq", **changes}


INDEXED = {"qweight", "qzeros", "scales", "g_idx"}
PLAIN = INDEXED - {"g_idx"}


class TestGptq:
    @pytest.mark.parametrize(
        ("changes", "stored", "fmt"),
        [
            ({}, INDEXED, GptqInt()),
            ({}, PLAIN, GptqInt(g_idx=False)),
            ({"bits": 3, "group_size": -1}, INDEXED, GptqInt(bits=3, group_size=-1)),
            ({"sym": False, "checkpoint_format": "gptq_v2"}, INDEXED, GptqInt(symmetric=False, checkpoint_format="gptq_v2")),
            ({"desc_act": True}, INDEXED, GptqInt()),
            ({"checkpoint_format": None, "format": "gptq_v2"}, INDEXED, GptqInt(checkpoint_format="gptq_v2")),
        ],
    )
    def test_a_config_and_the_parts_there_are_give_the_format(self, changes, stored, fmt):
        assert read(gptq(**changes), stored=stored) == fmt

    def test_the_first_matching_override_counts(self):
        dynamic = {"-:.*o_proj": {}, r"+:model\.layers\.1\.": {"bits": 8}, ".*down": {"bits": 3, "group_size": 32}}
        config = gptq(dynamic=dynamic)
        assert read(config, "model.layers.0.up", INDEXED) == GptqInt()
        assert read(config, "model.layers.1.down", INDEXED) == GptqInt(bits=8)
        assert read(config, "model.layers.10.down", INDEXED) == GptqInt(bits=3, group_size=32)
        with pytest.raises(
            SourceError, match=r"here: layer model\.layers\.1\.o_proj is packed but quantization_config does not say"
        ):
            read(config, "model.layers.1.o_proj", INDEXED)

    def test_an_order_that_is_not_stored_is_refused(self):
        with pytest.raises(SourceError, match="here: layer up was quantized with desc_act but has no g_idx; "):
            read(gptq(desc_act=True), "up", PLAIN)

    @pytest.mark.parametrize(
        "changes",
        [
            {"bits": 5},
            {"bits": None},
            {"group_size": 0},
            {"checkpoint_format": "gptq_p"},
            {"checkpoint_format": "marlin"},
            {"pack_dtype": "int16"},
            {"adapter": {"rank": 8}},
            {"meta": {"rotation": "hadamard"}},
            {"dynamic": {"+:(": {"bits": 8}}},
            {"dynamic": ["o_proj"]},
        ],
        ids=str,
    )
    def test_what_would_be_misread_is_refused(self, changes):
        with pytest.raises(SourceError, match="here: "):
            read(gptq(**changes), stored=INDEXED)

    def test_what_is_written_is_read_back(self):
        fmt = GptqInt(bits=8, group_size=32, symmetric=False, checkpoint_format="gptq_v2")
        formats = {"model.layers.0.up": fmt, "model.layers.0.down": fmt}
        config = quantization_config.write(formats, [*formats, "model.layers.0.o", "lm_head"], [])
        assert config["quant_method"] == "gptq"
        assert [read(config, layer, INDEXED) for layer in formats] == [fmt, fmt]
        with pytest.raises(SourceError, match="does not say how"):
            read(config, "model.layers.0.o", INDEXED)

    @pytest.mark.parametrize(
        ("formats", "transposed"),
        [
            ({"a": GptqInt(), "b": INT4}, []),
            ({"a": GptqInt(), "b": GptqInt(bits=8)}, []),
            ({"a": GptqInt()}, ["a"]),
            ({"a": GptqInt(symmetric=False)}, []),  # which others refuse, or read differently
        ],
    )
    def test_what_that_layout_cannot_say_is_written_as_ours(self, formats, transposed):
        config = quantization_config.write(formats, ["a", "b"], transposed)
        assert config["quant_method"] == "compressor"
        assert {layer: read(config, layer, INDEXED) for layer in formats} == formats


class TestAutoRound:
    @pytest.mark.parametrize(
        ("changes", "stored", "fmt"),
        [
            ({}, PLAIN, GptqInt(g_idx=False)),
            ({"packing_format": "auto_round:gptqmodel"}, INDEXED, GptqInt(checkpoint_format="gptq_v2")),
            ({"bits": 2, "group_size": 32}, PLAIN, GptqInt(bits=2, group_size=32, g_idx=False)),
        ],
    )
    def test_a_config_and_the_parts_there_are_give_the_format(self, changes, stored, fmt):
        assert read(auto_round(**changes), stored=stored) == fmt

    def test_a_name_goes_before_an_expression(self):
        extra = {".*down.*": {"bits": 8}, "model.layers.1.down": {"bits": 3}, "model.layers.0.o": {"bits": 16}}
        config = auto_round(extra_config=extra)
        found = {layer: read(config, f"model.layers.{layer}", PLAIN).bits for layer in ("0.up", "0.down", "1.down")}
        assert found == {"0.up": 4, "0.down": 8, "1.down": 3}
        with pytest.raises(SourceError, match="does not say how"):
            read(config, "model.layers.0.o", PLAIN)

    @pytest.mark.parametrize(
        "changes",
        [
            {"packing_format": "auto_round:auto_awq"},
            {"packing_format": None},
            {"data_type": "mx_fp"},
            {"act_bits": 8},
            {"rotation_config": {"kind": "hadamard"}},
            {"bits": 5},
            {"extra_config": {"layer": {"act_bits": 8}}},
        ],
        ids=str,
    )
    def test_what_would_be_misread_is_refused(self, changes):
        with pytest.raises(SourceError, match="here: "):
            read(auto_round(**changes), stored=PLAIN)


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
    assert default_out(tmp_path / "link", (), {"unit": INT4}) == tmp_path / "link-int4g128"
    assert default_out(Path("/a/model/"), (), {"unit": INT4}) == Path("/a/model-int4g128")


def test_another_model_below_the_model_is_not_copied(tmp_path):
    import shutil

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    for name in ("first", "second"):
        api.quantize(tmp_path / "model", tmp_path / "model" / name, method="rtn", evaluate=False, device="cpu", verify=False)
    assert not (tmp_path / "model" / "second" / "first").exists()


def test_a_group_size_that_no_width_allows_says_what_would(tiny):
    recipe = quantize_recipe(4, method="rtn", group_size=96)
    with pytest.raises(RecipeError, match=r"every layer here is 128 or 256 wide, a multiple of 128"):
        api.forecast(recipe, tiny("llama"), device="cpu")


def test_a_wrong_regular_expression_is_refused():
    with pytest.raises(RecipeError, match="not a regular expression"):
        quantize_recipe(4, ignore=("re:(",))


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
    with pytest.raises(SourceError, match="weight_g_idx is not part of a layer"):
        ModelSource(tmp_path / "out", torch.device("cpu")).block(0)
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
