"""What a report.json has to hold for a page to be made of it. Whole parts may be missing or null: they were not measured."""

from collections.abc import Iterator, Mapping
from typing import Any

NEEDED = ("model", "path", "out", "rows", "size_bytes", "source_size_bytes", "bits_per_weight", "model_bits_per_weight")
_NUMBERS = ("size_bytes", "source_size_bytes", "bits_per_weight", "model_bits_per_weight")
_LISTS = {
    "rows": ("layer", "option", "bits_per_weight", "error"),
    "tasks": ("task", "metric"),
    "samples": ("prompt", "reference", "model"),
    "verification": ("check", "outcome"),
}
_OBJECTS = {
    "quality": ("perplexity", "tokens", "source", "seq_len", "texts", "positions", "protocol"),
    "calibration": ("source", "samples", "seq_len", "seed", "sha256"),
    "search": ("best", "contestants", "steps"),
    "speed": ("device", "dtype", "bandwidth_gb_s", "rows"),
    "fingerprint": (),
    "versions": (),
}
_IN_QUALITY = {"texts": ("name", "sha256"), "positions": ("first", "last", "tokens")}
_IN_SEARCH = {
    "contestants": ("name", "bits_per_weight", "kl", "seconds"),
    "steps": ("stage", "number", "seconds", "fitness"),
}
_PROTOCOL = ("seq_len", "stride", "bos", "documents", "dtype")
_SPEED = ("phase", "model", "batch", "tokens_per_second")


def faults(report: Any) -> Iterator[str]:
    """What keeps the content of a report.json from being shown, each as a part of a sentence."""
    missing = [key for key in NEEDED if not isinstance(report, dict) or key not in report]
    if missing:
        yield f"{len(missing)} of {len(NEEDED)} needed keys are missing ({', '.join(missing)})"
        return
    for key in _NUMBERS:
        if not _is_number(report[key]):
            yield f"{key} is no number"
    for key, needed in _LISTS.items():
        yield from _of_list(key, report.get(key), needed, nullable=key != "rows")
    for key, needed in _OBJECTS.items():
        if report.get(key) is not None:
            yield from _of_object(key, report[key], needed)
    for number, row in enumerate(_elements(report["rows"])):
        for key in ("bits_per_weight", "error"):
            if key in row and not _is_number(row[key]):
                yield f"rows[{number}].{key} is no number"
    if isinstance(quality := report.get("quality"), dict):
        for key, needed in _IN_QUALITY.items():
            yield from _of_list(f"quality.{key}", quality.get(key), needed)
        yield from _of_object("quality.protocol", quality.get("protocol"), _PROTOCOL)
    if isinstance(search := report.get("search"), dict):
        for key, needed in _IN_SEARCH.items():
            yield from _of_list(f"search.{key}", search.get(key), needed)
    if isinstance(speed := report.get("speed"), dict):
        yield from _of_list("speed.rows", speed.get("rows"), _SPEED)


def _of_list(name: str, value: Any, needed: tuple[str, ...], *, nullable: bool = False) -> Iterator[str]:
    if value is None and nullable:
        return
    if not isinstance(value, list):
        yield f"{name} is no list"
        return
    for number, one in enumerate(value):
        yield from _of_object(f"{name}[{number}]", one, needed)


def _of_object(name: str, value: Any, needed: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{name} is no object"
        return
    missing = [key for key in needed if key not in value]
    if missing:
        yield f"{name} lacks {', '.join(missing)}"


def _elements(rows: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
