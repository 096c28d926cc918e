"""The tools that are compared: how each is installed, run and judged. `peers.py` and `quality.py` say which and how often.

Every peer is installed, at a pinned version, into .bench/venvs/PEER, since they ask for different transformers. Torch goes
in first and alone, so that no peer brings a build of its own; which build (CPU or CUDA) is for pip's configuration to say.

All are given the same calibration tokens, those that `compress` draws (rows_run.py). `seconds` is the quantization alone: for
a peer without its imports, reading the dense model and writing the result; ours is what `compress quantize` reports, and
includes reading and writing, because it does both block by block. The process columns are everything: start, imports,
reading, quantizing, writing.

Each result is read back from disk inside the tool's own environment, ours by stock transformers, and compared with the
dense model in fp32 on the evaluation texts; see peer_run.py. Bits per weight are those of the quantized layers, scales and
all other metadata included, counted in the files.
"""

import json
import os
import platform
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from _process import BENCH, WAITING, RunError, Usage, execute, tell

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
INTEGERS = "int"
DOCUMENTS = 120  # scored of each evaluation file
DOCUMENT_TOKENS = 256
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Package:
    """A peer's package, and its defaults."""

    method: str
    requirements: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS = {
    "llmcompressor": Package("GPTQ", ("llmcompressor==0.14.0.1",)),
    # It starts two jobs that need a worker each, but makes only one worker where there are two cores.
    "gptqmodel": Package("GPTQ", ("gptqmodel==7.6.0",), {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 1))}),
    "autoround": Package("learned rounding", ("auto-round==0.16.1", "compressed-tensors==0.20.0")),
    "hqq": Package("HQQ, no data", ("hqq==0.2.8.post1",)),
}


@dataclass(frozen=True)
class Settings:
    """The settings that are the same for all contestants."""

    model: Path
    calibration: Path
    evaluation: tuple[Path, ...]
    bits: int
    group_size: int
    samples: int
    seq_len: int
    dtype: str
    timeout: float
    rows: Path  # what `draw` wrote
    threads: int | None = None  # of OpenMP; None leaves it to the environment
    fmt: str = INTEGERS  # of the weights; others than integers have bits and groups of their own
    activations: int = 16  # bits; 16 leaves them as they are

    def protocol(self) -> dict[str, Any]:
        """For the record, without paths."""
        named = {
            "model": self.model.name,
            "calibration": self.calibration.name,
            "evaluation": [p.name for p in self.evaluation],
        }
        rest = {key: getattr(self, key) for key in ("samples", "seq_len", "dtype", "threads")}
        waiting = {key.lower(): os.environ.get(key, value) for key, value in WAITING.items()}
        numbers: dict[str, Any] = {} if self.fmt == INTEGERS else {"format": self.fmt}
        numbers |= {} if self.activations == 16 else {"activations": self.activations}
        return {**named, **rest, "documents": DOCUMENTS, "document_tokens": DOCUMENT_TOKENS, **waiting, **numbers}


def draw(model: Path, calibration: Path, samples: int, seq_len: int, rows: Path) -> None:
    """Write the calibration rows of everybody.

    Raises:
        RunError: the file holds too little text, or is no text.
    """
    command = [sys.executable, HERE / "rows_run.py", model, calibration, samples, seq_len, rows]
    execute(command, BENCH / "logs" / "rows.log", timeout=3600)


@dataclass(frozen=True)
class Run:
    """One timed quantization."""

    seconds: float  # the quantization alone
    process_seconds: float  # from start to exit
    cpu_seconds: float  # user and system, of all threads of the process
    peak_memory_bytes: int  # resident set of the process
    save_seconds: float | None = None  # packing and writing, where that is not part of `seconds`


class Contestant(ABC):
    """One tool: how it is prepared, run and judged, and what came of it."""

    def __init__(self, name: str, method: str, settings: Settings, scratch: Path) -> None:
        self.name = name
        self.method = method
        self.settings = settings
        self.scratch = scratch / name.replace(" ", "-")
        self.out = self.scratch / "out"  # the quantized model; each run replaces it
        self.environment = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}
        self.runs: list[Run] = []
        self.facts: dict[str, Any] = {}  # version, versions of its libraries, dtype
        self.quality: dict[str, Any] = {}  # with bits_per_weight
        self.error: str | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Install what is missing."""

    @abstractmethod
    def quantize(self, samples: int, label: str) -> Run:
        """Quantize once, in a process of its own."""

    @abstractmethod
    def score(self) -> None:
        """Judge what the last run wrote."""

    def attempt(self, what: str, step: Callable[[], object]) -> None:
        """Take one step, unless an earlier one failed; remember a failure."""
        if self.error is None:
            try:
                self.scratch.mkdir(exist_ok=True)
                step()
            except RunError as error:
                s, message = self.settings, f"{what}: {error}"
                for path in (s.model, s.calibration, *s.evaluation, self.scratch, BENCH.parent):  # no paths in the record
                    message = message.replace(str(path), path.name)
                self.error = message
                tell(f"{self.name}: failed in {self.error}")

    def log(self, label: str) -> Path:
        """Where the output of a step goes."""
        return BENCH / "logs" / f"{self.name.replace(' ', '-')}-{label}.log"

    @cached_property
    def drawn(self) -> dict[str, Any]:
        """Calibration rows and their hash."""
        drawn: dict[str, Any] = json.loads(self.settings.rows.read_text(encoding="utf-8"))
        return drawn

    def peer_run(self, python: Path, label: str, **job: Any) -> tuple[Any, Usage]:
        """One job of peer_run.py: its result, and what the process took."""
        job_file, result_file = self.scratch / "job.json", self.scratch / "result.json"
        job_file.write_text(json.dumps({"model": str(self.settings.model), "out": str(self.out), **job}), encoding="utf-8")
        result_file.unlink(missing_ok=True)
        command = [python, HERE / "peer_run.py", job_file, result_file]
        try:
            usage = execute(command, self.log(label), self.settings.timeout, self.environment)
        except RunError as error:
            if not result_file.is_file():  # killed, or it could not even start
                raise
            raise RunError(json.loads(result_file.read_text(encoding="utf-8"))["error"]) from error
        return json.loads(result_file.read_text(encoding="utf-8")), usage

    def judge(self, python: Path, tool: str) -> None:
        """Score by peer_run.py."""
        texts = {"evaluation": [str(path) for path in self.settings.evaluation]}
        limits = {"documents": DOCUMENTS, "document_tokens": DOCUMENT_TOKENS}
        found, _ = self.peer_run(python, "score", action="score", tool=tool, **texts, **limits)
        # a file format of its own: the tool has counted while it wrote
        self.quality = {**found, "bits_per_weight": found["bits_per_weight"] or self.facts["bits_per_weight"]}


class Ours(Contestant):
    """`compress quantize`, as a user runs it."""

    def __init__(self, name: str, method: str, settings: Settings, scratch: Path, flags: Sequence[str] = ()) -> None:
        super().__init__(name, method, settings, scratch)
        self.flags = flags

    def prepare(self) -> None:
        self.command = Path(sys.executable).with_name("compress")
        if not self.command.is_file():
            raise RunError("no `compress` beside this Python; run scripts/install")

    def quantize(self, samples: int, label: str) -> Run:
        s = self.settings
        report = self.scratch / "report.json"
        integers = {"--bits": s.bits, "--group-size": s.group_size}
        numbers = integers if s.fmt == INTEGERS else {"--format": s.fmt, "--activations": s.activations}
        options: dict[str, object] = {
            **numbers,
            "--calibration": s.calibration,
            "--samples": samples,
            "--seq-len": s.seq_len,
            "--out": self.out,
        }
        if s.dtype != "auto":
            options["--dtype"] = s.dtype
        flags = [str(part) for option in options.items() for part in option]
        command = [self.command, "quantize", s.model, *self.flags, *flags, "--no-eval", "--overwrite", "--json"]
        usage = execute(command, self.log(label), s.timeout, self.environment, report)
        result = json.loads(report.read_text(encoding="utf-8"))
        if samples == s.samples and result["calibration"] and result["calibration"]["sha256"] != self.drawn["sha256"]:
            raise RunError("it calibrated on other tokens than those of the peers; draw them alike in rows_run.py")
        dtype = str(result["fingerprint"]["computation"]).rpartition("torch.")[2]
        self.facts = {"version": result["version"], "versions": result["versions"], "dtype": dtype}
        return Run(result["seconds"], usage.seconds, usage.cpu_seconds, usage.peak_bytes)

    def score(self) -> None:
        self.judge(Path(sys.executable), "stock")


class Peer(Contestant):
    """A tool in its own environment, driven by peer_run.py."""

    def __init__(
        self,
        name: str,
        tool: str,
        settings: Settings,
        scratch: Path,
        method: str | None = None,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        self.tool, self.package = tool, PEERS[tool]
        numbers = {"format": settings.fmt, "activations": settings.activations}
        self.options = options if settings.fmt == INTEGERS else {**options, **numbers}
        super().__init__(name, method or self.package.method, settings, scratch)
        self.venv = BENCH / "venvs" / tool
        self.python = self.venv / "bin" / "python"
        # What it compiles is kept with it, and not mixed with what other versions left in the home directory.
        caches = {key: str(self.venv / "cache" / key) for key in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        self.environment |= {**self.package.environment, **caches}

    def prepare(self) -> None:
        stamp = self.venv / "installed"
        wanted = "\n".join((platform.python_version(), TORCH, *self.package.requirements))
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return
        tell(f"{self.name}: installing into .bench/venvs/{self.tool}, some minutes")
        execute([sys.executable, "-m", "venv", self.venv], self.log("venv"), self.settings.timeout)
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install"]
        execute([*pip, TORCH], self.log("install-torch"), self.settings.timeout)
        execute([*pip, TORCH, *self.package.requirements], self.log("install"), self.settings.timeout)
        stamp.write_text(wanted, encoding="utf-8")

    def quantize(self, samples: int, label: str) -> Run:
        s = self.settings
        shutil.rmtree(self.out, ignore_errors=True)
        grid = {"bits": s.bits, "group_size": s.group_size, "dtype": s.dtype, "options": dict(self.options)}
        rows = self.drawn["rows"][:samples]
        result, usage = self.peer_run(self.python, label, action="quantize", tool=self.tool, **grid, rows=rows)
        self.facts = {key: result[key] for key in ("version", "versions", "dtype", "bits_per_weight") if key in result}
        return Run(result["seconds"], usage.seconds, usage.cpu_seconds, usage.peak_bytes, result["save_seconds"])

    def score(self) -> None:
        self.judge(self.python, self.tool)
