"""Load the text that models are evaluated on."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.access import kind_of
from compressor.errors import CalibrationError, SourceError
from compressor.evaluation.text import Protocol, Text, load_text, make_protocol
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import Split, check_vocabulary
from compressor.pipeline.prepare import sample_length
from compressor.reading import read_json
from compressor.recipe.schema import Recipe


@dataclass(frozen=True)
class Judged:
    """The text that models are evaluated on."""

    texts: tuple[Text, ...]
    protocol: Protocol

    @property
    def tokens(self) -> int:
        """Return the number of tokens that go through the models."""
        return sum(passage.tokens.numel() for text in self.texts for passage in text.passages)


def load_evaluation(recipe: Recipe, source: ModelSource) -> Judged | None:
    """Return the text that a recipe has the result evaluated on; None if it asks for no evaluation."""
    spec, judge = recipe.calibration, recipe.evaluation
    if judge is None:
        return None
    named = (judge.source,) if isinstance(judge.source, str) else judge.source or (spec.source,)
    length = sample_length(judge.seq_len or sample_length(spec.seq_len, source), source)
    protocol = make_protocol(load_tokenizer(source.path), length, judge.stride, judge.bos)
    return judged(source, named, protocol, judge.samples, spec.seed, {spec.source})


def judged(
    model: ModelSource,
    sources: Sequence[str],
    protocol: Protocol,
    samples: int,
    seed: int = 0,
    calibrated_on: Set[str | None] = frozenset(),
) -> Judged:
    """Texts to judge a model on: whole ones, but the held-out part of those that it was calibrated on."""
    tokenizer = load_tokenizer(model.path)
    known = {_place(name) for name in calibrated_on if name is not None}
    texts = []
    for name in dict.fromkeys(sources):
        split: Split = "held-out" if _place(name) in known else "all"
        texts.append(load_text(name, tokenizer, protocol, samples=samples, seed=seed, split=split))
        check_vocabulary(torch.cat([p.tokens for p in texts[-1].passages]), model.vocab_size, name)
    return Judged(tuple(texts), protocol)


def calibration_source(model: Path) -> str | None:
    """Where the text came from that a model was calibrated on, if its report tells."""
    try:
        found = read_json(model / "report.json", SourceError)["calibration"]["source"]
    except (SourceError, LookupError, TypeError):
        return None
    return str(found)


def _place(source: str) -> str:
    """The same for every way to write the same file."""
    return str(Path(source).resolve()) if kind_of(Path(source), CalibrationError) == "file" else source
