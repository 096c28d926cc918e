"""Time of GPU work, from replays of CUDA graphs in turns: the host's part is not in it, and a drift is shared by all."""

import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compiling import Wanted, compile_all

from compressor.errors import CompressorError
from compressor.runtime.kernels.cuda import nvrtc
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.cuda.program import Program, architecture, load

ROUNDS = 7
CALLS = 32  # in a graph, at least: then what a replay costs is below a hundredth
CACHES = 3  # that the weights of a chain fill
COPIED = 1 << 31  # bytes of the copy that the memory's bandwidth is taken from
LIBRARIES = ("torch", "transformers", "triton", "gemlite", "humming-kernels", "bitsandbytes", "marlin")

Call = Callable[[], object]
Timer = Callable[[], float]


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class Budget:
    """Minutes that may be spent."""

    minutes: float
    now: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    def check(self, reserve: float = 0) -> None:
        """Raises OutOfTimeError if nothing is left but a reserve of some minutes."""
        if self.now() - self.started > 60 * (self.minutes - reserve):
            left = f"of {self.minutes:g} minutes only the {reserve:g} are left that are kept for what follows"
            raise OutOfTimeError(left if reserve else f"{self.minutes:g} minutes are spent")


class Gpu:
    """The device that torch is on."""

    def __init__(self) -> None:
        self.index = torch.cuda.current_device()
        self.name = torch.cuda.get_device_name()
        self.device = f"cuda:{self.index}"
        properties = torch.cuda.get_device_properties(self.index)
        self.multiprocessors, self.cache_bytes = properties.multi_processor_count, properties.L2_cache_size
        self.stream = torch.cuda.Stream()  # that graphs are captured on

    def facts(self) -> dict[str, Any]:
        """Return the facts on the machine that a reader has to know."""
        try:
            compiler = ".".join(map(str, nvrtc.library().version))
        except CompressorError as error:
            compiler = str(error)
        return {
            "device": self.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": self.multiprocessors,
            "cache_bytes": self.cache_bytes,
            "memory_bytes": torch.cuda.get_device_properties(self.index).total_memory,
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "nvrtc": compiler,
            "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        }

    def chain(self, calls: Sequence[Call]) -> Timer:
        """Calls that follow each other in a graph; the result says, each time it is asked, what one of them takes."""
        repeated = [*calls] * math.ceil(CALLS / len(calls))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for call in calls[:2]:  # what is done once, is done before
                call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for call in repeated:
                call()

        def seconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000 / len(repeated)

        return seconds

    def compile(self, wanted: Sequence[Wanted]) -> None:
        """Compile what `kernels` will need, in parallel."""
        compile_all(wanted, architecture(torch.cuda.get_device_capability()))

    def kernels(self, layout: str, tiles: tuple[Tile, ...] | None = None, overlapping: bool = True) -> Program:
        """The kernels of a layout."""
        return load(layout, self.index, tiles, overlapping)

    def copy_bytes_per_second(self) -> float:
        """Read and written by a copy in memory, on random bytes."""
        source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        taken = in_turns({"copy": self.chain([lambda: target.copy_(source)])})
        return 2 * COPIED / median(taken["copy"])

    def release(self) -> None:
        """Gives memory back between measurements."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def in_turns(timers: Mapping[str, Timer], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Time each timer in each round, the first of which is not counted; every other round goes backwards."""
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name in list(timers)[:: -1 if number % 2 else 1]:
            taken[name].append(timers[name]())
    return {name: times[1:] for name, times in taken.items()}


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many of a weight to go through in turn, so that none is still in the cache when it is its turn again."""
    return max(2, math.ceil(CACHES * cache_bytes / nbytes))


def write(path: Path, results: dict[str, Any]) -> None:
    """Replaces a file of results in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
