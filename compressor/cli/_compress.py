"""Run a recipe: the shared part of `run` and the shorthands."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.cli._show import print_forecast, print_json, print_report, progress

if TYPE_CHECKING:
    from compressor.recipe.schema import Recipe


def compress(
    recipe: "Recipe",
    model: Path,
    out: Path | None,
    *,
    plan: Path | None = None,
    levels: Path | None = None,
    required: Sequence[str],
    resume: bool,
    overwrite: bool,
    verify: bool,
    dry_run: bool,
    as_json: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    """Run a recipe, or say what it would do, and print the result; arguments as of `api.run`."""
    from compressor import api
    from compressor.cli._quiet import quiet
    from compressor.pipeline.job import silent
    from compressor.pipeline.ranks import Ranks

    quiet()
    first = Ranks.from_environment(device).first
    if dry_run:
        if not first:
            return
        forecast = api.forecast(recipe, model, out, plan=plan, device=device, dtype=dtype, required=required)
        print_json(forecast.to_dict()) if as_json else print_forecast(forecast)
        return
    with progress() if first else nullcontext(silent) as tell:
        report = api.run(
            recipe,
            model,
            out,
            plan=plan,
            levels=levels,
            resume=resume,
            overwrite=overwrite,
            verify=verify,
            device=device,
            dtype=dtype,
            required=required,
            tell=tell,
        )
    if first:
        print_json(report.to_dict()) if as_json else print_report(report, report.path)
