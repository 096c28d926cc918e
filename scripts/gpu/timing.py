"""Time of GPU work, from replays of CUDA graphs: what a launch costs the host is not in it."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compiling import compile_all

from compressor.errors import CompressorError
from compressor.kernels.cuda import instances, nvrtc
from compressor.kernels.cuda.instances import Tile
from compressor.kernels.cuda.program import Program, architecture, load
from compressor.kernels.layouts import Layout

REPLAYS = 15
CALLS = 32  # in a graph, at least
COPIED = 1 << 31  # bytes of the copy that the memory's bandwidth is taken from

Call = Callable[[], object]


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

    def check(self) -> None:
        """Raises OutOfTimeError if nothing is left."""
        if self.now() - self.started > 60 * self.minutes:
            raise OutOfTimeError(f"{self.minutes:g} minutes are spent")


class Gpu:
    """The device that torch is on."""

    def __init__(self) -> None:
        self.index = torch.cuda.current_device()
        self.name = torch.cuda.get_device_name()
        self.device = f"cuda:{self.index}"
        properties = torch.cuda.get_device_properties(self.index)
        self.multiprocessors, self.cache_bytes = properties.multi_processor_count, properties.L2_cache_size

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of the machine."""
        try:
            compiler = nvrtc.library()
            version, path = ".".join(map(str, compiler.version)), compiler.path.name
        except CompressorError as error:
            version, path = str(error), ""
        return {
            "device": self.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": self.multiprocessors,
            "cache_bytes": self.cache_bytes,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nvrtc": version,
            "nvrtc_library": path,
            "driver": _driver_version(),
        }

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median time of one call, of calls that follow each other in a graph."""
        repeated = [calls[i % len(calls)] for i in range(max(CALLS, len(calls)))]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in repeated:
                call()
        taken = []
        for replay in range(3 + REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 3:
                taken.append(start.elapsed_time(end) / 1000)
        return float(median(taken)) / len(repeated)

    def compile(self, layouts: Sequence[Layout]) -> None:
        """What `kernels` will need, at once."""
        compile_all(
            [(layout, instances.tiles(layout)) for layout in layouts], architecture(torch.cuda.get_device_capability())
        )

    def kernels(self, layout: str, tiles: tuple[Tile, ...] | None = None, overlapping: bool = True) -> Program:
        """The kernels of a layout."""
        return load(layout, self.index, tiles, overlapping)

    def copy_bytes_per_second(self) -> float:
        """Read and written by a copy in memory, on random bytes."""
        source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * COPIED / self.seconds([lambda: target.copy_(source)])

    def release(self) -> None:
        """Gives memory back between measurements."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many of a weight to go through in turn, so that none is still in the cache when it is its turn again."""
    return max(2, -(-2 * cache_bytes // nbytes) + 1)


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
