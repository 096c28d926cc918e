"""The verbs as functions: what the command line calls, and what a program can call instead."""

import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RecipeError, SourceError
from compressor.evaluation.data import Judged, load_evaluation
from compressor.evaluation.evaluate import continuations, judge
from compressor.evaluation.verify.check import WrongError
from compressor.evaluation.verify.verify import verify as verify_directory
from compressor.formats.base import OneOf
from compressor.host import known_state
from compressor.model import shards
from compressor.model.journal import remove_leftovers
from compressor.model.source import ModelSource
from compressor.model.writer import Workspace, check_space, check_target
from compressor.pipeline import blocks, whole_model
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE, Samples
from compressor.pipeline.calibration.hidden import Keep, keeping
from compressor.pipeline.contract import Plan
from compressor.pipeline.job import Event, Job, Tell, silent
from compressor.pipeline.memory_estimate import expected_memory, generating
from compressor.pipeline.patterns import check_patterns
from compressor.pipeline.plan import describe_plan, make_plan, model_formats, output_headers, total_bits
from compressor.pipeline.plan_file import offering, read_plan
from compressor.pipeline.prepare import check_shares, load_calibration, needs_data, open_model, sample_length, streams
from compressor.pipeline.probe import Record
from compressor.pipeline.provenance import fingerprint, fingerprint_plan, finished_report, new_report
from compressor.pipeline.prune_stage import clear, expected_peak, held, pruned, pruning_place, sketched
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.target_search import find_plan, fit_recipe, levels_place, settle, shortened
from compressor.pipeline.write_model import default_out, write_model
from compressor.recipe.build import prune_recipe, quantize_recipe
from compressor.recipe.schema import Recipe, changed_patterns, load_recipe
from compressor.report.card import model_card
from compressor.report.files import CARD, completed, written
from compressor.report.record import Report

NOTHING: tuple[str, ...] = ()  # finished by an interrupted run
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
    started = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    ranks = Ranks.from_environment(device)
    given = read_plan(Path(plan)) if plan is not None else None
    recipe = recipe if given is None else offering(recipe, given)
    source = open_model(recipe, Path(model), ranks.device, dtype, lambda done, total: tell(Event("rotate", done, total)))
    source, given, gone = settle(source, given)
    small, unmatched = shaped(source, recipe, required)
    expected = make_plan(small, recipe.passes, given) if recipe.target is None else {}
    out = default_out(Path(model), recipe.passes, expected, recipe.target) if out is None else Path(out)
    check_target(out, Path(model), resume=resume, overwrite=overwrite)
    calibration, evaluation = load_calibration(recipe, source), load_evaluation(recipe, source)
    check_shares(calibration, ranks)
    made_by = fingerprint(recipe, source, calibration) | ({} if given is None else fingerprint_plan(given))
    report = new_report(recipe, source, out, made_by, calibration, unmatched)
    place = pruning_place(out)
    if resume and out.exists() and not overwrite:
        return finished(out, report, ranks)
    if recipe.target is None:
        check_space(out, shards.total_bytes(shards.layout(output_headers(small, recipe.passes, expected))))
    prunes = ranks.first and any(step.prunes for step in recipe.passes)
    with held(out, report.warnings.append, resume=resume, overwrite=overwrite) if prunes else nullcontext():
        source, report.pruning = pruned(recipe, source, calibration, ranks, place, made_by, tell)
        report.seconds = time.monotonic() - started if report.pruning else 0.0
        chosen = make_plan(source, recipe.passes, given) if recipe.target is None else {}
        if recipe.target is not None:
            judged = evaluation.tokens if evaluation is not None else 0
            found = find_plan(
                recipe, source, calibration, ranks, levels_place(out, levels), tell, started=started, judged=judged
            )
            if found.training < 1:
                recipe = shortened(recipe, found.training)
                report.warnings.append(
                    f"for want of time only {found.training:.0%} of the training was done that a layer gets"
                )
            source, kept, gone = settle(source, found.plan)
            chosen = make_plan(source, recipe.passes, kept)
            report.fingerprint = made_by = made_by | fingerprint_plan(found.plan) | {"training": f"{found.training:.4f}"}
            report.search = found.to_dict()
        check_space(out, shards.total_bytes(shards.layout(output_headers(source, recipe.passes, chosen))))
        job, keep = Job(source, recipe.passes, chosen, ranks), keeping(recipe.calibration.on_disk)
        calibration = calibration if streams(recipe.passes) else None
        if not ranks.first:
            compress_blocks(job, calibration, keep, None, ranks.agree(NOTHING), report, tell)
            ranks.barrier()
            return report
        with Workspace(out, made_by, resume=resume, overwrite=overwrite) as workspace:
            done = ranks.agree(tuple(workspace.finished))
            probe = compress_blocks(job, calibration, keep, workspace, done, report, tell)
            tell(Event("write", 0, 1, str(out)))
            write_model(recipe, source, {**chosen, **gone}, workspace, report, probe)
            finish(recipe, source, evaluation, workspace, report, tell, verify=verify)
        if recipe.target is not None and levels is None:
            remove_leftovers(levels_place(out, levels), out, report.warnings.append)
        ranks.barrier()
        return report


def quantize(
    model: str | Path = ".", out: str | Path | None = None, *, bits: float | None = None, tell: Tell = silent, **options: Any
) -> Report:
    """Quantize a model's weights: `run` with the recipe of `quantize_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends what was done to the model's name.
        bits: Bits of a weight; None takes 4, or the bits of the numbers.
        tell: Called with progress.
        options: Options of `quantize_recipe`, and resume, overwrite, verify, device, dtype of `run`.
    """
    of_run = {key: options.pop(key) for key in ("resume", "overwrite", "verify", "device", "dtype") if key in options}
    return run(quantize_recipe(bits, **options), model, out, required=given_patterns(options), tell=tell, **of_run)


def fit(model: str | Path = ".", out: str | Path | None = None, *, tell: Tell = silent, **options: Any) -> Report:
    """Find and write the best model of a size: `run` with the recipe of `fit_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends the target to the model's name.
        tell: Called with progress.
        options: Options of `fit_recipe`, and levels, resume, overwrite, verify, device, dtype of `run`.
    """
    keys = ("levels", "resume", "overwrite", "verify", "device", "dtype")
    of_run = {key: options.pop(key) for key in keys if key in options}
    return run(fit_recipe(Path(model), **options), model, out, required=given_patterns(options), tell=tell, **of_run)


def prune(
    model: str | Path = ".", out: str | Path | None = None, *, ratio: float = 0.25, tell: Tell = silent, **options: Any
) -> Report:
    """Take parameters away from a model: `run` with the recipe of `prune_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends what was done to the model's name.
        ratio: Share of the parameters that goes.
        tell: Called with progress.
        options: Options of `prune_recipe`, and resume, overwrite, verify, device, dtype of `run`.
    """
    of_run = {key: options.pop(key) for key in ("resume", "overwrite", "verify", "device", "dtype") if key in options}
    return run(prune_recipe(ratio, **options), model, out, required=given_patterns(options), tell=tell, **of_run)


def shaped(source: ModelSource, recipe: Recipe, required: Sequence[str]) -> tuple[ModelSource, list[str]]:
    """Return the model in the shape in which its blocks are compressed, and warnings of patterns that match nothing there."""
    small = sketched(source, recipe.passes)[0]
    return small, check_patterns(small, recipe.passes, required)


def given_patterns(options: Mapping[str, Any]) -> list[str]:
    """Return the patterns of layers among the options of a shorthand."""
    return [*options.get("ignore", ()), *changed_patterns(options.get("changes", ()))]


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


def compress_blocks(
    job: Job,
    calibration: Samples | None,
    keep: Keep,
    workspace: Workspace | None,
    finished: Sequence[str],
    report: Report,
    tell: Tell,
) -> Record | None:
    """The pipeline, timed. Returns what the model now computes, for the manifest."""
    source = job.source
    started = time.monotonic()
    stream = None
    if calibration is not None:
        stream = blocks.open_stream(job, calibration, keep, tell)
    probe = blocks.compress(job, stream, workspace, finished, report, tell)
    for number, step in enumerate(job.passes):
        if step.trains_model:
            if whole_model.TUNED in finished:
                probe = whole_model.tuned(workspace, report) if workspace is not None else None
            else:
                assert calibration is not None
                batches = job.ranks.mine(calibration.batches(TOKENS_AT_ONCE))
                probe = whole_model.tune(job, number, batches, keep, workspace, report, tell)
    report.seconds += time.monotonic() - started
    report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if source.device.type == "cuda":
        report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(source.device)
    return probe


def finished(out: Path, report: Report, ranks: Ranks) -> Report:
    """The report of a run that is complete already, and nothing left of how it was made."""
    found = finished_report(out, report)
    if ranks.first:
        clear(out, found.warnings.append)
    return found


def finish(
    recipe: Recipe,
    source: ModelSource,
    evaluation: Judged | None,
    workspace: Workspace,
    report: Report,
    tell: Tell,
    *,
    verify: bool,
) -> None:
    """Judge and verify what was written, and let it appear."""
    if evaluation is not None and recipe.evaluation is not None:
        judge_result(workspace.model, source, evaluation, recipe.evaluation.generate, report, tell)
    if verify:
        check_result(workspace.model, source.device, report, tell)
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
