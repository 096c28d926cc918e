"""The verbs as functions: what the command line calls, and what a program can call instead."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from compressor.errors import RecipeError, SourceError
from compressor.evaluation.data import Judged, load_evaluation
from compressor.evaluation.evaluate import continuations, judge
from compressor.evaluation.verify.check import WrongError
from compressor.evaluation.verify.verify import verify as verify_directory
from compressor.formats.base import OneOf
from compressor.host import known_state
from compressor.model import shards
from compressor.model.source import ModelSource
from compressor.model.writer import Workspace
from compressor.pipeline import run as stages
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE
from compressor.pipeline.contract import Plan
from compressor.pipeline.job import Event, Tell, silent
from compressor.pipeline.memory_estimate import expected_memory, generating
from compressor.pipeline.patterns import check_patterns
from compressor.pipeline.plan import describe_plan, make_plan, model_formats, output_headers, total_bits
from compressor.pipeline.plan_file import offering, read_plan
from compressor.pipeline.prepare import needs_data, open_model, sample_length
from compressor.pipeline.provenance import finished_report
from compressor.pipeline.prune_stage import clear, expected_peak, held, sketched
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.run import RunOptions, RunState
from compressor.pipeline.target_search import FitOptions, fit_recipe, settle
from compressor.pipeline.write_model import default_out
from compressor.recipe.build import PruneOptions, QuantizeOptions, prune_recipe, quantize_recipe
from compressor.recipe.schema import Recipe, changed_patterns, load_recipe
from compressor.report.card import model_card
from compressor.report.files import CARD, completed, written
from compressor.report.record import Report

LIBRARIES_BYTES = 540 * 2**20  # of the process before it reads a weight, and of what libraries keep for themselves later


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run: `--dry-run`."""

    out: Path
    plan: Plan
    size_bytes: int  # of the safetensors files and their index: exact, or at most that
    source_size_bytes: int
    bits_per_weight: float  # over the compressed layers: exact, or at most that
    expected_peak_memory_bytes: int
    certain: bool  # that of the shapes which a pass may choose among there is only one
    warnings: tuple[str, ...]  # of the source and the recipe; `run` warns of more

    @property
    def exact(self) -> bool:
        """Whether no pass has yet to choose: else sizes are the largest there may be."""
        return self.certain and not any(isinstance(option, OneOf) for option in self.plan.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "out": str(self.out), "exact": self.exact, "plan": describe_plan(self.plan)}


@known_state()
def run(
    recipe: Recipe | str | Path,
    model: str | Path = ".",
    out: str | Path | None = None,
    *,
    plan: str | Path | None = None,
    levels: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    required: Sequence[str] = (),
    tell: Tell = silent,
) -> Report:
    """Compress a model as a recipe says and write a model directory.

    Args:
        recipe: A recipe, or the path of one.
        model: Hugging Face model directory with safetensors weights.
        out: Directory to create; None appends what was done to the model's name.
        plan: A plan.yaml, which says what each unit gets of the options, and replaces the recipe's target.
        levels: Directory for the measured levels of a search, kept for others; None puts them beside `out` until it is there.
        resume: Go on from an interrupted run of the same recipe, model and data.
        overwrite: Replace what is there.
        verify: Reload what was written through every loader that claims to read it, before it appears.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        dtype: Calibration runs in; None takes the checkpoint's where the hardware computes in it, else float32.
            The result is always compared with the original in float32.
        required: Patterns of layers that must match something; others of the recipe that match nothing are warned of.
        tell: Called with progress.

    Raises:
        CompressorError: anything a user can mend.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    options = RunOptions(
        plan=None if plan is None else Path(plan),
        levels=None if levels is None else Path(levels),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        device=device,
        dtype=dtype,
        required=required,
    )
    state = stages.prepare(recipe, Path(model), None if out is None else Path(out), options, tell)
    evaluation = load_evaluation(recipe, state.source)
    report = state.report
    if resume and state.out.exists() and not overwrite:
        return finished(state.out, report, state.ranks)
    stages.check_room(state)
    prunes = state.ranks.first and any(step.prunes for step in recipe.passes)
    with held(state.out, report.warnings.append, resume=resume, overwrite=overwrite) if prunes else nullcontext():
        state = stages.prune(state)
        state = stages.search(state, judged=evaluation.tokens if evaluation is not None else 0)
        stages.compress_and_write(state, partial(finish, state, evaluation))
    return report


def quantize(
    model: str | Path = ".",
    out: str | Path | None = None,
    *,
    bits: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
    **options: Unpack[QuantizeOptions],
) -> Report:
    """Quantize a model's weights: `run` with the recipe of `quantize_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends what was done to the model's name.
        bits: Bits of a weight; None takes 4, or the bits of the numbers.
        resume: Go on from an interrupted run, as in `run`.
        overwrite: Replace what is there.
        verify: Reload what was written, as in `run`.
        device: Device of the run, as in `run`.
        dtype: Dtype of calibration, as in `run`.
        tell: Called with progress.
        options: Options of `quantize_recipe`.
    """
    return run(
        quantize_recipe(bits, **options),
        model,
        out,
        required=[*options.get("ignore", ()), *changed_patterns(options.get("changes", ()))],
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        device=device,
        dtype=dtype,
        tell=tell,
    )


def fit(
    model: str | Path = ".",
    out: str | Path | None = None,
    *,
    levels: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
    **options: Unpack[FitOptions],
) -> Report:
    """Find and write the best model of a size: `run` with the recipe of `fit_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends the target to the model's name.
        levels: Directory for the measured levels, as in `run`.
        resume: Go on from an interrupted run, as in `run`.
        overwrite: Replace what is there.
        verify: Reload what was written, as in `run`.
        device: Device of the run, as in `run`.
        dtype: Dtype of calibration, as in `run`.
        tell: Called with progress.
        options: Options of `fit_recipe`.
    """
    return run(
        fit_recipe(Path(model), **options),
        model,
        out,
        levels=levels,
        required=[*options.get("ignore", ()), *changed_patterns(options.get("changes", ()))],
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        device=device,
        dtype=dtype,
        tell=tell,
    )


def prune(
    model: str | Path = ".",
    out: str | Path | None = None,
    *,
    ratio: float = 0.25,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
    **options: Unpack[PruneOptions],
) -> Report:
    """Take parameters away from a model: `run` with the recipe of `prune_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends what was done to the model's name.
        ratio: Share of the parameters to drop.
        resume: Go on from an interrupted run, as in `run`.
        overwrite: Replace what is there.
        verify: Reload what was written, as in `run`.
        device: Device of the run, as in `run`.
        dtype: Dtype of calibration, as in `run`.
        tell: Called with progress.
        options: Options of `prune_recipe`.
    """
    return run(
        prune_recipe(ratio, **options),
        model,
        out,
        required=changed_patterns(options.get("changes", ())),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        device=device,
        dtype=dtype,
        tell=tell,
    )


@known_state()
def forecast(
    recipe: Recipe,
    model: str | Path,
    out: str | Path | None = None,
    *,
    plan: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    required: Sequence[str] = (),
) -> Forecast:
    """Return what `run` would do and how large the result would be, from the headers alone; arguments as of `run`.

    Raises:
        RecipeError: (among others) the recipe has a target, so that the plan is known only after a search.
    """
    given = read_plan(Path(plan)) if plan is not None else None
    recipe = recipe if given is None else offering(recipe, given)
    if recipe.target is not None:
        raise RecipeError("--dry-run: what a target comes to is known after a search; `compress search` writes only the plan")
    source = open_model(recipe, Path(model), Ranks.from_environment(device).device, dtype, sizes_only=True)
    warnings = source.unused.warnings
    source, given, _ = settle(source, given)
    spec = recipe.calibration
    length = sample_length(spec.seq_len, source)
    tokens = spec.samples * length if needs_data(recipe) else 0
    judge = recipe.evaluation
    samples = generating(source) if judge is not None and judge.generate and source.device.type == "cpu" else 0
    pruning = expected_peak(source, recipe.passes, tokens, TOKENS_AT_ONCE)
    source, certain, more = sketched(source, recipe.passes)
    unmatched = check_patterns(source, recipe.passes, required)
    chosen = make_plan(source, recipe.passes, given)
    files = shards.layout(output_headers(source, recipe.passes, chosen))
    memory = expected_memory(
        source,
        recipe.passes,
        tokens=tokens,
        on_disk=spec.on_disk is not None,
        judged=judge.samples * sample_length(judge.seq_len or length, source) if judge is not None else 0,
        batch=TOKENS_AT_ONCE,
    )
    bits, weights = total_bits(source, model_formats(source, recipe.passes, chosen))
    widest = max(header.dtype.itemsize for header in source.checkpoint.headers.values())
    return Forecast(
        out=default_out(Path(model), recipe.passes, chosen) if out is None else Path(out),
        plan=chosen,
        size_bytes=shards.total_bytes(files) + more * widest,
        source_size_bytes=sum(file.stat().st_size for file in source.checkpoint.files()),
        bits_per_weight=bits / weights if weights else 8 * widest,
        certain=certain,
        warnings=(*warnings, *unmatched),
        expected_peak_memory_bytes=LIBRARIES_BYTES + max(memory, pruning, samples),
    )


def finished(out: Path, report: Report, ranks: Ranks) -> Report:
    """The report of a run that is complete already, and nothing left of how it was made."""
    found = finished_report(out, report)
    if ranks.first:
        clear(out, found.warnings.append)
    return found


def finish(state: RunState, evaluation: Judged | None, workspace: Workspace) -> None:
    """Evaluate and verify what was written, and let it appear."""
    report, judge_spec = state.report, state.recipe.evaluation
    if evaluation is not None and judge_spec is not None:
        judge_result(workspace.model, state.source, evaluation, judge_spec.generate, report, state.tell)
    if state.options.verify:
        check_result(workspace.model, state.source.device, report, state.tell)
    write_reports(workspace, report)
    workspace.publish(report.warnings.append)


def judge_result(model: Path, source: ModelSource, text: Judged, generate: int, report: Report, tell: Tell) -> None:
    """Compare what was written with the original, in float32, and let both continue some beginnings."""
    report.quality = judge([ModelSource(model, source.device)], ModelSource(source.path, source.device), text, tell)[
        0
    ].to_dict()
    if generate:
        tell(Event("generate", 0, 1))
        try:
            report.samples += continuations(model, source.path, text, generate, source)
        except SourceError as error:
            report.warnings.append(f"no samples were generated: {error}")


def write_reports(workspace: Workspace, report: Report) -> None:
    """Write the report for programs and for a browser, and the model card."""
    whole = completed(report.to_dict())
    report.plots = whole["plots"]
    for name, text in {**written(whole), CARD: model_card(whole)}.items():
        workspace.write_text(name, text)


def check_result(model: Path, device: torch.device, report: Report, tell: Tell) -> None:
    """Reload what was written in every way there is.

    Raises:
        WrongError: it is not what was computed, or does not load as that.
    """
    tell(Event("verify", 0, 1))
    checks = verify_directory(model, None, device, lambda done, total, what: tell(Event("verify", done, total, what)))
    report.verification += [check.to_dict() for check in checks]
    failed = [check for check in checks if check.outcome == "failed"]
    if failed:
        detail = failed[0].detail.replace(f"{model}/", "").replace(f"{model}: ", "")  # the place is named once
        raise WrongError(f"{model}: what was written is not sound, so {report.out} was not made; {failed[0].check}: {detail}")
