"""The stages of a run, each a function from one state to the next: prepare, prune, search, compress, write.

The later stages (evaluate, verify, publish) are in compressor/api.py, which runs all stages in order.
"""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressor.model import shards
from compressor.model.journal import remove_leftovers
from compressor.model.source import ModelSource
from compressor.model.writer import Workspace, check_space, check_target
from compressor.pipeline import blocks, whole_model
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE, Samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.contract import Plan
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.patterns import check_patterns
from compressor.pipeline.plan import make_plan, output_headers
from compressor.pipeline.plan_file import offering, read_plan
from compressor.pipeline.prepare import check_shares, load_calibration, open_model, streams
from compressor.pipeline.probe import Record
from compressor.pipeline.provenance import fingerprint, fingerprint_plan, new_report
from compressor.pipeline.prune_stage import pruned, pruning_place, sketched
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.target_search import find_plan, levels_place, settle, shortened
from compressor.pipeline.write_model import default_out, write_model
from compressor.recipe.schema import Recipe
from compressor.report.record import Report

NOTHING: tuple[str, ...] = ()  # no parts finished by an interrupted run


@dataclass(frozen=True)
class RunOptions:
    """The options of a run besides its recipe, model and output directory; see `compressor.run`."""

    plan: Path | None = None
    levels: Path | None = None
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    device: str | None = None
    dtype: str | None = None
    required: Sequence[str] = ()


@dataclass(frozen=True)
class RunState:
    """A run between two stages.

    Args:
        recipe: The recipe; a given plan removes its target.
        source: The model, with all changes made to it so far.
        shaped: The model with the shapes that it is expected to have after pruning.
        plan: Option of every unit. If the recipe has a target, it is empty until the search is done.
        dropped: Sub-layers that the plan drops.
        given: Plan that the user gave for the remaining units.
        out: Directory to create.
        ranks: The ranks that share the work.
        calibration: Calibration text; None if no pass reads text.
        report: Record of the run, filled by the stages.
        options: The options of the run.
        tell: Called with progress.
        started: Start of the run on the clock of `time.monotonic`.
    """

    recipe: Recipe
    source: ModelSource
    shaped: ModelSource
    plan: Plan
    dropped: Plan
    given: Plan | None
    out: Path
    ranks: Ranks
    calibration: Samples | None
    report: Report
    options: RunOptions
    tell: Tell
    started: float

    @property
    def job(self) -> Job:
        """Job that the block loop works on."""
        return Job(self.source, self.recipe.passes, self.plan, self.ranks)


def prepare(recipe: Recipe, model: Path, out: Path | None, options: RunOptions, tell: Tell) -> RunState:
    """Open the model, plan for its expected shapes, and load the calibration text. Whatever can fail early fails here.

    Raises:
        CompressorError: any error that the user can fix.
    """
    started, ranks = time.monotonic(), Ranks.from_environment(options.device)
    given = read_plan(options.plan) if options.plan is not None else None
    recipe = recipe if given is None else offering(recipe, given)
    source = open_model(recipe, model, ranks.device, options.dtype, lambda done, total: tell(Event("rotate", done, total)))
    source, given, dropped = settle(source, given)
    shaped = sketched(source, recipe.passes)[0]
    unmatched = check_patterns(shaped, recipe.passes, options.required)
    plan = make_plan(shaped, recipe.passes, given) if recipe.target is None else {}
    out = default_out(model, recipe.passes, plan, recipe.target) if out is None else out
    check_target(out, model, resume=options.resume, overwrite=options.overwrite)
    calibration = load_calibration(recipe, source)
    check_shares(calibration, ranks)
    made_by = fingerprint(recipe, source, calibration) | ({} if given is None else fingerprint_plan(given))
    report = new_report(recipe, source, out, made_by, calibration, unmatched)
    return RunState(recipe, source, shaped, plan, dropped, given, out, ranks, calibration, report, options, tell, started)


def check_room(state: RunState) -> None:
    """Refuse a run whose result would not fit on the disk. With a target, the size is unknown until the search is done.

    Raises:
        OutputError: it does not fit.
    """
    if state.recipe.target is None or state.plan:
        files = shards.layout(output_headers(state.shaped, state.recipe.passes, state.plan))
        check_space(state.out, shards.total_bytes(files))


def prune(state: RunState) -> RunState:
    """Run the pruning passes one after the other, and make the plan for the resulting shapes."""
    if not any(step.prunes for step in state.recipe.passes):
        return state
    report, place = state.report, pruning_place(state.out)
    source, report.pruning = pruned(
        state.recipe, state.source, state.calibration, state.ranks, place, report.fingerprint, state.tell
    )
    report.seconds = time.monotonic() - state.started if report.pruning else 0.0
    plan = make_plan(source, state.recipe.passes, state.given) if state.recipe.target is None else {}
    state = replace(state, source=source, shaped=source, plan=plan)
    check_room(state)
    return state


def search(state: RunState, judged: int) -> RunState:
    """Find the plan that meets the recipe's target, if it has one.

    Args:
        state: The state after pruning.
        judged: Number of tokens that the result will be evaluated on, for the estimate of the time left.
    """
    if state.recipe.target is None:
        return state
    recipe, report, place = state.recipe, state.report, levels_place(state.out, state.options.levels)
    found = find_plan(
        recipe, state.source, state.calibration, state.ranks, place, state.tell, started=state.started, judged=judged
    )
    if found.training < 1:
        recipe = shortened(recipe, found.training)
        report.warnings.append(f"time limit reached: each layer was trained for {found.training:.0%} of the planned steps")
    source, kept, dropped = settle(state.source, found.plan)
    plan = make_plan(source, recipe.passes, kept)
    made_by = {**fingerprint_plan(found.plan), "training": f"{found.training:.4f}"}
    report.fingerprint = {**report.fingerprint, **made_by}
    report.search = found.to_dict()
    state = replace(state, recipe=recipe, source=source, shaped=source, plan=plan, dropped=dropped)
    check_room(state)
    return state


def compress(state: RunState, workspace: Workspace | None, finished: Sequence[str]) -> Record | None:
    """Compress every block, then run the passes that train the compressed model.

    Args:
        state: The state with a plan.
        workspace: Store of finished blocks; None on all ranks but the first.
        finished: Names of the parts that an interrupted run finished; the same on every rank.

    Returns: the probe's record of the compressed model's logits, for the manifest.
    """
    started, report, job = time.monotonic(), state.report, state.job
    keep = keeping(state.recipe.calibration.on_disk)
    calibration = state.calibration if streams(job.passes) else None
    stream = blocks.open_stream(job, calibration, keep, state.tell) if calibration is not None else None
    probe = blocks.compress(job, stream, workspace, finished, report, state.tell)
    for number in (number for number, step in enumerate(job.passes) if step.trains_model):
        if whole_model.TUNED in finished:
            probe = whole_model.tuned(workspace, report) if workspace is not None else None
        else:
            assert calibration is not None
            batches = job.ranks.mine(calibration.batches(TOKENS_AT_ONCE))
            probe = whole_model.tune(job, number, batches, keep, workspace, report, state.tell)
    report.seconds += time.monotonic() - started
    report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if state.source.device.type == "cuda":
        report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(state.source.device)
    return probe


def compress_and_write(state: RunState, finish: Callable[[Workspace], None]) -> None:
    """Compress the model and write its directory. Only the first rank writes.

    Args:
        state: The state with a plan.
        finish: Function that evaluates, verifies and publishes the model; called with the workspace after writing.
    """
    ranks, options = state.ranks, state.options
    if not ranks.first:
        compress(state, None, ranks.agree(NOTHING))
        ranks.barrier()
        return
    fingerprint = state.report.fingerprint
    with Workspace(state.out, fingerprint, resume=options.resume, overwrite=options.overwrite) as workspace:
        probe = compress(state, workspace, ranks.agree(tuple(workspace.finished)))
        state.tell(Event("write", 0, 1, str(state.out)))
        write_model(state.recipe, state.source, {**state.plan, **state.dropped}, workspace, state.report, probe)
        finish(workspace)
    if state.recipe.target is not None and options.levels is None:
        remove_leftovers(levels_place(state.out, None), state.out, state.report.warnings.append)
    ranks.barrier()
