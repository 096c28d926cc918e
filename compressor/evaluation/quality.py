"""Perplexity of models on texts, and their divergence from a reference: overall, by text and by place in the sample.

Every prediction counts the same. Perplexity is exp of the mean negative log-likelihood; KL is KL(reference || model) in
nats, of which mean, median and 99th percentile are given; top-1 agreement is the share of predictions where both models put
the same token first, flips the share where exactly one of them puts the right one first. Bits per byte is the
log-likelihood of the text over its UTF-8 bytes: unlike perplexity it can be compared between tokenizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.evaluation.predict import Predictor
from compressor.evaluation.score import Passage, Scored, Scores, score
from compressor.evaluation.text import Protocol, Text

LARGEST = 700.0  # exponent that still gives a finite perplexity


@dataclass(frozen=True)
class Figures:
    """Over some predictions. What needs a reference is None without one."""

    tokens: int  # predictions
    nll: float  # mean, nats
    perplexity: float
    bits_per_byte: float | None  # None where there is no text, as in a part of a sample
    reference_nll: float | None = None
    reference_perplexity: float | None = None
    reference_bits_per_byte: float | None = None
    delta_nll: float | None = None
    kl: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    flips: float | None = None


@dataclass(frozen=True)
class Quality:
    """A model's figures, and on what they were measured."""

    overall: Figures
    texts: dict[str, tuple[Figures, Text]]  # by name
    positions: dict[tuple[int, int], Figures]  # by first and last place in the sample; the first token's place is 0
    protocol: Protocol
    dtype: str  # of the computation

    @property
    def perplexity(self) -> float:
        """Over all texts."""
        return self.overall.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the overall figures at the top."""
        return {
            **asdict(self.overall),
            "source": ", ".join(self.texts),
            "seq_len": self.protocol.seq_len,
            "protocol": {**self.protocol.to_dict(), "dtype": self.dtype},
            "texts": [{"name": t.name, "split": t.split, "sha256": t.sha256, **asdict(f)} for f, t in self.texts.values()],
            "positions": [{"first": a, "last": b, **asdict(f)} for (a, b), f in self.positions.items()],
        }


def measure(
    models: Sequence[Predictor],
    texts: Sequence[Text],
    protocol: Protocol,
    reference: Predictor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Quality]:
    """The quality of each model, all measured in one go.

    Args:
        models: To be judged.
        texts: With different names.
        protocol: Protocol by which the texts were cut, for the record.
        reference: The original; None leaves out what needs one.
        dtype: Dtype of the computation, for the record.
        tell: Called with steps done and steps in total.

    Raises:
        SourceError: see score.
    """
    passages = [passage for text in texts for passage in text.passages]
    scored = score(models, passages, reference, tell=tell)
    return [_quality(which, scored, texts, protocol, str(dtype).removeprefix("torch.")) for which in range(len(models))]


def _quality(which: int, scored: Scored, texts: Sequence[Text], protocol: Protocol, dtype: str) -> Quality:
    rows: list[_Predictions] = []
    by_text: dict[str, tuple[Figures, Text]] = {}
    first = 0
    for text in texts:
        own = slice(first, first + len(text.passages))
        reference = scored.reference[own] if scored.reference is not None else None
        rows.append(_Predictions.of(text.passages, scored.models[which][own], reference))
        by_text[text.name] = (rows[-1].figures(text.bytes), text)
        first = own.stop
    everything = _Predictions.joined(rows)
    places: dict[tuple[int, int], Figures] = {}
    edge = 1
    while edge <= int(everything.place.max()):
        inside = (everything.place >= edge) & (everything.place < 2 * edge)
        if inside.any():
            places[edge, int(everything.place[inside].max())] = everything.where(inside).figures(None)
        edge *= 2
    return Quality(everything.figures(sum(text.bytes for text in texts)), by_text, places, protocol, dtype)


@dataclass(frozen=True, slots=True)
class _Predictions:
    """Tensors with one value for each prediction."""

    place: Tensor  # of the predicted token in its sample
    nll: Tensor
    right: Tensor  # whether the most likely token is what follows
    reference_nll: Tensor | None
    reference_right: Tensor | None
    kl: Tensor | None
    agree: Tensor | None

    @classmethod
    def of(cls, passages: Sequence[Passage], scores: Sequence[Scores], reference: Sequence[Scores] | None) -> "_Predictions":
        following = torch.cat([p.tokens[p.start :] for p in passages])
        place = torch.cat([torch.arange(p.start, len(p.tokens)) for p in passages])
        nll, best = torch.cat([s.nll for s in scores]), torch.cat([s.best for s in scores])
        if reference is None:
            return cls(place, nll, best == following, None, None, None, None)
        other = torch.cat([s.best for s in reference])
        kl = torch.cat([s.kl for s in scores if s.kl is not None])
        other_nll = torch.cat([s.nll for s in reference])
        return cls(place, nll, best == following, other_nll, other == following, kl, other == best)

    @classmethod
    def joined(cls, parts: Sequence["_Predictions"]) -> "_Predictions":
        def cat(name: str) -> Any:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return cls(*(cat(name) for name in cls.__slots__))

    def where(self, mask: Tensor) -> "_Predictions":
        """Only some predictions."""
        present = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        return replace(self, **{name: tensor[mask] for name, tensor in present.items()})

    def figures(self, text_bytes: int | None) -> Figures:
        """Their figures, `text_bytes` being the length of what they predict."""
        mean = float(self.nll.mean())
        alone = Figures(len(self.nll), mean, _exp(mean), _bits(self.nll, text_bytes))
        if self.reference_nll is None or self.kl is None or self.agree is None or self.reference_right is None:
            return alone
        other = float(self.reference_nll.mean())
        return replace(
            alone,
            reference_nll=other,
            reference_perplexity=_exp(other),
            reference_bits_per_byte=_bits(self.reference_nll, text_bytes),
            delta_nll=float((self.nll - self.reference_nll).mean()),
            kl=float(self.kl.mean()),
            kl_median=float(self.kl.median()),
            kl_p99=_percentile(self.kl, 99),
            top1_agreement=float(self.agree.double().mean()),
            flips=float((self.right != self.reference_right).double().mean()),
        )


def _exp(nll: float) -> float:
    return math.exp(min(nll, LARGEST))


def _bits(nll: Tensor, text_bytes: int | None) -> float | None:
    return float(nll.sum()) / math.log(2) / text_bytes if text_bytes else None


def _percentile(values: Tensor, percent: int) -> float:
    """The smallest value that `percent` of 100 values do not exceed."""
    return float(values.kthvalue(max(1, math.ceil(len(values) * percent / 100))).values)
