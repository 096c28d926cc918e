"""Identify the run that made a result: fingerprints of recipe, model, data and arithmetic, and the report that holds them.

`--resume` requires equal fingerprints. On the same kind of machine, with the same number of threads, equal fingerprints
give equal weights, byte for byte.
"""

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from compressor.errors import OutputError
from compressor.model.source import ModelSource
from compressor.model.writer import clear_up
from compressor.pipeline.calibration.data import Samples
from compressor.pipeline.contract import Plan
from compressor.pipeline.plan import describe_plan
from compressor.reading import read_json
from compressor.recipe.schema import Recipe, to_yaml
from compressor.report.record import Report, Row


def fingerprint(recipe: Recipe, source: ModelSource, calibration: Samples | None) -> dict[str, str]:
    """Return the properties that must be equal for two runs to be the same run."""
    return {
        "recipe": hashlib.sha256(to_yaml(recipe).encode()).hexdigest(),
        "model": fingerprint_model(source),
        "data": calibration.sha256 if calibration else "none",
        "computation": f"compressor {version('compressor')}, torch {torch.__version__}, "
        f"transformers {version('transformers')}, {source.device.type}, {source.dtype}",
    }


def fingerprint_plan(plan: Plan) -> dict[str, str]:
    """Return the fingerprint of a plan that was given or found."""
    return {"plan": hashlib.sha256(json.dumps(describe_plan(plan)).encode()).hexdigest()}


def fingerprint_model(source: ModelSource) -> str:
    """Hash a checkpoint's config, and the name, the size and a sample of the bytes of each file. Cheap for large models."""
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for file in source.checkpoint.files():
        size, piece, pieces = file.stat().st_size, 2**16, 64
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(pieces):
                opened.seek(i * max(0, size - piece) // (pieces - 1))
                digest.update(opened.read(piece))
    return digest.hexdigest()


def new_report(
    recipe: Recipe,
    source: ModelSource,
    out: Path,
    made_by: Mapping[str, str],
    calibration: Samples | None,
    warnings: Sequence[str] = (),
) -> Report:
    """Return a report with everything that is known before the run."""
    spec = recipe.calibration
    data = None
    if calibration is not None:
        count, length = calibration.tokens.shape
        data = {
            "source": spec.source,
            "samples": count,
            "seq_len": length,
            "seed": spec.seed,
            "sha256": calibration.sha256,
        }
    return Report(
        model=source.path.resolve().name,
        path=str(out),
        out=out.name,
        version=version("compressor"),
        fingerprint=made_by,
        recipe=yaml.safe_load(to_yaml(recipe)),
        calibration=data,
        versions=versions(),
        command=command(source, out),
        source_size_bytes=sum(file.stat().st_size for file in source.checkpoint.files()),
        warnings=[*source.unused.warnings, *warnings],
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def command(source: ModelSource, out: Path) -> str:
    """Return the shell command that repeats a run, from the recipe stored with its result."""
    precision = str(source.dtype).removeprefix("torch.")
    parts = ("compress", "run", f"{out}/recipe.yaml", str(source.path), "--out", f"{out}-again")
    return shlex.join([*parts, "--device", source.device.type, "--dtype", precision])


def finished_report(out: Path, report: Report) -> Report:
    """Return the report of a run that is already complete, for `--resume` after a kill that came too late.

    Raises:
        OutputError: the directory was written by another run.
    """
    try:
        found = read_json(out / "report.json", OutputError)
        same = dict(report.fingerprint).items() <= found["fingerprint"].items()  # a search adds its plan
        rows = [Row(**row) for row in found["rows"]]
    except (OutputError, LookupError, TypeError, AttributeError):
        same = False
    if not same:
        raise OutputError(f"{out}: exists and is not the result of this run; give --overwrite or choose another --out")
    known = {key: found[key] for key in vars(report) if key in found and key != "rows"}
    whole = replace(report, **known, rows=rows)
    clear_up(out, found["fingerprint"], whole.warnings.append)
    return whole
