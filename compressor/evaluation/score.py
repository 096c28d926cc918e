"""Score models on given tokens: log-likelihood, the most likely token, divergence from a reference, per prediction.

All models see the same batches in the same order and their logits are compared as they come, so that no logits are kept.

Shape suffixes: S sequence, P positions, T predictions of a passage, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.evaluation.predict import LOGITS_AT_ONCE, RESIDENT_LOGITS, Batch, Predictor
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE

PADDED_TO = 32  # lengths are rounded up to a multiple: few different shapes


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens, of which some are predicted, each from all before it."""

    tokens: Tensor  # int64 [S]
    start: int = 1  # predicted are tokens[start:]; at least 1

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.tokens)


@dataclass(frozen=True, slots=True)
class Scores:
    """A model's predictions in one passage. Tensors [T] on the CPU."""

    nll: Tensor  # fp64, nats, of the tokens that follow
    best: Tensor  # int64, the most likely tokens
    kl: Tensor | None = None  # fp64, nats, KL(reference || model)


@dataclass(frozen=True, slots=True)
class Scored:
    """By model, then by passage in the order given."""

    models: list[list[Scores]]
    reference: list[Scores] | None


def score(
    models: Sequence[Predictor],
    passages: Sequence[Passage],
    reference: Predictor | None = None,
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Score passages with several models at once.

    Args:
        models: To be judged.
        passages: Passages of any length.
        reference: Model that the others are compared with; None leaves out the divergence.
        tokens_at_once: Number of tokens that go through a model together, padding included.
        tell: Called with steps done and steps in total.

    Raises:
        SourceError: different vocabularies, or an output that is not finite.
    """
    everyone = [*models, *([reference] if reference is not None else [])]
    _check_vocabularies(everyone)
    turns = list(_turns(everyone, passages, tokens_at_once))
    total = sum(one.steps([batch for batch, _ in turn]) for turn in turns for one in everyone)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    found: list[list[Scores | None]] = [[None] * len(passages) for _ in everyone]
    for turn in turns:
        batches = [batch for batch, _ in turn]
        predictions = [one.predict(batches, step) for one in everyone]
        for batch, members in turn:
            parts = [_compare(predictions, batch, piece, reference is not None) for piece in batch.pieces]
            for which, pieces in enumerate(zip(*parts, strict=True)):
                for member, scores in zip(members, _cut(pieces, [passages[m] for m in members]), strict=True):
                    found[which][member] = scores
    scored = [[s for s in of_model if s is not None] for of_model in found]
    for one, of_model in zip(everyone, scored, strict=True):
        if not all(math.isfinite(float(s.nll.sum())) for s in of_model):
            raise SourceError(f"{one.path}: its output is not finite on the text; use --dtype float32")
    return Scored(scored[: len(models)], scored[len(models)] if reference is not None else None)


def _check_vocabularies(everyone: Sequence[Predictor]) -> None:
    for one in everyone:
        if one.vocab_size != everyone[-1].vocab_size:
            raise SourceError(
                f"{one.path}: vocabulary of {one.vocab_size} where {everyone[-1].path} has {everyone[-1].vocab_size}; "
                "they cannot be compared"
            )


def _turns(
    everyone: Sequence[Predictor], passages: Sequence[Passage], tokens_at_once: int
) -> Iterator[list[tuple[Batch, list[int]]]]:
    """Batches, with the passages in each, in groups that may be in flight together; long passages first."""
    vocabulary = everyone[0].vocab_size
    bounded = [one.tokens_in_flight for one in everyone]
    limit = min((bound // len(everyone) for bound in bounded if bound is not None), default=None)
    if None in bounded:
        tokens_at_once = min(tokens_at_once, RESIDENT_LOGITS // vocabulary)
    longest = min(one.max_positions for one in everyone)
    together = max(1, min(longest, LOGITS_AT_ONCE // vocabulary))  # positions whose hidden states make up one sequence
    turn: list[tuple[Batch, list[int]]] = []
    size = 0
    for members in _groups(passages, tokens_at_once):
        batch = _batch([passages[m] for m in members], longest, together)
        if turn and limit is not None and size + batch.tokens_BS.numel() > limit:
            yield turn
            turn, size = [], 0
        turn.append((batch, members))
        size += batch.tokens_BS.numel()
    if turn:
        yield turn


def _groups(passages: Sequence[Passage], tokens_at_once: int) -> Iterator[list[int]]:
    order = sorted(range(len(passages)), key=lambda m: -len(passages[m].tokens))
    first = 0
    while first < len(order):
        count = max(1, tokens_at_once // _padded(passages[order[first]]))
        yield order[first : first + count]
        first += count


def _padded(passage: Passage) -> int:
    """Length to which a group is padded that this passage is the longest of."""
    return -(-len(passage.tokens) // PADDED_TO) * PADDED_TO


def _batch(passages: Sequence[Passage], longest: int, positions_at_once: int) -> Batch:
    """Passages side by side, padded to a length that the model still takes."""
    length = max(len(p.tokens) for p in passages)
    if any(len(p.tokens) != length for p in passages):
        length = max(length, min(longest, _padded(max(passages, key=lambda p: len(p.tokens)))))
    tokens_BS = torch.zeros(len(passages), length, dtype=torch.long)
    for row, passage in enumerate(passages):
        tokens_BS[row, : len(passage.tokens)] = passage.tokens
    rows = torch.cat([torch.full((len(p.tokens) - p.start,), row) for row, p in enumerate(passages)])
    columns = torch.cat([torch.arange(p.start, len(p.tokens)) - 1 for p in passages])
    return Batch(tokens_BS, tuple(zip(rows.split(positions_at_once), columns.split(positions_at_once), strict=True)))


def _compare(
    predictions: Sequence[Iterator[Tensor]], batch: Batch, piece: tuple[Tensor, Tensor], with_reference: bool
) -> list[Scores]:
    """Every model's scores at one piece's positions; the reference is the last model."""
    rows, columns = piece
    following = batch.tokens_BS[rows, columns + 1]
    logp_PV = [next(one).double().log_softmax(-1) for one in predictions]
    return [
        Scores(
            -logp.gather(-1, following.to(logp.device)[:, None])[:, 0].cpu(),
            logp.argmax(-1).cpu(),
            divergence(logp_PV[-1], logp) if with_reference and which < len(logp_PV) - 1 else None,
        )
        for which, logp in enumerate(logp_PV)
    ]


def divergence(reference_PV: Tensor, logp_PV: Tensor) -> Tensor:
    """KL(reference || model) [P]. Where the reference gives no probability at all, nothing is lost."""
    share = reference_PV.exp()
    lost = share * (reference_PV - logp_PV.to(reference_PV.device))
    return torch.where(share > 0, lost, 0.0).sum(-1).cpu()


def _cut(pieces: Sequence[Scores], passages: Sequence[Passage]) -> list[Scores]:
    """The scores of a batch, passage by passage."""
    counts = [len(p.tokens) - p.start for p in passages]
    nll, best = (torch.cat(part).split(counts) for part in ([s.nll for s in pieces], [s.best for s in pieces]))
    kls = [s.kl for s in pieces if s.kl is not None]
    kl = torch.cat(kls).split(counts) if kls else [None] * len(counts)
    return [Scores(*one) for one in zip(nll, best, kl, strict=True)]
