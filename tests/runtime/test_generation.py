"""Continuations are plain: what the checkpoint asks of `generate` (penalties, temperatures) has no part in them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import exact
from transformers import PreTrainedModel

from compressor.assets import DEMO_MODEL
from compressor.evaluation.tasks.generation import continuations
from compressor.model.tokenizer import load_tokenizer
from compressor.runtime.load import continuation, generate

PROMPT, LENGTH = "def read(self, size=-1):", 40
SETTINGS = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "temperature": 0.01, "top_k": 1, "do_sample": True}


@pytest.fixture(scope="module")
def penalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with other settings for `generate`, which draw and avoid repetitions."""
    path = Path(shutil.copytree(DEMO_MODEL, tmp_path_factory.mktemp("models") / "demo"))
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, **SETTINGS}))
    return path


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], ends: list[int]) -> list[int]:
    """The likeliest token, one by one."""
    written: list[int] = []
    while len(written) < LENGTH and not (written and written[-1] in ends):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def test_without_a_seed_it_is_the_likeliest_token_each_time(penalised: Path) -> None:
    tokenizer, model = load_tokenizer(DEMO_MODEL), exact(DEMO_MODEL)
    ids = tokenizer.encode(PROMPT)
    expected = tokenizer.decode(greedy(model, ids, [0, 2]), skip_special_tokens=True)
    assert generate(penalised, PROMPT, max_new_tokens=LENGTH, dtype=torch.float32) == expected
    assert continuations(exact(penalised), tokenizer, [ids], [], LENGTH) == [expected]


def test_it_ends_where_the_checkpoint_says(penalised: Path) -> None:
    tokenizer, model = load_tokenizer(DEMO_MODEL), exact(penalised)
    ids = tokenizer.encode(PROMPT)
    end = greedy(model, ids, [])[5]
    model.generation_config.eos_token_id = [2, end]
    expected = greedy(model, ids, [2, end])
    assert len(expected) <= 6
    for _ in range(2):  # the end stays
        assert continuation(model, tokenizer, torch.tensor(ids), LENGTH) == tokenizer.decode(
            expected, skip_special_tokens=True
        )


def test_with_a_seed_it_draws_from_the_models_own_distribution(penalised: Path) -> None:
    """First tokens of many draws against the probabilities: as often as the likeliest should come, within 5 deviations."""
    tokenizer, model = load_tokenizer(DEMO_MODEL), exact(penalised)
    ids = torch.tensor(tokenizer.encode(PROMPT))
    with torch.no_grad():
        p_V = model(ids[None]).logits[0, -1].softmax(-1)
    token, n = int(p_V.argmax()), 300
    p = float(p_V[token])
    drawn = [continuation(model, tokenizer, ids, 1, seed) for seed in range(n)]
    count = drawn.count(tokenizer.decode([token]))
    assert p < 0.95
    assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert continuation(model, tokenizer, ids, LENGTH, 7) == continuation(model, tokenizer, ids, LENGTH, 7)
