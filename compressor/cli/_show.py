"""What a person sees: progress with the time left while it runs, a table at the end.

On a terminal the progress is one live line; elsewhere a plain line per block. Both go to stderr.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.api import Forecast
    from compressor.pipeline import Event
    from compressor.report import Report


class Clock:
    """Turns events into a line: block n of N, layer, error, tokens/s, memory, time left."""

    def __init__(self) -> None:
        self.stage, self.started, self.first_done = "", time.monotonic(), 0
        self.speed: float | None = None

    def line(self, event: "Event") -> str:
        """The line for an event."""
        if event.stage != self.stage:
            self.stage, self.started, self.first_done = event.stage, time.monotonic(), event.done
        self.speed = event.tokens_per_second or self.speed
        if event.stage == "write":
            return f"write {event.what}"
        fields = [f"{event.stage} block {min(event.done + bool(event.what), event.total)}/{event.total}"]
        if event.what:
            fields.append(event.what)
        if event.error is not None:
            fields.append(f"error {event.error:.2e}")
        if event.stage == "compress" and self.speed:
            fields.append(f"{self.speed:,.0f} tokens/s")
        fields.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB peak")
        done = event.done - self.first_done
        if done:
            fields.append(f"{_time((time.monotonic() - self.started) / done * (event.total - event.done))} left")
        return ", ".join(fields)


@contextmanager
def progress() -> Iterator[Callable[["Event"], None]]:
    """A `tell` that shows progress while the context is open."""
    clock = Clock()
    if not sys.stderr.isatty():

        def plain(event: "Event") -> None:
            line = clock.line(event)
            if not event.what or event.stage == "write":  # per block, not per layer
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the model", total=None)
        yield lambda event: bar.update(task, completed=event.done, total=event.total, description=clock.line(event))


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def print_json(data: Mapping[str, Any]) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its first column to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False) if sys.stdout.isatty() else Console(width=110).print(table, markup=False)


def quality_fields(quality: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The figures of a comparison, for a table."""
    if quality is None:
        return [("quality", "not measured")]
    fields = [("perplexity", f"{quality['perplexity']:.4g}")]
    if quality["kl"] is not None:
        fields += [
            ("perplexity of the original", f"{quality['reference_perplexity']:.4g}"),
            ("KL from the original, nats/token", f"{quality['kl']:.4g}"),
            ("top-1 agreement", f"{quality['top1_agreement']:.2%}"),
        ]
    return [*fields, ("measured on", f"{quality['tokens']:,} tokens, {quality['source']}, length {quality['seq_len']}")]


def print_report(report: "Report", out: str) -> None:
    """The closing table of a run, its warnings last."""
    rows = [
        ("size", f"{size(report.size_bytes)} of {size(report.source_size_bytes)}"),
        ("bits per weight, compressed layers", f"{report.bits_per_weight:.3f}"),
        ("bits per weight, whole model", f"{report.model_bits_per_weight:.3f}"),
        *quality_fields(report.quality),
        ("worst layer", worst_layer(report)),
        ("time, peak memory", f"{_time(report.seconds)}, {size(report.peak_memory_bytes)}"),
        ("loads with", loads_with(report.layout)),
    ]
    print_table(out, ("", ""), rows)
    for warning in report.warnings:
        sys.stderr.write(f"warning: {warning}\n")


def worst_layer(report: "Report") -> str:
    """The layer with the largest relative error."""
    if not report.rows:
        return "none"
    worst = max(report.rows, key=lambda row: row.error)
    return f"{worst.layer} ({worst.option}, error {worst.error:.2e})"


def loads_with(layout: str) -> str:
    """What can read a layout."""
    return "transformers, vLLM (compressed-tensors)" if layout == "compressed-tensors" else "compressor.load only"


def print_forecast(forecast: "Forecast") -> None:
    """The answer to --dry-run."""
    from collections import Counter

    labels = Counter(option.label for option in forecast.plan.values())
    rows = [
        ("would write", str(forecast.out)),
        ("plan", ", ".join(f"{count} units {label}" for label, count in labels.items())),
        ("size", f"{size(forecast.size_bytes)} ({forecast.size_bytes:,} bytes) of {size(forecast.source_size_bytes)}"),
        ("bits per weight, compressed layers", f"{forecast.bits_per_weight:.3f}"),
        ("expected peak memory", size(forecast.expected_peak_memory_bytes)),
    ]
    print_table("dry run", ("", ""), rows)


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
