"""Our GPTQ beside other tools', repeated at one setting so that the times can be trusted: on one model, text and machine.

    scripts/bench peers MODEL --calibration FILE.jsonl --eval FILE.jsonl [--eval FILE2.jsonl] [--bits 4] [--group-size 128]
        [--samples 128] [--seq-len 512] [--peers llmcompressor,gptqmodel,autoround,hqq] [--repeat 3] [--out FILE.json]

`quality.py` runs everything once at many settings. What the seconds, KL and bits are: `_contestants.py`.

All contestants quantize to as many bits in groups of the same size, leave lm_head alone and are given the same calibration
tokens. Other work on the machine would favour whoever runs in a quiet minute, so the rounds are interleaved: ours, peer,
peer, ours, peer, peer ... A first, short run of each is thrown away; it fills the caches of whoever compiles something.
Threads wait without spinning (OMP_WAIT_POLICY=PASSIVE, unless it is set otherwise), for all alike.

A contestant that fails stays in the table with its last line of error; the full output is in .bench/logs.
Exit status: 0 all finished, 1 one failed, 2 the benchmark could not run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from _contestants import PEERS, Contestant, Ours, Peer, Settings, draw
from _process import BENCH, RunError, machine, tell
from rich.console import Console
from rich.table import Table

WARM_UP_SAMPLES = 8
BUSY = 0.25  # load average per core from which other work disturbs the times


def median(contestant: Contestant) -> float:
    """Seconds of quantization."""
    return statistics.median(run.seconds for run in contestant.runs)


def timed_run(contestant: Contestant, samples: int, number: int, repeat: int) -> None:
    """One run that counts."""
    run = contestant.quantize(samples, f"round-{number}")
    contestant.runs.append(run)
    tell(f"round {number} of {repeat}: {contestant.name} {run.seconds:.1f} s, process {run.process_seconds:.1f} s")


def compete(contestants: Sequence[Contestant], samples: int, repeat: int) -> None:
    """All steps of all contestants, interleaved."""
    for contestant in contestants:
        contestant.attempt("installation", contestant.prepare)
    for contestant in contestants:
        contestant.attempt("warm-up", partial(contestant.quantize, min(WARM_UP_SAMPLES, samples), "warm-up"))
    for number in range(1, repeat + 1):
        for contestant in contestants:
            contestant.attempt(f"round {number}", partial(timed_run, contestant, samples, number, repeat))
    for contestant in contestants:
        contestant.attempt("scoring", contestant.score)


def fastest_peer(contestants: Sequence[Contestant]) -> Contestant | None:
    """By median; only those count that ran to the end and do what we do: rounding without data is no rival in time."""
    ours, *peers = contestants
    return min((c for c in peers if c.error is None and c.method == ours.method), key=median, default=None)


def ratio_to(ours: Contestant, other: Contestant) -> float | None:
    """Our median seconds for one of theirs."""
    return median(ours) / median(other) if ours.runs and other.runs else None


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
        timed[0] = f"{min(seconds):.1f} / {median(c):.1f} / {max(seconds):.1f}" + (", then failed" if c.error else "")
        timed[1] = f"{ratio:.2f}" if ratio is not None and c is not ours else ""
        timed[2] = f"{statistics.median(run.process_seconds for run in c.runs):.1f}"
        timed[3] = f"{statistics.median(run.cpu_seconds for run in c.runs):.1f}"
    if c.quality:
        judged = [f"{c.quality['kl']:.5f}", f"{c.quality['perplexity']:.3f}", f"{c.quality['top1']:.2%}"]
        judged.append(f"{c.quality['bits_per_weight']:.3f}")
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
        "protocol": {"bits": settings.bits, "group_size": settings.group_size} | settings.protocol(),
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
            }
            for c in contestants
        ],
    }


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
    load_before = os.getloadavg()[0]
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH, prefix="run-") as place:
        scratch = Path(place)
        settings = Settings(
            model=options.model.resolve(),
            calibration=options.calibration.resolve(),
            evaluation=tuple(path.resolve() for path in options.eval),
            rows=scratch / "rows.json",
            **{key: getattr(options, key) for key in ("bits", "group_size", "samples", "seq_len", "dtype", "timeout")},
        )
        try:
            draw(settings.model, settings.calibration, settings.samples, settings.seq_len, settings.rows)
        except RunError as error:
            tell(str(error))
            return 2
        ours = Ours("compressor", "GPTQ", settings, scratch, ("--method", "gptq"))
        contestants: list[Contestant] = [ours, *(Peer(name, name, settings, scratch) for name in options.peers)]
        compete(contestants, settings.samples, options.repeat)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table(contestants, settings, load_before))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record(contestants, settings, load_before), indent=1) + "\n", encoding="utf-8")
    return 1 if any(contestant.error for contestant in contestants) else 0


if __name__ == "__main__":
    sys.exit(main())
