"""Training what pruning has left: nearer to the original, of the same shape, and repeatable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import some_tokens, tensors
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.passes.train.distillation import Schedule, Training
from compressor.recipe.schema import make_recipe

NARROW = {"pass": "prune_width", "ratio": 0.5, "of": "mlp", "multiple": 32}
TRAIN = {"pass": "recover", "steps": 40, "batch": 4, "rank": 8}


def run(model: Path, out: Path, text: Path, *passes: dict[str, Any], **options: Any) -> Any:
    calibration = {"source": str(text), "samples": 16, "seq_len": 32}
    recipe = make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})
    return api.run(recipe, model, out, verify=False, **options)


def divergence(original: Path, pruned: Path) -> float:
    """KL of predictions on random tokens."""
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(some_tokens()).logits.log_softmax(-1)
            for path in (original, pruned)
        )
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_what_is_trained_is_nearer_and_of_the_same_shape(
    family: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    run(tiny(family), tmp_path / "plain", text_file, NARROW)
    report = run(tiny(family), tmp_path / "trained", text_file, NARROW, TRAIN)
    first, last = report.pruning[1]["loss"]
    assert last < 0.8 * first
    assert divergence(tiny(family), tmp_path / "trained") < divergence(tiny(family), tmp_path / "plain")
    plain, trained = tensors(tmp_path / "plain"), tensors(tmp_path / "trained")
    assert {name: t.shape for name, t in plain.items()} == {name: t.shape for name, t in trained.items()}
    outside = [name for name in plain if ".layers." not in name]
    assert all(torch.equal(plain[name], trained[name]) for name in outside)
    assert not any(torch.equal(plain[name], trained[name]) for name in plain if name.endswith("_proj.weight"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "trained")]
    assert configs[0] == configs[1]


def test_norms_can_stay(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", text_file, NARROW, {**TRAIN, "steps": 3, "norms": False})
    before, after = tensors(tiny("llama")), tensors(tmp_path / "out")
    norms = [name for name in before if "norm" in name]
    assert norms
    assert all(torch.equal(before[name], after[name]) for name in norms)


def test_the_first_loss_is_that_of_the_pruned_model(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """One step with a learning rate of nearly nothing: what is written is what pruning alone gives, and the loss its KL."""
    run(tiny("llama"), tmp_path / "plain", text_file, NARROW)
    report = run(tiny("llama"), tmp_path / "out", text_file, NARROW, {**TRAIN, "steps": 1, "lr": 1e-12})
    plain, out = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    for name, tensor in plain.items():
        torch.testing.assert_close(out[name], tensor, rtol=1e-5, atol=1e-6)
    assert report.pruning[1]["loss"][0] > 0


def test_a_training_that_is_broken_off_goes_on_as_it_would_have(tmp_path: Path) -> None:
    schedule = Schedule(steps=60, batch=8, lr=0.1, seed=0)

    def trained(file: Path | None, until: int) -> tuple[torch.Tensor, list[float]]:
        weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        training = Training(schedule, [weight], file)
        training.resume(training.kept())
        for _ in range(training.done, until):
            loss = (weight - torch.tensor([1.0, 1.0])).square().sum()
            loss.backward()
            training.step(float(loss.detach()))
        return weight.detach(), training.losses

    whole = trained(None, 60)
    trained(tmp_path / "state", 47)  # put down after 40
    resumed = trained(tmp_path / "state", 60)
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_a_file_that_is_not_whole_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"half of a file")
    assert Training(Schedule(60, 8, 0.1, 0), [torch.nn.Parameter(torch.zeros(1))], tmp_path / "state").kept() == {}


def test_two_runs_are_equal(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        run(tiny("llama"), out, text_file, NARROW, {**TRAIN, "steps": 5})
    one, two = map(tensors, outs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_pruning_there_is_nothing_to_recover(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="put `prune_width` or `prune_depth` before it"):
        run(tiny("llama"), tmp_path / "out", text_file, TRAIN)


@pytest.mark.parametrize("key", ["steps", "batch", "rank", "lr"])
def test_settings_that_make_no_sense(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        make_recipe({"passes": [{"pass": "recover", key: 0}]})
