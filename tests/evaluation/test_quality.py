"""Quality of models on text, against plain transformers and the definitions."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import stock_logits
from torch import Tensor

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import SourceError
from compressor.evaluation import predict
from compressor.evaluation.predict import Predictor, Resident, Streamed
from compressor.evaluation.quality import Quality, measure
from compressor.evaluation.score import Passage, score
from compressor.evaluation.text import Protocol, Text, load_text
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")
PROTOCOL = Protocol(96, 96, bos=False)
OPEN: dict[str, Callable[[Path], Predictor]] = {
    "streamed": lambda path: Streamed(ModelSource(path, CPU)),
    "resident": lambda path: Resident(ModelSource(path, CPU)),
}


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text("builtin", load_tokenizer(DEMO_MODEL), PROTOCOL, samples=6, split="held-out")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "int3"
    api.quantize(DEMO_MODEL, out, bits=3, method="rtn", evaluate=False, device="cpu", verify=False)
    return out


def of(text: Text, model: Path, reference: Path | None = None, path: str = "streamed", **options: int) -> Quality:
    original = OPEN[path](reference) if reference else None
    return measure([OPEN[path](model)], [text], PROTOCOL, original, **options)[0]


@torch.no_grad()
def plain(model: Path, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, S, V] by transformers alone, which loads the compressed model itself."""
    return stock_logits(model, tokens).double().log_softmax(-1)


def stacked(text: Text) -> Tensor:
    return torch.stack([passage.tokens for passage in text.passages])


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("which", ["dense", "packed"])
def test_a_model_against_itself_loses_nothing(path: str, which: str, text: Text, rounded: Path) -> None:
    model = DEMO_MODEL if which == "dense" else rounded
    same = of(text, model, model, path).overall
    assert (same.kl, same.kl_median, same.kl_p99, same.delta_nll, same.flips) == (0, 0, 0, 0, 0)
    assert same.top1_agreement == 1
    assert same.perplexity == same.reference_perplexity


def test_figures_are_those_of_an_independent_computation(text: Text, rounded: Path) -> None:
    found = of(text, rounded, DEMO_MODEL).overall
    tokens = stacked(text)
    ours, theirs = plain(rounded, tokens)[:, :-1], plain(DEMO_MODEL, tokens)[:, :-1]
    following = tokens[:, 1:, None]
    kl = (theirs.exp() * (theirs - ours)).sum(-1).flatten()
    right, right_before = (p.argmax(-1) == following[..., 0] for p in (ours, theirs))
    nll, nll_before = -ours.gather(-1, following), -theirs.gather(-1, following)
    assert found.tokens == following.numel()
    assert found.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(float(nll_before.mean())), rel=1e-4)
    assert found.delta_nll == pytest.approx(float((nll - nll_before).mean()), rel=1e-3)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_median == pytest.approx(float(kl.median()), rel=1e-3)
    assert found.kl_p99 == pytest.approx(float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=2e-3)
    assert found.flips == pytest.approx(float((right != right_before).double().mean()), abs=2e-3)


def test_streamed_equals_resident(text: Text, rounded: Path) -> None:
    streamed, resident = (of(text, rounded, DEMO_MODEL, path).overall for path in OPEN)
    assert streamed.perplexity == pytest.approx(resident.perplexity, rel=1e-5)
    assert streamed.kl == pytest.approx(resident.kl, rel=1e-4)


def test_streaming_in_several_turns_changes_nothing(text: Text, rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of(text, rounded, DEMO_MODEL)
    monkeypatch.setitem(predict.HIDDEN_BYTES, "cpu", 2 * 2 * 96 * 4 * 256)  # of two models, two samples each
    steps: list[tuple[int, int]] = []
    turns = score(
        [OPEN["streamed"](rounded)],
        text.passages,
        OPEN["streamed"](DEMO_MODEL),
        tokens_at_once=96,
        tell=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1][0] == steps[-1][1] > 2 * 4
    nll = torch.cat([s.nll for s in turns.models[0]])
    assert float(nll.mean()) == pytest.approx(whole.overall.nll, rel=1e-6)


@pytest.mark.parametrize("path", OPEN)
def test_perplexity_does_not_depend_on_the_batch_size(path: str, text: Text, rounded: Path) -> None:
    found = [score([OPEN[path](rounded)], text.passages, tokens_at_once=count) for count in (1, 200, 10**6)]
    nll = [float(torch.cat([s.nll for s in one.models[0]]).mean()) for one in found]
    assert nll[1:] == pytest.approx([nll[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("path", OPEN)
def test_passages_of_different_lengths_are_scored_as_each_alone(path: str, text: Text) -> None:
    tokens = stacked(text).flatten()
    passages = [Passage(tokens[a:b], start) for a, b, start in ((0, 70, 1), (100, 103, 2), (40, 41 + 33, 30), (7, 9, 1))]
    found = score([OPEN[path](DEMO_MODEL)], passages).models[0]
    for passage, scores in zip(passages, found, strict=True):
        alone = plain(DEMO_MODEL, passage.tokens[None])[0, passage.start - 1 : -1]
        expected = -alone.gather(-1, passage.tokens[passage.start :, None])[:, 0]
        torch.testing.assert_close(scores.nll, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(scores.best, alone.argmax(-1))


@pytest.mark.parametrize("path", OPEN)
def test_a_model_with_learned_positions_scores_more_predictions_than_it_has_positions(
    path: str, tiny: Callable[..., Path]
) -> None:
    """They share a batch, and are padded no further than the model goes."""
    model = tiny("gpt2")
    tokens = torch.randint(3, 320, (4, 63), generator=torch.Generator().manual_seed(0))
    passages = [Passage(row[: 63 - 2 * n]) for n, row in enumerate(tokens)]
    found = score([OPEN[path](model)], passages).models[0]
    for passage, scores in zip(passages, found, strict=True):
        alone = plain(model, passage.tokens[None])[0, :-1]
        torch.testing.assert_close(scores.nll, -alone.gather(-1, passage.tokens[1:, None])[:, 0], rtol=1e-4, atol=1e-5)


def test_several_models_are_judged_as_each_alone(text: Text, rounded: Path) -> None:
    both = measure(
        [Streamed(ModelSource(p, CPU)) for p in (rounded, DEMO_MODEL)], [text], PROTOCOL, OPEN["streamed"](DEMO_MODEL)
    )
    assert both[0].to_dict() == of(text, rounded, DEMO_MODEL).to_dict()
    assert both[1].overall.kl == 0


def test_parts_make_up_the_whole(text: Text, rounded: Path) -> None:
    """By text and by place: token-weighted means of the parts are the overall means."""
    other = load_text("builtin", load_tokenizer(DEMO_MODEL), PROTOCOL, samples=3, seed=5)
    renamed = Text("other", other.split, other.passages, other.bytes, other.sha256)
    quality = measure([OPEN["streamed"](rounded)], [text, renamed], PROTOCOL, OPEN["streamed"](DEMO_MODEL))[0]
    for parts in ([f for f, _ in quality.texts.values()], list(quality.positions.values())):
        assert sum(f.tokens for f in parts) == quality.overall.tokens
        for name in ("nll", "kl", "top1_agreement", "flips"):
            mean = sum(f.tokens * getattr(f, name) for f in parts) / quality.overall.tokens
            assert mean == pytest.approx(getattr(quality.overall, name), rel=1e-9)
    assert list(quality.positions) == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 95)]


def test_bits_per_byte_are_those_of_the_text(text: Text) -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    found = of(text, DEMO_MODEL).overall
    written = sum(len(tokenizer.decode(p.tokens[1:], skip_special_tokens=True).encode()) for p in text.passages)
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / math.log(2) / written, rel=1e-3)


def test_an_output_that_is_not_finite_is_refused(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OPEN["streamed"](DEMO_MODEL)
    logits = model.predict
    monkeypatch.setattr(model, "predict", lambda *a: (piece.fill_(math.nan) for piece in logits(*a)))
    with pytest.raises(SourceError, match="not finite"):
        score([model], text.passages)
