"""A model whose answers are asked for: opened when its turn comes, so that two need not be in memory at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compressor.evaluation.predict import Predictor, Resident, Streamed
from compressor.model.memory import available_memory
from compressor.model.source import ModelSource


@dataclass(frozen=True)
class Place:
    """Where and how models are run."""

    device: torch.device
    dtype: torch.dtype
    resident: bool  # rather than streamed
    available: Callable[[torch.device], int] = available_memory  # bytes


class Subject:
    """A model directory that can predict and, with all of it in memory, write."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self.place = path, place

    @cached_property
    def predictor(self) -> Predictor:
        """Streamed or resident."""
        return Resident(self._open()) if self.place.resident else Streamed(self._open())

    def whole(self) -> PreTrainedModel:
        """The model for generation. A streamed one is read for this and not kept."""
        return self.predictor.model if isinstance(self.predictor, Resident) else self._open().whole()

    def _open(self) -> ModelSource:
        return ModelSource(self.path, self.place.device, self.place.dtype)
