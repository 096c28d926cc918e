"""Model types that are no causal language models are named for what they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import change_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import SourceError
from compressor.model.architecture import check_config
from compressor.model.source import ModelSource


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llava", "a vision-language model, which is not supported yet"),
        ("qwen2_5_vl", "a vision-language model, which is not supported yet"),
        ("mistral3", "a vision-language model, which is not supported yet"),
        ("wav2vec2", "an audio model, which is not supported yet"),
        ("vit", "a vision model, which is not supported yet"),
        ("distilbert", "an encoder (masked language model), which is not supported yet"),
        ("vitpose", "not a causal language model"),
    ],
)
def test_a_model_without_a_causal_class_is_named_for_what_it_is_in_one_line(
    kind: str, words: str, tiny_copy: Callable[..., Path]
) -> None:
    model = tiny_copy("llama")
    change_config(model, model_type=kind)
    with pytest.raises(SourceError) as error:
        ModelSource(model, torch.device("cpu"))
    assert str(error.value) == f"{model}: model type `{kind}` is {words}; name a model that only reads and writes text"


def test_no_model_type_that_transformers_knows_is_refused_at_length() -> None:
    for kind in CONFIG_MAPPING:
        try:
            check_config({"model_type": kind}, "model")
        except SourceError as error:
            assert len(str(error)) <= 200


def test_what_transformers_says_of_a_config_is_cut_short(tiny_copy: Callable[..., Path]) -> None:
    model = tiny_copy("llama")
    change_config(model, hidden_act="x" * 10_000)
    with pytest.raises(SourceError) as error:
        ModelSource(model, torch.device("cpu"))
    assert len(str(error.value).replace(str(model), "MODEL")) <= 300
