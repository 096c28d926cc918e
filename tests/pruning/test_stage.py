"""Passes that prune, one after the other: what may follow what, what a dry run says, who else works there."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_per_layer import ALIKE, CPU, SEARCH, logits, with_silence
from tiny_models import some_tokens
from transformers import AutoModelForCausalLM

import compressor
from compressor import api
from compressor.errors import CalibrationError, OutputError, RecipeError
from compressor.model.source import ModelSource
from compressor.pipeline.job import Event
from compressor.pipeline.prune_stage import held, pruning_place
from compressor.recipe.schema import make_recipe

WIDTH = {"pass": "prune_width", "ratio": 0.15, "of": "mlp", "multiple": 32, "search": SEARCH}
DEPTH = {"pass": "prune_depth", "ratio": 0.2, "of": "blocks", "by": "even"}
SUBLAYERS = {**DEPTH, "parts": "sublayers"}
HIDDEN = {"pass": "prune_hidden", "ratio": 0.15, "of": "blocks"}
RECOVER = {"pass": "recover", "steps": 2, "batch": 2}
DISTIL = {"pass": "distil_blocks", "steps": 0}
PAT = {"pass": "pat", "ratio": 0.1, "of": "blocks", "steps": 2, "batch": 2}


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", num_hidden_layers=4)


@pytest.fixture
def recipe(text_file: Path) -> Callable[..., Any]:
    def made(*passes: dict[str, Any]) -> Any:
        calibration = {"source": str(text_file), "samples": 8, "seq_len": 32}
        return make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})

    return made


@pytest.mark.parametrize(
    "before",
    [[HIDDEN], [PAT], [WIDTH, {**RECOVER, "lr": 0.05, "steps": 10}], [{"pass": "rotate"}]],
    ids=["hidden", "pat", "recovered", "rotated"],
)
def test_the_hidden_state_of_a_changed_model_is_turned_and_narrowed(
    before: list[dict[str, Any]], model: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    report = api.run(recipe(*before, HIDDEN), model, tmp_path / "out")
    assert {check["check"]: check["outcome"] for check in report.verification}["transformers"] == "passed"


def test_it_is_turned_behind_what_was_the_second_block(
    model: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.passes.prune.prune_depth.even", lambda units, count: (0, 1, 1, 1))
    report = api.run(recipe(DEPTH, HIDDEN), model, tmp_path / "out")
    assert report.pruning[0]["gone"] == [0]
    assert {check["check"]: check["outcome"] for check in report.verification}["transformers"] == "passed"


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([HIDDEN, DISTIL], "prune_hidden .passes.0. leaves other hidden channels between blocks"),
        ([PAT, DISTIL], "pat .passes.0. leaves other hidden channels"),
        ([RECOVER], "recover: nothing was pruned"),
        ([{**WIDTH, "ratio": 0}, RECOVER], "recover: nothing was pruned"),
        ([DISTIL, WIDTH], "distil_blocks: nothing was pruned"),
        ([{**WIDTH, "layout": "per-layer"}, WIDTH], "its blocks have widths of their own"),
        ([SUBLAYERS, WIDTH], "does without its (self_attn|mlp); width has to be taken before those go"),
    ],
)
def test_what_cannot_follow_is_refused_before_anything_is_done(
    passes: list[dict[str, Any]], said: str, model: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    for way in (api.forecast, api.run):
        with pytest.raises(RecipeError, match=said):
            way(recipe(*passes), model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["cosine", "search"])
def test_sublayers_go_where_some_are_missing(by: str, model: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    (first,) = api.run(recipe(SUBLAYERS), model, tmp_path / "one", verify=False).pruning
    (second,) = api.run(
        recipe({**SUBLAYERS, "by": by, "search": SEARCH}), tmp_path / "one", tmp_path / "two", verify=False
    ).pruning
    absent = ModelSource(tmp_path / "two", CPU).absent
    assert absent == {*first["gone"], *second["gone"]}
    assert len(absent) == len(first["gone"]) + len(second["gone"])


@pytest.fixture
def uneven(tiny_copy: Callable[..., Path], recipe: Callable[..., Any], tmp_path: Path) -> Path:
    """A model whose second block has a narrower MLP."""
    silent = with_silence(tiny_copy("llama", num_hidden_layers=4), {"model.layers.1.mlp.down_proj": 224})
    step = {**WIDTH, "layout": "per-layer", "ratio": 0.2, "heads": False}
    api.run(recipe(step), silent, tmp_path / "uneven", verify=False)
    return tmp_path / "uneven"


@pytest.mark.parametrize("step", [DEPTH, SUBLAYERS], ids=["blocks", "sublayers"])
def test_widths_of_what_goes_are_forgotten(
    step: dict[str, Any], uneven: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ModelSource(uneven, CPU)
    narrow = {int(name.split(".")[2]) for name in before.widths}
    places = range(4) if step is DEPTH else [n for i in range(4) for n in (i, i)]  # of attentions, too
    goes = tuple(int(place not in narrow) for place in places)
    monkeypatch.setattr("compressor.passes.prune.prune_depth.even", lambda units, count: goes)
    report = api.run(recipe(step), uneven, tmp_path / "out")
    assert "failed" not in {check["outcome"] for check in report.verification}
    assert ModelSource(tmp_path / "out", CPU).widths == {}
    assert torch.isfinite(logits(compressor.load(tmp_path / "out"))).all()
    said = "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == (step is SUBLAYERS)


@pytest.mark.parametrize(
    "step",
    [
        {**WIDTH, "layout": "per-layer", "of": "blocks", "multiple": 64},
        {**WIDTH, "of": "blocks", "multiple": 64},
        {**SUBLAYERS, "by": "search", "ratio": 0.15, "search": SEARCH},
        {**DEPTH, "by": "cosine"},
    ],
    ids=["per-layer", "uniform", "sublayers", "depth"],
)
def test_no_more_is_written_than_a_dry_run_says(
    step: dict[str, Any], model: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    forecast = api.forecast(recipe(step), model, tmp_path / "out")
    report = api.run(recipe(step), model, tmp_path / "out", verify=False)
    assert report.size_bytes <= forecast.size_bytes + 64 * len(forecast.plan)
    assert report.size_bytes > 0.9 * forecast.size_bytes
    if forecast.certain:
        assert report.size_bytes == forecast.size_bytes


def interrupted(at: str) -> Callable[[Event], None]:
    """Ends a run at the third event of a stage."""
    seen = itertools.count(1)

    def tell(event: Event) -> None:
        if event.stage == at and next(seen) == 3:
            raise KeyboardInterrupt

    return tell


def test_other_settings_begin_anew_only_if_that_is_said(model: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        api.run(recipe(WIDTH), model, out, tell=interrupted("prune"))
    assert list(pruning_place(out).rglob("*.safetensors"))
    other = recipe({**WIDTH, "ratio": 0.3})
    with pytest.raises(OutputError, match="give --resume to go on from there or --overwrite to start again"):
        api.run(other, model, out)
    with pytest.raises(OutputError, match=r"widths changed since the interrupted run; give --overwrite to start again"):
        api.run(other, model, out, resume=True)
    api.run(other, model, out, overwrite=True, verify=False)
    assert not pruning_place(out).exists()


def test_two_runs_do_not_prune_at_one_place(model: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    with (
        held(tmp_path / "out", print, resume=False, overwrite=False),
        pytest.raises(OutputError, match="another run is writing here"),
    ):
        api.run(recipe(WIDTH), model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_complete_run_is_cleared_up(
    model: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    api.run(recipe(DEPTH), model, out, verify=False)
    (pruning_place(out) / "0").mkdir(parents=True)  # as if the kill had come after OUT appeared
    monkeypatch.setattr("compressor.pipeline.run.check_space", lambda *given: pytest.fail("nothing is to be written"))
    assert api.run(recipe(DEPTH), model, out, resume=True).out == "out"
    assert not pruning_place(out).exists()


def test_what_was_damaged_is_said_in_a_sentence(model: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = recipe(WIDTH, {**RECOVER, "steps": 4})
    with pytest.raises(KeyboardInterrupt):
        api.run(steps, model, out, tell=interrupted("train"))
    for file in pruning_place(out).rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OutputError, match="it is damaged: give --overwrite to start again"):
        api.run(steps, model, out, resume=True)


@pytest.mark.parametrize("where", ["/proc/nowhere/out", "/dev/null/out"])
@pytest.mark.parametrize("step", [WIDTH, DEPTH], ids=["width", "depth"])
def test_where_nothing_can_be_written_is_said_at_once(
    step: dict[str, Any], where: str, model: Path, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.pipeline.run.pruned", lambda *given: pytest.fail("has begun"))
    with pytest.raises(OutputError):
        api.run(recipe(step), model, where)


def test_directories_that_runs_work_in_are_not_published(tiny_copy: Callable[..., Path], recipe: Callable[..., Any]) -> None:
    model = tiny_copy("llama", num_hidden_layers=4)
    (model / "other.pruning" / "0").mkdir(parents=True)
    (model / "other.pruning" / "0" / "recovered.training").write_text("of another run")
    api.run(recipe(WIDTH), model, model / "out", verify=False)
    assert [path for path in (model / "out").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({**WIDTH, "damp": float("nan")}, "damp: nan is not a positive number"),
        ({**HIDDEN, "damp": float("inf")}, "damp: inf is not a positive number"),
        ({**DISTIL, "damp": float("nan")}, "damp: nan is not a positive number"),
        ({**DEPTH, "of": "mlp"}, "of: Input should be 'model' or 'blocks'"),
        ({**WIDTH, "of": "model", "score": "cfsp"}, "set heads: false"),
    ],
)
def test_values_that_make_no_sense(step: dict[str, Any], said: str, recipe: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(step)


@pytest.mark.parametrize(
    ("passes", "key"),
    [([{**WIDTH, "of": "blocks", "multiple": 16, "search": {"tokens": 10**7}}], "search.tokens"),
     ([{**DEPTH, "by": "search", "search": {"tokens": 10**7}}], "search.tokens"),
     ([DEPTH, {"pass": "soft_prompt", "tokens": 8, "judged": 10**7}], "judged")],
)  # fmt: skip
def test_too_little_text_is_noticed_first(
    passes: list[dict[str, Any]], key: str, model: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    stages: list[str] = []
    with pytest.raises(CalibrationError, match=f"^{key} 10000000, besides those of calibration"):
        api.run(recipe(*passes), model, tmp_path / "out", tell=lambda event: stages.append(event.stage))
    assert stages == []


def test_blocks_of_gpt2_can_go(tiny: Callable[..., Path], recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Its config has their number in `n_layer`."""
    report = api.run(recipe({**DEPTH, "ratio": 0.4}), tiny("gpt2"), tmp_path / "out")
    assert {check["outcome"] for check in report.verification} == {"passed"}
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)
    for index in sorted(report.pruning[0]["gone"], reverse=True):
        del whole.transformer.h[index]
    with torch.no_grad():
        torch.testing.assert_close(shorter(some_tokens()).logits, whole(some_tokens(), use_cache=False).logits, **ALIKE)


def test_the_loss_of_a_penalised_training_is_a_divergence(model: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Which is never below nought, whatever is added for the mask."""
    step = {"pass": "compresso", "ratio": 0.2, "of": "mlp", "multiple": 32, "steps": 6, "batch": 2, "search": SEARCH}
    (report,) = api.run(recipe(step), model, tmp_path / "out", verify=False).pruning
    assert all(loss >= 0 for loss in report["loss"])


@pytest.mark.parametrize("step", [WIDTH, DEPTH], ids=["width", "depth"])
def test_a_setting_of_the_search_leaves_the_others_as_they_are(step: dict[str, Any], recipe: Callable[..., Any]) -> None:
    plain = {key: value for key, value in step.items() if key != "search"}
    (whole,) = recipe(plain).passes
    (one,) = recipe({**plain, "search": {"tokens": 64, "evolve": {"generations": 2}}}).passes
    assert (one.search.tokens, one.search.evolve.generations) == (64, 2)
    assert one.search.table_tokens == whole.search.table_tokens
    assert one.search.evolve.stages == whole.search.evolve.stages
    with pytest.raises(RecipeError, match="no such key"):
        recipe({**plain, "search": {"tokns": 64}})
