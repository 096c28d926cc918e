"""Collect the results of tasks: a row for each task and metric, and what changed from the reference to the model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressor.evaluation.tasks.significance import paired

Tasks = Mapping[str, Mapping[str, Any]]  # by the name asked for: the harness's tasks that it stands for, by their names


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task. What needs a reference is None without one; without a mean of rights, so are the flips."""

    task: str
    metric: str
    samples: int
    value: float
    stderr: float | None
    reference_value: float | None = None
    reference_stderr: float | None = None
    lost: int | None = None  # right with the reference, wrong with the model
    won: int | None = None
    flips: float | None = None
    p_value: float | None = None  # exact McNemar

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """The harness's scores of a model's answers, for each of its tasks."""

    each: Mapping[str, Mapping[str, list[Any]]]  # task -> metric -> for each question; numbers where the metric is a mean
    overall: Mapping[str, Mapping[str, Any]]  # task -> metric -> what the harness makes of them


def results(tasks: Tasks, model: Answers, reference: Answers | None = None) -> list[TaskResult]:
    """Rows for each task and metric: one for all of a group's tasks together, every question counting the same."""
    rows = []
    for name, leaves in tasks.items():
        metrics = {metric: None for leaf in leaves for metric in model.each[leaf]}
        for metric in metrics:
            members = [leaf for leaf in leaves if metric in model.each[leaf]]
            if all(_is_mean(leaves[leaf], metric) for leaf in members):
                rows.append(_row(name, metric, members, model, reference))
            else:
                rows += [_overall(leaf, metric, model, reference) for leaf in members]
    return rows


def _row(name: str, metric: str, members: list[str], model: Answers, reference: Answers | None) -> TaskResult:
    from lm_eval.api.metrics import mean, mean_stderr

    def figures(answers: Answers) -> tuple[list[float], float, float | None]:
        values = [float(value) for leaf in members for value in answers.each[leaf][metric]]
        return values, float(mean(values)), float(mean_stderr(values)) if len(values) > 1 else None

    values, value, stderr = figures(model)
    row = TaskResult(name, _shown(metric), len(values), value, stderr)
    if reference is None:
        return row
    others, other, other_stderr = figures(reference)
    row = replace(row, reference_value=other, reference_stderr=other_stderr)
    if not set(values) | set(others) <= {0.0, 1.0}:
        return row  # neither right nor wrong
    return replace(row, **asdict(paired([v == 1.0 for v in values], [v == 1.0 for v in others])))


def _overall(leaf: str, metric: str, model: Answers, reference: Answers | None) -> TaskResult:
    other = float(reference.overall[leaf][metric]) if reference is not None else None
    value = float(model.overall[leaf][metric])
    return TaskResult(leaf, _shown(metric), len(model.each[leaf][metric]), value, None, other)


def _is_mean(task: Any, metric: str) -> bool:
    """Whether a metric is the mean over questions, rather than perplexity, F1 and their like."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric.partition(",")[0], mean) is mean


def _shown(metric: str) -> str:
    return metric.removesuffix(",none")
