"""A narrower residual stream: against transformers' own models that have zeros in what goes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import change_tensors, some_tokens, stock_logits, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.edited import Rewriting
from compressor.model.edits import fewer_sublayers
from compressor.model.source import ModelSource
from compressor.passes.prune.readers import Both, Refit
from compressor.passes.prune.residual import Residual, fitting
from compressor.passes.prune.shapes import parameters
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
FAMILIES = ("llama", "llama_tied", "llama_biased", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mistral")
ALIKE = {"rtol": 0, "atol": 5e-5}
GONE = torch.arange(128) % 4 == 1


def run(model: Path, out: Path, text: Path, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    """What `prune_hidden` reports."""
    calibration = {"source": str(text), "samples": 16, "seq_len": 32}
    step = {"pass": "prune_hidden", **options}
    recipe = make_recipe({"passes": [step], "calibration": calibration, "evaluation": None})
    (report,) = api.run(recipe, model, out, verify=False, resume=resume).pruning
    return dict(report)


def silenced(path: Path) -> Path:
    """With zeros in a quarter of the hidden channels, whatever enters the model."""

    def silence(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if "embed_tokens" in name:
                tensor[:, GONE] = 0
            elif "o_proj" in name or "down_proj" in name:
                tensor[GONE] = 0

    change_tensors(path, silence)
    return path


@torch.no_grad()
def logits(source: ModelSource) -> Tensor:
    return source.whole()(some_tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_channels_that_are_always_zero_go_and_nothing_changes(family: str, tiny_copy: Callable[..., Path]) -> None:
    model = silenced(tiny_copy(family))
    residual, stays = Residual.narrowed(ModelSource(model, CPU), 96), (~GONE).nonzero().flatten()
    residual.check(stays)
    narrow = ModelSource(model, CPU, rewritings=[residual.rewriting(stays)])
    assert narrow.model.config.hidden_size == 96
    torch.testing.assert_close(logits(narrow), stock_logits(model, some_tokens()), **ALIKE)


@pytest.mark.parametrize(
    ("family", "basis"),
    [("llama_tied", "channels"), ("llama_tied", "pca"), ("qwen3", "pca"), ("phi3", "pca"), ("gemma2", "channels")],
)
def test_the_weakest_go_and_what_is_never_used_costs_nothing(
    family: str, basis: str, tiny_copy: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = silenced(tiny_copy(family))
    run(model, tmp_path / "out", text_file, ratio=0.2, of="blocks", basis=basis, multiple=32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 96
    torch.testing.assert_close(stock_logits(tmp_path / "out", some_tokens()), stock_logits(model, some_tokens()), **ALIKE)


def test_norms_and_their_epsilon_both_follow_the_width() -> None:
    """A derivation of its own: transformers' Llama with zeros in a quarter of the channels, cut by hand."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 50}
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, rms_norm_eps=1e-2, **sizes)).double().eval()
    gone = torch.arange(64) % 4 == 1
    state = {name: torch.randn(p.shape, dtype=torch.float64) / 8 for name, p in wide.state_dict().items()}
    for name, tensor in state.items():
        if "embed" in name:
            tensor[:, gone] = 0
        if "o_proj" in name or "down_proj" in name:
            tensor[gone] = 0
    wide.load_state_dict(state)

    @torch.no_grad()
    def missed(gain: float, eps: float) -> float:
        narrow = LlamaForCausalLM(LlamaConfig(hidden_size=48, rms_norm_eps=eps, **sizes)).double().eval()
        cut = {}
        for name, tensor in state.items():
            if "norm" in name:
                cut[name] = tensor[~gone] * gain
            else:
                cut[name] = tensor[~gone] if "o_proj" in name or "down_proj" in name else tensor[:, ~gone]
        narrow.load_state_dict(cut)
        tokens = some_tokens() % 50
        return float((narrow(tokens).logits - wide(tokens).logits).abs().max())

    assert missed(math.sqrt(64 / 48), 1e-2 * 64 / 48) < 1e-6  # norms compute in float32
    for gain, eps in ((1, 1e-2), (math.sqrt(48 / 64), 1e-2 * 64 / 48), (math.sqrt(64 / 48), 1e-2), (1, 1e-2 * 64 / 48)):
        assert missed(gain, eps) > 1e-4


@torch.no_grad()
def test_llama_in_the_shell_of_mistral_computes_the_same() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    others = {"num_key_value_heads": 2, "vocab_size": 50, "rope_parameters": {**rope, "original_max_position_embeddings": 8}}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **others)).double().eval()
    mistral = MistralForCausalLM(MistralConfig(**sizes, **others, sliding_window=None)).double().eval()
    mistral.load_state_dict({name: torch.randn_like(p) / 4 for name, p in llama.state_dict().items()})
    llama.load_state_dict(mistral.state_dict())
    torch.testing.assert_close(mistral(some_tokens() % 50).logits, llama(some_tokens() % 50).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_mean_of_a_channel_that_goes_can_stay_as_a_bias(tiny: Callable[..., Path]) -> None:
    """A head's values, and a channel of an MLP, that are the same for all tokens: Llama has biases for what they give."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama_biased"))
    attention, mlp, tokens = model.model.layers[0].self_attn, model.model.layers[0].mlp, some_tokens()
    attention.v_proj.weight[:32] = 0  # of two groups, the first, which gives its bias
    mlp.gate_proj.weight[:9] = mlp.up_proj.weight[:9] = 0
    expected = model(tokens).logits
    constant = torch.nn.functional.silu(mlp.gate_proj.bias[:9]) * mlp.up_proj.bias[:9]
    values = attention.v_proj.bias[:32].repeat(2)  # of the two query heads that read the group
    for writer, mean in ((attention.o_proj, values), (mlp.down_proj, constant)):
        kept = writer.bias.clone()
        writer.bias += writer.weight[:, : len(mean)] @ mean
        writer.weight[:, : len(mean)] = 0
        torch.testing.assert_close(writer.bias - kept != 0, torch.ones_like(kept, dtype=torch.bool))
    torch.testing.assert_close(model(tokens).logits, expected, **ALIKE)


@pytest.mark.parametrize("of", ["model", "blocks"])
@pytest.mark.parametrize("basis", ["channels", "pca"])
def test_the_share_that_is_asked_for_goes_and_no_more_than_a_step_of_it(
    of: str, basis: str, tiny: Callable[..., Path]
) -> None:
    source = ModelSource(tiny("llama_tied"), CPU)
    step = make_recipe({"passes": [{"pass": "prune_hidden", "ratio": 0.3, "of": of, "basis": basis, "multiple": 4}]}).passes[
        0
    ]
    sketch = step.sketch(source)
    assert sketch.rewriting is not None
    narrow = source.rewritten(sketch.rewriting)
    built = AutoModelForCausalLM.from_config(narrow.model.config)
    assert sketch.certain
    assert parameters(narrow) == sum(p.numel() for p in built.parameters())
    after, before = parameters(narrow, of), parameters(source, of)
    assert after <= 0.7 * before
    assert after * (1 + 4 / narrow.model.config.hidden_size) > 0.7 * before


def test_the_fit_of_readers_is_least_squares_solved_otherwise() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 12, generator=random) @ torch.randn(12, 12, generator=random)
    keep = torch.tensor([0, 2, 3, 7, 8, 11])
    z = x[..., keep] + 0.3 * torch.randn(2, 300, 6, generator=random)
    w = torch.randn(5, 12, generator=random)
    both = Both.zeros(12, keep, CPU)
    for some, other in zip(x, z, strict=True):
        both.update(some[None], other[None])
    rows, wanted = z.flatten(0, 1).double(), x.flatten(0, 1).double() @ w.double().T
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(both.fitted(w, 1e-9), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.fitted(w, 1e9), w[:, keep].double(), rtol=0, atol=1e-6)


def test_sizes_that_the_model_class_refuses_are_passed_over(tiny: Callable[..., Path]) -> None:
    """Llama wants a multiple of its number of heads, Qwen3 does not."""
    sizes = {}
    for family in ("llama", "qwen3"):
        source = ModelSource(tiny(family), CPU)
        sizes[family] = fitting(source, parameters(source) - 1, "model", 3).size
    assert sizes == {"llama": 120, "qwen3": 126}


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"ratio": 0.95}, "with 16 of 128 there are"),
        ("llama", {"ratio": 0.1, "multiple": 127}, "`llama` refuses sizes: "),
        ("gpt_neox", {"ratio": 0.1}, "`gpt_neox` is built otherwise"),
        ("olmo2", {"ratio": 0.1}, "through a norm"),
        ("gemma2", {"ratio": 0.1}, "set basis: channels"),
        ("llama", {"ratio": 1}, "ratio: 1.0 is not from 0 up to, without, 1"),
        ("llama", {"ratio": 0.1, "damp": 0}, "damp: 0.0 is not a positive number"),
        ("llama", {"ratio": 0.1, "multiple": 0}, "multiple: 0 is not a positive number"),
    ],
)
def test_what_cannot_be_done_is_refused(
    family: str, options: dict[str, Any], said: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        run(tiny(family), tmp_path / "out", text_file, **options)


def test_a_width_that_a_model_computes_with_is_noticed(tiny: Callable[..., Path]) -> None:
    residual = Residual.narrowed(ModelSource(tiny("gemma2"), CPU), 96)
    residual.check(torch.arange(96))
    with pytest.raises(RecipeError, match="depends on how many there are"):
        replace(residual, louder=1.0).check(torch.arange(96))


def test_parts_that_are_missing_are_refused_and_parts_that_are_narrower_are_not(tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny("llama"), CPU)
    with pytest.raises(RecipeError, match="have to go before those do"):
        fitting(source.rewritten(fewer_sublayers(source, frozenset({"model.layers.1.mlp"}))), 10, "model", None)
    keys = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    shapes = dict(zip(keys, [(64, 128), (64, 128), (128, 64)], strict=True))
    cut = {key: (lambda old, shape=shape: old[: shape[0], : shape[1]]) for key, shape in shapes.items()}
    narrower = source.rewritten(Rewriting(cut, shapes=shapes, widths={"model.layers.1.mlp": 64}))
    assert Residual.narrowed(narrower, 96).shapes[keys[2]] == (96, 64)


def test_a_run_that_is_broken_off_goes_on_to_the_same(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"ratio": 0.3, "basis": "pca"}
    run(tiny("llama"), tmp_path / "whole", text_file, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Refit, "_head", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny("llama"), tmp_path / "out", text_file, **options)
    made = sorted(file.stem.rpartition("-")[0] for file in (tmp_path / "out.pruning").rglob("*.safetensors"))
    assert made == ["components", "readers-0", "readers-1"]
    with monkeypatch.context() as patch:
        patch.setattr(Refit, "_block", lambda *given: pytest.fail("made again"))
        run(tiny("llama"), tmp_path / "out", text_file, resume=True, **options)
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
