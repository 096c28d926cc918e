"""What lm-evaluation-harness is told of a model, against plain transformers and the harness's own transformers model."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError, RecipeError
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.generation import continuations
from compressor.evaluation.tasks.subject import Place, Subject
from compressor.model.tokenizer import load_tokenizer

pytest.importorskip("lm_eval")

PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("The capital of France is ", "Paris"),  # the space goes to the continuation
    ("", "import os\nimport sys"),  # nothing before it
    ("x", " = 1"),
    ("for i in range(10):", "\n    print(i)"),
    ("class Queue:\n    def __init__(self", "):"),
    ("import", " numpy as np, scipy, json, re, sys, os"),
]
PROMPTS = [
    "def add(a, b):\n    return",
    "import os\nimport",
    "class Queue:\n    def __init__(self",
    "x = [1, 2,",
    "if name == ",
]


def place(resident: bool) -> Place:
    return Place(torch.device("cpu"), torch.float32, resident, lambda device: 2**40)


def adapter(path: Path = DEMO_MODEL, max_length: int = 256, resident: bool = False) -> Any:
    from compressor.evaluation.tasks.adapter import Adapter

    return Adapter(Subject(path, place(resident)), Encoder(load_tokenizer(path), max_length), lambda done, total: None)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def oracle(path: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(path), device="cpu", dtype="float32", **{"batch_size": 1, **options})


@pytest.fixture(scope="module")
def with_begin(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A model whose tokenizer puts a begin token before every text."""
    path = Path(shutil.copytree(tiny("llama"), tmp_path_factory.mktemp("begin") / "model"))
    begun = PreTrainedTokenizerFast(
        tokenizer_object=tiny_models.tokenizer().backend_tokenizer.from_str(
            tiny_models.tokenizer().backend_tokenizer.to_str()
        ),
        bos_token=tiny_models.END,
        eos_token=tiny_models.END,
    )
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tiny_models.END} $A", special_tokens=[(tiny_models.END, 0)]
    )
    begun.save_pretrained(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("resident", [False, True])
def test_loglikelihoods_are_those_of_transformers(resident: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    encode = load_tokenizer(DEMO_MODEL).encode
    found = adapter(resident=resident).loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (loglikelihood, greedy) in zip(PAIRS, found, strict=True):
        before = encode(context.rstrip()) if context else [0]  # the begin token
        whole = encode(context + continuation) if context else [0, *encode(continuation)]
        logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected = sum(float(logp[n - 1, whole[n]]) for n in range(len(before), len(whole)))
        assert math.isclose(loglikelihood, expected, rel_tol=1e-4)
        assert greedy == all(int(logp[n - 1].argmax()) == whole[n] for n in range(len(before), len(whole)))


def test_greedy_is_said_of_what_the_model_would_write() -> None:
    written = adapter().generate_until(requests("generate_until", [(PROMPTS[0], {"until": [], "max_gen_toks": 4})]))[0]
    said = adapter().loglikelihood(requests("loglikelihood", [(PROMPTS[0], written), (PROMPTS[0], " zebra")]))
    assert [greedy for _, greedy in said] == [True, False]


def test_loglikelihoods_do_not_depend_on_what_is_asked_beside() -> None:
    together = adapter().loglikelihood(requests("loglikelihood", PAIRS))
    alone = [adapter().loglikelihood(requests("loglikelihood", [pair]))[0] for pair in PAIRS]
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-5)


@pytest.mark.parametrize("model", ["demo", "with_begin"])
def test_the_harness_s_own_model_says_the_same(model: str, request: pytest.FixtureRequest) -> None:
    path = DEMO_MODEL if model == "demo" else request.getfixturevalue("with_begin")
    length = 256 if model == "demo" else tiny_models.POSITIONS
    ours, its = adapter(path, length), oracle(path)
    asked = requests("loglikelihood", PAIRS)
    expected = its.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)


@pytest.mark.parametrize("model", ["demo", "with_begin"])
def test_whole_texts_are_as_likely_as_to_the_harness_s_own_model(model: str, request: pytest.FixtureRequest) -> None:
    path = DEMO_MODEL if model == "demo" else request.getfixturevalue("with_begin")
    texts = requests("loglikelihood_rolling", [("import os",), (tiny_models.TEXT[:900],), ("x = 1\n" * 60,)])
    expected = oracle(path, max_length=47).loglikelihood_rolling(
        texts, disable_tqdm=True
    )  # several windows; we feed one more
    assert adapter(path, 48).loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("until", [[], ["\n"], ["(", "\n\n"]])
def test_the_harness_s_own_model_writes_the_same(until: list[str]) -> None:
    asked = requests(
        "generate_until", [(prompt, {"until": until, "max_gen_toks": 24, "do_sample": False}) for prompt in PROMPTS]
    )
    expected = oracle(DEMO_MODEL).generate_until(asked, disable_tqdm=True)
    assert any(expected)
    for resident in (False, True):
        assert adapter(resident=resident).generate_until(asked) == expected
    assert not any(stop in text for stop in until for text in expected)


def test_a_long_prompt_loses_its_beginning() -> None:
    encoder = Encoder(load_tokenizer(DEMO_MODEL), 64)
    passage = encoder.pair("import os\n" * 100 + "import", " sys")
    whole = encoder.ids("import os\n" * 100 + "import sys")
    assert passage.tokens.tolist() == whole[-64:]
    assert passage.tokens[passage.start :].tolist() == whole[len(encoder.ids("import os\n" * 100 + "import")) :]
    assert encoder.prompt("import os\n" * 100, 24) == encoder.ids("import os\n" * 100)[-40:]


@pytest.mark.parametrize("continuation", ["", "x = 1\n" * 200])
def test_what_cannot_be_predicted_is_refused(continuation: str) -> None:
    with pytest.raises(RecipeError, match=r"tokens of its own where 1 … 63 can be judged"):
        Encoder(load_tokenizer(DEMO_MODEL), 64).pair("import os", continuation)


def test_more_to_write_than_the_model_was_made_for_is_refused() -> None:
    asked = requests("generate_until", [("x", {"until": ["\n"], "max_gen_toks": 64})])
    with pytest.raises(RecipeError, match="up to 64 tokens are to be written where the model was made for 64"):
        adapter(max_length=64).generate_until(asked)


def test_answers_drawn_at_random_are_refused() -> None:
    asked = requests("generate_until", [("x", {"until": ["\n"], "do_sample": True, "temperature": 0.8})])
    with pytest.raises(RecipeError, match="drawn at random"):
        adapter().generate_until(asked)


def test_a_tokenizer_of_another_model_is_refused(tiny: Callable[..., Path]) -> None:
    from compressor.evaluation.tasks.adapter import Adapter

    ours = Adapter(Subject(tiny("llama"), place(False)), Encoder(load_tokenizer(DEMO_MODEL), 64), lambda done, total: None)
    with pytest.raises(CalibrationError, match="tokenizer and model differ"):
        ours.loglikelihood(requests("loglikelihood", PAIRS))


def test_padding_changes_no_continuation() -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    together = continuations(model, tokenizer, prompts, ["\n\n"], 16)
    assert together == [continuations(model, tokenizer, [prompt], ["\n\n"], 16)[0] for prompt in prompts]
