"""Blocks that add nothing can be dropped without changing the model, in every family; or the family is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.passes.prune.depth import GOES, STAYS, fewer_blocks
from compressor.recipe.schema import make_recipe

IDLE = (1, 2)  # blocks that add nothing
LAYERS = 6
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64, **HEADS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
KINDS = ["sliding_attention", "full_attention"] * 3
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_head": 4, "n_layer": LAYERS, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "mistral, window": ("mistral", {**COMMON, "sliding_window": 8}),
    "qwen2, windows from block 3": (
        "qwen2",
        {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", COMMON),
    "gemma": ("gemma", {**COMMON, "head_dim": 16}),
    "gemma2": ("gemma2", {**COMMON, "head_dim": 16, "sliding_window": 8, "layer_types": KINDS}),
    "gemma3": ("gemma3_text", {**COMMON, "head_dim": 16, "sliding_window": 8, "layer_types": KINDS}),
    "cohere2": ("cohere2", {**COMMON, "sliding_window": 8, "layer_types": KINDS}),
    "smollm3, some without rotation": (
        "smollm3",
        {**COMMON, "no_rope_layers": [1, 1, 1, 0, 1, 0], "pad_token_id": 0, "use_sliding_window": False},
    ),
    "olmo2": ("olmo2", COMMON),
    "olmo3": ("olmo3", {**COMMON, "sliding_window": 8, "layer_types": KINDS}),
    "exaone4": ("exaone4", {**COMMON, "sliding_window": 8, "layer_types": KINDS}),
    "granite": ("granite", {**COMMON, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "phi3": ("phi3", {**COMMON, "pad_token_id": 0}),
    "stablelm": ("stablelm", COMMON),
    "starcoder2": ("starcoder2", COMMON),
    "glm4": ("glm4", {**COMMON, "head_dim": 16, "pad_token_id": 0}),
    "helium": ("helium", {**COMMON, "head_dim": 16}),
    "minicpm3": ("minicpm3", {**COMMON, **LATENT, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, by inverse number": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", COMMON),
    "opt": (
        "opt",
        {"vocab_size": 384, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {"diffllama": ("diffllama", COMMON)}  # lambda_init by the block's number


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write a model of six blocks, of which those in `IDLE` add nothing to the hidden state."""

    def build(kind: str, options: dict[str, Any]) -> Path:
        counted = {} if {"n_layer", "num_layers"} & options.keys() else {"num_hidden_layers": LAYERS}
        config = AutoConfig.for_model(kind, **{"bos_token_id": 0, "eos_token_id": 0, **options, **counted})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise if parameter.dim() < 2 else noise * (1.5 / parameter.shape[-1] ** 0.5)
        blocks = next(m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
        for index in IDLE:
            for parameter in blocks[index].parameters():
                parameter.data.zero_()
        model.save_pretrained(tmp_path / "model")
        tiny_models.tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


def opened(path: Path) -> ModelSource:
    return ModelSource(path, torch.device("cpu"))


def choice(*gone: int) -> tuple[int, ...]:
    return tuple(GOES if index in gone else STAYS for index in range(LAYERS))


@torch.no_grad()
def logits(source: ModelSource) -> Tensor:
    (hidden,) = source.first_inputs([tiny_models.some_tokens(batch=1, length=24)])
    for block in source.blocks():
        hidden = block.forward(hidden)
    return next(iter(source.logits([hidden])))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_blocks_that_add_nothing_changes_nothing(family: str, make: Callable[..., Path]) -> None:
    source = opened(make(*FAMILIES[family]))
    expected = logits(source)
    left = source.rewritten(fewer_blocks(source, choice(*IDLE)))
    assert len(left.layers) == LAYERS - len(IDLE)
    torch.testing.assert_close(logits(left), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", REFUSED)
def test_arithmetic_by_a_blocks_number_is_refused(family: str, make: Callable[..., Path]) -> None:
    source = opened(make(*REFUSED[family]))
    with pytest.raises(
        RecipeError, match=r"block \d would be block \d of 4 and compute something else.*--by width"
    ) as refused:
        fewer_blocks(source, choice(*IDLE))
    assert len(str(refused.value)) <= 300


def test_a_refusal_comes_before_any_work(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(*REFUSED["diffllama"])
    recipe = make_recipe({"passes": [{"pass": "prune_depth", "ratio": 0.3}], "evaluation": None})
    with pytest.raises(RecipeError, match="compute something else"):
        api.forecast(recipe, path, device="cpu")
    with pytest.raises(RecipeError, match="compute something else"):
        api.run(recipe, path, tmp_path / "out", device="cpu")
    assert not list(tmp_path.glob("out*"))


def test_no_weight_is_read_for_the_check(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(make(*FAMILIES["llama"]))

    def read(self: object, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("compressor.model.checkpoint.Checkpoint.read", read)
    fewer_blocks(source, choice(*IDLE))


@pytest.mark.parametrize("family", ["minicpm3", "gpt2, by inverse number"])
def test_stock_transformers_computes_the_same_with_what_is_written(
    family: str, make: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    path = make(*FAMILIES[family])
    tokens = tiny_models.some_tokens(batch=1, length=24)
    expected = tiny_models.stock_logits(path, tokens)
    recipe = make_recipe(
        {
            "passes": [{"pass": "prune_depth", "ratio": 0.3, "of": "blocks", "by": "cosine"}],
            "calibration": {"source": str(text_file), "samples": 2, "seq_len": 32},
            "evaluation": None,
        }
    )
    report = api.run(recipe, path, tmp_path / "out", device="cpu", verify=False)
    assert report.pruning[0]["gone"] == list(IDLE)
    found = tiny_models.stock_logits(tmp_path / "out", tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_packed_queries_that_need_a_correction_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(*FAMILIES["gpt2, by inverse number"])
    recipe = make_recipe(
        {"passes": [{"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 64}]}], "evaluation": None}
    )
    api.run(recipe, path, tmp_path / "packed", device="cpu", verify=False)
    source = opened(tmp_path / "packed")
    with pytest.raises(RecipeError, match="cannot be corrected in packed weights"):
        fewer_blocks(source, choice(*IDLE))
