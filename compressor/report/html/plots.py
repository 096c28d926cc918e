"""Data of the plots, as small plain data that can be recomputed from the reports alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report.html.numbers import finite

Reports = Sequence[Mapping[str, Any]]
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")  # the number of the block in the name of a layer


def plot_data(reports: Reports) -> dict[str, Any]:
    """Collect the data of all plots: quality by size, error and bits by layer, quality by position in the sample, searches.

    Args:
        reports: Contents of report.json files.

    Returns:
        Plain data for JSON, without infinities.
    """
    names = labels(reports)
    return {
        "quality_size": quality_size(reports, names),
        "layers": [layer_map(report["rows"], name) for report, name in zip(reports, names, strict=True)],
        "positions": [
            {"label": name, **_positions(report["quality"]["positions"])}
            for report, name in zip(reports, names, strict=True)
            if (report.get("quality") or {}).get("positions")
        ],
        "search": [
            {"label": name, **trajectory}
            for report, name in zip(reports, names, strict=True)
            if report.get("search") and (trajectory := _trajectory(report["search"]))["fitness"]
        ],
    }


def labels(reports: Reports) -> list[str]:
    """Return a short name for each report: without the original's name if all share it, the path if names repeat."""
    names = [str(report["out"]) for report in reports]
    prefix = f"{reports[0]['model']}-"
    if len(names) > 1 and all(name.startswith(prefix) and name != prefix for name in names):
        names = [name.removeprefix(prefix) for name in names]
    count = Counter(names)
    names = [str(report["path"]) if count[name] > 1 else name for report, name in zip(reports, names, strict=True)]
    count = Counter(names)
    return [f"{name} ({place})" if count[name] > 1 else name for place, name in enumerate(names, 1)]


def quality_size(reports: Reports, names: Sequence[str]) -> dict[str, Any]:
    """Return size, quality and Pareto-front membership of every evaluated model and of the originals.

    Only models evaluated on the same text are compared: those on the text that most models share. The loss of the front is
    KL, or perplexity if a model has no KL.
    """
    judged = [(report, name) for report, name in zip(reports, names, strict=True) if report.get("quality")]
    common = common_text(reports)
    points = [
        {
            "label": name,
            "original": False,
            "size_bytes": report["size_bytes"],
            "perplexity": finite(report["quality"].get("perplexity")),
            "kl": finite(report["quality"].get("kl")),
            "comparable": judged_text(report) == common,
        }
        for report, name in judged
    ]
    loss = "kl" if all(point["kl"] is not None for point in points if point["comparable"]) else "perplexity"
    points += _originals([report for report, _ in judged if judged_text(report) == common])
    compared = [point for point in points if point["comparable"] and point[loss] is not None]
    front = pareto_front([(point["size_bytes"], point[loss]) for point in compared])
    best = {id(compared[i]) for i in front}
    return {"loss": loss, "points": [{**point, "front": id(point) in best} for point in points]}


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the indices of the points (size, loss) on the Pareto front.

    A point is not on it if another is at most as large in both coordinates and smaller in one.
    """
    return {
        i
        for i, (size, loss) in enumerate(points)
        if not any(a <= size and b <= loss and (a, b) != (size, loss) for a, b in points)
    }


def judged_text(report: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return hashes that identify the text a model was evaluated on; None if the report has none."""
    texts = (report.get("quality") or {}).get("texts")
    return tuple(sorted(text["sha256"] for text in texts)) if texts else None


def common_text(reports: Reports) -> tuple[str, ...] | None:
    """Return the text that most models were evaluated on; of equally frequent ones the first."""
    count = Counter(judged_text(report) for report in reports if report.get("quality"))
    return count.most_common(1)[0][0] if count else None


def origins(reports: Reports) -> set[str]:
    """Return the fingerprints of the original models, as far as they are known."""
    return {known for report in reports if (known := (report.get("fingerprint") or {}).get("model"))}


def _originals(reports: Reports) -> list[dict[str, Any]]:
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for report in reports:
        perplexity = finite(report["quality"].get("reference_perplexity"))
        if perplexity is not None:
            found.setdefault(
                (report["source_size_bytes"], f"{perplexity:.5g}"),  # one original, however often it was evaluated
                {
                    "label": f"{report['model']}, original",
                    "original": True,
                    "size_bytes": report["source_size_bytes"],
                    "perplexity": perplexity,
                    "kl": 0.0,
                    "comparable": True,
                },
            )
    if len(found) == 1:
        return [{**one, "label": "original"} for one in found.values()]
    return list(found.values())


def layer_map(rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    """Arrange layers by kind (rows of the matrices) and block (columns).

    Layers of one kind in one block, such as experts, share a cell, which shows their largest error and their mean bits.
    """
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    outside: list[Mapping[str, Any]] = []
    for row in rows:
        found = _BLOCK.search(row["layer"])
        if found is None:
            outside.append(row)
        else:
            kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["layer"][found.end() :])
            cells.setdefault((kind, int(found[1])), []).append(row)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = list(range(min(b for _, b in cells), max(b for _, b in cells) + 1)) if cells else []
    matrix = [[_cell(cells.get((kind, block), ())) for block in blocks] for kind in kinds]
    return {
        "label": label,
        "kinds": _short(kinds),
        "blocks": blocks,
        **{key: [[cell[key] for cell in line] for line in matrix] for key in ("layer", "option", "bits_per_weight", "error")},
        "outside": [dict(row) for row in outside],
    }


def _cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"layer": None, "option": None, "bits_per_weight": None, "error": None}
    errors = [error for row in rows if (error := finite(row["error"])) is not None]
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return {
        "layer": rows[0]["layer"] + more,
        "option": ", ".join(dict.fromkeys(row["option"] for row in rows)),
        "bits_per_weight": sum(row["bits_per_weight"] for row in rows) / len(rows),
        "error": max(errors, default=None),
    }


def _short(kinds: Sequence[str]) -> list[str]:
    """Return the last parts of names if they are distinct, else the full names."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return last if len(set(last)) == len(last) else list(kinds)


def _positions(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    nll, reference = ([finite(row.get(key)) for row in rows] for key in ("nll", "reference_nll"))
    return {
        **{key: [row[key] for row in rows] for key in ("first", "last", "tokens")},
        "nll": nll,
        "delta_nll": [a - b if a is not None and b is not None else None for a, b in zip(nll, reference, strict=True)],
        "kl": [finite(row.get("kl")) for row in rows],
    }


def _trajectory(search: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return stage, number, time in seconds and fitness of each step that has a finite fitness."""
    steps = [step for step in search["steps"] if finite(step["fitness"]) is not None]
    return {key: [step[key] for step in steps] for key in ("stage", "number", "seconds", "fitness")}
