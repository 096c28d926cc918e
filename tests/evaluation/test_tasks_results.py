"""Two models that answer the same questions: what changed, whether it can be chance, and what is refused."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError, SourceError
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.harness import expected_work, run_tasks
from compressor.evaluation.tasks.loading import load
from compressor.evaluation.tasks.results import Answers, results
from compressor.evaluation.tasks.significance import mcnemar, paired
from compressor.evaluation.tasks.subject import Place
from compressor.evaluation.tasks.suites import HUB
from compressor.evaluation.tasks.work import Work
from compressor.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")
STREAMED = Place(CPU, torch.float32, False, lambda device: 2**40)
RESIDENT = Place(CPU, torch.float32, True, lambda device: 2**40)
OFFLINE = ["facts-choice", "facts-cloze", "facts-long-50", "grammar-pairs", "arithmetic-sums"]


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coarse") / "int2"
    api.quantize(DEMO_MODEL, out, bits=2, method="rtn", evaluate=False, verify=False, device="cpu")
    return out


@pytest.fixture(scope="module")
def manager() -> Any:
    """The harness's list of its tasks: takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 1), (2, 2), (0, 6), (9, 2)])
def test_significance_is_that_of_all_ways_to_toss_a_coin(lost: int, won: int) -> None:
    as_uneven = [
        abs(2 * sum(tosses) - lost - won) >= abs(lost - won) for tosses in itertools.product((0, 1), repeat=lost + won)
    ]
    assert mcnemar(lost, won) == pytest.approx(sum(as_uneven) / len(as_uneven))


def test_significance_of_thousands_of_changes() -> None:
    assert mcnemar(2000, 2000) == 1.0
    assert 0 < mcnemar(1500, 1000) < 1e-20


def test_what_changed_is_counted_question_by_question() -> None:
    changed = paired([True, False, False, True, False], [True, True, True, False, False])
    assert (changed.lost, changed.won, changed.flips) == (2, 1, 0.6)


@pytest.mark.parametrize("place", [STREAMED, RESIDENT], ids=["streamed", "resident"])
def test_against_itself_nothing_changes(place: Place) -> None:
    rows = run_tasks(DEMO_MODEL, OFFLINE, place, reference=DEMO_MODEL, limit=6)
    assert {row.task for row in rows} == set(OFFLINE)
    for row in rows:
        assert (row.lost, row.won, row.flips, row.p_value) == (0, 0, 0.0, 1.0)
        assert (row.value, row.stderr) == (row.reference_value, row.reference_stderr)


def test_streamed_and_resident_answer_alike(coarse: Path) -> None:
    streamed, resident = (run_tasks(coarse, OFFLINE, place, reference=DEMO_MODEL, limit=8) for place in (STREAMED, RESIDENT))
    assert streamed == resident
    assert any(row.flips for row in streamed)  # 2 bits change something


def test_flips_are_those_of_the_two_models_alone(coarse: Path) -> None:
    both = {r.metric: r for r in run_tasks(coarse, ["facts-choice"], RESIDENT, reference=DEMO_MODEL, limit=60)}
    alone = {r.metric: r for r in run_tasks(coarse, ["facts-choice"], RESIDENT, limit=60)}
    other = {r.metric: r for r in run_tasks(DEMO_MODEL, ["facts-choice"], RESIDENT, limit=60)}
    for metric, row in both.items():
        assert (row.value, row.stderr) == (alone[metric].value, alone[metric].stderr)
        assert (row.reference_value, row.reference_stderr) == (other[metric].value, other[metric].stderr)
        assert row.lost is not None and row.won is not None and row.lost + row.won > 0
        assert round(row.samples * (row.value - other[metric].value)) == row.won - row.lost
        assert alone[metric].reference_value is alone[metric].flips is alone[metric].p_value is None
    assert both["acc"].to_dict().keys() == {
        *("task", "metric", "samples", "value", "stderr", "reference_value", "reference_stderr"),
        *("lost", "won", "flips", "p_value"),
    }


def test_a_group_is_one_row_and_what_is_no_mean_has_no_flips() -> None:
    class Task:
        def aggregation(self) -> dict[str, Any]:
            from lm_eval.api.metrics import mean, perplexity

            return {"acc": mean, "perplexity": perplexity}

    tasks = {"group": {"one": Task(), "two": Task()}}
    now = Answers(
        {"one": {"acc,none": [1.0, 0.0]}, "two": {"acc,none": [0.0], "perplexity,none": [-1.0]}},
        {"two": {"perplexity,none": 2.7}},
    )
    before = Answers(
        {"one": {"acc,none": [1.0, 1.0]}, "two": {"acc,none": [0.0], "perplexity,none": [-1.1]}},
        {"two": {"perplexity,none": 3.0}},
    )
    pooled, single = results(tasks, now, before)
    assert (pooled.task, pooled.metric, pooled.samples) == ("group", "acc", 3)
    assert (pooled.value, pooled.reference_value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (pooled.lost, pooled.won, pooled.p_value) == (1, 0, 1.0)
    assert (single.task, single.metric, single.value, single.reference_value) == ("two", "perplexity", 2.7, 3.0)
    assert single.stderr is single.flips is single.p_value is None


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A list of tasks with one group, as the harness has them: two tasks of words, and one of whole texts."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "import os, sys{n}"}}\n' for n in range(3)))
    files = f"{{data_files: {tmp_path}/rows.jsonl, cache_dir: {tmp_path}/cache}}"
    common = f"dataset_path: json\ndataset_kwargs: {files}\ntest_split: train\n"
    words = 'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: ":"\nmetric_list:\n'
    acc = "- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
    bits = "- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n"
    perplexity = "- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    for name, text in {"one": words + acc, "two": words + acc + perplexity, "texts": rolling + bits}.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: my_{name}\n{common}{text}")
    (tmp_path / "group.yaml").write_text("group: my_group\ntask: [my_one, my_two]\n")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_tasks_of_the_harness_s_kind(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: group)
    rows = run_tasks(DEMO_MODEL, ["my_group", "my_texts"], RESIDENT, reference=DEMO_MODEL)
    assert [(row.task, row.metric, row.samples) for row in rows] == [
        ("my_group", "acc", 6),
        ("my_two", "perplexity", 3),
        ("my_texts", "bits_per_byte", 3),
    ]
    tokenizer, model = load_tokenizer(DEMO_MODEL), AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    nll = size = 0.0
    for n in range(3):
        ids = torch.tensor([[0, *tokenizer.encode(f"import os, sys{n}")]])
        nll += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        size += len(f"import os, sys{n}")
    assert rows[2].value == pytest.approx(nll / size / math.log(2), rel=1e-4)
    assert [row.flips for row in rows] == [0.0, None, None]
    assert all(row.value == row.reference_value for row in rows)


def test_a_task_named_twice_over_is_refused(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: group)
    with pytest.raises(RecipeError, match="my_one belongs to both my_group and my_one; leave one of them out"):
        run_tasks(DEMO_MODEL, ["my_group", "my_one"], RESIDENT)


def test_the_work_is_counted_before_it_is_done() -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    encoder = Encoder(tokenizer, 256)
    told: list[tuple[Work, float]] = []
    run_tasks(DEMO_MODEL, ["facts-cloze", "arithmetic-sums"], STREAMED, limit=5, announce=lambda *work: told.append(work))
    [(work, seconds)] = told
    assert (work.questions, work.written) == (10, 5 * 16)
    tasks = load(["facts-cloze", "arithmetic-sums"], encoder, limit=5)
    assert expected_work(tasks, encoder) == work
    requests = [request.args for leaves in tasks.values() for task in leaves.values() for request in task.instances]
    texts = [args[0] + (args[1] if isinstance(args[1], str) else "") for args in requests]
    assert work.tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert seconds > 0


@pytest.mark.parametrize(("seconds", "time"), [(4.4, "4 s"), (240.0, "4 min"), (9000.0, "2.5 h")])
def test_the_work_is_told_in_a_sentence(seconds: float, time: str) -> None:
    assert Work(12, 34567, 0).sentence(seconds) == f"12 questions, 34,567 tokens to read with each model, about {time} in all"
    assert "34,567 tokens to read and at most 80 to write with each model" in Work(12, 34567, 80).sentence(seconds)
    assert "; 3 prompts are longer than the model takes" in Work(12, 34567, 0, 3).sentence(seconds)


def test_progress_ends_at_its_end() -> None:
    steps: list[tuple[int, int]] = []
    run_tasks(DEMO_MODEL, ["facts-cloze", "arithmetic-sums"], RESIDENT, limit=3, tell=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == 3
    assert all(0 < done <= total for done, total in steps)


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run_tasks(DEMO_MODEL, ["facts-cloze", "arithmetic-sums"], RESIDENT, limit=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "none are named"),
        (["facts-cloze"], {"limit": 0}, "limit 0: not a positive number"),
        (["facts-clozes.jsonl"], {}, "facts-clozes.jsonl: no such task file"),
        (["arc_eazy"], {}, r"no task named `arc_eazy`; did you mean `arc_easy`\?"),
        (["qqqqqqqq"], {}, "no task named `qqqqqqqq`; `lm-eval ls tasks` lists them"),
        (["arc_easy"], {}, r"task arc_easy: its data cannot be loaded from the hub \(.*ai2_arc.*\); check the network"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    names: list[str], options: dict[str, Any], message: str, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)
    with pytest.raises(RecipeError, match=message):
        run_tasks(DEMO_MODEL, names, STREAMED, **options)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / place / "same.jsonl" for place in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"text": "a b"}\n')
    with pytest.raises(RecipeError, match="another task of the name same; rename the file"):
        run_tasks(DEMO_MODEL, [str(path) for path in paths], STREAMED)


def test_without_the_harness_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"tasks need lm-evaluation-harness; pip install 'compressor\[eval\]'"):
        run_tasks(DEMO_MODEL, ["facts-cloze"], STREAMED)


@pytest.mark.parametrize(
    ("names", "resident", "message"),
    [
        (
            ["facts-cloze", "arithmetic-sums"],
            False,
            "tasks arithmetic-sums have it write, which takes 0.0 GB .* leave these tasks",
        ),
        (["facts-cloze"], True, "resident in memory it takes 0.0 GB .* leave out --resident"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_starts(names: list[str], resident: bool, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run_tasks(DEMO_MODEL, names, Place(CPU, torch.float32, resident, lambda device: 2**20))


def test_a_streamed_model_need_not_fit() -> None:
    assert run_tasks(DEMO_MODEL, ["facts-cloze"], Place(CPU, torch.float32, False, lambda device: 0), limit=2)


def test_the_hub_s_names_are_the_harness_s(manager: Any) -> None:
    assert set(HUB) <= set(manager.all_tasks)
