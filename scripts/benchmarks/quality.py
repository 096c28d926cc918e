"""Measure the loss of our formats and of other tools on one model: KL divergence, perplexity and seconds at equal bits, in
one table.

    scripts/bench quality MODEL --calibration FILE.jsonl --eval FILE.jsonl [--eval FILE2.jsonl] [--bits 4 3 2]
        [--group-size 128 64] [--format int|nvfp4|mxfp4] [--samples 128] [--seq-len 256] [--threads 1]
        [--only NAME …] [--again NAME …] [--out FILE.json]

Every contestant quantizes once at every setting, in a process of its own, with the same calibration tokens and number of
threads, and is judged on text that calibration did not see; `_contestants.py` says how, and what the seconds are.

A result is kept in FILE.json as soon as it is there, benchmarks/quality-MODEL[-FORMAT].json if not named; a second start
only does what is missing (a contestant that failed has its result: its error) and then shows the whole table. `--again` does
all of one contestant again. `--only`, `--bits` and `--group-size` say what to run; nothing else is forgotten.

Below the table, our default is set beside the peer that loses least. CPU seconds, of the whole process with its start, are
those of a machine with nothing else to do if there is one thread; where they are far below the seconds, the machine was busy.

Exit status: 0; 1 if at some setting our default has more than 0.85 of the best peer's KL divergence, takes longer than that
peer, or stores more bits; 2 the benchmark could not run.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _contestants import INTEGERS, Contestant, Ours, Peer, Settings, draw
from _process import BENCH, RunError, machine, tell
from rich.console import Console
from rich.table import Table

FLOATS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "fp8": (8, -1)}  # with their bits and the size of their groups
PASSED_OVER = 1.5  # times our bits per weight: a peer with more left layers dense
MOST = 0.85  # of the best peer's KL that our default may have
OURS = "compressor"  # with its default method
Result = dict[str, Any]  # of one contestant at one setting
Key = tuple[str, int, int]  # contestant, bits, group size


@dataclass(frozen=True)
class Entry:
    """An entry of the comparison, and how it is run."""

    method: str
    tool: str = ""  # empty: ours
    flags: tuple[str, ...] = ()  # ours
    options: tuple[tuple[str, Any], ...] = ()  # a peer's, for its adapter
    floats: bool = False  # it knows floating-point formats
    integers: bool = True

    def contestant(self, name: str, settings: Settings, scratch: Path) -> Contestant:
        """Ready to run."""
        if not self.tool:
            return Ours(name, self.method, settings, scratch, self.flags)
        return Peer(name, self.tool, settings, scratch, self.method, dict(self.options))


ENTRIES: Mapping[str, Entry] = {
    OURS: Entry("our default", floats=True),
    "compressor gptq": Entry("GPTQ", flags=("--method", "gptq"), floats=True),
    "compressor awq": Entry("AWQ", flags=("--method", "awq")),
    "compressor rotated": Entry("rotated, GPTQ", flags=("--method", "rotated"), floats=True),
    "compressor rotated-learned": Entry(
        "rotated, GPTQ, rounding learned by block", flags=("--method", "rotated-learned"), floats=True
    ),
    "compressor hqq": Entry("HQQ, no data", flags=("--method", "hqq")),
    "compressor search": Entry("rounding, scales searched, no data", flags=("--method", "search"), floats=True),
    "compressor rtn": Entry("rounding, no data", flags=("--method", "rtn"), floats=True),
    "llmcompressor gptq": Entry("GPTQ", "llmcompressor", floats=True),
    "llmcompressor rtn": Entry(
        "rounding, no data", "llmcompressor", options=(("method", "rtn"),), floats=True, integers=False
    ),
    "llmcompressor awq": Entry("AWQ", "llmcompressor", options=(("method", "awq"),)),
    "llmcompressor awq asym": Entry("AWQ, zero points", "llmcompressor", options=(("method", "awq"), ("symmetric", False))),
    "gptqmodel": Entry("GPTQ", "gptqmodel"),
    "hqq": Entry("HQQ, no data", "hqq"),
    "autoround": Entry("learned, 200 iterations", "autoround", floats=True),
    "autoround best": Entry("learned, 1000 iterations", "autoround", options=(("iters", 1000),), floats=True),
    "autoround ext": Entry("learned, 1000, alg_ext", "autoround", options=(("iters", 1000), ("enable_alg_ext", True))),
}


class Store:
    """Results in a JSON file, which is read again before each change: several may run at once."""

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        self.path, self.protocol = path, dict(protocol)
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("protocol") != self.protocol:
            raise RunError(f"{path}: made by other settings than these; name another --out, or delete the file")

    def results(self) -> dict[Key, Result]:
        """All of them, by contestant and setting, in the order of the table."""
        rows = json.loads(self.path.read_text(encoding="utf-8"))["results"] if self.path.is_file() else []
        order = list(ENTRIES)
        rows = [row for row in rows if row["contestant"] in order]
        rows.sort(key=lambda row: (-row["bits"], -row["group_size"] % 2**31, order.index(row["contestant"])))
        return {(row["contestant"], row["bits"], row["group_size"]): row for row in rows}

    def add(self, key: Key, result: Result) -> None:
        """Keep one, in place of an earlier one."""
        results = self.results() | {key: result}
        data = {
            "protocol": self.protocol,
            "machine": machine(),
            "verdicts": verdicts(results),
            "results": [*results.values()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def measure(key: Key, contestant: Contestant) -> Result:
    """One contestant at one setting, from installation to its figures; an error is a result too."""
    name, bits, group_size = key
    load = os.getloadavg()[0]
    label = f"{bits}-{group_size}"
    contestant.attempt("installation", contestant.prepare)
    contestant.attempt(
        "quantization", lambda: contestant.runs.append(contestant.quantize(contestant.settings.samples, label))
    )
    contestant.attempt("scoring", contestant.score)
    run = asdict(contestant.runs[0]) if contestant.runs else {}
    named = {"contestant": name, "method": contestant.method, "bits": bits, "group_size": group_size}
    figures = {**contestant.facts, **run, **contestant.quality}
    return {**named, "error": contestant.error, "load_average_before": round(load, 2), **figures}


def verdicts(results: Mapping[Key, Result]) -> list[Result]:
    """Our default beside the best peer, at each setting where both have finished.

    A peer that stores half as much again does not count: it passed layers over.
    """
    found = []
    for bits, group_size in dict.fromkeys(key[1:] for key in results):
        ours = results.get((OURS, bits, group_size))
        peers = [r for (name, *setting), r in results.items() if ENTRIES[name].tool and setting == [bits, group_size]]
        finished = [peer for peer in peers if peer["error"] is None]
        if ours is not None and ours["error"] is None:
            finished = [peer for peer in finished if peer["bits_per_weight"] <= PASSED_OVER * ours["bits_per_weight"]]
        if ours is None or not finished:
            continue
        best = min(finished, key=lambda peer: float(peer["kl"]))
        verdict = {"bits": bits, "group_size": group_size, "best_peer": best["contestant"], "error": ours["error"]}
        if ours["error"] is None:
            keys = {"kl": "kl", "seconds": "seconds", "cpu_seconds": "cpu_seconds", "stored": "bits_per_weight"}
            verdict |= {f"{key}_ratio": ours[field] / best[field] for key, field in keys.items()}
        found.append(verdict)
    return found


def complaint(verdict: Result) -> str | None:
    """Return what is wrong with a verdict, in words."""
    if verdict["error"] is not None:
        return f"ours failed in {verdict['error']}"
    found = []
    if verdict["kl_ratio"] > MOST:
        found.append(f"KL {verdict['kl_ratio']:.3f} of {verdict['best_peer']}'s, {MOST} is wanted")
    if verdict["seconds_ratio"] > 1:
        found.append(f"{verdict['seconds_ratio']:.2f} times its seconds")
    if verdict["stored_ratio"] > 1:
        found.append(f"{verdict['stored_ratio']:.4f} times its bits")
    return "; ".join(found) or None


def setting(bits: int, group_size: int) -> str:
    """For people."""
    return f"{bits} bits, " + (f"groups of {group_size}" if group_size != -1 else "one scale per row")


def cells(result: Result) -> list[str]:
    """A row of the table."""
    r = result
    shown = {
        "bits_per_weight": ".3f",
        "seconds": ".1f",
        "cpu_seconds": ".1f",
        "kl": ".5f",
        "perplexity": ".3f",
        "top1": ".2%",
    }
    figures = [format(r[key], form) if key in r else "" for key, form in shown.items()]
    return [r["contestant"], r["method"], *figures] if r["error"] is None else [r["contestant"], "failed: " + r["error"]]


def show(results: Mapping[Key, Result], model: str) -> list[str]:
    """Print a table per setting and the verdict; return the complaints."""
    terminal = Console()
    console = Console(width=None if terminal.is_terminal else 140)
    judged = {(v["bits"], v["group_size"]): v for v in verdicts(results)}
    complaints = []
    for chosen in dict.fromkeys(key[1:] for key in results):
        rows = [result for key, result in results.items() if key[1:] == chosen]
        dense = next((f", dense perplexity {r['dense_perplexity']:.3f}" for r in rows if "dense_perplexity" in r), "")
        table = Table(title=f"{model}: {setting(*chosen)}{dense}")
        for n, heading in enumerate(("tool", "method", "bits/weight", "seconds", "CPU s", "KL", "perplexity", "top-1")):
            table.add_column(heading, justify="right" if n > 1 else "left")
        for result in rows:
            table.add_row(*cells(result))
        console.print(table)
        if (verdict := judged.get(chosen)) is None:
            continue
        if verdict["error"] is None:
            v = {key: f"{value:.3f}" for key, value in verdict.items() if key.endswith("_ratio")}
            times = f"{v['seconds_ratio']} seconds, {v['cpu_seconds_ratio']} CPU seconds, {v['stored_ratio']} stored bits"
            console.print(f"ours / {verdict['best_peer']}, the best peer: {v['kl_ratio']} KL, {times}\n", highlight=False)
        if (words := complaint(verdict)) is not None:
            complaints.append(f"{setting(*chosen)}: {words}")
    return complaints


def minutes_left(missing: Sequence[Key], results: Mapping[Key, Result]) -> float:
    """As long as the same contestants took elsewhere; unknown ones as long as the mean."""
    took: dict[str, list[float]] = {}
    for (name, *_), result in results.items():
        took.setdefault(name, []).append(float(result.get("process_seconds", 0.0)))
    mean = {name: sum(times) / len(times) for name, times in took.items()}
    usual = sum(mean.values()) / max(1, len(mean))
    return sum(mean.get(name, usual) for name, *_ in missing) / 60


def compete(missing: Sequence[Key], store: Store, settings: Mapping[tuple[int, int], Settings], scratch: Path) -> None:
    """Do what is missing, one after the other."""
    for number, key in enumerate(missing):
        name = key[0]
        results = store.results()
        left = f", about {minutes_left(missing[number:], results):.0f} min left" if results else ""
        tell(f"{number + 1} of {len(missing)}{left}: {name}, {setting(*key[1:])}")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            result = measure(key, ENTRIES[name].contestant(name, settings[key[1:]], Path(place)))
        store.add(key, result)
        figures = "failed" if result["error"] else f"KL {result['kl']:.5f}, {result['bits_per_weight']:.3f} bits"
        tell(f"    {figures}; {time.perf_counter() - start:.0f} s with scoring")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench quality", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="dense Hugging Face model directory")
    parser.add_argument("--calibration", type=Path, required=True, help="JSONL with a `text` field")
    parser.add_argument(
        "--eval", type=Path, nargs="+", action="extend", required=True, help="the same, unseen in calibration"
    )
    parser.add_argument("--format", choices=[INTEGERS, *FLOATS], default=INTEGERS, help="others than int: no further choice")
    parser.add_argument("--activations", type=int, default=16, help="bits, with --format; 16: as they are")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 64], help="-1: one scale per row")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="of calibration: auto (each tool's own choice), float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of OpenMP, for everybody")
    parser.add_argument("--only", nargs="+", choices=[*ENTRIES], metavar="NAME", default=[*ENTRIES], help=", ".join(ENTRIES))
    parser.add_argument("--again", nargs="+", choices=[*ENTRIES], metavar="NAME", default=[], help="do it anew")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds after which a single step is given up")
    parser.add_argument("--out", type=Path, help="keep the results here")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model}: no config.json here; MODEL is a Hugging Face model directory")
    if options.format != INTEGERS:
        bits, size = FLOATS[options.format]
        options.bits, options.group_size = [bits], [size]
    for path in (options.calibration, *options.eval):
        if not path.is_file():
            parser.error(f"{path}: no such file; give a .jsonl file whose lines have a `text` field")
    return options


def main() -> int:
    options = parse()
    model = options.model.resolve()
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH, prefix="quality-") as place:
        rows = Path(place) / "rows.json"
        try:
            draw(model, options.calibration, options.samples, options.seq_len, rows)
        except RunError as error:
            tell(str(error))
            return 2
        settings = {
            (bits, group_size): Settings(
                model=model,
                calibration=options.calibration.resolve(),
                evaluation=tuple(path.resolve() for path in options.eval),
                bits=bits,
                group_size=group_size,
                rows=rows,
                fmt=options.format,
                activations=options.activations,
                **{key: getattr(options, key) for key in ("samples", "seq_len", "dtype", "timeout", "threads")},
            )
            for bits in options.bits
            for group_size in options.group_size
        }
        tokens = json.loads(rows.read_text(encoding="utf-8"))["sha256"]
        protocol = next(iter(settings.values())).protocol() | {"tokens_sha256": tokens}
        try:
            rounded = "" if options.activations == 16 else f"-a{options.activations}"
            name = model.name if options.format == INTEGERS else f"{model.name}-{options.format}{rounded}"
            store = Store(options.out or BENCH.parent / "benchmarks" / f"quality-{name}.json", protocol)
        except RunError as error:
            tell(str(error))
            return 2
        known = store.results()
        able = [name for name, entry in ENTRIES.items() if (entry.integers if options.format == INTEGERS else entry.floats)]
        asked = [name for name in able if name in options.only or name in options.again]
        wanted = [(name, *chosen) for chosen in settings for name in asked]
        compete([key for key in wanted if key not in known or key[0] in options.again], store, settings, Path(place))
    complaints = show(store.results(), model.name)
    for words in complaints:
        tell(words)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
