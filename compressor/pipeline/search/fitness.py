"""Score complete compressed models by the KL divergence from the dense model, for many choices of levels at once.

Choices are computed block by block. Choices that agree up to a block share their hidden states there, which are computed
once. So choices that differ from each other in a single unit cost half as much as one by one. Blocks are held in memory or
read from disk. From disk, each is read once for all choices of a turn; `STATES` limits the choices in a turn.

The dense model's predictions are stored as the K largest probabilities per token and one probability for all other tokens.
By the data processing inequality, KL over these is never more than the full KL. With renormalized probabilities, as in
EvoPress' `sparse_kl`, it could be.

Shape suffixes: N samples, S sequence, D hidden, K kept probabilities, V vocabulary.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model.block import Block, Trial
from compressor.model.source import ModelSource
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.levels import Choice, Levels, Unit

KEPT = 512  # probabilities stored per token
TOGETHER = 2048  # tokens that a block processes at once
STATES = 2**30  # largest number of bytes of hidden states between two blocks


@dataclass(frozen=True, slots=True)
class Teacher:
    """The dense model's predictions for one batch."""

    top_NSK: Tensor  # largest log-probabilities, fp32
    at_NSK: Tensor  # token ids of these
    rest_NS: Tensor  # log-probability of all other tokens together; -inf if there are none

    @classmethod
    def of(cls, logits_NSV: Tensor, kept: int = KEPT) -> "Teacher":
        """Make predictions from the dense model's logits."""
        logp = logits_NSV.float().log_softmax(-1)
        top, at = logp.topk(min(kept, logp.shape[-1]), dim=-1)
        return cls(top, at, _rest(logp, at))

    @classmethod
    def joined(cls, parts: Sequence["Teacher"]) -> "Teacher":
        """Join the predictions for several batches."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def of_samples(self, samples: Sequence[int]) -> "Teacher":
        """Select the predictions for some samples."""
        chosen = list(samples)
        return Teacher(self.top_NSK[chosen], self.at_NSK[chosen], self.rest_NS[chosen])

    def divergence(self, logits_NSV: Tensor) -> Tensor:
        """Return KL(dense || candidate) [N, S], fp64, in nats. All tokens except the K kept ones count as one."""
        logq = logits_NSV.float().log_softmax(-1)
        top = self.top_NSK.double()
        lost = (top.exp() * (top - logq.gather(-1, self.at_NSK))).sum(-1)
        rest = self.rest_NS.double()
        others = rest.exp() * (rest - _rest(logq, self.at_NSK))
        return lost + torch.where(rest > -torch.inf, others, 0.0)


def _rest(logp_NSV: Tensor, at_NSK: Tensor) -> Tensor:
    """Return the log-probability of all tokens except some."""
    return logp_NSV.scatter(-1, at_NSK, -torch.inf).logsumexp(-1)


Blocks = Callable[[], Iterable[Block]]
Head = Callable[[], AbstractContextManager[Callable[[Tensor], Tensor]]]


@contextmanager
def opened(source: ModelSource, *, resident: bool) -> Iterator[tuple[Blocks, Head]]:
    """Open a model's blocks and its head: held in memory while the context is open, or read each time they are used."""
    if not resident:
        yield source.blocks, source.head
        return
    held = [source.block(index) for index in range(len(source.layers))]
    with source.head() as head:
        yield lambda: held, lambda: nullcontext(head)


class Fitness:
    """The KL divergence of choices. Call it with choices and the numbers of samples; lower is better.

    Args:
        source: The dense model.
        model: Its blocks and its head, from `opened`.
        levels: Levels to choose among.
        samples_NS: Tokens, the same on every rank; sample i is computed on rank i mod world.
        ranks: The ranks that share the work.
        kept: Bytes of dequantized levels to cache for later calls.
    """

    def __init__(
        self,
        source: ModelSource,
        model: tuple[Blocks, Head],
        levels: Levels,
        samples_NS: Tensor,
        ranks: Ranks,
        kept: int = 0,
    ) -> None:
        self.source, self.levels, self.ranks = source, levels, ranks
        self.blocks, self.head = model
        self.units, self.samples, self.seq_len = levels.units, len(samples_NS), samples_NS.shape[1]
        self._mine = range(ranks.rank, len(samples_NS), ranks.world)
        self._inputs = source.first_inputs([samples_NS[i : i + 1] for i in self._mine])
        largest = max(unit.weights for unit in self.units) * source.dtype.itemsize
        self._trial = functools.lru_cache(maxsize=max(kept // largest, len(self.units) // len(source.layers)))(self._made)
        started = time.monotonic()
        self._teacher = self._predicted()
        self.pace = ranks.agree((time.monotonic() - started) / self.samples)  # about the seconds per sample and choice

    def __call__(self, choices: Sequence[Choice], samples: Sequence[int]) -> list[float]:
        """Return the mean KL divergence of each choice over all tokens of some samples, in nats."""
        mine = [place for place, sample in enumerate(self._mine) if sample in set(samples)]
        total = torch.zeros(len(choices), dtype=torch.float64, device=self.source.device)
        waiting = 2 * sum(self._inputs[place].nbytes for place in mine)  # input and output of a block
        together = max(1, STATES // max(waiting, 1))
        order = sorted(range(len(choices)), key=choices.__getitem__)  # choices with a long common prefix share a turn
        for first in range(0, len(order), together):
            turn = order[first : first + together]
            total[turn] = self._totals([choices[i] for i in turn], mine)
        self.ranks.sum_([total])
        return [float(kl) for kl in total / (len(set(samples)) * self.seq_len)]

    @torch.no_grad()
    def _totals(self, choices: Sequence[Choice], mine: Sequence[int]) -> Tensor:
        """Return the KL divergence of each choice, summed over the tokens of this rank's samples."""
        batches = _batches(mine, max(1, TOGETHER // self.seq_len))
        states: Mapping[Choice, list[Tensor]] = {(): [torch.cat([self._inputs[i] for i in batch]) for batch in batches]}
        known = 0
        for block in self.blocks():
            units = [unit for unit in self.units if unit.block == block.index]
            known += len(units)
            states = self._advanced(block, units, states, dict.fromkeys(choice[:known] for choice in choices))
        found = {}
        with self.head() as head:
            for choice, hidden in states.items():
                total = torch.zeros((), dtype=torch.float64, device=self.source.device)
                for batch, x in zip(batches, hidden, strict=True):
                    assert self._teacher is not None
                    total += self._teacher.of_samples(batch).divergence(head(x.to(self.source.device))).sum()
                found[choice] = total
        return torch.stack([found[choice] for choice in choices])

    def _advanced(
        self, block: Block, units: Sequence[Unit], states: Mapping[Choice, list[Tensor]], choices: Iterable[Choice]
    ) -> dict[Choice, list[Tensor]]:
        """Return the hidden states after a block, by the levels of all units up to and including it."""
        new: dict[Choice, list[Tensor]] = {}
        for choice in choices:
            before, own = choice[: len(choice) - len(units)], choice[len(choice) - len(units) :]
            forward = block.trying(*(self._trial(unit.name, level) for unit, level in zip(units, own, strict=True)))
            new[choice] = [forward(x.to(self.source.device)).to(x.device) for x in states[before]]
        return new

    def _made(self, unit: str, level: int) -> Trial:
        return self.levels.trial(unit, level, self.source.device, self.source.dtype)

    @torch.no_grad()
    def _predicted(self) -> Teacher | None:
        """Return the dense model's predictions for all samples of this rank; None if it has no samples."""
        states = list(self._inputs)
        for block in self.blocks():
            states = [block.forward(x.to(self.source.device)).to(x.device) for x in states]
        with self.head() as head:
            parts = [Teacher.of(head(x.to(self.source.device))) for x in states]
        return Teacher.joined(parts) if parts else None


def _batches(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
