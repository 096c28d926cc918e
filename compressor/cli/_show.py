"""Show progress, with the time left, while something runs, and a table at the end.

On a terminal the progress is one live line; elsewhere plain lines, at least one in ten seconds. Both go to stderr.
"""

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.report.html.model import protocol
from compressor.report.html.numbers import duration, size

if TYPE_CHECKING:
    from compressor.api import Forecast
    from compressor.pipeline.job import Event
    from compressor.report.record import Report


OPENING = 3.0  # seconds
LAST_IMPORTED = "datasets"  # of the libraries that take long, see `quiet`
QUIET = 10.0  # seconds after which a line says what is running
UNITS = {  # what a part of a model is narrowed by
    "self_attn": "groups of heads stay in each block",
    "mlp": "channels stay in each block",
    "hidden": "hidden channels stay",
}


class Clock:
    """Turns events into a line: block n of N, layer, error, tokens/s, memory, time left."""

    def __init__(self) -> None:
        self.stage, self.started, self.first_done, self.done = "", time.monotonic(), 0, 0
        self.speed: float | None = None

    def line(self, event: "Event") -> str:
        """The line for an event."""
        if event.stage != self.stage or event.done < self.done:  # another, or the same again for another model
            self.stage, self.started, self.first_done = event.stage, time.monotonic(), event.done
        self.done = event.done
        self.speed = event.tokens_per_second or self.speed
        if event.stage in ("write", "generate", "verify"):
            return f"{event.stage} {event.what}".rstrip()
        unit = "block" if event.stage in ("compress", "resume") else "step"
        fields = [f"{event.stage} {unit} {min(event.done + bool(event.what), event.total)}/{event.total}"]
        if event.what:
            fields.append(event.what)
        if event.error is not None:
            fields.append(f"error {event.error:.2e}")
        if event.stage == "compress" and self.speed:
            fields.append(f"{self.speed:,.0f} tokens/s")
        fields.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB peak")
        done = event.done - self.first_done
        if done and event.done < event.total:
            fields.append(f"{duration((time.monotonic() - self.started) / done * (event.total - event.done))} left")
        return ", ".join(fields)


class PlainLines:
    """Write progress as plain lines: when a stage begins, when a step is done, and now and then within a long step.

    Args:
        write: Called with each line.
        now: Clock, in seconds.
    """

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.write, self.now = Clock(), write, now
        self.stage, self.current, self.began, self.written = "", "reading the model", now(), now()
        self.lock = threading.Lock()

    def tell(self, event: "Event") -> None:
        """Take note of an event, and write it if it begins a stage or ends a step."""
        with self.lock:
            self.current, self.began = self.clock.line(event), self.now()
            begins = event.stage != self.stage and event.error is None
            if not event.what or event.stage == "write" or begins:
                self._put(self.current)
            self.stage = event.stage

    def beat(self) -> None:
        """Write what is running, if nothing was written for `QUIET` seconds."""
        with self.lock:
            if self.now() - self.written >= QUIET:
                self._put(f"{self.current}, for {duration(self.now() - self.began)} so far")

    def _put(self, line: str) -> None:
        self.write(line)
        self.written = self.now()


@contextmanager
def opening() -> Iterator[None]:
    """Write a line if the process is still importing after `OPENING` seconds, when nothing else can say so yet."""
    ended = threading.Event()

    def wait() -> None:
        if not ended.wait(OPENING) and LAST_IMPORTED not in sys.modules:
            _write_line("starting: importing torch and transformers")

    if "torch" not in sys.modules:
        threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def progress() -> Iterator[Callable[["Event"], None]]:
    """A `tell` that shows progress while the context is open."""
    if not sys.stderr.isatty():
        lines, ended = PlainLines(_write_line), threading.Event()

        def beats() -> None:
            while not ended.wait(1.0):
                lines.beat()

        threading.Thread(target=beats, daemon=True).start()
        try:
            yield lines.tell
        finally:
            ended.set()
        return
    clock = Clock()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the model", total=None)
        yield lambda event: bar.update(task, completed=event.done, total=event.total, description=clock.line(event))


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def print_json(data: Mapping[str, Any]) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its first column to the left."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")  # names of directories may look like markup
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table, markup=False) if sys.stdout.isatty() else Console(width=110).print(table, markup=False)


def quality_fields(quality: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The figures of a judgement, for a table."""
    if quality is None:
        return [("quality", "not measured")]
    fields = [("perplexity", f"{quality['perplexity']:.4g}")]
    if quality["kl"] is not None:
        increase = quality["perplexity"] / quality["reference_perplexity"] - 1
        kl = [f"{quality[key]:.4g}" for key in ("kl", "kl_median", "kl_p99")]
        fields += [
            ("perplexity of the original", f"{quality['reference_perplexity']:.4g} ({increase:+.2%})"),
            ("KL from the original, nats/token", f"{kl[0]} (median {kl[1]}, 99th percentile {kl[2]})"),
            ("top-1 agreement, flips", f"{quality['top1_agreement']:.2%}, {quality['flips']:.2%}"),
        ]
    if quality["bits_per_byte"] is not None:
        fields.append(("bits per byte", f"{quality['bits_per_byte']:.4f}"))
    return [*fields, ("measured on", f"{quality['tokens']:,} tokens, {quality['source']}; {protocol(quality['protocol'])}")]


def print_quality(title: str, quality: Mapping[str, Any]) -> None:
    """All figures of a judgement: overall, by text where there are several, by place in the sample."""
    print_table(title, ("", ""), quality_fields(quality))
    compared = quality["kl"] is not None
    header = ["tokens", "perplexity", *(("of the original", "KL", "top-1") if compared else ())]

    def figures(row: Mapping[str, Any]) -> list[str]:
        own = [f"{row['tokens']:,}", f"{row['perplexity']:.4g}"]
        if compared:
            own += [f"{row['reference_perplexity']:.4g}", f"{row['kl']:.4g}", f"{row['top1_agreement']:.2%}"]
        return own

    if len(quality["texts"]) > 1:
        print_table("by text", ("", *header), [[text["name"], *figures(text)] for text in quality["texts"]])
    rows = [[f"{row['first']}–{row['last']}", *figures(row)] for row in quality["positions"]]
    print_table("by place in the sample", ("", *header), rows)


def print_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    """A row for each task and metric; what flipped, where there is a reference."""
    compared = any(task["reference_value"] is not None for task in tasks)

    def figure(value: float | None, error: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    rows = []
    for task in tasks:
        row = [task["task"], task["metric"], f"{task['samples']:,}", figure(task["value"], task["stderr"])]
        if compared:
            row.append(figure(task["reference_value"], task["reference_stderr"]))
            flips = task["flips"]
            row.append("" if flips is None else f"{flips:.2%} (−{task['lost']} +{task['won']}, p {task['p_value']:.3f})")
        rows.append(row)
    header = ["task", "metric", "questions", "value", *(("original", "flips") if compared else ())]
    print_table("tasks", header, rows)


def print_report(report: "Report", out: str) -> None:
    """The closing table of a run, its warnings last."""
    rows = [
        ("size", f"{size(report.size_bytes)} of {size(report.source_size_bytes)}"),
        ("bits per weight, compressed layers", f"{report.bits_per_weight:.3f}"),
        ("bits per weight, whole model", f"{report.model_bits_per_weight:.3f}"),
        *pruned(report.pruning),
        *quality_fields(report.quality),
        ("passes", chain(report.recipe["passes"])),
        *searched(report.search),
        ("worst layer", worst_layer(report)),
        ("time and peak memory of compressing", f"{duration(report.seconds)}, {size(report.peak_memory_bytes)}"),
        ("loads with", loaders(out)),
        ("verified", verified(report.verification)),
        ("page", f"{out}/report.html"),
    ]
    print_table(out, ("", ""), rows)
    print_warnings(report.warnings)


def pruned(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return rows on what was dropped, and how many parameters are left."""
    done = [step for step in steps if step["parameters"][0] > step["parameters"][1]]
    if not done:
        return []
    before, after = done[0]["parameters"][0], done[-1]["parameters"][1]
    went = [
        kept(step["keep"])
        if "keep" in step
        else "without " + ", ".join(f"block {one}" if isinstance(one, int) else one for one in step["gone"])
        for step in done
    ]
    return [("parameters", f"{after:,} of {before:,} (-{1 - after / before:.1%})"), ("pruned", "; ".join(went))]


def kept(keep: Mapping[str, int]) -> str:
    """How many units of each kind of part stay; parts by their kind or, where blocks differ, by full name."""
    counts: dict[str, set[int]] = {}
    for part, count in keep.items():
        counts.setdefault(part.rpartition(".")[2], set()).add(count)
    ranges = {part: " to ".join(map(str, sorted({min(found), max(found)}))) for part, found in counts.items()}
    return ", ".join(f"{some} {UNITS[part]}" for part, some in ranges.items())


def searched(search: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return rows on the choice that was taken, next to the others."""
    if search is None:
        return []
    losses = sorted((one["kl"], one["name"]) for one in search["contestants"])
    return [("chosen by, with KL before training", ", ".join(f"{name} {kl:.4g}" for kl, name in losses))]


def chain(passes: Sequence[Mapping[str, Any]]) -> str:
    """The passes of a recipe, in the order they are applied."""
    return ", then ".join(str(step["pass"]) for step in passes)


def worst_layer(report: "Report") -> str:
    """The layer with the largest relative error."""
    if not report.rows:
        return "none"
    worst = max(report.rows, key=lambda row: row.error)
    return f"{worst.layer} ({worst.option}, error {worst.error:.2e})"


def verified(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return what was checked after writing."""
    if not checks:
        return "no (--no-verify)"
    names = {o: ", ".join(c["check"] for c in checks if c["outcome"] == o) for o in ("passed", "skipped")}
    return names["passed"] + (f"; skipped: {names['skipped']}" if names["skipped"] else "")


def loaders(out: str) -> str:
    """The runtimes that load what a run wrote."""
    import torch

    from compressor.model.source import ModelSource
    from compressor.report.compatibility import runtimes

    found = [one for one in runtimes(ModelSource(Path(out), torch.device("cpu"))) if one.loads]
    return ", ".join(one.name if one.tried else f"{one.name} (as read, not run)" for one in found)


def print_forecast(forecast: "Forecast") -> None:
    """The answer to --dry-run."""
    from collections import Counter

    labels = Counter(option.label for option in forecast.plan.values())
    most = "" if forecast.exact else "at most "
    rows = [
        ("would write", str(forecast.out)),
        ("plan", ", ".join(f"{count} units {label}" for label, count in labels.items())),
        ("size", f"{most}{size(forecast.size_bytes)} ({forecast.size_bytes:,} bytes) of {size(forecast.source_size_bytes)}"),
        ("bits per weight, compressed layers", f"{most}{forecast.bits_per_weight:.3f}"),
        ("expected peak memory", size(forecast.expected_peak_memory_bytes)),
    ]
    print_table("dry run", ("", ""), rows)
    print_warnings(forecast.warnings)


def print_warnings(warnings: Sequence[str]) -> None:
    """Write each warning on a line of stderr."""
    sys.stdout.flush()  # of stdout and stderr in one terminal, warnings come last
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
