"""A prompt that is learned: peft loads it, it brings predictions nearer, and no weight is another."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.evaluation.verify.check import WrongError
from compressor.evaluation.verify.files import check_copies
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import load_samples
from compressor.pipeline.job import Event
from compressor.pipeline.manifest import read_manifest
from compressor.recipe.schema import make_recipe

NARROW = {"pass": "prune_width", "ratio": 0.5, "of": "mlp", "multiple": 32}
SHORT = {"pass": "prune_depth", "ratio": 0.5, "of": "blocks", "by": "even"}  # of four blocks, two go
PROMPT = {"pass": "soft_prompt", "tokens": 8, "steps": 30, "batch": 2, "judged": 256}
CALIBRATION = {"samples": 16, "seq_len": 32}


def run(model: Path, out: Path, text: Path, *passes: Mapping[str, Any], **options: Any) -> Any:
    calibration = {"source": str(text), **CALIBRATION}
    recipe = make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})
    return api.run(recipe, model, out, verify=False, **options)


def learned_text(model: Path, text: Path) -> Tensor:
    return load_samples(str(text), load_tokenizer(model), **CALIBRATION).tokens


@torch.no_grad()
def predictions(model: Path, tokens: Tensor, prompt: Path | None = None) -> Tensor:
    """Log-probabilities behind each token of the text, by transformers and peft."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = loaded if prompt is None else PeftModel.from_pretrained(loaded, prompt)
    logits: Tensor = loaded(input_ids=tokens).logits
    return logits[:, -tokens.shape[1] :].log_softmax(-1)


def divergence(a: Tensor, b: Tensor) -> float:
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_peft_loads_a_prompt_with_which_predictions_are_nearer_and_no_weight_is_another(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny("llama", num_hidden_layers=4)
    run(model, tmp_path / "plain", text_file, SHORT)
    run(model, tmp_path / "out", text_file, SHORT, {**PROMPT, "steps": 40, "batch": 4, "lr": 0.5})
    plain, out = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert plain.keys() == out.keys()
    assert all(torch.equal(plain[name], out[name]) for name in plain)
    tokens = learned_text(model, text_file)
    original = predictions(model, tokens)
    alone, prompted = (
        divergence(original, predictions(tmp_path / "out", tokens, prompt))
        for prompt in (None, tmp_path / "out" / "soft_prompt")
    )
    assert prompted < alone
    assert not (tmp_path / "out.pruning").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_divergences_of_the_report_are_those_of_peft_on_text_that_was_not_learned_from(
    family: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run(tiny(family), tmp_path / "out", text_file, NARROW, {**PROMPT, "steps": 2})
    more = math.ceil(256 / 32) + 1
    samples = load_samples(str(text_file), load_tokenizer(tiny(family)), samples=16 + more, seq_len=32)
    original = predictions(tiny(family), samples.tokens[16:])
    expected = [
        divergence(original, predictions(tmp_path / "out", samples.tokens[16:], prompt))
        for prompt in (None, tmp_path / "out" / "soft_prompt")
    ]
    assert report.pruning[1]["kl"] == pytest.approx(expected, rel=1e-4)


def test_the_prompt_is_verified_as_the_rest_is_and_not_carried_into_another_model(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out, rounded = tmp_path / "out", {"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 32}]}
    run(tiny("llama"), out, text_file, NARROW, {**PROMPT, "steps": 1}, rounded)
    check_copies(out, read_manifest(out))
    file = out / "soft_prompt" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(WrongError, match="is not what the run copied"):
        check_copies(out, read_manifest(out))
    run(tiny("llama"), tmp_path / "pruned", text_file, NARROW, {**PROMPT, "steps": 1})
    run(tmp_path / "pruned", tmp_path / "again", text_file, {**NARROW, "ratio": 0.2})
    assert not (tmp_path / "again" / "soft_prompt").exists()


def test_no_place_on_this_machine_is_written_into_the_prompt(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    run(tiny("llama"), tmp_path / "out", text_file, NARROW, {**PROMPT, "steps": 1})
    config = json.loads((tmp_path / "out" / "soft_prompt" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 8)
    assert config["base_model_name_or_path"] is None


def test_a_run_that_is_broken_off_goes_on_to_the_same(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if (event.stage, event.done) == ("train", 22):  # put down after 20
            raise KeyboardInterrupt

    run(tiny("llama"), tmp_path / "whole", text_file, NARROW, PROMPT)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), tmp_path / "out", text_file, NARROW, PROMPT, tell=interrupt)
    steps: list[int] = []
    tell = lambda event: steps.append(event.done) if event.stage == "train" else None  # noqa: E731
    run(tiny("llama"), tmp_path / "out", text_file, NARROW, PROMPT, resume=True, tell=tell)
    assert steps[0] == 21
    whole, out = (tensors(tmp_path / name / "soft_prompt") for name in ("whole", "out"))
    assert torch.equal(whole["prompt_embeddings"], out["prompt_embeddings"])


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([PROMPT], "soft_prompt: nothing was pruned"),
        ([NARROW, {**PROMPT, "tokens": 33}], "33 tokens before 32 of text are more than the 64 that the model was made for"),
        ([NARROW, PROMPT, {"pass": "recover"}], "passes.2: changes the model that a prompt was learned for"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    passes: list[dict[str, Any]], said: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        run(tiny("llama"), tmp_path / "out", text_file, *passes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["tokens", "steps", "batch", "lr", "judged"])
def test_settings_that_make_no_sense(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        make_recipe({"passes": [{"pass": "soft_prompt", key: 0}]})
