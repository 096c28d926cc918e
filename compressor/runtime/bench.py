"""How fast a model runs and what memory it takes, beside the original, in one run.

Each model lives in a process of its own and they take turns, batch by batch and round by round, the first to go another one
each time: what else the machine does then hits all of them alike. The first round warms up and does not count. Figures are
medians over the other rounds; the spread is (slowest - fastest) / median. How much faster than the original a model is, is
the median of the rounds' own ratios, which a machine that is busy for a whole round does not change.

Sources of the figures: see `compressor.runtime.measure`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch

from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.runtime.measure import About, Bandwidth, Resident, Taken
from compressor.runtime.worker import started

Phase = Literal["prefill", "decode"]
Progress = Callable[[int, int, str], None]  # done, of how many, what is being measured
BUFFER_BYTES = 2**29  # two of them; more than any processor's cache
PROMPT = 128
CPU = torch.device("cpu")


class Asked(Protocol):
    """The interface of a `Worker`."""

    def ask(self, method: str, *arguments: Any) -> Any: ...


@dataclass(frozen=True)
class Load:
    """The work that is timed."""

    batches: tuple[int, ...]
    prompt: int  # tokens
    new_tokens: int  # timed decoding steps; one more goes before them
    rounds: int

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + 1 + self.new_tokens

    def runs(self) -> list[tuple[Phase, int]]:
        """Return the runs of one round: phase and batch. A single prompt is always among them, for the time to its first
        token.
        """
        prefills: list[tuple[Phase, int]] = [("prefill", batch) for batch in sorted({1, *self.batches})]
        return [*prefills, *(("decode", batch) for batch in sorted(set(self.batches)))]


@dataclass(frozen=True)
class Row:
    """One model in one phase at one batch size."""

    model: str
    phase: Phase
    batch: int
    tokens: int  # that a timed run reads (prefill) or a step writes (decode)
    seconds: tuple[float, ...]  # of a prefill or of a step, for each round
    bytes_read: int | None  # by a step

    def to_dict(self, original: "Row | None") -> dict[str, Any]:
        """Plain data for JSON. The first token of every prompt is there when the prefill ends."""
        typical = median(self.seconds)
        return {
            "model": self.model,
            "phase": self.phase,
            "batch": self.batch,
            "tokens_per_second": self.tokens / typical,
            "gb_per_second": self.bytes_read / typical / 1e9 if self.bytes_read is not None else None,
            "first_token_seconds": typical if self.phase == "prefill" else None,
            "speedup": median(a / b for a, b in zip(original.seconds, self.seconds, strict=True)) if original else None,
            "bytes_per_step": self.bytes_read,
            "seconds": list(self.seconds),
            "spread": (max(self.seconds) - min(self.seconds)) / typical,
        }


@dataclass(frozen=True)
class Speed:
    """The measurements, and how they were made."""

    load: Load
    dtype: str
    about: Mapping[str, About]  # by model, the original first
    rows: tuple[Row, ...]
    bandwidth: float  # bytes per second that the memory gives or takes
    peaks: Mapping[str, tuple[int, int]]  # of the model's process, and of the GPU in it

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        first, some = next(iter(self.about.items()))
        original = {(row.phase, row.batch): row for row in self.rows if row.model == first and len(self.about) > 1}
        return {
            "device": some.device,
            "threads": some.threads,
            "dtype": self.dtype,
            "prompt": self.load.prompt,
            "new_tokens": self.load.new_tokens,
            "rounds": self.load.rounds,
            "bandwidth_gb_s": self.bandwidth / 1e9,
            "rows": [row.to_dict(original.get((row.phase, row.batch))) for row in self.rows],
            "runtime": {name: about.runtime for name, about in self.about.items()},
            "load_seconds": {name: about.load_seconds for name, about in self.about.items()},
            "peak_memory_bytes": {name: host for name, (host, _) in self.peaks.items()},
            "peak_device_memory_bytes": {name: device for name, (_, device) in self.peaks.items()},
        }


def bench(
    model: Path,
    reference: Path | None = None,
    *,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int | None = None,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    tell: Progress = lambda done, total, what: None,
) -> Speed:
    """Measure a model, and the original in turn with it.

    Both are in memory at once. A program that calls this needs the `if __name__ == "__main__"` of multiprocessing.

    Args:
        model: Model directory.
        reference: The original.
        batches: How many sequences at once.
        prompt: Tokens of a prompt; None takes 128, or as many as the models have room for.
        new_tokens: Decoding steps to time.
        rounds: How often everything is measured, after a round that is not counted.
        threads: On the CPU; None leaves it to torch.
        device: Where to run.
        dtype: Dtype of the computation.
        tell: Called before each measurement, and with an empty text after each round.

    Raises:
        CompressorError: a number that cannot be, a directory that cannot be read, or too little memory.
    """
    models = _named([place for place in (reference, model) if place is not None])
    load = _checked(models, batches, prompt, new_tokens, rounds, threads)
    total = (rounds + 1) * len(load.runs()) * len(models)
    with ExitStack() as stack:
        workers = {}
        for name, place in models.items():
            tell(0, total, f"loading {name}")
            workers[name] = stack.enter_context(started(str(place), Resident, str(place), str(device), dtype, threads))
        about: dict[str, About] = {name: worker.ask("about") for name, worker in workers.items()}
        meter = stack.enter_context(started("memory bandwidth", Bandwidth, str(device), threads, BUFFER_BYTES))
        rows, bandwidth = take_turns(workers, meter, load, tell)
        peaks = {name: worker.ask("peaks") for name, worker in workers.items()}
    return Speed(load, str(dtype).removeprefix("torch."), about, rows, bandwidth, peaks)


def take_turns(workers: Mapping[str, Asked], meter: Asked, load: Load, tell: Progress) -> tuple[tuple[Row, ...], float]:
    """Every model's rows, and the best memory bandwidth of any round."""
    runs, names = load.runs(), list(workers)
    total, done, bandwidth = (load.rounds + 1) * len(runs) * len(names), 0, 0.0
    taken: dict[tuple[Phase, int, str], list[Taken]] = {(*run, name): [] for run in runs for name in names}
    for turn in range(load.rounds + 1):
        for phase, batch in runs:
            for name in names if turn % 2 == 0 else reversed(names):
                tell(done, total, f"{name}, {phase}, batch {batch}")
                steps = (load.new_tokens,) if phase == "decode" else ()
                found = workers[name].ask(phase, batch, load.prompt, *steps)
                done += 1
                if turn > 0:
                    taken[phase, batch, name].append(found)
        bandwidth = max(bandwidth, meter.ask("best"))
        tell(done, total, "")
    rows = [
        Row(
            name,
            phase,
            batch,
            batch * load.prompt if phase == "prefill" else batch,
            tuple(one.seconds for one in all_taken),
            all_taken[0].bytes_read,
        )
        for (phase, batch, name), all_taken in taken.items()
    ]
    return tuple(rows), bandwidth


def _named(places: Sequence[Path]) -> dict[str, Path]:
    """Directories by their names; of two with the same name, the first is marked as the original."""
    names = [place.resolve().name for place in places]
    if len(set(names)) < len(names):
        names[0] += " (original)"
    return dict(zip(names, places, strict=True))


def _checked(
    models: Mapping[str, Path],
    batches: Sequence[int],
    prompt: int | None,
    new_tokens: int,
    rounds: int,
    threads: int | None,
) -> Load:
    """Return the work for the models, checked to fit all of them. Reads headers only."""
    at_least_one = [*(("--batch", batch) for batch in batches), ("--new-tokens", new_tokens), ("--rounds", rounds)]
    at_least_one += [("--prompt-len", 1 if prompt is None else prompt), ("--threads", 1 if threads is None else threads)]
    for option, value in at_least_one:
        if value < 1:
            raise RecipeError(f"{option} {value}: nothing to measure; give 1 or more")
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise RecipeError(f"--threads {threads}: this machine runs {cores} at once; lower --threads")
    if not batches:
        raise RecipeError("--batch: no batch size; give one or more")
    room = {name: ModelSource(place, CPU).max_positions for name, place in models.items()}
    short = min(room, key=lambda name: room[name])
    load = Load(tuple(batches), prompt or max(1, min(PROMPT, room[short] - 1 - new_tokens)), new_tokens, rounds)
    if load.positions > room[short]:
        lower = "--new-tokens" if prompt is None else "--prompt-len"
        raise RecipeError(
            f"{models[short]}: --prompt-len {load.prompt}, an untimed step and --new-tokens {new_tokens} need "
            f"{load.positions} positions, the model has {room[short]}; lower {lower}"
        )
    return load
