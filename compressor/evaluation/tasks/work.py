"""How much there is to do, and how long it is going to take, before it starts."""

import time
from dataclasses import dataclass

import torch

from compressor.evaluation.tasks.generation import AT_ONCE
from compressor.model.memory import parameters
from compressor.model.source import ModelSource

READ_AT_ONCE = 1024  # rows of the product that stands for reading
WEIGHTS = 2**24  # of it: more than a processor keeps close by
SECONDS = 0.2  # of measurement


@dataclass(frozen=True)
class Work:
    """For one model."""

    questions: int
    tokens: int  # read
    written: int  # tokens generated, at most
    cut: int = 0  # prompts that are too long for the model and lose their beginning

    def sentence(self, seconds: float) -> str:
        """Describe the work in words."""
        writing = f" and at most {self.written:,} to write" if self.written else ""
        time = (
            f"{seconds:.0f} s"
            if seconds < 100
            else f"{seconds / 60:.0f} min"
            if seconds < 6000
            else f"{seconds / 3600:.1f} h"
        )
        cut = f"; {self.cut:,} prompts are longer than the model takes and lose their beginning" if self.cut else ""
        return (
            f"{self.questions:,} questions, {self.tokens:,} tokens to read{writing} with each model, about {time} in all{cut}"
        )

    def seconds(self, source: ModelSource) -> float:
        """An estimate from the speed of one matrix product: 2 operations for each parameter and token.

        Leaves out attention and the time to read a model from disk, so that it is the least that can be expected of a
        large model; answers that end early make it less.
        """
        reading = self.tokens * _seconds_per_row(source, READ_AT_ONCE)
        writing = self.written * _seconds_per_row(source, AT_ONCE)
        return (reading + writing) * parameters(source) / WEIGHTS


def _seconds_per_row(source: ModelSource, rows: int) -> float:
    """Return the seconds per row of a product [rows, D] x [D, WEIGHTS / D], on the device and in the dtype of the model."""
    width = 4096
    x = torch.ones(rows, width, device=source.device, dtype=source.dtype)
    w = torch.ones(width, WEIGHTS // width, device=source.device, dtype=source.dtype)
    _ready(x @ w)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        _ready(x @ w)
        count += 1
    return (time.perf_counter() - start) / (count * rows)


def _ready(result: torch.Tensor) -> None:
    """Wait until it is computed."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
