"""Whole checkpoints in the layouts of other programs: built here by the book, with numpy, and read, inspected and served."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import change_config, change_tensors, exact, some_tokens, stock_logits, tensors
from torch import Tensor

from compressor import api
from compressor.cli import main
from compressor.errors import CompressorError, SourceError
from compressor.evaluation.verify.verify import verify
from compressor.formats.gptq_int import GptqInt
from compressor.model.checkpoint import Checkpoint
from compressor.model.packed_layers import PackedLayers
from compressor.model.source import ModelSource
from compressor.pipeline import blocks
from compressor.recipe.schema import make_recipe
from compressor.report.inspect import inspect_model

CPU = torch.device("cpu")
Tiny = Callable[..., Path]
UP, DOWN, OUT = (f"model.layers.1.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"))


@dataclass(frozen=True)
class Kind:
    """How the layers of a GPTQ checkpoint are stored."""

    bits: int = 4
    group_size: int = 32
    minus_one: bool = True
    act_order: bool = False
    g_idx: bool = True


def pack(numbers: np.ndarray, bits: int) -> Tensor:
    """Numbers [n, columns] as words along the first axis, by way of single bits."""
    stream = (numbers[:, None, :] >> np.arange(bits)[None, :, None] & 1).reshape(-1, numbers.shape[1])
    octets = np.packbits(stream.astype(np.uint8), axis=0, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(octets.T).view("<i4").T.copy())


def store(kind: Kind, shape: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random layer [O, I]: its parts, and the weight they stand for."""
    rows, columns = shape
    random, size = np.random.default_rng(seed), columns if kind.group_size == -1 else kind.group_size
    codes, count = random.integers(2**kind.bits, size=(columns, rows)), columns // size
    zeros = random.integers(1, 2**kind.bits, size=(count, rows))
    scales = (random.uniform(0.5, 1.5, size=(count, rows)) / 2**kind.bits / columns**0.5).astype(np.float16)
    g_idx = np.arange(columns) // size
    if kind.act_order:
        random.shuffle(g_idx)
    weight = (codes - zeros[g_idx]) * scales.astype(np.float64)[g_idx]
    parts = {
        "qweight": pack(codes, kind.bits),
        "qzeros": pack((zeros - kind.minus_one).T, kind.bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
    }
    if kind.g_idx:
        parts["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return parts, torch.from_numpy(np.ascontiguousarray(weight.T)).float()


@dataclass(frozen=True)
class Made:
    """A GPTQ checkpoint and the dense model that it stands for."""

    path: Path
    dense: Path


@pytest.fixture
def make(tiny_copy: Tiny, tmp_path: Path) -> Callable[..., Made]:
    """`make(kind, others, family, **config)`: a checkpoint with layers stored as `kind`, or as `others` have it by name."""

    def build(kind: Kind, others: dict[str, Kind | None] | None = None, family: str = "llama", **config: Any) -> Made:
        dense, path = tiny_copy(family), tmp_path / "gptq"
        path.mkdir()
        stored = weights = tensors(dense)
        for seed, name in enumerate(sorted(weights)):
            layer = name.removesuffix(".weight")
            this = {**dict.fromkeys([layer], kind), **(others or {})}[layer]
            if not layer.endswith("_proj") or this is None:
                continue
            parts, weight = store(this, tuple(weights[name].shape), seed)
            stored = {n: t for n, t in stored.items() if n != name} | {f"{layer}.{n}": t for n, t in parts.items()}
            weights = weights | {name: weight}
        save_file(weights, dense / "model.safetensors", {"format": "pt"})
        save_file(stored, path / "model.safetensors", {"format": "pt"})
        for file in dense.glob("*.json"):
            (path / file.name).write_bytes(file.read_bytes())
        common = {"quant_method": "gptq", "bits": kind.bits, "group_size": kind.group_size, "sym": False}
        named = {"desc_act": kind.act_order, "checkpoint_format": "gptq" if kind.minus_one else "gptq_v2"}
        change_config(path, quantization_config={**common, **named, **config})
        return Made(path, dense)

    return build


KINDS = {
    "4 bits": Kind(),
    "3 bits": Kind(bits=3),
    "2 bits, v2": Kind(bits=2, minus_one=False),
    "8 bits, whole rows": Kind(bits=8, group_size=-1),
    "act order": Kind(act_order=True, minus_one=False),
    "act order, 3 bits": Kind(bits=3, act_order=True),
    "no g_idx": Kind(g_idx=False),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_weight_is_what_the_book_says(kind: Kind, make: Callable[..., Made]) -> None:
    made = make(kind)
    source, expected = ModelSource(made.path, CPU), tensors(made.dense)
    assert len(source.packed()) == 14
    for layer in source.packed():
        assert torch.equal(source.read(f"{layer}.weight"), expected[f"{layer}.weight"]), layer


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_layer_is_stored_again_byte_for_byte(kind: Kind, make: Callable[..., Made]) -> None:
    source = ModelSource(make(kind).path, CPU)
    for layer in source.packed():
        packed = source.read_packed(layer)
        again = packed.format.stored(packed.format.codes(packed), packed.shape)
        assert again.parts.keys() == packed.parts.keys()
        assert all(torch.equal(again.parts[name], part) for name, part in packed.parts.items()), layer


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2"])
def test_a_loaded_model_computes_what_the_dense_one_does(family: str, make: Callable[..., Made]) -> None:
    made = make(Kind(act_order=True), family=family)
    ours = exact(made.path)(some_tokens()).logits
    torch.testing.assert_close(ours, stock_logits(made.dense, some_tokens()), rtol=1e-4, atol=1e-4)


def test_overrides_reach_their_layers(make: Callable[..., Made]) -> None:
    others = {UP: Kind(bits=8, group_size=64), DOWN: Kind(bits=3, group_size=-1), OUT: None}
    dynamic = {r"-:.*\.1\..*o_proj": {}, r"+:.*\.1\.mlp\.up": {"bits": 8, "group_size": 64}}
    made = make(Kind(), others, dynamic={**dynamic, r".*\.1\.mlp\.down": {"bits": 3, "group_size": -1}})
    source, expected = ModelSource(made.path, CPU), tensors(made.dense)
    labels = {layer: fmt.label for layer, fmt in source.packed().items()}
    assert (labels[UP], labels[DOWN], labels.get(OUT)) == ("gptq8ag64", "gptq3a", None)
    assert all(torch.equal(source.read(f"{layer}.weight"), expected[f"{layer}.weight"]) for layer in (UP, DOWN, OUT))


def test_an_auto_round_checkpoint_is_read(make: Callable[..., Made]) -> None:
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    made = make(Kind(g_idx=False), {DOWN: Kind(bits=8, g_idx=False)}, **config, extra_config={".*1.mlp.down.*": {"bits": 8}})
    source, expected = ModelSource(made.path, CPU), tensors(made.dense)
    assert source.packed()[DOWN] == GptqInt(bits=8, group_size=32, symmetric=False, g_idx=False)
    assert all(torch.equal(source.read(f"{layer}.weight"), expected[f"{layer}.weight"]) for layer in source.packed())


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        exact(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWhatDoesNotFit:
    def test_a_part_that_is_missing_is_named(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content.pop(f"{DOWN}.qweight"))
        assert f"{DOWN}.qweight is missing" in refusal(path)

    def test_a_part_of_another_layout_is_named(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content.update({f"{DOWN}.input_scale": torch.ones(1)}))
        assert f"{DOWN}.input_scale is not part of gptq4ag32" in refusal(path)

    def test_a_dense_weight_beside_the_packed_one_is_refused(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content.update({f"{DOWN}.weight": torch.ones(128, 256)}))
        assert f"{DOWN}.weight is not part of gptq4ag32" in refusal(path)

    def test_another_width_than_the_config_has(self, make: Callable[..., Made]) -> None:
        path = make(Kind(), {DOWN: Kind(bits=8)}).path
        assert f"{DOWN}.qweight has shape [64, 128] where gptq4ag32 of a [128, 256] weight needs [32, 128]" in refusal(path)

    def test_another_dtype_than_the_layout_has(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content.update({f"{DOWN}.qweight": content[f"{DOWN}.qweight"].long()}))
        assert f"{DOWN}.qweight is stored as torch.int64 where gptq4ag32 needs torch.int32" in refusal(path)

    def test_group_sizes_that_do_not_divide(self, make: Callable[..., Made]) -> None:
        made = make(Kind())
        config = json.loads((made.path / "config.json").read_text())["quantization_config"]
        change_config(made.path, quantization_config={**config, "group_size": 96})
        assert "cannot be packed as config.json has it: in_features" in refusal(made.path)

    def test_uneven_groups(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content[f"{DOWN}.g_idx"][:3].fill_(5))
        assert "gptq4ag32: g_idx does not put 32 of 256 input channels into each group" in refusal(path)

    def test_an_order_that_was_lost(self, make: Callable[..., Made]) -> None:
        path = make(Kind(act_order=True)).path
        change_tensors(path, lambda content: content.pop(f"{DOWN}.g_idx"))
        assert f"layer {DOWN} was quantized with desc_act but has no g_idx" in refusal(path)

    def test_a_bias_where_the_model_has_none(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        change_tensors(path, lambda content: content.update({f"{DOWN}.bias": torch.ones(128)}))
        assert f"{DOWN}.bias is a bias that config.json denies" in refusal(path)

    def test_a_bias_of_zeros_changes_nothing(self, make: Callable[..., Made]) -> None:
        path = make(Kind()).path
        before = exact(path)(some_tokens()).logits
        change_tensors(path, lambda content: content.update({f"{DOWN}.bias": torch.zeros(128)}))
        assert torch.equal(exact(path)(some_tokens()).logits, before)

    def test_quantized_activations(self, tiny: Tiny, tmp_path: Path) -> None:
        recipe = make_recipe(rounding(bits=8, group_size=-1, packed=False))
        api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False, "strategy": "tensor"}
        change_config(tmp_path / "out", quantization_config=config)
        assert "activations are quantized as 8 int tensor static, which is not computed" in refusal(tmp_path / "out")


def test_names_of_parts_are_no_parts_in_a_dense_model(tiny_copy: Tiny) -> None:
    """A lone `scales` is a parameter like any other."""
    path = tiny_copy("llama")
    change_tensors(path, lambda content: content.update({"model.layers.0.mlp.scales": torch.ones(2)}))
    assert "model.layers.0.mlp.weight" not in PackedLayers(path, {}, Checkpoint(path))


class TestCommands:
    def test_inspect_counts_all_parts_and_says_what_loads_it(self, make: Callable[..., Made]) -> None:
        found = inspect_model(make(Kind()).path)
        layer = next(tensor for tensor in found.tensors if tensor.name == f"{DOWN}.weight")
        assert layer.kind == "packed gptq4ag32"
        assert layer.bits == 4 + (4 + 16) / 32 + 32 / 128
        assert {part.name.rpartition(".")[2] for part in layer.parts} == {"qweight", "qzeros", "scales", "g_idx"}
        loading = {runtime.name: (runtime.loads, runtime.reason) for runtime in found.runtimes}
        assert loading["transformers"] == (True, "with optimum and gptqmodel installed")
        assert not loading["vLLM"][0]
        assert "without zero points" in loading["vLLM"][1]

    def test_verify_finds_nothing_wrong_and_skips_what_needs_other_packages(self, make: Callable[..., Made]) -> None:
        made = make(Kind(act_order=True))
        answers = {check.check: check for check in verify(made.path, reference=made.dense)}
        assert {name for name, check in answers.items() if check.outcome == "failed"} == set()
        assert answers["values"].outcome == answers["reference"].outcome == "passed"
        assert answers["transformers"].detail == "it needs the package optimum, which is not installed here"

    def test_eval_judges_it_as_the_model_that_it_stands_for(
        self,
        make: Callable[..., Made],
        text_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        made = make(Kind())
        arguments = ["eval", str(made.path), "--reference", str(made.dense), "--data", str(text_file), "--samples", "4"]
        monkeypatch.setattr(sys, "argv", ["compress", *arguments, "--json", "--device", "cpu"])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        assert json.loads(capsys.readouterr().out)["kl"] == pytest.approx(0, abs=1e-6)

    def test_it_is_not_compressed_again(self, make: Callable[..., Made], tmp_path: Path) -> None:
        with pytest.raises(CompressorError, match=r"already quantized \(gptq\); compress the original model"):
            api.quantize(make(Kind()).path, tmp_path / "out", method="rtn", evaluate=False, device="cpu")


def rounding(**option: Any) -> dict[str, Any]:
    """A recipe that rounds."""
    return {"passes": [{"pass": "rtn", "options": [{"format": "int_group", **option}]}], "evaluation": None}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_byte_for_each_code_loads_in_stock_transformers_alike(symmetric: bool, tiny: Tiny, tmp_path: Path) -> None:
    recipe = make_recipe(rounding(bits=8, group_size=-1, packed=False, symmetric=symmetric))
    report = api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu")
    assert report.layout == "compressed-tensors"
    assert {c["check"]: c["outcome"] for c in report.verification}["transformers"] == "passed"
    assert tensors(tmp_path / "out")[f"{DOWN}.weight"].dtype == torch.int8


def test_a_run_that_stores_a_byte_for_each_code_goes_on_where_it_was_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(rounding(bits=8, group_size=-1, packed=False))
    compress_block = blocks.compress_block

    def stopped(job: Any, block: Any, *args: Any) -> Any:
        if block.index == 1:
            raise KeyboardInterrupt
        return compress_block(job, block, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(blocks, "compress_block", stopped)
        api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    report = api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", resume=True)
    assert {c["check"]: c["outcome"] for c in report.verification}["logits"] == "passed"
