"""Every tensor of a checkpoint is accounted for when it is opened: used, harmless, warned of, or refused by name."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, Tensors, change_config, change_tensors, exact, some_tokens, stock_logits, tensors

from compressor import api
from compressor.cli import main
from compressor.errors import SourceError
from compressor.evaluation.evaluate import evaluate
from compressor.evaluation.verify.verify import verify
from compressor.model.edits import fewer_sublayers
from compressor.model.source import ModelSource
from compressor.passes.prune.depth import GOES, STAYS, fewer_blocks
from compressor.recipe.build import quantize_recipe
from compressor.recipe.schema import make_recipe

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
BLOCK = "model.layers.1"
Q = f"{BLOCK}.self_attn.q_proj"
ROUND = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)


def add(path: Path, name: str, tensor: torch.Tensor) -> Path:
    change_tensors(path, lambda t: t.update({name: tensor}))
    return path


def refusal(path: Path) -> str:
    """The sentence with which a directory is refused, the same by a reader and before any work by a dry run and a run."""
    with pytest.raises(SourceError) as refused:
        ModelSource(path, CPU)
    for work in (api.forecast, api.run):
        with pytest.raises(SourceError, match=re.escape(str(refused.value))):
            work(ROUND, path, path.parent / "out", device="cpu")
    assert not list(path.parent.glob("out*"))
    sentence = str(refused.value)
    assert len(sentence.replace(str(path), "")) < 300
    return sentence


def float8(content: Tensors) -> None:
    for name in [name for name in content if "_proj" in name]:
        content[f"{name}_scale_inv"] = torch.ones(1, 1)
        content[name] = content[name].to(torch.float8_e4m3fn)


def base_layers(content: Tensors) -> None:
    content[f"{Q}.base_layer.weight"] = content.pop(f"{Q}.weight")
    content[f"{Q}.lora_A.default.weight"] = torch.ones(4, 128)


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda content: content.update({name: tensor})


# Refused

REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "bias": (added(f"{Q}.bias", torch.ones(128)), rf"{Q}.bias is a bias that config.json denies; .*attention_bias"),
    "bias of a norm": (added("model.norm.bias", torch.ones(128)), "model.norm.bias is a bias that config"),
    "bias of the head": (added("lm_head.bias", torch.ones(384)), "lm_head.bias is a bias that config"),
    "float8 and scales": (
        float8,
        r"weight_scale_inv \(14 such tensors\) belongs to quantized weights, .*no quantization_config; restore",
    ),
    "scales alone": (
        added(f"{Q}.weight_scale", torch.ones(1)),
        "q_proj is packed but config.json has no quantization_config",
    ),
    "float8 alone": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
        "q_proj.weight is stored as torch.float8_e4m3fn .*restore quantization_config",
    ),
    "int8 alone": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}),
        "q_proj.weight is stored as torch.int8",
    ),
    "nf4": (added(f"{Q}.weight.absmax", torch.ones(8)), "q_proj.weight.absmax belongs to quantized weights"),
    "lora": (added(f"{Q}.lora_A.default.weight", torch.ones(4, 128)), "lora_A.default.weight belongs to an adapter .*merge"),
    "lora around base layers": (base_layers, r"base_layer.weight \(2 such tensors\) belongs to an adapter .*merge it first"),
    "lora of the head": (added("lm_head.lora_B.weight", torch.ones(384, 4)), "lm_head.lora_B.weight belongs to an adapter"),
    "norm of queries": (added(f"{BLOCK}.self_attn.q_norm.weight", torch.ones(32)), "q_norm.weight has no place in the model"),
    "embedding of positions": (
        added("model.embed_positions.weight", torch.ones(64, 128)),
        "embed_positions.weight has no place",
    ),
    "another block": (
        lambda t: t.update({n.replace("layers.1.", "layers.2."): v.clone() for n, v in t.items() if "layers.1." in n}),
        r"model.layers.2.\S+ \(9 such tensors\) belongs to a block beyond the 2 of config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_should_use_and_cannot_is_refused_by_name_before_any_work(case: str, tiny_copy: Tiny) -> None:
    path, (change, sentence) = tiny_copy("llama"), REFUSED[case]
    change_tensors(path, change)
    assert re.search(sentence, refusal(path))


def test_an_adapter_in_a_file_of_its_own_is_refused(tiny_copy: Tiny) -> None:
    path = tiny_copy("llama")
    (path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json says that these weights have an adapter" in refusal(path)


def test_a_tensor_of_a_shard_that_the_index_leaves_out_counts_too(tiny_copy: Tiny) -> None:
    path = tiny_copy("llama", shard_bytes="100KB")
    shard = min(path.glob("model-*.safetensors"))
    content = tensors(path)
    names = [
        n for n, s in json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].items() if s == shard.name
    ]
    save_file({name: content[name] for name in names} | {f"{Q}.bias": torch.ones(128)}, shard, {"format": "pt"})
    assert f"{Q}.bias is a bias that config.json denies" in refusal(path)


def test_the_command_line_refuses_in_a_sentence_in_a_dry_run_too(
    tiny_copy: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(tiny_copy("llama"), f"{Q}.bias", torch.ones(128))
    assert command(monkeypatch, "quantize", str(path), "--dry-run") == 2
    assert f"{Q}.bias is a bias that config.json denies" in capsys.readouterr().err


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """Run the command line and return its status."""
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


# Warned of


PASSED_OVER = {
    "value head": ("v_head.summary.weight", torch.ones(1, 128)),
    "score": ("score.weight", torch.ones(1, 128)),
    "vision tower": ("visual.blocks.0.attn.qkv.weight", torch.ones(8, 8)),
    "vision tower inside the decoder": ("model.vision_tower.layers.0.weight_scale", torch.ones(8, 8)),
    "bias of zeros": (f"{Q}.bias", torch.zeros(128)),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_cannot_change_the_logits_is_warned_of_and_carried_along(case: str, tiny_copy: Tiny, tmp_path: Path) -> None:
    name, tensor = PASSED_OVER[case]
    path = add(tiny_copy("llama"), name, tensor)
    (warning,) = ModelSource(path, CPU).unused.warnings
    assert re.match(rf"{re.escape(str(path))}: 1 tensor is \({re.escape(name)}\) ", warning)
    assert api.forecast(ROUND, path, device="cpu").warnings == (warning,)
    report = api.run(ROUND, path, tmp_path / "out", device="cpu")  # is verified
    assert report.warnings == [warning]
    assert torch.equal(tensors(tmp_path / "out")[name], tensor)
    torch.testing.assert_close(
        exact(tmp_path / "out")(some_tokens()).logits, stock_logits(tmp_path / "out", some_tokens()), rtol=0, atol=1e-4
    )


def test_verbs_without_a_report_warn_too(
    tiny_copy: Tiny,
    text_file: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = add(tiny_copy("llama"), "score.weight", torch.ones(1, 128))
    (warning,) = ModelSource(path, CPU).unused.warnings
    for words in (["inspect", str(path)], ["quantize", str(path), "--method", "rtn", "--group-size", "64", "--dry-run"]):
        assert not command(monkeypatch, *words)
        assert f"warning: {warning}\n" in capsys.readouterr().err
    for use in (lambda: exact(path), lambda: evaluate(path, data=str(text_file), samples=1, seq_len=16)):
        caplog.clear()
        use()
        assert warning in caplog.text
    assert any(warning in check.detail for check in verify(path) if check.check == "config")


# Harmless


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_transformers_saves_it_opens_without_a_warning(family: str, tiny: Tiny) -> None:
    unused = ModelSource(tiny(family), CPU).unused
    assert not unused.names
    assert not unused.warnings


HARMLESS = {
    "rotary frequencies": ("llama", f"{BLOCK}.self_attn.rotary_emb.inv_freq", torch.ones(16)),
    "mask of GPT-2": ("gpt2", "transformer.h.1.attn.bias", torch.ones(1, 1, 64, 64).tril()),
    "masked bias of GPT-2": ("gpt2", "transformer.h.1.attn.masked_bias", torch.tensor(-1e4)),
    "mask of GPT-NeoX": ("gpt_neox", "gpt_neox.layers.1.attention.bias", torch.ones(1, 1, 64, 64).tril()),
    "cache scale": ("llama", f"{BLOCK}.self_attn.k_scale", torch.ones(1)),
    "cache scale of a projection": ("llama", f"{BLOCK}.self_attn.k_proj.k_scale", torch.tensor(1.0)),
    "prediction of more tokens": ("llama", "mtp.layers.0.self_attn.q_proj.weight", torch.ones(8, 8)),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_tensors_are_known_and_carried_along(case: str, tiny_copy: Tiny, tmp_path: Path) -> None:
    family, name, tensor = HARMLESS[case]
    path = add(tiny_copy(family), name, tensor)
    report = api.run(ROUND, path, tmp_path / "out", device="cpu")  # is verified
    assert report.warnings == []
    assert torch.equal(tensors(tmp_path / "out")[name], tensor)
    assert not ModelSource(tmp_path / "out", CPU).unused.warnings


def test_new_cache_scales_take_the_place_of_old_ones(tiny_copy: Tiny, text_file: Path, tmp_path: Path) -> None:
    path = tiny_copy("llama")
    for name in ("k_scale", "k_proj.k_scale", "q_scale"):
        add(path, f"{BLOCK}.self_attn.{name}", torch.tensor(77.0))
    recipe = make_recipe(
        {
            "passes": [
                {"pass": "rtn", "options": [{"format": "int_group", "bits": 4, "group_size": 64}]},
                {"pass": "kv_cache"},
            ],
            "calibration": {"source": str(text_file), "samples": 2, "seq_len": 32},
        }
    )
    size = api.forecast(recipe, path, device="cpu").size_bytes
    report = api.run(recipe, path, tmp_path / "out", device="cpu", verify=False)
    written = {name: tensor for name, tensor in tensors(tmp_path / "out").items() if re.search("[kqv]_scale$", name)}
    assert {name.partition("self_attn.")[2] for name in written} == {"k_scale", "v_scale"}
    assert all(tensor.shape == (1,) and tensor.item() != 77 for tensor in written.values())
    assert size == report.size_bytes
    assert all(check.outcome != "failed" for check in verify(tmp_path / "out", reference=path))


# Renumbered with their block


def numbered(number: int) -> Tensors:
    return {
        f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.full((16,), float(number)),
        f"model.layers.{number}.self_attn.k_scale": torch.tensor(float(number)),
    }


@pytest.fixture
def four_blocks(tiny_copy: Tiny) -> Path:
    """A model of four blocks with harmless tensors in all of them but the first, and a block that predicts more tokens."""
    path = tiny_copy("llama", num_hidden_layers=4)
    predictor = {
        "model.layers.4.eh_proj.weight": torch.full((4, 8), 4.0),
        "model.layers.4.self_attn.q_proj.weight": torch.full((128, 128), 4.0),
    }
    change_tensors(path, lambda t: t.update(numbered(1) | numbered(2) | numbered(3) | predictor))
    return path


def test_harmless_tensors_follow_their_block_when_others_are_dropped(four_blocks: Path, tmp_path: Path) -> None:
    source = ModelSource(four_blocks, CPU)
    left = source.rewritten(fewer_blocks(source, (STAYS, GOES, STAYS, STAYS)))
    found = {name: left.checkpoint.read(name).flatten()[0].item() for name in left.unused.names}
    assert found == {
        "model.layers.1.self_attn.rotary_emb.inv_freq": 2,
        "model.layers.1.self_attn.k_scale": 2,
        "model.layers.2.self_attn.rotary_emb.inv_freq": 3,
        "model.layers.2.self_attn.k_scale": 3,
        "model.layers.3.eh_proj.weight": 4,
        "model.layers.3.self_attn.q_proj.weight": 4,
    }
    before = source.checkpoint
    assert torch.equal(left.checkpoint.read(f"{Q}.weight"), before.read("model.layers.2.self_attn.q_proj.weight"))
    again = left.rewritten(fewer_blocks(left, (GOES, GOES, STAYS)))
    assert {name: again.checkpoint.read(name).flatten()[0].item() for name in again.unused.names} == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": 3,
        "model.layers.0.self_attn.k_scale": 3,
        "model.layers.1.eh_proj.weight": 4,
        "model.layers.1.self_attn.q_proj.weight": 4,
    }


def test_harmless_tensors_of_a_dropped_attention_are_dropped_with_it(four_blocks: Path) -> None:
    source = ModelSource(four_blocks, CPU)
    left = source.rewritten(fewer_sublayers(source, frozenset({f"{BLOCK}.self_attn"})))
    assert not [name for name in left.checkpoint if name.startswith(f"{BLOCK}.self_attn.")]
    assert set(numbered(2)) <= left.unused.names


def test_a_model_with_fewer_blocks_is_written_with_them(four_blocks: Path, text_file: Path, tmp_path: Path) -> None:
    api.prune(
        four_blocks, tmp_path / "out", ratio=0.2, by="depth", score="even", calibration=str(text_file), samples=2,
        seq_len=32, evaluate=False, device="cpu",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (gone,) = report["pruning"][0]["gone"]
    kept = [number for number in range(4) if number != gone]
    written = tensors(tmp_path / "out")
    assert written["model.layers.3.eh_proj.weight"][0, 0] == 4
    for new, old in enumerate(kept):
        name = f"model.layers.{new}.self_attn.k_scale"
        assert (name in written) == (old > 0)
        assert old == 0 or written[name] == old
    assert report["warnings"] == []
    assert not ModelSource(tmp_path / "out", CPU).unused.warnings
    assert torch.isfinite(stock_logits(tmp_path / "out", some_tokens())).all()


def test_a_number_of_blocks_that_the_config_counts_as_predictors_is_harmless(tiny_copy: Tiny) -> None:
    path = add(tiny_copy("llama"), "model.layers.2.self_attn.q_proj.weight", torch.ones(128, 128))
    change_config(path, num_nextn_predict_layers=1)
    assert ModelSource(path, CPU).unused.warnings == ()
