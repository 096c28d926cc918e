"""The search of compressor/pipeline/search, applied to the choices of pruning passes."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from compressor.model.journal import writing
from compressor.model.memory import available_memory, dense_bytes
from compressor.model.source import ModelSource
from compressor.pipeline.memory_estimate import collecting, hidden_size
from compressor.pipeline.prune_stage import Work
from compressor.pipeline.search.allocate import Budget
from compressor.pipeline.search.clock import Clock
from compressor.pipeline.search.find import SHARE, Contestant, fits_in_memory, improve
from compressor.pipeline.search.fitness import KEPT, TOGETHER, Fitness, opened
from compressor.pipeline.search.levels import Choice, Levels
from compressor.pipeline.search.trail import Trail
from compressor.recipe.schema import Evolve, Search

BRIEF = Search(
    tokens=16384,
    table_tokens=4096,
    evolve=Evolve(generations=30, offspring=16, stages=((4, 2048), (1, 8192)), patience=5),
)  # defaults for searches over few units


@contextmanager
def compared(work: Work, levels: Levels, settings: Search, text_NS: Tensor) -> Iterator[Fitness]:
    """Yield a fitness function for choices, on text that calibration does not use. `settings.resident` applies."""
    source, resident = work.source, settings.resident
    resident = fits_in_memory(work.job) if resident is None else resident
    kept = int(SHARE * available_memory(source.device)) if resident else 0
    with opened(source, resident=resident) as model:
        yield Fitness(source, model, levels, text_NS, work.ranks, kept)


def comparing(source: ModelSource, settings: Search, batch: int) -> int:
    """Return the bytes that `compared` needs: the model or a block of it, hidden states, and the model's predictions."""
    size = source.dtype.itemsize
    resident = dense_bytes(source) if settings.resident is not False else collecting(source, 0, batch)
    teacher = settings.tokens * min(KEPT, source.vocab_size) * (4 + 8)
    return resident + teacher + 3 * settings.tokens * hidden_size(source) * size + 4 * TOGETHER * source.vocab_size * 3


def searched(
    work: Work,
    fitness: Fitness,
    ways: Mapping[str, Choice],
    costs: Sequence[Sequence[int]],
    limit: int,
    settings: Search,
) -> list[Contestant]:
    """Search, and return the choices along the way, scored on held-out text that no choice was fitted to.

    Args:
        work: Context: the directory for the log, from which an interrupted search resumes, and the progress callback.
        fitness: Loss of a choice.
        ways: Initial choices, by name.
        costs: Number of parameters, by unit and level.
        limit: Maximum number of parameters of a choice.
        settings: Settings of the search. `minutes` has no effect.
    """
    known = repr((sorted(work.known.items()), dict(ways), costs, limit, settings))
    trail = Trail(_place(work, f"search-{hashlib.sha256(known.encode()).hexdigest()[:12]}.jsonl"))
    trail.steps = work.ranks.agree(trail.steps)
    clock = Clock.of(None, time.monotonic(), work.ranks)
    weights, budget = sum(max(row) for row in costs), Budget({"bits": costs}, {"bits": limit})
    return improve(ways, weights, budget, fitness, settings, trail, clock=clock, tell=work.tell)


def _place(work: Work, name: str) -> Path | None:
    """Return the path of a file on the first rank, None on others."""
    if not work.ranks.first:
        return None
    with writing(work.place):
        work.place.mkdir(parents=True, exist_ok=True)
    return work.place / name
