"""Run another program to its end and report what it took, and on which machine: shared by several benchmarks."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

BENCH = Path(__file__).parents[2] / ".bench"
# OpenMP threads that wait by spinning lose whole time slices to any other process: 6 times the seconds were seen.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
OFFLINE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class RunError(RuntimeError):
    """A contestant failed, or the benchmark has nothing to run; the message is one line."""


@dataclass(frozen=True)
class Usage:
    """The resources that a process used."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def execute(
    command: Sequence[object],
    log: Path,
    timeout: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    stdout: Path | None = None,
) -> Usage:
    """Run a command to its end, its output going to `log`.

    Raises:
        RunError: it exits with another status than 0, or is killed after `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors, (stdout or Path(os.devnull)).open("wb") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**WAITING, **os.environ, **OFFLINE, **environment},
            stdin=subprocess.DEVNULL,
            stdout=printed if stdout else errors,
            stderr=errors,
            start_new_session=True,
        )
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            if process.returncode is None:  # interrupted
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - start
    if process.returncode == -signal.SIGKILL and seconds >= timeout:
        raise RunError(f"killed after {timeout:.0f} s; raise --timeout, or lower --samples")
    if process.returncode != 0:
        raise RunError(f"{last_line(log)} (exit status {process.returncode})")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def last_line(log: Path) -> str:
    """The last line with something in it."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def machine() -> dict[str, Any]:
    """Describe the machine; contestants report their library versions themselves."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
