"""Perplexity of a model, and its divergence from a reference, both streamed block by block.

Protocol: samples of exactly S tokens cut from joined documents (compressor.calibration.data); every token but the first of
a sample is predicted from those before it in the sample. Perplexity is exp of the mean negative log-likelihood, KL is the
mean over positions of KL(reference || model) in nats, top-1 agreement the share of positions where both put the same token
first.

Shape suffixes: B samples of a batch, S sequence, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.model.source import ModelSource

LARGEST = 700.0  # exponent that still gives a finite perplexity
POSITIONS_AT_ONCE = 512  # compared together: bounds the fp64 copies of their logits


@dataclass(frozen=True)
class Quality:
    """The figures, and on what they were measured."""

    perplexity: float
    tokens: int  # predictions scored
    seq_len: int
    source: str
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure(
    model: ModelSource,
    batches: Sequence[Tensor],
    what: str,
    reference: ModelSource | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Measure a model on tokens.

    Args:
        model: To be judged.
        batches: Tokens, int64 [B, S].
        what: The name of the text, for the record.
        reference: The original; None leaves out what needs one.
        tell: Called with blocks done and blocks in total.

    Raises:
        SourceError: the two have different vocabularies.
    """
    if reference is not None and reference.vocab_size != model.vocab_size:
        raise SourceError(
            f"{model.path}: vocabulary of {model.vocab_size} where {reference.path} has {reference.vocab_size}; "
            "they cannot be compared"
        )
    total = len(model.layers) + (len(reference.layers) if reference is not None else 0)
    hidden = final_hidden(model, batches, lambda done: tell(done, total))
    reference_hidden = []
    if reference is not None:
        reference_hidden = final_hidden(reference, batches, lambda done: tell(len(model.layers) + done, total))
    sums = _Sums()
    predictions = model.logits(hidden)
    targets = reference.logits(reference_hidden) if reference is not None else None
    for tokens, logits in zip(batches, predictions, strict=True):
        sums.add(logits, tokens.to(logits.device), next(targets) if targets is not None else None)
    if not math.isfinite(sums.nll + sums.reference_nll):
        raise SourceError(f"{model.path}: its output, or the original's, is not finite on {what}; use --dtype float32")
    return Quality(
        perplexity=math.exp(min(sums.nll / sums.count, LARGEST)),
        tokens=sums.count,
        seq_len=batches[0].shape[1],
        source=what,
        reference_perplexity=math.exp(min(sums.reference_nll / sums.count, LARGEST)) if reference is not None else None,
        kl=sums.kl / sums.count if reference is not None else None,
        top1_agreement=sums.agree / sums.count if reference is not None else None,
    )


@torch.no_grad()
def final_hidden(model: ModelSource, batches: Sequence[Tensor], tell: Callable[[int], None]) -> list[Tensor]:
    """The last block's outputs [B, S, D], on the CPU, for batches of tokens."""
    hidden = model.first_inputs(batches)
    for block in model.blocks():
        for i, states in enumerate(hidden):
            hidden[i] = block.forward(states.to(model.device)).cpu()
        tell(block.index + 1)
    return hidden


class _Sums:
    """Running sums over predictions."""

    def __init__(self) -> None:
        self.count = self.agree = 0
        self.nll = self.reference_nll = self.kl = 0.0

    def add(self, logits_BSV: Tensor, tokens_BS: Tensor, reference_BSV: Tensor | None) -> None:
        """Score the predictions of one batch."""
        for where, following in _positions(tokens_BS):
            logp = logits_BSV[where].double().log_softmax(-1)
            self.nll -= float(logp.gather(-1, following[:, None]).sum())
            self.count += len(following)
            if reference_BSV is not None:
                other = reference_BSV[where].double().log_softmax(-1)
                self.reference_nll -= float(other.gather(-1, following[:, None]).sum())
                self.kl += float((other.exp() * (other - logp)).sum())
                self.agree += int((other.argmax(-1) == logp.argmax(-1)).sum())


def _positions(tokens_BS: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Where predictions stand, some positions of a sample at a time, and what followed them."""
    for sample, tokens in enumerate(tokens_BS):
        for start in range(0, len(tokens) - 1, POSITIONS_AT_ONCE):
            following = tokens[start + 1 : start + 1 + POSITIONS_AT_ONCE]
            yield (sample, slice(start, start + len(following))), following
