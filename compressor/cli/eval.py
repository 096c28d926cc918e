"""`compress eval`: what a model knows, what it lost against the original, and whether that is within limits."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_quality, print_tasks, progress

if TYPE_CHECKING:
    from compressor.evaluation.tasks.work import Work


def eval_(
    model: a.Model = Path(),
    reference: Annotated[Path | None, typer.Option(help="Original model: adds KL divergence, agreement and flips.")] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Evaluate it on text.")] = True,
    data: a.Data = None,
    samples: a.Samples = 64,
    seq_len: a.SeqLen = None,
    stride: a.Stride = None,
    bos: a.Bos = None,
    documents: a.Documents = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of lm-evaluation-harness, or a .jsonl file of questions (see docs/evaluation.md); repeatable."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Tasks under one name: knowledge, or quick, standard, full. Only the last needs a network."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of questions from each task.")] = None,
    seed: a.Seed = 0,
    resident: a.Resident = False,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit 1 if the mean KL, of all texts or of one, exceeds this many nats per token.")
    ] = None,
    max_kl_p99: Annotated[
        float | None, typer.Option(help="Exit 1 if the 99th percentile of the KL exceeds this many nats.")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Exit 1 if the perplexity grew by more than this share: 2% or 0.02.")
    ] = None,
    min_top1: Annotated[
        str | None, typer.Option(help="Exit 1 if the top-1 agreement is below this share: 95% or 0.95.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Put the figures into MODEL's report.json, report.html and README.md.")
    ] = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Judge MODEL on text it was not calibrated on and on tasks, streamed block by block: larger than memory is no problem.

    Perplexities are only comparable under the same protocol, which is printed with them. Exit status: 0 done and within all
    limits, 1 a limit is broken, 2 could not run.

    Example: `compress eval model-int4 --reference model/ --max-kl 0.05 --max-ppl-increase 2%`
    """
    from compressor.cli._quiet import quiet
    from compressor.errors import RecipeError
    from compressor.evaluation.evaluate import answer_tasks, check_tasks, evaluate
    from compressor.evaluation.limits import Limits, share
    from compressor.evaluation.tasks.suites import tasks_of
    from compressor.report import files

    names = [*(tasks or ()), *(tasks_of(suite) if suite else ())]
    limits = Limits(max_kl, max_kl_p99, share(max_ppl_increase, "--max-ppl-increase"), share(min_top1, "--min-top1"))
    if limits.any and (reference is None or not text):
        raise RecipeError("limits: nothing to compare with; give the original model as --reference, and no --no-text")
    if not text and not names:
        raise RecipeError("--no-text: leaves nothing to do; name --tasks or a --suite")
    if limit is not None and not names:
        raise RecipeError(f"--limit {limit}: there are no questions; name --tasks or a --suite")
    if save:
        files.check_amendable(model, judged=text, compared=reference is not None)  # fails before the work
    quiet()
    if names:
        check_tasks(model, names, limit, seed)  # fails before the work
    broken: list[str] = []
    shared: dict[str, Any] = {"seed": seed, "resident": resident, "device": device, "dtype": dtype}
    answer: dict[str, Any] = {"tasks": []}
    if text:
        protocol: dict[str, Any] = {
            "samples": samples,
            "seq_len": seq_len,
            "stride": stride,
            "bos": bos,
            "documents": documents,
        }
        with progress() as tell:
            quality = evaluate(model, reference, data=data or ("builtin",), **protocol, **shared, tell=tell)
        broken = limits.broken(quality) if limits.any else []
        answer |= quality.to_dict()
        if save:
            files.amend(model, quality=quality.to_dict())
        if not as_json:
            print_quality(str(model), quality.to_dict())
    if names:
        with progress() as tell:
            answered = answer_tasks(model, names, reference, limit=limit, announce=_announce, **shared, tell=tell)
        answer["tasks"] = [result.to_dict() for result in answered]
        if save:
            files.amend(model, tasks=answer["tasks"])
        if not as_json:
            print_tasks(answer["tasks"])
    if as_json:
        print_json({**answer, "limits_broken": broken})
    for sentence in broken:
        sys.stderr.write(f"limit broken: {sentence}\n")
    if broken:
        raise SystemExit(1)


def _announce(work: "Work", seconds: float) -> None:
    sys.stderr.write(f"{work.sentence(seconds)}\n")
