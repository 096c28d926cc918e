"""Results of scripts/gpu/bench as text."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
SHOWN_TOKENS = (1, 16)


def table(rows: Sequence[Row]) -> str:
    """Contestants down, numbers of tokens across: microseconds, and how many times as fast as the first."""
    tokens = sorted({row["tokens"] for row in rows if "tokens" in row})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        what = ", ".join(str(row[key]) for key in ("format", "kernel") if key in row)
        if "failed" in row:
            lines.setdefault(f"{what}: {row['failed']}", {})
        elif "microseconds" in row:
            where = f"{row['shape'][0]}x{row['shape'][1]} " if "chosen" in row else ""
            lines.setdefault(where + what, {})[row["tokens"]] = f"{row['microseconds']:8.1f} {row['speedup']:5.2f}x"
    head = " " * 44 + "".join(f"{f'M = {count}':>16}" for count in tokens)
    return "\n".join([head, *(f"{what:44}" + _cells(cells, tokens) for what, cells in lines.items())]) if tokens else ""


def summary(results: dict[str, Any]) -> str:
    """The few figures that the rest is about: one token and 16, fused, of each shape and format."""
    sections: dict[str, Any] = results["sections"]
    lines = [f"copy: {results['copy_bytes_per_second'] / 1e12:.2f} TB/s"]
    products = (section for name, section in sections.items() if name.startswith("products"))
    rows = [row for section in products for row in section["rows"] if row["kernel"] == "fused"]
    for row in sorted(rows, key=lambda row: (row["format"], row["tokens"], row["shape"])):
        if row["tokens"] in SHOWN_TOKENS:
            lines.append(
                f"{row['format']:14} {row['shape'][0]:5} x {row['shape'][1]:5}, {row['tokens']:3} tokens: "
                f"{row['microseconds']:7.1f} us, {100 * row['of_copy']:3.0f} % of copy, {row['speedup']:.2f}x bf16"
            )
    unfinished = (f"{name}: {one['outcome']} ({one['detail']})" for name, one in sections.items() if one["outcome"] != "done")
    return "\n".join([*lines, *unfinished])


def in_a_line(error: Exception) -> str:
    """Return what went wrong, without the rest of the story."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _cells(cells: dict[int, str], tokens: Iterable[int]) -> str:
    return "".join(f"{cells.get(count, ''):>16}" for count in tokens)
