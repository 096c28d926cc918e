"""Configs that describe absurd models: refused at once, by a sentence with the key and its value."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import change_config

from compressor.errors import SourceError
from compressor.model.limits import check_limits
from compressor.model.source import ModelSource

Tiny = Callable[..., Path]


def refusal(path: Path, **changes: Any) -> str:
    """The sentence with which a model with a changed config is refused, within seconds."""
    change_config(path, **changes)
    started = time.perf_counter()
    with pytest.raises(SourceError) as refused:
        ModelSource(path, torch.device("cpu"))
    assert time.perf_counter() - started < 5
    assert len(str(refused.value)) <= 300
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**15),
        ("hidden_size", 10**12),
        ("head_dim", 10**12),
        ("num_attention_heads", -(10**12)),
        ("max_position_embeddings", 10**15),
        ("vision_config", {"depth": 10**9}),
        ("layer_types", [10**9]),
    ],
)
def test_a_size_that_no_model_has_is_refused_before_it_is_built(key: str, value: Any, tiny_copy: Tiny) -> None:
    assert "cannot build a model from config.json" in refusal(tiny_copy("llama"), **{key: value})


def test_more_blocks_than_tensors_are_refused(tiny_copy: Tiny) -> None:
    sentence = refusal(tiny_copy("gpt2"), n_layer=9000)
    assert re.search("it has 9,000 decoder blocks where the checkpoint has [0-9]+ tensors; weights and config.json", sentence)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("hidden_size", value) for value in ("128", -128, 0, None, [128], {"a": 1}, 128.5, True)],
        *[("num_hidden_layers", value) for value in ("2", -2, None, [], 2.5)],
        *[("rope_parameters", value) for value in ("x" * 10**5, [], {"rope_type": "y" * 10**5})],
        *[("hidden_act", value) for value in ("z" * 10**5, 5, None, {})],
        *[("model_type", value) for value in ("m" * 10**5, 5, None, [], {})],
    ],
)
def test_a_value_of_another_kind_is_refused_in_one_sentence(key: str, value: Any, tiny_copy: Tiny) -> None:
    assert re.search("config|does not know model type", refusal(tiny_copy("llama"), **{key: value}))


def test_masks_of_all_pairs_of_positions_are_bounded() -> None:
    with pytest.raises(SourceError, match="max_position_embeddings is 1048576 where at most 32,768 are supported"):
        check_limits({"model_type": "gpt_neo", "max_position_embeddings": 2**20}, 100, "DIR")


def test_numbers_of_real_models_are_within_the_limits() -> None:
    config = {
        **{"model_type": "llama", "num_hidden_layers": 126, "hidden_size": 16384, "max_position_embeddings": 10_485_760},
        **{"vocab_size": 262_208, "rope_theta": 1e9, "bos_token_id": 128_000, "quantization_config": {"group_size": 2**40}},
        **{"num_experts": 512, "max_window_layers": 28, "seed": 2**63},
    }
    check_limits(config, 1000, "DIR")
