"""Tiny random checkpoints of the model families, each with a tokenizer, and ways to look into a model directory.

Every parameter is drawn so that it matters: biases are not zero, norms not one, attention not uniform. With the default
initialisation a bias could get lost unnoticed.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import compressor
from compressor.runtime.hf_quantizer import stock

VOCABULARY = 384
POSITIONS = 64
WINDOW = 8  # of sliding attention: less than any sequence in the tests
END = "<end>"
CHAT = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "\n\n".join(f"Item {n}: {n} times {n} is {n * n}; {n} sheep jump over a fence of {n + 3} feet." for n in range(800))

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 32}
TIED = {"tie_word_embeddings": True}
GEMMA = {**HEADS, **TIED, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OPT = {**COMMON, **TIED, "ffn_dim": 256, "pad_token_id": 1}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": 256}

# Class names without `Config` and `ForCausalLM`; what the config says.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", HEADS),
    "llama_tied": ("Llama", {**HEADS, **TIED}),
    "llama_biased": ("Llama", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**HEADS, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {**GROUPED, **TIED}),
    "qwen3": ("Qwen3", HEADS),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3_vision": ("Gemma3", {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 1}),
    "phi3": ("Phi3", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "gpt_neox": ("GPTNeoX", COMMON),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 128}),
    "opt_projected": ("OPT", {**OPT, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "gpt2": ("GPT2", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}),
}
MODELS = {
    "Gemma3Text": "Gemma3ForCausalLM",
    "Gemma3": "Gemma3ForConditionalGeneration",
    "GPT2": "GPT2LMHeadModel",
    "T5": "T5ForConditionalGeneration",
}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mixtral": ("Mixtral", {**HEADS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}),
    "t5": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 16}),
}

Tensors = dict[str, Tensor]


def build(path: Path, family: str, *, shard_bytes: str = "5GB", dtype: str = "float32", **changes: Any) -> Path:
    """Write a checkpoint of a family with its tokenizer; `changes` are to the config."""
    kind, options = {**FAMILIES, **UNSUPPORTED}[family]
    config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
    model = getattr(transformers, MODELS.get(kind, f"{kind}ForCausalLM"))(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        vector = parameter.dim() == 1
        parameter.data = parameter.data + 0.2 * noise if vector else noise * (1.5 / parameter.shape[-1] ** 0.5)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard_bytes)
    tokenizer().save_pretrained(path)
    return path


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 320 tokens with an end token and a chat template."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=320, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, chat_template=CHAT)


def some_tokens(batch: int = 2, length: int = 24) -> Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stock_logits(path: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What transformers alone computes, fp32."""
    with stock():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits.float()


def exact(path: Path) -> PreTrainedModel:
    """Our loader, computing in float32 without rounding activations; packed layers stay packed."""
    return compressor.load(path, dtype=torch.float32, kernel="reference")


def tensors(path: Path) -> Tensors:
    """Every tensor of a directory's safetensors files."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Let a function alter the tensors of a directory with a single safetensors file."""
    content = tensors(path)
    change(content)
    save_file(content, path / "model.safetensors", {"format": "pt"})


def change_config(path: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
