import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.calibration.data import load_samples, load_tokenizer
from compressor.evaluation.quality import measure
from compressor.model.source import ModelSource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text():
    return load_samples("builtin", load_tokenizer(DEMO_MODEL), samples=6, seq_len=96, split="held-out")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    out = tmp_path_factory.mktemp("rounded") / "int3"
    api.quantize(DEMO_MODEL, out, bits=3, method="rtn", evaluate=False, device="cpu")
    return out


@torch.no_grad()
def plain(model, tokens):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits[:, :-1].double().log_softmax(-1)


def test_a_model_against_itself_loses_nothing(text):
    same = measure(ModelSource(DEMO_MODEL, CPU), text.batches(192), "text", ModelSource(DEMO_MODEL, CPU))
    assert same.kl == 0
    assert same.top1_agreement == 1
    assert same.perplexity == same.reference_perplexity


def test_figures_are_those_of_an_independent_computation(text, rounded):
    """By stock transformers, which loads the compressed model itself, and the definitions."""
    found = measure(ModelSource(rounded, CPU), text.batches(192), "text", ModelSource(DEMO_MODEL, CPU))
    ours, theirs = plain(rounded, text.tokens), plain(DEMO_MODEL, text.tokens)
    following = text.tokens[:, 1:, None]
    assert found.tokens == following.numel()
    assert found.perplexity == pytest.approx(math.exp(-float(ours.gather(-1, following).mean())), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(-float(theirs.gather(-1, following).mean())), rel=1e-4)
    assert found.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=2e-3)


def test_figures_do_not_depend_on_the_batch_size(text, rounded):
    one, all_ = (
        measure(ModelSource(rounded, CPU), text.batches(n), "text", ModelSource(DEMO_MODEL, CPU)) for n in (1, 10**6)
    )
    assert one.perplexity == pytest.approx(all_.perplexity, rel=1e-5)
    assert one.kl == pytest.approx(all_.kl, rel=1e-4)
