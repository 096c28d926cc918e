"""Several models on the same text: what `compress compare` calls."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressor.inspection import inspect_model
from compressor.judging import evaluate_all, silent
from compressor.pipeline import Tell
from compressor.provenance import versions
from compressor.report import Report
from compressor.report_html.page import render
from compressor.report_html.plots import pareto_front


@dataclass(frozen=True)
class Compared:
    """One model among others."""

    name: str
    path: str
    size_bytes: int
    bits_per_weight: float  # of the packed layers; of the blocks' linear layers if none is packed
    model_bits_per_weight: float
    quality: dict[str, Any]
    best: bool  # on the Pareto front: none of the others is both smaller and better

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare(
    models: Sequence[str | Path], reference: str | Path | None = None, *, tell: Tell = silent, **options: Any
) -> list[Compared]:
    """Judge models on the same text in one go.

    Args:
        models: Model directories.
        reference: The original of all of them.
        tell: Called with progress.
        options: Of `evaluate_all`.
    """
    paths = [Path(path) for path in models]
    contents = [inspect_model(path) for path in paths]
    qualities = evaluate_all(paths, reference, tell=tell, **options)
    sizes = [content.size_bytes for content in contents]
    losses = [q.overall.nll if q.overall.kl is None else q.overall.kl for q in qualities]
    front = pareto_front(list(zip(sizes, losses, strict=True)))
    return [
        Compared(
            name=path.resolve().name,
            path=str(path),
            size_bytes=content.size_bytes,
            bits_per_weight=content.bits_per_weight,
            model_bits_per_weight=content.model_bits_per_weight,
            quality=quality.to_dict(),
            best=index in front,
        )
        for index, (path, content, quality) in enumerate(zip(paths, contents, qualities, strict=True))
    ]


def page(found: Sequence[Compared], reference: str | Path | None) -> str:
    """The comparison as a page, HTML: each model's own report if it has one, with the quality as measured now."""
    original = inspect_model(Path(reference)).size_bytes if reference is not None else max(one.size_bytes for one in found)
    return render([{**_own_report(one, original), "quality": one.quality} for one in found])


def _own_report(one: Compared, source_size_bytes: int) -> dict[str, Any]:
    file = Path(one.path) / "report.json"
    if file.is_file():
        own: dict[str, Any] = json.loads(file.read_text())
        return own
    return Report(
        model=one.name,
        path=one.path,
        out=one.name,
        version=version("compressor"),
        fingerprint={},
        recipe=None,
        calibration=None,
        versions=versions(),
        bits_per_weight=one.bits_per_weight,
        model_bits_per_weight=one.model_bits_per_weight,
        size_bytes=one.size_bytes,
        source_size_bytes=source_size_bytes,
    ).to_dict()
