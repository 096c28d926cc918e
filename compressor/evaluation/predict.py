"""A model as a function from tokens to logits, at the positions that are asked for: streamed block by block, or resident.

Passages are padded on the right: a causal model's prediction does not depend on what follows it, so padding changes nothing.

Shape suffixes: B passages of a batch, S sequence, D hidden, P positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressor.model.source import ModelSource

LOGITS_AT_ONCE = 2**24  # values: 134 MB in fp64
RESIDENT_LOGITS = 2**28  # values of a whole batch: 1 GiB in fp32
HIDDEN_BYTES = {"cpu": 2**29, "cuda": 2**33}  # that wait between two blocks, on the host; more text takes several turns


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens that go through a model together."""

    tokens_BS: Tensor  # int64, padded on the right
    pieces: tuple[tuple[Tensor, Tensor], ...]  # (rows [P], columns [P]) of the predictions that are wanted, in order


class Predictor(Protocol):
    """Something that predicts tokens."""

    @property
    def path(self) -> Path: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...  # the longest sequence it can be given
    @property
    def tokens_in_flight(self) -> int | None: ...  # most tokens for one call of `predict`; None for any number
    def steps(self, batches: Sequence[Batch]) -> int: ...  # times that `predict` calls `step`
    def predict(self, batches: Sequence[Batch], step: Callable[[], None]) -> Iterator[Tensor]:
        """Logits [P, V] of every piece of every batch, in order."""


class Streamed:
    """One block in memory at a time: for models of any size. Reads the model once for `tokens_in_flight` tokens."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    @property
    def max_positions(self) -> int:
        return self.source.max_positions

    @property
    def tokens_in_flight(self) -> int | None:
        width = int(self.source.model.config.get_text_config().hidden_size)
        return max(1, HIDDEN_BYTES[self.source.device.type] // (width * self.source.dtype.itemsize))

    def steps(self, batches: Sequence[Batch]) -> int:
        return len(self.source.layers)

    def predict(self, batches: Sequence[Batch], step: Callable[[], None]) -> Iterator[Tensor]:
        hidden = final_hidden(self.source, [batch.tokens_BS for batch in batches], step)
        wanted = (
            states_BSD[piece][None] for states_BSD, batch in zip(hidden, batches, strict=True) for piece in batch.pieces
        )
        for logits_1PV in self.source.logits(wanted):
            yield logits_1PV[0]


class Resident:
    """The whole model in memory, dense."""

    def __init__(self, source: ModelSource) -> None:
        self.path, self.device = source.path, source.device
        self.vocab_size, self.max_positions = source.vocab_size, source.max_positions
        self.tokens_in_flight: int | None = None
        self.model = source.whole()

    def steps(self, batches: Sequence[Batch]) -> int:
        return len(batches)

    @torch.no_grad()
    def predict(self, batches: Sequence[Batch], step: Callable[[], None]) -> Iterator[Tensor]:
        for batch in batches:
            logits_BSV = self.model(batch.tokens_BS.to(self.device), use_cache=False).logits
            step()
            for rows, columns in batch.pieces:
                yield logits_BSV[rows, columns]


@torch.no_grad()
def final_hidden(source: ModelSource, batches: Sequence[Tensor], step: Callable[[], None]) -> list[Tensor]:
    """The last block's outputs [B, S, D], on the CPU, for batches of tokens."""
    hidden = source.first_inputs(batches)
    for block in source.blocks():
        for i, states in enumerate(hidden):
            hidden[i] = block.forward(states.to(source.device)).cpu()
        step()
    source.forget_arguments()
    return hidden
