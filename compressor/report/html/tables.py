"""Tables of the page, with cells as text."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from compressor.report.html.model import Model
from compressor.report.html.numbers import MISSING, duration, number, percent, size

Cell = str  # or Markup
_WORST = 5
_CLASS = {outcome: outcome for outcome in ("passed", "failed", "skipped")}  # classes in the style sheet


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first columns are words, the others numbers."""

    header: tuple[Cell, ...]
    rows: list[tuple[Cell, ...]]
    words: int = 1  # number of columns of words


def code(text: object) -> Markup:
    """Mark up a name as code."""
    return Markup("<code>{}</code>").format(text)


def prose(text: str) -> Markup:
    """Mark up text; parts between backticks become code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _by_model(
    models: Sequence[Model], header: Sequence[Cell], rows: Callable[[Model], Iterable[Sequence[Cell]]], words: int = 1
) -> Table | None:
    """Join the rows of all models, with a column of model names if there are several; None if there is no row."""
    several = len(models) > 1
    found: list[tuple[Cell, ...]] = []
    for model in models:
        for n, row in enumerate(rows(model)):
            found.append((*(("" if n else model.name,) if several else ()), *row))
    return Table((*(("model",) if several else ()), *header), found, words + several) if found else None


def search(models: Sequence[Model]) -> Table | None:
    """Show the final candidates of a search, the worst first."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        found = model.report.get("search") or {}
        for one in sorted(found.get("contestants", ()), key=lambda one: -float(one["kl"])):
            taken = "taken" if one["name"] == found["best"] else ""
            yield one["name"], taken, f"{one['bits_per_weight']:.3f}", number(one["kl"]), duration(one["seconds"])

    return _by_model(models, ("choice", "", "bits/weight", "KL", "there after"), rows, words=2)


def comparison(models: Sequence[Model]) -> Table:
    """Compare the headline figures of several models, the smallest last."""
    header = (
        "model",
        "size",
        "of original",
        "bits/weight",
        "whole model",
        "perplexity",
        "change",
        "KL",
        "KL 99 %",
        "top-1",
        "tokens/s",
    )
    return Table(
        header,
        [
            (
                Markup("<strong>{} ●</strong>").format(model.name) if model.front else model.name,
                size(model.report["size_bytes"]),
                percent(_ratio(model.report["size_bytes"], model.report["source_size_bytes"])),
                f"{model.report['bits_per_weight']:.2f}",
                f"{model.report['model_bits_per_weight']:.2f}",
                number(model.quality["perplexity"]),
                percent(_change(model.quality), 2, signed=True),
                number(model.quality["kl"], 3),
                number(model.quality["kl_p99"], 3),
                percent(model.quality["top1_agreement"]),
                number(model.decoding[1], 3) if model.decoding else MISSING,
            )
            for model in sorted(models, key=lambda model: -model.report["size_bytes"])
        ],
    )


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _change(quality: Mapping[str, Any]) -> float | None:
    ratio = _ratio(quality["perplexity"], quality["reference_perplexity"])
    return None if ratio is None else ratio - 1


def texts(models: Sequence[Model]) -> Table | None:
    """Show quality by text."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        for text in model.texts:
            split = f" ({text['split']})" if text.get("split") else ""
            yield (
                f"{text['name']}{split}",
                f"{text['tokens']:,}" if text["tokens"] is not None else MISSING,
                number(text["perplexity"]),
                number(text["reference_perplexity"]),
                number(text["delta_nll"], 3, signed=True),
                number(text["kl"], 3),
                number(text["kl_p99"], 3),
                percent(text["top1_agreement"]),
                percent(text["flips"]),
                number(text["bits_per_byte"]),
                code(str(text["sha256"])[:8]),
            )

    header = (
        "text",
        "predictions",
        "perplexity",
        "original",
        "ΔNLL",
        "KL",
        "KL 99 %",
        "top-1",
        "flips",
        "bits/byte",
        "sha256",
    )
    return _by_model(models, header, rows)


def tasks(models: Sequence[Model]) -> Table | None:
    """Show the scores of tasks, next to those of the original."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        for task in model.report["tasks"] or ():
            counts = tuple(task.get(key) for key in ("lost", "won"))
            yield (
                str(task["task"]),
                str(task["metric"]),
                f"{task['samples']:,}" if task.get("samples") is not None else MISSING,
                _with_error(task.get("reference_value"), task.get("reference_stderr")),
                _with_error(task.get("value"), task.get("stderr")),
                " / ".join(f"{count:,}" if count is not None else MISSING for count in counts),
                percent(task.get("flips")),
                number(task.get("p_value"), 2),
            )

    return _by_model(
        models, ("task", "metric", "samples", "original", "compressed", "lost / won", "flips", "p"), rows, words=2
    )


def _with_error(value: float | None, error: float | None) -> Cell:
    if value is None:
        return MISSING
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def speed(models: Sequence[Model]) -> Table | None:
    """Show tokens per second, and the share of the memory bandwidth that they use."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        bandwidth = (model.report["speed"] or {}).get("bandwidth_gb_s")
        for row in model.speed_rows:
            yield (
                str(row["phase"]),
                str(row["model"]),
                f"{row['batch']:,}",
                number(row["tokens_per_second"], 3),
                percent(row.get("spread"), 0),
                number(row.get("gb_per_second"), 3),
                percent(_ratio(row.get("gb_per_second"), bandwidth), 0),
                duration(row.get("first_token_seconds")),
            )

    header = ("phase", "weights", "batch", "tokens/s", "spread", "GB/s", "of memory’s", "first token")
    return _by_model(models, header, rows, words=2)


def plan(models: Sequence[Model]) -> Table | None:
    """Show, for each option, the kinds and the number of layers that have it, their bits and errors."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        by_option: dict[str, list[Mapping[str, Any]]] = {}
        for row in model.report["rows"]:
            by_option.setdefault(str(row["option"]), []).append(row)
        kinds = list(dict.fromkeys(_kind(row) for row in model.report["rows"]))
        for option, layers in by_option.items():
            yield (
                code(option),
                ", ".join(sorted({_kind(row) for row in layers}, key=kinds.index)),
                f"{len(layers):,}",
                f"{sum(row['bits_per_weight'] for row in layers) / len(layers):.3f}",
                number(_mean_error(layers), 3),
                number(max(float(row["error"]) for row in layers), 3),
            )

    return _by_model(models, ("option", "of layers", "layers", "bits/weight", "mean error", "largest"), rows, words=2)


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["layer"]).rsplit(".", 1)[-1]


def _mean_error(layers: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(row["error"]) for row in layers) / len(layers)


def worst_layers(models: Sequence[Model]) -> Table | None:
    """Show the layers with the largest errors."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        for row in sorted(model.report["rows"], key=lambda row: -float(row["error"]))[:_WORST]:
            yield code(row["layer"]), code(row["option"]), f"{row['bits_per_weight']:.3f}", number(row["error"], 3)

    return _by_model(models, ("layer", "option", "bits/weight", "error"), rows, words=2)


def verification(models: Sequence[Model]) -> Table | None:
    """Show the checks that verification made, and their outcomes."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        for check in model.report["verification"] or ():
            outcome = Markup('<span class="{}">{}</span>').format(_CLASS.get(check["outcome"], ""), check["outcome"])
            yield (
                str(check["check"]),
                outcome,
                Markup('<span class="prose">{}</span>').format(prose(check.get("detail") or MISSING)),
            )

    return _by_model(models, ("check", "outcome", "found"), rows, words=3)


def calibration(models: Sequence[Model]) -> Table | None:
    """Show the source and the amount of calibration data."""

    def rows(model: Model) -> Iterable[Sequence[Cell]]:
        data = model.report["calibration"]
        if data:
            yield (
                str(data["source"]),
                f"{data['samples']:,}",
                f"{data['seq_len']:,}",
                f"{data['samples'] * data['seq_len']:,}",
                str(data["seed"]),
                code(str(data["sha256"])[:16]),
            )

    return _by_model(models, ("text", "samples", "tokens of each", "tokens", "seed", "sha256 of the tokens"), rows)


def run(models: Sequence[Model]) -> Table:
    """Show inputs, software versions, time and memory of each run, one column per model."""
    columns = [_facts(model) for model in models]
    names = list(dict.fromkeys(name for column in columns for name in column))
    header = ("", *(model.label for model in models)) if len(models) > 1 else ("", "")
    return Table(header, [(name, *(column.get(name, MISSING) for column in columns)) for name in names], len(header))


def _facts(model: Model) -> dict[str, Cell]:
    report = model.report
    device = report["peak_device_memory_bytes"]
    return {
        "original": str(report["model"]),
        "written to": code(report["path"]),
        "layout": str(report["layout"] or MISSING),
        "time": duration(report["seconds"] or None),
        "peak memory": size(report["peak_memory_bytes"] or None),
        **({"peak memory of the GPU": size(device)} if device else {}),
        "compressor": str(report["version"] or MISSING),
        **{str(name): str(version) for name, version in (report["versions"] or {}).items()},
        **{
            f"fingerprint of the {name}": code(str(value)[:16])
            for name, value in (report["fingerprint"] or {}).items()
            if name != "computation"
        },
    }
