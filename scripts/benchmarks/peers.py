"""Our GPTQ beside other tools', each in its own environment, on one model, one text and one machine.

    scripts/bench peers MODEL --calibration FILE.jsonl --eval FILE.jsonl [--eval FILE2.jsonl] [--bits 4] [--group-size 128]
        [--samples 128] [--seq-len 512] [--peers llmcompressor,gptqmodel,autoround,hqq] [--repeat 3] [--out FILE.json]

Every peer is installed, at a pinned version, into .bench/venvs/PEER, since they ask for different transformers. Torch goes
in first and alone, so that no peer brings a build of its own; which build (CPU or CUDA) is for pip's configuration to say.

Time: all contestants quantize to as many bits in groups of the same size and leave lm_head alone. They get as many rows of
as many tokens, made of the same file's documents. The peers' rows are all the same; ours are what `compress` draws from the
file by its own rules. Other work on the machine would favour whoever runs in a quiet minute, so the rounds are interleaved:
ours, peer, peer, ours, peer, peer ... A first, short run of each is thrown away; it fills the caches of whoever compiles
something. Threads wait without spinning (OMP_WAIT_POLICY=PASSIVE, unless it is set otherwise), for all alike. `seconds` is
the quantization alone: for a peer without its imports, reading the dense model and writing the result; ours is what
`compress quantize` reports, and includes reading and writing, because it does both block by block. The process column is
everything: start, imports, reading, quantizing, writing.

Quality: each result is read back from disk inside the tool's own environment, ours by stock transformers, and compared with
the dense model in fp32 on the evaluation texts; see peer_run.py, which does the peers' part. Bits per weight are those of the
quantized layers, scales and all other metadata included, counted in the files.

A contestant that fails stays in the table with its last line of error; the full output is in .bench/logs.
Exit status: 0 all finished, 1 one failed, 2 the benchmark could not run.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

# compressor is imported only where it is needed, after the clocks: a child's peak memory starts with that of its parent.

BENCH = Path(__file__).parents[2] / ".bench"
PEER_RUN = Path(__file__).with_name("peer_run.py")
TORCH = "torch==2.13.0"
WARM_UP_SAMPLES = 8
DOCUMENTS = 120  # scored of each evaluation file
DOCUMENT_TOKENS = 256
BUSY = 0.25  # load average per core from which other work disturbs the times
# OpenMP threads that wait by spinning lose whole time slices to any other process: 6 times the seconds were seen.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
OFFLINE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class RunError(RuntimeError):
    """A contestant failed, or the benchmark has nothing to run; the message is one line."""


@dataclass(frozen=True)
class Package:
    """What pip installs for a peer, and what it is asked to do."""

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
    """What all contestants are given."""

    model: Path
    calibration: Path
    evaluation: tuple[Path, ...]
    bits: int
    group_size: int
    samples: int
    seq_len: int
    dtype: str
    timeout: float

    def protocol(self) -> dict[str, Any]:
        """For the record, without paths."""
        named = {
            "model": self.model.name,
            "calibration": self.calibration.name,
            "evaluation": [p.name for p in self.evaluation],
        }
        rest = {key: getattr(self, key) for key in ("bits", "group_size", "samples", "seq_len", "dtype")}
        waiting = {key.lower(): os.environ.get(key, value) for key, value in WAITING.items()}
        return {**named, **rest, "documents": DOCUMENTS, "document_tokens": DOCUMENT_TOKENS, **waiting}


@dataclass(frozen=True)
class Run:
    """One timed quantization."""

    seconds: float  # the quantization alone
    process_seconds: float  # from start to exit
    cpu_seconds: float  # user and system, of all threads of the process
    peak_memory_bytes: int  # resident set of the process
    save_seconds: float | None = None  # packing and writing, where that is not part of `seconds`


@dataclass(frozen=True)
class Usage:
    """What a process took."""

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


class Contestant(ABC):
    """One tool: how it is prepared, run and judged, and what came of it."""

    def __init__(self, name: str, method: str, settings: Settings, scratch: Path) -> None:
        self.name = name
        self.method = method
        self.settings = settings
        self.out = scratch / name  # the quantized model; each run replaces it
        self.scratch = scratch
        self.environment: dict[str, str] = {}
        self.runs: list[Run] = []
        self.facts: dict[str, Any] = {}  # version, versions of its libraries, dtype
        self.quality: dict[str, Any] = {}
        self.bits_per_weight: float | None = None
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

    def log(self, label: str) -> Path:
        """Where the output of a step goes."""
        return BENCH / "logs" / f"{self.name}-{label}.log"

    def peer_run(
        self, python: Path, action: str, tool: str, samples: int, label: str, **environment: str
    ) -> tuple[Any, Usage]:
        """One job of peer_run.py: its result, and what the process took."""
        s = self.settings
        job = {
            "action": action,
            "tool": tool,
            "model": str(s.model),
            "out": str(self.out),
            "bits": s.bits,
            "group_size": s.group_size,
            "dtype": s.dtype,
            "calibration": str(s.calibration),
            "samples": samples,
            "seq_len": s.seq_len,
            "evaluation": [str(path) for path in s.evaluation],
            "documents": DOCUMENTS,
            "document_tokens": DOCUMENT_TOKENS,
        }
        job_file, result_file = self.scratch / "job.json", self.scratch / "result.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        result_file.unlink(missing_ok=True)
        try:
            usage = execute([python, PEER_RUN, job_file, result_file], self.log(label), s.timeout, self.environment)
        except RunError as error:
            if not result_file.is_file():  # killed, or it could not even start
                raise
            raise RunError(json.loads(result_file.read_text(encoding="utf-8"))["error"]) from error
        return json.loads(result_file.read_text(encoding="utf-8")), usage

    def median(self) -> float:
        """Seconds of quantization."""
        return statistics.median(run.seconds for run in self.runs)


class Ours(Contestant):
    """`compress quantize`, as a user runs it."""

    def prepare(self) -> None:
        self.command = Path(sys.executable).with_name("compress")
        if not self.command.is_file():
            raise RunError("no `compress` beside this Python; run scripts/install")

    def quantize(self, samples: int, label: str) -> Run:
        s = self.settings
        report = self.scratch / "report.json"
        options: dict[str, object] = {
            "--method": "gptq",
            "--bits": s.bits,
            "--group-size": s.group_size,
            "--calibration": s.calibration,
            "--samples": samples,
            "--seq-len": s.seq_len,
            "--out": self.out,
        }
        if s.dtype != "auto":
            options["--dtype"] = s.dtype
        flags = [str(part) for option in options.items() for part in option]
        command = [self.command, "quantize", s.model, *flags, "--no-eval", "--overwrite", "--json"]
        usage = execute(command, self.log(label), s.timeout, self.environment, report)
        result = json.loads(report.read_text(encoding="utf-8"))
        dtype = str(result["fingerprint"]["computation"]).rpartition("torch.")[2]
        self.facts = {"version": result["version"], "versions": result["versions"], "dtype": dtype}
        return Run(result["seconds"], usage.seconds, usage.cpu_seconds, usage.peak_bytes)

    def score(self) -> None:
        self.quality, _ = self.peer_run(Path(sys.executable), "score", "stock", 0, "score")
        self.bits_per_weight = bits_per_weight(self.settings.model, self.out)


class Peer(Contestant):
    """A tool in its own environment, driven by peer_run.py."""

    def __init__(self, name: str, settings: Settings, scratch: Path) -> None:
        super().__init__(name, PEERS[name].method, settings, scratch)
        self.package = PEERS[name]
        self.venv = BENCH / "venvs" / name
        self.python = self.venv / "bin" / "python"
        # What it compiles is kept with it, and not mixed with what other versions left in the home directory.
        caches = {key: str(self.venv / "cache" / key) for key in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        self.environment = {**self.package.environment, **caches}

    def prepare(self) -> None:
        stamp = self.venv / "installed"
        wanted = "\n".join((platform.python_version(), TORCH, *self.package.requirements))
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return
        tell(f"{self.name}: installing into .bench/venvs/{self.name}, some minutes")
        execute([sys.executable, "-m", "venv", self.venv], self.log("venv"), self.settings.timeout)
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install"]
        execute([*pip, TORCH], self.log("install-torch"), self.settings.timeout)
        execute([*pip, TORCH, *self.package.requirements], self.log("install"), self.settings.timeout)
        stamp.write_text(wanted, encoding="utf-8")

    def quantize(self, samples: int, label: str) -> Run:
        shutil.rmtree(self.out, ignore_errors=True)
        result, usage = self.peer_run(self.python, "quantize", self.name, samples, label)
        self.facts = {key: result[key] for key in ("version", "versions", "dtype")}
        self.bits_per_weight = result.get("bits_per_weight")
        return Run(result["seconds"], usage.seconds, usage.cpu_seconds, usage.peak_bytes, result["save_seconds"])

    def score(self) -> None:
        self.quality, _ = self.peer_run(self.python, "score", self.name, 0, "score")
        if self.bits_per_weight is None:
            self.bits_per_weight = bits_per_weight(self.settings.model, self.out)


def bits_per_weight(dense: Path, quantized: Path) -> float:
    """Stored bits of the quantized layers, per dense weight.

    A layer is quantized if its tensors, those under its name, are others than the dense model's.
    """
    from compressor.errors import CompressorError
    from compressor.model.checkpoint import Checkpoint

    try:
        before, after = Checkpoint(dense).headers, Checkpoint(quantized).headers
    except CompressorError as error:
        raise RunError(str(error)) from error
    parts: dict[str, dict[str, int]] = {}
    for name, header in after.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = header.nbytes
    stored = weights = 0
    for name, header in before.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in parts and not set(parts[layer]) <= {"weight", "bias"}:
            stored += sum(nbytes for part, nbytes in parts[layer].items() if part != "bias")
            weights += header.nbytes // header.dtype.itemsize
    if not weights:
        raise RunError("it left every layer dense; see its log, and whether --group-size divides the layers' inputs")
    return 8 * stored / weights


def attempt(contestant: Contestant, what: str, step: Callable[[], object]) -> None:
    """Take one step, unless an earlier one failed; remember a failure."""
    if contestant.error is None:
        try:
            step()
        except RunError as error:
            s, message = contestant.settings, f"{what}: {error}"
            for path in (s.model, s.calibration, *s.evaluation, contestant.scratch, BENCH.parent):  # no paths in the record
                message = message.replace(str(path), path.name)
            contestant.error = message
            tell(f"{contestant.name}: failed in {contestant.error}")


def timed_run(contestant: Contestant, samples: int, number: int, repeat: int) -> None:
    """One run that counts."""
    run = contestant.quantize(samples, f"round-{number}")
    contestant.runs.append(run)
    tell(f"round {number} of {repeat}: {contestant.name} {run.seconds:.1f} s, process {run.process_seconds:.1f} s")


def compete(contestants: Sequence[Contestant], samples: int, repeat: int) -> None:
    """All steps of all contestants, interleaved."""
    for contestant in contestants:
        attempt(contestant, "installation", contestant.prepare)
    for contestant in contestants:
        attempt(contestant, "warm-up", partial(contestant.quantize, min(WARM_UP_SAMPLES, samples), "warm-up"))
    for number in range(1, repeat + 1):
        for contestant in contestants:
            attempt(contestant, f"round {number}", partial(timed_run, contestant, samples, number, repeat))
    for contestant in contestants:
        attempt(contestant, "scoring", contestant.score)


def fastest_peer(contestants: Sequence[Contestant]) -> Contestant | None:
    """By median; only those count that ran to the end and do what we do: rounding without data is no rival in time."""
    ours, *peers = contestants
    return min((c for c in peers if c.error is None and c.method == ours.method), key=Contestant.median, default=None)


def ratio_to(ours: Contestant, other: Contestant) -> float | None:
    """Our median seconds for one of theirs."""
    return ours.median() / other.median() if ours.runs and other.runs else None


def verdict(contestants: Sequence[Contestant], load_before: float) -> str:
    """Below the table: the fastest peer, what failed, and whether the times mean anything."""
    ours, fastest = contestants[0], fastest_peer(contestants)
    lines = [f"{c.name} failed in {c.error}; see .bench/logs" for c in contestants if c.error is not None]
    ratio = ratio_to(ours, fastest) if fastest is not None else None
    if fastest is not None and ratio is not None:
        lines.insert(0, f"ours takes {ratio:.2f} times as long as {fastest.name}, the fastest {ours.method} peer (medians)")
    if load_before > BUSY * (os.cpu_count() or 1):
        lines.append(
            f"the machine was busy before the start (load average {load_before:.1f}): do not trust the times; run again"
        )
    return "\n".join(lines)


def cells(contestant: Contestant, ours: Contestant) -> list[str]:
    """A row of the table."""
    c = contestant
    timed, judged = ["failed" if c.error else "", "", "", ""], [""] * 4
    if c.runs:
        seconds, ratio = [run.seconds for run in c.runs], ratio_to(ours, c)
        timed[0] = f"{min(seconds):.1f} / {c.median():.1f} / {max(seconds):.1f}" + (", then failed" if c.error else "")
        timed[1] = f"{ratio:.2f}" if ratio is not None and c is not ours else ""
        timed[2] = f"{statistics.median(run.process_seconds for run in c.runs):.1f}"
        timed[3] = f"{statistics.median(run.cpu_seconds for run in c.runs):.1f}"
    if c.quality:
        judged = [f"{c.quality['kl']:.5f}", f"{c.quality['perplexity']:.3f}", f"{c.quality['top1']:.2%}", ""]
    if c.bits_per_weight is not None:
        judged[3] = f"{c.bits_per_weight:.3f}"
    return [c.name, c.facts.get("version", ""), c.method, *timed, *judged]


def table(contestants: Sequence[Contestant], settings: Settings, load_before: float) -> Table:
    """One row each; the first contestant is ours."""
    s = settings
    dense = next((f", dense perplexity {c.quality['dense_perplexity']:.3f}" for c in contestants if c.quality), "")
    title = f"{s.model.name}: {s.bits} bits, groups of {s.group_size}, {s.samples} x {s.seq_len} tokens{dense}"
    view = Table(title=title, caption=verdict(contestants, load_before), caption_justify="left")
    for heading in ("tool", "version", "method"):
        view.add_column(heading)
    timed, judged = (
        ("seconds\nmin / median / max", "ours / it", "process s", "CPU s"),
        ("KL", "perplexity", "top-1", "bits/weight"),
    )
    for heading in (*timed, *judged):
        view.add_column(heading, justify="right")
    for contestant in contestants:
        view.add_row(*cells(contestant, contestants[0]))
    return view


def record(contestants: Sequence[Contestant], settings: Settings, load_before: float) -> dict[str, Any]:
    """Everything measured, for JSON: no host name, no path."""
    fastest = fastest_peer(contestants)
    return {
        "protocol": settings.protocol(),
        "machine": machine()
        | {"load_average_before": round(load_before, 2), "load_average_after": round(os.getloadavg()[0], 2)},
        "fastest_peer": fastest.name if fastest is not None else None,
        "ratio_to_fastest_peer": ratio_to(contestants[0], fastest) if fastest is not None else None,
        "contestants": [
            {
                "name": c.name,
                "method": c.method,
                **c.facts,
                "error": c.error,
                "ratio_ours_to_it": ratio_to(contestants[0], c),
                "runs": [asdict(run) for run in c.runs],
                "quality": c.quality,
                "bits_per_weight": c.bits_per_weight,
            }
            for c in contestants
        ],
    }


def machine() -> dict[str, Any]:
    """What it was measured on; contestants tell their library versions themselves."""
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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="dense Hugging Face model directory")
    parser.add_argument("--calibration", type=Path, required=True, help="JSONL with a `text` field")
    parser.add_argument(
        "--eval", type=Path, required=True, nargs="+", action="extend", help="the same, unseen in calibration"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="of calibration: auto (each tool's own choice), float32 or bfloat16")
    parser.add_argument("--peers", default="llmcompressor,gptqmodel", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that count")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a single step is given up")
    parser.add_argument("--out", type=Path, help="write everything measured, as JSON")
    options = parser.parse_args()
    options.peers = [name.strip() for name in options.peers.split(",") if name.strip()]
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"--peers: no peer named {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model}: no config.json here; MODEL is a Hugging Face model directory")
    for path in (options.calibration, *options.eval):
        if not path.is_file():
            parser.error(f"{path}: no such file; give a .jsonl file whose lines have a `text` field")
    for name in ("repeat", "samples", "seq_len"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    return options


def main() -> int:
    options = parse()
    settings = Settings(
        model=options.model.resolve(),
        calibration=options.calibration.resolve(),
        evaluation=tuple(path.resolve() for path in options.eval),
        **{key: getattr(options, key) for key in ("bits", "group_size", "samples", "seq_len", "dtype", "timeout")},
    )
    load_before = os.getloadavg()[0]
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH, prefix="run-") as place:
        scratch = Path(place)
        ours = Ours("compressor", "GPTQ", settings, scratch)
        contestants: list[Contestant] = [ours, *(Peer(name, settings, scratch) for name in options.peers)]
        compete(contestants, settings.samples, options.repeat)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table(contestants, settings, load_before))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record(contestants, settings, load_before), indent=1) + "\n", encoding="utf-8")
    return 1 if any(contestant.error for contestant in contestants) else 0


if __name__ == "__main__":
    sys.exit(main())
