"""Training what pruning has left, or while it prunes, towards the original's predictions: KL(original || model) over the
calibration text, and whatever a pass adds to that.

Forward KL alone as in Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", NeurIPS 2024,
section 3. Gradients of a step are summed over ranks, so what comes out does not depend on their number but for rounding.
A training is put down now and then, and goes on from there.

Shape suffixes: N samples, B some of them, S sequence, D hidden, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from compressor.errors import RecipeError
from compressor.model.journal import sync, writing
from compressor.model.memory import parameters as weights
from compressor.model.source import ModelSource
from compressor.pipeline.job import Event
from compressor.pipeline.memory_estimate import hidden_size
from compressor.pipeline.prune_stage import Work
from compressor.pipeline.ranks import Ranks

WARM = 0.05  # of the steps, in which the learning rate rises
OFTEN = 20  # steps after which a training is put down
TOGETHER = 2048  # tokens that go through the model together


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW.

    Args:
        steps: How many.
        batch: Samples in each.
        lr: Highest learning rate; it rises to that and falls to zero with a cosine.
        seed: Seed of the order of samples.
    """

    steps: int
    batch: int
    lr: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr: {self.lr} is not above 0 and at most 1")

    def samples(self, step: int, count: int) -> list[int]:
        """Return the samples of a step, out of a number of them."""
        return drawn(self.seed, step, self.batch, count)


def drawn(seed: int, step: int, batch: int, count: int) -> list[int]:
    """A batch out of so many samples."""
    return random.Random(f"{seed}-{step}").sample(range(count), min(batch, count))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, S, V], the original's log-probabilities, tokens [B, S] -> sum


def divergence(found_BSV: Tensor, wanted_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """KL(original || model), summed over tokens."""
    return (wanted_BSV.exp() * (wanted_BSV - found_BSV.float().log_softmax(-1))).sum()


class Training:
    """Parameters on their way.

    Args:
        schedule: How many steps, how fast.
        trained: Trained parameters, or groups of them with learning rates of their own, as AdamW takes them.
        file: Where it is put down; None does not.
    """

    def __init__(
        self, schedule: Schedule, trained: Sequence[nn.Parameter] | Sequence[dict[str, Any]], file: Path | None
    ) -> None:
        self.schedule, self.file = schedule, file
        self.optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=0.0)
        self.losses: list[float] = []

    @property
    def trained(self) -> list[nn.Parameter]:
        """All that changes."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def done(self) -> int:
        """Steps."""
        return len(self.losses)

    def kept(self) -> dict[str, Any]:
        """Return the state that an interrupted training has left; nothing at the start."""
        if self.file is None or not self.file.exists():
            return {}
        try:
            found: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception:  # whatever torch's reader makes of it: the machine went down before all of it was on the disk
            return {}
        return found if isinstance(found, dict) and found.keys() >= {"losses", "optimizer", "trained"} else {}

    def resume(self, kept: Mapping[str, Any]) -> None:
        """Go on from there, with the learning rate as it was to become."""
        if kept:
            self.losses = list(kept["losses"])
            self.optimizer.load_state_dict(kept["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(self.trained, kept["trained"], strict=True):
                    parameter.copy_(value)
        steps = self.schedule.steps
        warm = max(1, round(WARM * steps))
        self.rates = get_cosine_schedule_with_warmup(self.optimizer, warm, steps, last_epoch=self.done - 1)

    def step(self, loss: float) -> None:
        """Follow the gradients, which are all there."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        if self.file is not None and self.done % OFTEN == 0 and self.done < self.schedule.steps:
            state = {
                "losses": self.losses,
                "optimizer": self.optimizer.state_dict(),
                "trained": [p.detach() for p in self.trained],
            }
            new = self.file.with_suffix(".new")
            with writing(new):
                with new.open("wb") as file:  # torch, given a path, has errors of its own
                    torch.save(state, file)
                sync(new)
                new.rename(self.file)


class Lesson:
    """The calibration text with what the original makes of it, as much of it as is this rank's.

    Args:
        work: The text, and where to compute.
        head: Makes logits of hidden states.
        targets: Hidden states [1, S, D] that leave the original's last block, by sample.
    """

    def __init__(self, work: Work, head: Callable[[Tensor], Tensor], targets: Mapping[int, Tensor]) -> None:
        self.work, self.head, self.targets = work, head, targets
        self.tokens_NS = work.calibration.tokens

    @classmethod
    @contextmanager
    def opened(cls, work: Work) -> Iterator["Lesson"]:
        """With the original's last hidden states made, and its head in memory while it is open."""
        ranks, tokens_NS = work.ranks, work.calibration.tokens
        mine = range(ranks.rank, len(tokens_NS), ranks.world)
        targets = dict(zip(mine, _finished(work.original, [tokens_NS[i : i + 1] for i in mine]), strict=True))
        with work.original.head() as head:
            yield cls(work, head, targets)

    def backward(self, model: Callable[..., Any], chosen: Sequence[int], lost_of: Loss = divergence) -> Tensor:
        """Add the gradients of a mean over tokens, as far as they are of this rank's samples; the loss, fp64.

        Args:
            model: Model of transformers, or a callable that computes as one.
            chosen: Samples, of all ranks.
            lost_of: Loss that the mean is taken of.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.work.source.device)
        for lost in self._lost(model, chosen, lost_of):
            lost.backward()
            loss += lost.detach()
        return loss

    @torch.no_grad()
    def loss(self, model: Callable[..., Any]) -> float:
        """Return the mean loss on all samples of all ranks."""
        lost = self._lost(model, range(len(self.tokens_NS)), divergence)
        total = sum(lost, torch.zeros((), dtype=torch.float64, device=self.work.source.device))
        self.work.ranks.sum_([total])
        return float(total)

    def _lost(self, model: Callable[..., Any], chosen: Sequence[int], lost_of: Loss) -> Iterator[Tensor]:
        """A loss on some samples, in parts that add up over ranks to the mean over tokens."""
        source, tokens_NS = self.work.source, self.tokens_NS
        for some in pieces([i for i in chosen if i in self.targets], tokens_NS.shape[1]):
            tokens_BS = tokens_NS[some].to(source.device)
            with precision(source):
                found_BSV = model(tokens_BS, use_cache=False).logits
            with torch.no_grad():
                wanted_BSV = self.head(torch.cat([self.targets[i] for i in some]).to(source.device)).float().log_softmax(-1)
            yield lost_of(found_BSV, wanted_BSV, tokens_BS) / (len(chosen) * tokens_NS.shape[1])


def expected_memory(source: ModelSource, tokens: int, trained: int) -> int:
    """Bytes that `distil` takes: all weights in fp32, what is trained with gradients and moments, activations, the lesson.

    Args:
        source: The model.
        tokens: Number of calibration tokens.
        trained: Numbers.
    """
    blocks = (source.block(index, load=False) for index in range(len(source.layers)))
    outputs = sum(block.shape(name)[0] for block in blocks for name in block.layers)
    activations = min(tokens, TOGETHER) * 4 * (2 * outputs + 4 * source.vocab_size)
    return 4 * weights(source) + 16 * trained + activations + tokens * hidden_size(source) * source.dtype.itemsize


def low_rank(source: ModelSource, rank: int) -> int:
    """Numbers of a change of a rank to every linear layer of the blocks."""
    blocks = (source.block(index, load=False) for index in range(len(source.layers)))
    return rank * sum(sum(block.shape(name)) for block in blocks for name in block.layers)


def distil(
    work: Work,
    model: Callable[..., Any],
    training: Training,
    *,
    penalty: Callable[[int], Tensor] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Take all steps that are left.

    Args:
        work: Text, ranks, who is told.
        model: Model of transformers, or a callable that computes as one, with the trained parameters.
        training: Its parameters; gone on with if it was broken off.
        penalty: Added to the loss of a step, the same on every rank.
        after: Called with the number of steps done after each; what it changes besides parameters has to follow from that
            number and the parameters, for a training that goes on.

    Raises:
        RecipeError: the loss is no number.
    """
    with Lesson.opened(work) as lesson:

        def backward(step: int) -> Tensor:
            loss = lesson.backward(model, training.schedule.samples(step, len(lesson.tokens_NS)))
            if penalty is not None:
                (penalty(step) / work.ranks.world).backward()
            return loss

        for done, loss in descend(training, work.ranks, backward):
            if after is not None:
                after(done)
            work.tell(Event("train", done, training.schedule.steps, error=loss))


def descend(training: Training, ranks: Ranks, backward: Callable[[int], Tensor]) -> Iterator[tuple[int, float]]:
    """Take all steps that are left, from where a training that was broken off has come to.

    Args:
        training: The parameters.
        ranks: Over which gradients and losses are summed.
        backward: Adds the gradients of a step, as far as they are this rank's; the loss, fp64.

    Yields: after each step, how many are done and its loss.

    Raises:
        RecipeError: the loss is no number.
    """
    training.resume(ranks.agree(training.kept()))
    for step in range(training.done, training.schedule.steps):
        loss = backward(step)
        for parameter in training.trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ranks.sum_([loss, *(p.grad for p in training.trained if p.grad is not None)])
        if not torch.isfinite(loss):
            raise RecipeError(
                f"the loss of training step {step + 1} is {float(loss)}; lower lr, which is {training.schedule.lr:g}"
            )
        training.step(float(loss))
        yield step + 1, float(loss)


@torch.no_grad()
def _finished(source: ModelSource, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states that leave the last block, on the CPU."""
    states = source.first_inputs(batches)
    for block in source.blocks():
        states = [block.forward(x.to(source.device)).cpu() for x in states]
    return states


def pieces(samples: Sequence[int], length: int) -> Iterator[list[int]]:
    """Samples that go through the model together."""
    size = max(1, TOGETHER // length)
    for first in range(0, len(samples), size):
        yield list(samples[first : first + size])


def precision(source: ModelSource) -> AbstractContextManager[Any]:
    """Products in bfloat16 unless the run computes in float32: gradients may be too small for float16. Weights stay."""
    return torch.autocast(source.device.type, torch.bfloat16, enabled=source.dtype != torch.float32)
