"""Runs tasks through lm-evaluation-harness, for a model and its original, one after the other.

The harness makes the prompts, tells right from wrong and takes the mean; what changed between the two is paired here,
question by question.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RecipeError, SourceError
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.loading import load
from compressor.evaluation.tasks.results import Answers, TaskResult, Tasks, results
from compressor.evaluation.tasks.subject import Place, Subject
from compressor.evaluation.tasks.work import Work
from compressor.model.memory import dense_bytes
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.model.unused import log_warnings

FEWSHOT_SEED = 1234  # the harness's own: which examples stand before a question of the hub


def run_tasks(
    model: Path,
    names: Sequence[str],
    place: Place,
    *,
    reference: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    announce: Callable[[Work, float], None] = lambda work, seconds: None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[TaskResult]:
    """Have a model answer questions and, if there is one, its original.

    Args:
        model: Model directory.
        names: Names of tasks.
        place: Where and how to run.
        reference: The original.
        limit: Questions of each task, at most: of those of the hub the first ones, of others drawn over all.
        seed: Seed of all random draws.
        announce: Called once before it starts, with the work for one model and the seconds expected for all.
        tell: Called with steps done and in total, from the beginning for each model and kind of request.

    Returns:
        A row for each task and metric.

    Raises:
        RecipeError: the harness is not installed, or a task is not known, cannot be loaded or does not suit the model.
        SourceError: a model does not fit into memory though a task needs it there, or its output is not finite.
    """
    _check_options(names, limit)
    everyone = [path for path in (model, reference) if path is not None]
    sources = [ModelSource(path, place.device, place.dtype) for path in everyone]
    log_warnings(*(source.unused for source in sources))
    encoder = Encoder(load_tokenizer(model), min(source.max_positions for source in sources))
    with quiet():
        tasks = load(names, encoder, limit, seed)
        work = expected_work(tasks, encoder, limit)
        _check_room(tasks, sources, place)
        announce(work, sum(work.seconds(source) for source in sources))
        answers = [answer(Subject(path, place), tasks, encoder, limit, tell) for path in everyone]
    return results(tasks, *answers)


def load_tasks(model: Path, names: Sequence[str], limit: int | None = None, seed: int = 0) -> Tasks:
    """The harness's tasks behind names, made for a model.

    Raises:
        RecipeError: see run_tasks.
    """
    _check_options(names, limit)
    source = ModelSource(model, torch.device("cpu"))
    with quiet():
        return load(names, Encoder(load_tokenizer(model), source.max_positions), limit, seed)


def expected_work(tasks: Tasks, encoder: Encoder, limit: int | None = None) -> Work:
    """Return the work of tasks on one model, found without the model."""
    from compressor.evaluation.tasks.adapter import expected

    requests: list[Any] = []
    questions = 0
    for task in _leaves(tasks).values():
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=limit)
        requests += task.instances
        questions += len({request.doc_id for request in task.instances})
    return expected(encoder, requests, questions)


def answer(
    subject: Subject,
    tasks: Tasks,
    encoder: Encoder,
    limit: int | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Have one model answer; see run_tasks."""
    from lm_eval.evaluator import evaluate

    from compressor.evaluation.tasks.adapter import Adapter

    leaves = _leaves(tasks)
    for task in leaves.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    found = evaluate(Adapter(subject, encoder, tell), {"tasks": leaves}, limit=limit, bootstrap_iters=0)
    each: dict[str, dict[str, list[Any]]] = {name: {} for name in leaves}
    for name, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                each[name].setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return Answers(each, found["results"])


def _leaves(tasks: Tasks) -> dict[str, Any]:
    return {name: task for leaves in tasks.values() for name, task in leaves.items()}


def _check_options(names: Sequence[str], limit: int | None) -> None:
    if not names:
        raise RecipeError("tasks: none are named; name a task or a file")
    if limit is not None and limit < 1:
        raise RecipeError(f"limit {limit}: not a positive number; raise --limit")
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("tasks need lm-evaluation-harness; pip install 'compressor[eval]'")


def _check_room(tasks: Tasks, sources: Sequence[ModelSource], place: Place) -> None:
    """Refuse early what needs a whole model in memory that does not fit. Only one of them is there at a time."""
    writing = [
        name
        for name, leaves in tasks.items()
        if any(request.request_type == "generate_until" for task in leaves.values() for request in task.instances)
    ]
    if not writing and not place.resident:
        return
    free = place.available(place.device)
    for source in sources:
        needed = dense_bytes(source)
        if needed > free:
            why = f"tasks {', '.join(writing)} have it write, which" if writing else "resident in memory it"
            remedy = "leave these tasks out" if writing else "leave out --resident"
            raise SourceError(
                f"{source.path}: {why} takes {needed / 1e9:.1f} GB in {source.dtype} where {free / 1e9:.1f} GB are "
                f"available; {remedy}, or give --dtype bfloat16"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness from writing to the terminal."""
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
