"""Names of tasks become tasks of lm-evaluation-harness.

A name is that of a local file (see files.py), of a task of our own (see suites.py), or of any task, group or tag of the
harness, whose data come from the hub.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.evaluation.tasks import files
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.questions import IGNORED, LONGEST_ANSWER, NUMBER, STOP, Questions
from compressor.evaluation.tasks.results import Tasks
from compressor.evaluation.tasks.suites import OWN

METRICS = {
    "choice": ("acc", "acc_norm"),
    "pair": ("acc",),
    "blank": ("acc",),
    "cloze": ("acc",),
    "generation": ("exact_match",),
}


def load(names: Sequence[str], encoder: Encoder, limit: int | None = None, seed: int = 0) -> Tasks:
    """The harness's tasks behind names.

    Raises:
        RecipeError: see run_tasks.
    """
    from lm_eval.tasks import TaskManager

    hub = [name for name in names if not files.is_file(name) and name not in OWN]
    manager = TaskManager() if hub else None
    found: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(names):
        if name in OWN:
            questions = OWN[name](name, encoder, seed)
        elif files.is_file(name):
            questions = files.read(Path(name), min(LONGEST_ANSWER, encoder.max_length // 2))
        else:
            found[name] = _from_hub(name, manager)
            continue
        if questions.name in found:
            raise RecipeError(f"{name}: there is another task of the name {questions.name}; rename the file")
        found[questions.name] = {questions.name: _own_task(questions.drawn(limit, seed))}
    _check_different(found)
    for task in (task for leaves in found.values() for task in leaves.values()):
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return found


def _own_task(questions: Questions) -> Any:
    """Questions as a task of the harness, held in memory."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    kind = questions.kind
    config: dict[str, Any] = {
        "task": questions.name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list([dict(row) for row in questions.rows])),
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "context",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS[kind]],
    }
    if kind in ("choice", "pair"):
        config |= {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "choices"}
    elif kind == "blank":  # the harness has it the other way round: the target is what the contexts share
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "label",
            "doc_to_target": "rest",
            "doc_to_choice": "contexts",
        }
    elif kind == "cloze":
        config |= {"output_type": "loglikelihood", "doc_to_target": _after_space}
    else:
        last = {"function": "regex", "regex_pattern": NUMBER, "group_select": -1}
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "target",
            "generation_kwargs": {"until": [STOP], "do_sample": False, "max_gen_toks": questions.max_tokens},
            "filter_list": [{"name": "none", "filter": [last, {"function": "take_first"}]}],
        }
        config["metric_list"][0]["regexes_to_ignore"] = list(IGNORED)
    return ConfigurableTask(config=config)


def _after_space(row: Mapping[str, str]) -> str:
    """A cloze's target as it continues the context."""
    apart = row["context"][-1:].isspace() or row["target"][:1].isspace()
    return row["target"] if apart else f" {row['target']}"


def _from_hub(name: str, manager: Any) -> Mapping[str, Any]:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`lm-eval ls tasks` lists them; the name of a file ends in .jsonl"
        raise RecipeError(f"tasks: no task named `{name}`; {hint}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # the hub's client, and the tasks' own code, raise unrelated kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RecipeError(f"task {name}: its data cannot be loaded from the hub ({reason}); check the network") from error
    return dict(loaded["tasks"])


def _check_different(tasks: Tasks) -> None:
    seen: dict[str, str] = {}
    for name, leaves in tasks.items():
        for leaf, task in leaves.items():
            if leaf in seen:
                raise RecipeError(f"tasks: {leaf} belongs to both {seen[leaf]} and {name}; leave one of them out")
            seen[leaf] = name
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = "runs code that a model wrote" if getattr(task, "UNSAFE_CODE", False) else "shows images or sound"
                raise RecipeError(f"tasks: {leaf} {what}, which is not done here; leave it out")
