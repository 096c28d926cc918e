"""Distillation, during or after pruning: minimise KL(original || model) over the calibration text, plus a pass's own penalty.

Forward KL alone, as in Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", NeurIPS 2024,
section 3. Gradients of a step are summed over ranks, so the result depends on their number only by rounding. The state of a
training is saved regularly, and an interrupted training resumes from it.

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

WARM = 0.05  # fraction of the steps in which the learning rate rises
OFTEN = 20  # number of steps between saves
TOGETHER = 2048  # maximum number of tokens per forward pass, but at least one sample


@dataclass(frozen=True)
class Schedule:
    """A schedule of AdamW steps.

    Args:
        steps: Number of steps.
        batch: Number of samples per step.
        lr: Peak learning rate, after warm-up. It decays to zero as a cosine.
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
        """Draw the samples of a step out of `count`."""
        return drawn(self.seed, step, self.batch, count)


def drawn(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Draw a batch out of `count` samples, without replacement."""
    return random.Random(f"{seed}-{step}").sample(range(count), min(batch, count))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, S, V], the original's log-probabilities, tokens [B, S] -> sum


def divergence(found_BSV: Tensor, wanted_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Return KL(original || model), summed over tokens."""
    return (wanted_BSV.exp() * (wanted_BSV - found_BSV.float().log_softmax(-1))).sum()


class Training:
    """The state of a training: parameters, optimizer and losses.

    Args:
        schedule: Number of steps and learning rate.
        trained: Trained parameters, or groups of them with separate learning rates, as for AdamW.
        file: File for the saved state. None saves nothing.
    """

    def __init__(
        self, schedule: Schedule, trained: Sequence[nn.Parameter] | Sequence[dict[str, Any]], file: Path | None
    ) -> None:
        self.schedule, self.file = schedule, file
        self.optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=0.0)
        self.losses: list[float] = []

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return all trained parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def done(self) -> int:
        """Return the number of steps done."""
        return len(self.losses)

    def kept(self) -> dict[str, Any]:
        """Return the saved state of an interrupted training, or an empty one."""
        if self.file is None or not self.file.exists():
            return {}
        try:
            found: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception:  # any error of torch's reader: a crash left an incomplete file
            return {}
        return found if isinstance(found, dict) and found.keys() >= {"losses", "optimizer", "trained"} else {}

    def resume(self, kept: Mapping[str, Any]) -> None:
        """Resume from a saved state, with the learning rate of its step. An empty state starts from the beginning."""
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
        """Take an optimizer step. All gradients must be set."""
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
                with new.open("wb") as file:  # given a path, torch raises its own error types
                    torch.save(state, file)
                sync(new)
                new.rename(self.file)


class Lesson:
    """The teacher: the calibration text with the original's predictions, for this rank's samples.

    Args:
        work: Context: the text and the device.
        head: Function from hidden states to logits.
        targets: Outputs [1, S, D] of the original's last block, by sample.
    """

    def __init__(self, work: Work, head: Callable[[Tensor], Tensor], targets: Mapping[int, Tensor]) -> None:
        self.work, self.head, self.targets = work, head, targets
        self.tokens_NS = work.calibration.tokens

    @classmethod
    @contextmanager
    def opened(cls, work: Work) -> Iterator["Lesson"]:
        """Compute the original's last hidden states, and hold its head in memory while the context is open."""
        ranks, tokens_NS = work.ranks, work.calibration.tokens
        mine = range(ranks.rank, len(tokens_NS), ranks.world)
        targets = dict(zip(mine, _finished(work.original, [tokens_NS[i : i + 1] for i in mine]), strict=True))
        with work.original.head() as head:
            yield cls(work, head, targets)

    def backward(self, model: Callable[..., Any], chosen: Sequence[int], lost_of: Loss = divergence) -> Tensor:
        """Add the gradients of the mean loss over tokens for this rank's samples, and return their part of the loss, fp64.

        Args:
            model: Model of transformers, or a callable with the same interface.
            chosen: Samples of all ranks.
            lost_of: Loss function.
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
        """Yield a loss on some samples, in parts that add up over ranks to the mean over tokens."""
        source, tokens_NS = self.work.source, self.tokens_NS
        for some in pieces([i for i in chosen if i in self.targets], tokens_NS.shape[1]):
            tokens_BS = tokens_NS[some].to(source.device)
            with precision(source):
                found_BSV = model(tokens_BS, use_cache=False).logits
            with torch.no_grad():
                wanted_BSV = self.head(torch.cat([self.targets[i] for i in some]).to(source.device)).float().log_softmax(-1)
            yield lost_of(found_BSV, wanted_BSV, tokens_BS) / (len(chosen) * tokens_NS.shape[1])


def expected_memory(source: ModelSource, tokens: int, trained: int) -> int:
    """Return the bytes that `distil` needs.

    It holds the weights in fp32, the trained parameters with gradients and moments, activations, and the teacher's states.

    Args:
        source: The model.
        tokens: Number of calibration tokens.
        trained: Number of trained parameters.
    """
    blocks = (source.block(index, load=False) for index in range(len(source.layers)))
    outputs = sum(block.shape(name)[0] for block in blocks for name in block.layers)
    activations = min(tokens, TOGETHER) * 4 * (2 * outputs + 4 * source.vocab_size)
    return 4 * weights(source) + 16 * trained + activations + tokens * hidden_size(source) * source.dtype.itemsize


def low_rank(source: ModelSource, rank: int) -> int:
    """Return the number of parameters of a low-rank change to every linear layer of the blocks."""
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
    """Take all remaining steps of a distillation.

    Args:
        work: Context: the text, the ranks, the progress callback.
        model: Model of transformers, or a callable with the same interface, that uses the trained parameters.
        training: State of the training. An interrupted one is resumed.
        penalty: Function of the step that returns a term added to its loss, the same on every rank.
        after: Callback after each step, with the number of steps done. Any state that it changes besides parameters must
            follow from that number and the parameters, so that a training can resume.

    Raises:
        RecipeError: The loss is not finite.
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
    """Take all remaining steps of a training. An interrupted one is resumed.

    Args:
        training: State of the training.
        ranks: Ranks over which gradients and losses are summed.
        backward: Function that adds this rank's gradients of a step and returns its part of the loss, fp64.

    Yields:
        After each step, the number of steps done and its loss.

    Raises:
        RecipeError: The loss is not finite.
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
    """Return the outputs of the last block, on the CPU."""
    states = source.first_inputs(batches)
    for block in source.blocks():
        states = [block.forward(x.to(source.device)).cpu() for x in states]
    return states


def pieces(samples: Sequence[int], length: int) -> Iterator[list[int]]:
    """Yield the samples of each forward pass."""
    size = max(1, TOGETHER // length)
    for first in range(0, len(samples), size):
        yield list(samples[first : first + size])


def precision(source: ModelSource) -> AbstractContextManager[Any]:
    """Return an autocast to bfloat16, off if the run computes in float32. float16 could underflow gradients."""
    return torch.autocast(source.device.type, torch.bfloat16, enabled=source.dtype != torch.float32)
