"""The log of a search. Each step is written to disk at once, so that an interrupted search can resume."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import OutputError
from compressor.model.journal import DAMAGED, read_journal, replace_text, sealed
from compressor.pipeline.search.levels import Choice
from compressor.reading import read_json


class Trail:
    """The log of a search's steps, each written to disk at once.

    Args:
        path: Path of a file of JSON lines; None keeps the steps in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.steps = read_journal(path) if path is not None else []
        self.started = time.monotonic() - max((step["seconds"] for step in self.steps), default=0.0)

    def add(self, stage: str, choice: Choice, **fields: Any) -> None:
        """Add a step, with the time since the start in seconds."""
        self._extend([{"stage": stage, "choice": list(choice), **fields}])

    def begin(self, ways: Mapping[str, Choice], fitness: Sequence[float]) -> None:
        """Restart the log with the scores of the choices that the search starts from, all in one write."""
        self.steps = []
        first = {"scored": 1, "number": 0}
        self._extend(
            [
                {"stage": name, "choice": list(choice), "fitness": kl, **first}
                for (name, choice), kl in zip(ways.items(), fitness, strict=True)
            ]
        )

    def begun(self, ways: Mapping[str, Choice]) -> bool:
        """Return whether all choices that the search starts from have been scored.

        A log with only some of them was interrupted. The best of these need not be the best of all, so later steps in it do
        not count either.
        """
        return {(step["stage"], tuple(step["choice"])) for step in self.steps} >= set(ways.items())

    def _extend(self, steps: Sequence[Mapping[str, Any]]) -> None:
        seconds = round(time.monotonic() - self.started, 1)
        self.steps += [{**step, "seconds": seconds} for step in steps]
        if self.path is not None:
            replace_text(self.path, "".join(map(sealed, self.steps)))

    def once(self, name: str, minutes: float | None, value: float) -> float:
        """Return the value that was given on the first call, which is kept on disk. It depends on the time left then.

        Raises:
            OutputError: the file is damaged.
        """
        if self.path is None:
            return value
        kept = self.path.with_name(f"{self.path.stem}-{name}-{minutes}.json")
        if not kept.exists():
            replace_text(kept, json.dumps(value))
        found = read_json(kept, OutputError, DAMAGED)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise OutputError(f"{kept}: holds no number; {DAMAGED}")
        return float(found)

    def of(self, stage: str) -> list[dict[str, Any]]:
        """Return the steps of a stage."""
        return [step for step in self.steps if step["stage"] == stage]
