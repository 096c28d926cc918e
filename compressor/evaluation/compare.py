"""Several models on the same text: what `compress compare` calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from compressor.errors import OutputError
from compressor.evaluation.evaluate import EvaluateOptions, evaluate_all
from compressor.model.checkpoint import Checkpoint
from compressor.pipeline.job import Tell, silent
from compressor.pipeline.provenance import versions
from compressor.report.files import REPORT, read_report
from compressor.report.html.page import render
from compressor.report.html.plots import pareto_front
from compressor.report.inspect import Inspection, inspect_model
from compressor.report.record import Report


@dataclass(frozen=True)
class Compared:
    """One model among others."""

    name: str
    path: str
    size_bytes: int  # of the safetensors files
    bits_per_weight: float  # of the packed layers; of the blocks' linear layers if none is packed
    model_bits_per_weight: float
    quality: dict[str, Any]
    best: bool  # on the Pareto front: none of the others is both smaller and better
    report: dict[str, Any]  # of the run that wrote it; if there is none, what its files tell

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the report stays with its model."""
        return {key: value for key, value in vars(self).items() if key != "report"}


def compare(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    tell: Tell = silent,
    **options: Unpack[EvaluateOptions],
) -> list[Compared]:
    """Judge models on the same text in one go.

    Args:
        models: Model directories.
        reference: The original of all of them.
        tell: Called with progress.
        options: Options of `evaluate_all`.
    """
    paths = [Path(path) for path in models]
    contents = [inspect_model(path) for path in paths]
    sizes = [_file_bytes(path) for path in paths]
    reports = [_report(path, content, size, max(sizes)) for path, content, size in zip(paths, contents, sizes, strict=True)]
    qualities = evaluate_all(paths, reference, tell=tell, **options)
    losses = [q.overall.nll if q.overall.kl is None else q.overall.kl for q in qualities]
    front = pareto_front(list(zip(sizes, losses, strict=True)))
    return [
        Compared(
            name=path.resolve().name,
            path=str(path),
            size_bytes=size,
            bits_per_weight=content.bits_per_weight,
            model_bits_per_weight=content.model_bits_per_weight,
            quality=quality.to_dict(),
            best=index in front,
            report=report,
        )
        for index, (path, content, size, report, quality) in enumerate(
            zip(paths, contents, sizes, reports, qualities, strict=True)
        )
    ]


def page(found: Sequence[Compared], reference: str | Path | None) -> str:
    """The comparison as a page, HTML: each model's report with the size and quality as found now, all from one original."""
    original: dict[str, Any] = {}
    if reference is not None:
        original = {"model": Path(reference).resolve().name, "source_size_bytes": _file_bytes(Path(reference))}
    return render([{**one.report, **original, "size_bytes": one.size_bytes, "quality": one.quality} for one in found])


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in Checkpoint(path).files())


def _report(path: Path, content: Inspection, size_bytes: int, source_size_bytes: int) -> dict[str, Any]:
    """The report of the run that wrote a model; if there is none, what its files tell."""
    warnings = []
    if (path / REPORT).is_file():
        try:
            return read_report(path)
        except OutputError as error:
            warnings.append(f"shown without the report of its run: {error}")
    name = path.resolve().name
    return Report(
        model=name,
        path=str(path),
        out=name,
        version=version("compressor"),
        fingerprint={},
        recipe=None,
        calibration=None,
        versions=versions(),
        warnings=warnings,
        bits_per_weight=content.bits_per_weight,
        model_bits_per_weight=content.model_bits_per_weight,
        size_bytes=size_bytes,
        source_size_bytes=source_size_bytes,
    ).to_dict()
