"""The description of a job, and its progress events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compressor.model.source import ModelSource
from compressor.pipeline.contract import Pass, Plan
from compressor.pipeline.ranks import Ranks


@dataclass(frozen=True)
class Event:
    """A progress event, for display to the user."""

    stage: str  # for example "rotate", "sensitivity", "compress", "resume", "evaluate", "write"
    done: int
    total: int
    what: str = ""
    error: float | None = None
    tokens_per_second: float | None = None


Tell = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore a progress event."""


@dataclass(frozen=True, slots=True)
class Job:
    """The work of a run, and the ranks that do it."""

    source: ModelSource
    passes: Sequence[Pass]
    plan: Plan
    ranks: Ranks
