"""How much memory compressing and judging take, against their promises: flat in depth, and a 7B model on a small machine.

    scripts/bench memory [--keep DIR] [--skip-7b] [--only prune] [--out FILE.json]

Weights are random: memory depends on shapes only. Two models of one width, 8 and 32 blocks deep, must peak within 15 % of
each other; when they are pruned, every shape is compared with the model read anew each time. Samples of text are not
generated: for that a model is whole in memory, where half of what is available holds it, as the forecast then says.
A checkpoint of Llama-7B's shape, 13.5 GB, must be rounded below 4 GiB, and its first two blocks go through GPTQ, and through
pruning, below 8 GiB; the blocks that follow would repeat them, so that run is then killed. `compress eval` must judge it
against itself, streamed, below 4 GiB; so it must with as much text as is ever in flight, for which two such blocks stand for
all: more text goes through in several turns. The checkpoints are written tensor by tensor, every block with the bytes of the
first, and so take no memory worth mentioning either.

The peak is the kernel's high-water mark of the process's resident set (VmHWM). It counts pages of mapped files, here the
shards, which the kernel can drop at any time; the peak of the anonymous pages alone, which it cannot, is polled and shown
beside it. `ru_maxrss` would not do: a child starts with that of the process it was forked from. The forecast of
`--dry-run` stands beside both; it must be within 30 % of the peak.

A run verifies what it wrote before it is done, and that counts: it streams, with one block in memory at a time. Stock
transformers, which then loads the whole model, does so in a process of its own, if that takes at most half of the memory
that is available: VmHWM is of one process, and this one is left out.

Exit status: 0 all limits hold, 1 one is broken, 2 a run failed. Needs 25 GB of disk, 1 GB with --skip-7b.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from compressor.model import shards
from compressor.model.checkpoint import INDEX, Header
from compressor.model.source import skeleton

ASSETS = Path(__file__).parents[2] / "compressor" / "assets" / "demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
GIB = 2**30
POLL_SECONDS = 0.02
DEPTH_RATIO = 1.15
FORECAST_ERROR = 0.30


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama with as many key and value heads as query heads."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    vocab: int

    def config(self) -> LlamaConfig:
        """Return the config that transformers builds it from."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )


SHALLOW = Shape("8 blocks", 8, 1024, 2816, 16, 4096)
DEEP = Shape("32 blocks", 32, 1024, 2816, 16, 4096)
LLAMA_7B = Shape("7B", 32, 4096, 11008, 32, 32000)
WIDE = Shape("2 blocks of 7B", 2, 4096, 11008, 32, 32000)
RTN = ("--method", "rtn", "--no-eval")
GPTQ_SMALL = (
    *("--samples", "16", "--seq-len", "256"),
    *("--set", "evaluation.samples=8", "--set", "evaluation.generate=0"),  # nothing for which a model has to be whole
)
EVAL_7B = ("--samples", "2", "--seq-len", "128")
EVAL_TURN = ("--samples", "8", "--seq-len", "2048")  # as many tokens as are ever in flight at this width
GPTQ_7B = ("--samples", "16", "--seq-len", "512", "--no-eval")
STREAMED = ("--set", "passes.0.search.resident=false", "--set", "passes.0.search.tokens=2048")
PRUNE_SMALL = ("--ratio", "0.2", "--of", "blocks", *GPTQ_SMALL, *STREAMED)  # all shapes are compared
PRUNE_7B = ("--ratio", "0.25", "--of", "mlp", *GPTQ_7B)  # the journal has the MLPs alone


@dataclass(frozen=True)
class Case:
    """One run of `compress quantize`, or of `compress prune` or `eval`."""

    shape: Shape
    method: str  # or `prune`, `eval`
    options: tuple[str, ...]
    limit_bytes: int | None = None
    blocks: int | None = None  # the run is killed once so many are on disk; None lets it finish

    @property
    def name(self) -> str:
        part = f", first {self.blocks} blocks" if self.blocks else ""
        return f"{self.shape.name}, {self.method}{part}"


CASES = (
    Case(SHALLOW, "rtn", RTN),
    Case(DEEP, "rtn", RTN),
    Case(SHALLOW, "gptq", GPTQ_SMALL),
    Case(DEEP, "gptq", GPTQ_SMALL),
    Case(SHALLOW, "prune", PRUNE_SMALL),
    Case(DEEP, "prune", PRUNE_SMALL),
)
CASES_7B = (
    Case(LLAMA_7B, "rtn", RTN, limit_bytes=4 * GIB),
    Case(LLAMA_7B, "gptq", GPTQ_7B, limit_bytes=8 * GIB, blocks=2),
    Case(LLAMA_7B, "prune", PRUNE_7B, limit_bytes=8 * GIB, blocks=2),
    Case(LLAMA_7B, "eval", EVAL_7B, limit_bytes=4 * GIB),
    Case(WIDE, "eval", EVAL_TURN, limit_bytes=4 * GIB),
)


@dataclass
class Result:
    """The measurements of a case."""

    case: str
    expected_bytes: int | None  # there is no forecast for `eval`
    limit_bytes: int | None
    peak_bytes: int = 0
    peak_anonymous_bytes: int = 0
    seconds: float = 0.0
    block_seconds: list[float] = field(default_factory=list)  # from one finished block to the next

    @property
    def forecast_error(self) -> float | None:
        """Return the error of the dry run: +0.1 if it says 10 % more than was taken."""
        return self.expected_bytes / self.peak_bytes - 1 if self.expected_bytes else None


class RunError(RuntimeError):
    """A run of `compress` failed: there is nothing to judge."""


def write_model(shape: Shape, path: Path) -> None:
    """A checkpoint with random weights: every block has those of the first, which are all that is ever in memory."""
    path.mkdir(parents=True)
    shape.config().save_pretrained(path)
    for name in TOKENIZER:
        shutil.copyfile(ASSETS / name, path / name)
    model = skeleton(path, torch.bfloat16)
    headers = {name: Header(p.dtype, tuple(p.shape)) for name, p in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, bytes] = {}  # by name with the block's index left out
    files = shards.layout(headers)
    for shard in files:
        with (path / shard.name).open("wb") as file:
            file.write(shard.header)
            for name in shard.tensors:
                key = ".".join(part for part in name.split(".") if not part.isdigit())
                if key not in drawn:
                    drawn[key] = random_bytes(headers[name].shape, generator)
                file.write(drawn[key])
    if len(files) > 1:
        (path / INDEX).write_text(json.dumps(shards.index(files)))


def random_bytes(size: Sequence[int], generator: torch.Generator) -> bytes:
    """A matrix as models are initialised, or a norm's ones, as bf16."""
    if len(size) == 1:
        return torch.ones(*size, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    values = torch.empty(*size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return bytes(values.view(torch.uint8).numpy().data)


def command(case: Case, model: Path, out: Path, *more: str) -> list[str]:
    """The command line of a case."""
    if case.method == "eval":
        judge = [sys.executable, "-m", "compressor", "eval", str(model), "--reference", str(model)]
        return [*judge, *case.options, "--device", "cpu", "--json"]
    verb = ["prune", str(model)] if case.method == "prune" else ["quantize", str(model), "--method", case.method]
    return [sys.executable, "-m", "compressor", *verb, *case.options, "--device", "cpu", "--out", str(out), "--json", *more]


def forecast(case: Case, model: Path, out: Path) -> int | None:
    """The peak that `--dry-run` expects, in bytes."""
    if case.method == "eval":
        return None
    done = subprocess.run(command(case, model, out, "--dry-run"), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{case.name}: --dry-run failed: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["expected_peak_memory_bytes"])


def measure(case: Case, model: Path, out: Path) -> Result:
    """Run a case to its end, or until enough blocks are on disk, and watch it.

    Raises:
        RunError: it ended otherwise.
    """
    result = Result(case.name, forecast(case, model, out), case.limit_bytes)
    finished: list[float] = []  # when each block was on disk
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command(case, model, out), stdout=subprocess.DEVNULL, stderr=log) as process:
            try:
                while process.poll() is None:
                    look(process.pid, result)
                    finished += [time.monotonic()] * (blocks_done(out) - len(finished))
                    if case.blocks and len(finished) >= case.blocks:
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
        stopped = bool(case.blocks) and len(finished) >= (case.blocks or 0)
        if process.returncode and not stopped:
            log.seek(0)
            raise RunError(f"{case.name}: exit status {process.returncode}: {log.read().strip()[-2000:]}")
    result.seconds = time.monotonic() - start
    result.block_seconds = [later - earlier for earlier, later in itertools.pairwise(finished)]
    for left in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(left, ignore_errors=True)
    return result


def look(pid: int, result: Result) -> None:
    """Take in the present memory figures of a process; none are left once it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return
    peak, anonymous = (int(fields.get(key, "0").split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
    result.peak_bytes = max(result.peak_bytes, peak)
    result.peak_anonymous_bytes = max(result.peak_anonymous_bytes, anonymous)


def blocks_done(out: Path) -> int:
    """Blocks that the journal of a run records, or as many whose MLPs that of pruning does."""
    journals = (out.with_name(f"{out.name}.partial") / "work", out.with_name(f"{out.name}.pruning") / "0" / "widths")
    lines: list[str] = []
    for journal in journals:
        with contextlib.suppress(OSError):
            lines += (journal / "journal.jsonl").read_text().splitlines()
    parts = [str(json.loads(line).get("part", "")) for line in lines]
    return max(sum(part.startswith("block-") for part in parts), sum(part.endswith(".mlp") for part in parts))


def broken(results: Mapping[str, Result]) -> list[str]:
    """The limits that do not hold, in words."""
    found = []
    for shallow, deep in ((f"{SHALLOW.name}, {m}", f"{DEEP.name}, {m}") for m in ("rtn", "gptq", "prune")):
        if deep not in results:
            continue
        ratio = results[deep].peak_bytes / results[shallow].peak_bytes
        if ratio > DEPTH_RATIO:
            found.append(f"{deep}: {ratio:.2f} times the peak of {shallow}; at most {DEPTH_RATIO} is allowed")
    for result in results.values():
        if result.limit_bytes and result.peak_bytes >= result.limit_bytes:
            found.append(f"{result.case}: {gib(result.peak_bytes)} GiB; less than {gib(result.limit_bytes)} is allowed")
        if result.forecast_error is not None and abs(result.forecast_error) > FORECAST_ERROR:
            found.append(
                f"{result.case}: the forecast is off by {result.forecast_error:+.0%}; {FORECAST_ERROR:.0%} is allowed"
            )
    return found


def show(results: Mapping[str, Result]) -> None:
    """The table."""
    table = Table(title="Memory, GiB", title_justify="left")
    for i, name in enumerate(("run", "peak", "limit", "of it anonymous", "forecast", "its error", "s", "s per block")):
        table.add_column(name, justify="right" if i else "left")
    for result in results.values():
        spent = result.block_seconds
        table.add_row(
            result.case,
            gib(result.peak_bytes),
            gib(result.limit_bytes) if result.limit_bytes else "",
            gib(result.peak_anonymous_bytes),
            gib(result.expected_bytes) if result.expected_bytes else "",
            f"{result.forecast_error:+.0%}" if result.forecast_error is not None else "",
            f"{result.seconds:.0f}",
            f"{sum(spent) / len(spent):.2f}" if spent else "",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def versions() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    libraries = {name: version(name) for name in ("compressor", "torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **libraries, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}


def run(cases: Sequence[Case], place: Path) -> dict[str, Result]:
    """Measure the cases in turn; models that are there from another run are used again."""
    results: dict[str, Result] = {}
    for case in cases:
        model = place / case.shape.name.replace(" ", "-")
        if not model.exists():
            sys.stderr.write(f"writing {model}\n")
            unfinished = model.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            write_model(case.shape, unfinished)
            unfinished.rename(model)
        sys.stderr.write(f"running {case.name}\n")
        results[case.name] = measure(case, model, place / "result")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure peak memory against its limits.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the models here, and use those that are here already")
    parser.add_argument("--skip-7b", action="store_true", help="leave out the model of 13.5 GB")
    parser.add_argument("--only", choices=("rtn", "gptq", "prune", "eval"), help="leave out all other runs")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compressor-memory-") as temporary:
        try:
            cases = CASES if options.skip_7b else CASES + CASES_7B
            wanted = [case for case in cases if options.only in (None, case.method)]
            results = run(wanted, options.keep or Path(temporary))
        except RunError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    show(results)
    failures = broken(results)
    figures = [{**asdict(result), "forecast_error": result.forecast_error} for result in results.values()]
    if options.out:
        options.out.write_text(json.dumps({"versions": versions(), "results": figures, "broken": failures}, indent=1) + "\n")
    for failure in failures:
        sys.stderr.write(f"limit broken: {failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
