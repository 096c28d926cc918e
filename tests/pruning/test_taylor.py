"""First-order importance against transformers' own gradients, and units that go step by step."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import some_tokens, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.passes.prune import prune_taylor
from compressor.passes.prune.gradual import SCHEDULES, left
from compressor.pipeline.prepare import load_calibration
from compressor.recipe.schema import Recipe, make_recipe

CPU = torch.device("cpu")
HALF = {"pass": "prune_taylor", "ratio": 0.5, "of": "mlp", "multiple": 32, "steps": 4, "batch": 4}
BOTH = {
    "ratio": 0.4,
    "of": "blocks",
    "multiple": 128,
}  # for which one of two groups of heads has to go, and half the channels


def recipe(text: Path, **changes: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 8, "seq_len": 32}
    return make_recipe({"passes": [{**HALF, **changes}], "calibration": calibration, "evaluation": None})


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(some_tokens()).logits
    return found


def silenced(path: Path, layer: str, columns: slice) -> Path:
    """A checkpoint in which columns of some layers are zero."""
    state = load_file(path / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(f"{layer}.weight"):
            tensor[:, columns] = 0
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_schedules_begin_with_nothing_and_end_with_all() -> None:
    for schedule in SCHEDULES.values():
        shares = [schedule(step / 40) for step in range(41)]
        assert (shares[0], shares[-1], schedule(2.0)) == (0, 1, 1)
        assert all(later > earlier for earlier, later in itertools.pairwise(shares))


def test_a_cubic_schedule_does_more_than_half_in_the_first_quarter() -> None:
    """Against the equation of the paper, with s_i = 0, s_f = 0.9."""
    cubic = SCHEDULES["cubic"]
    for t in (0.1, 0.25, 0.8):
        assert 0.9 * cubic(t) == pytest.approx(0.9 + (0 - 0.9) * (1 - t) ** 3)
    assert cubic(0.25) == pytest.approx(0.578, abs=5e-4)


def test_so_many_units_are_left() -> None:
    assert [left(10, 4, share) for share in (0, 0.5, 1)] == [10, 7, 4]


class Spy:
    """What importance was seen, by part, in the order of steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        original = prune_taylor.importance

        def importance(block: Any, part: Any) -> Tensor:
            self.seen.setdefault(f"{block.prefix}.{part.name}", []).append(found := original(block, part))
            return found.clone()

        monkeypatch.setattr(prune_taylor, "importance", importance)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("family", ["llama", "llama_biased"])
def test_in_the_first_step_importance_is_weights_times_gradients_of_the_next_token(
    family: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path, spy: Spy
) -> None:
    """By transformers' own loss, unit by unit; two groups of two query heads of 32, 256 channels."""
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    whole = recipe(text_file, steps=1, batch=8, **BOTH)
    calibration = load_calibration(whole, ModelSource(tiny(family), CPU))
    assert calibration is not None
    model(calibration.tokens, labels=calibration.tokens).loss.backward()
    api.run(whole, tiny(family), tmp_path / "out", verify=False)
    for index, layer in enumerate(model.model.layers):
        terms = {name: (p * p.grad).detach().abs() for name, p in layer.named_parameters()}

        def unit(rows: dict[str, int], writer: str, columns: int, u: int, terms: dict[str, Tensor] = terms) -> float:
            found = float(terms[f"{writer}.weight"][:, u * columns : (u + 1) * columns].sum())
            for name, term in terms.items():
                run = rows.get(name.rpartition(".")[0], 0)
                found += float(term[u * run : (u + 1) * run].sum())
            return found

        wanted = {
            "mlp": [unit({"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj", 1, u) for u in range(256)],
            "self_attn": [
                unit({f"self_attn.{n}_proj": w for n, w in (("q", 64), ("k", 32), ("v", 32))}, "self_attn.o_proj", 64, u)
                for u in range(2)
            ],
        }
        for part in ("mlp", "self_attn"):
            (found,) = spy.seen[f"model.layers.{index}.{part}"]
            torch.testing.assert_close(32 * found, 31 * torch.tensor(wanted[part]), rtol=1e-3, atol=0)  # 31 are predicted


def test_one_step_keeps_the_most_important(tiny: Callable[..., Path], text_file: Path, tmp_path: Path, spy: Spy) -> None:
    api.run(recipe(text_file, steps=1, refit=False), tiny("llama"), tmp_path / "out", verify=False)
    before, after = tensors(tiny("llama")), tensors(tmp_path / "out")
    for index in range(2):
        (score_U,) = spy.seen[f"model.layers.{index}.mlp"]
        stays = score_U.topk(128).indices.sort().values
        name = f"model.layers.{index}.mlp"
        assert torch.equal(after[f"{name}.up_proj.weight"], before[f"{name}.up_proj.weight"][stays])
        assert torch.equal(after[f"{name}.down_proj.weight"], before[f"{name}.down_proj.weight"][:, stays])


def test_what_is_gone_stays_gone_and_shapes_are_the_schedule_s(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_down: list[dict[str, Tensor]] = []
    monkeypatch.setattr(prune_taylor, "save", lambda path, state: put_down.append(dict(state)))
    api.run(recipe(text_file, schedule="cubic"), tiny("llama"), tmp_path / "out", verify=False)
    assert [int(state.pop("step")) for state in put_down] == [1, 2, 3, 4]
    for name in put_down[0]:
        kept = [set(state[name].nonzero().flatten().tolist()) for state in put_down]
        assert [len(units) for units in kept] == [256 - round(128 * (1 - (1 - t / 4) ** 3)) for t in range(1, 5)]
        assert all(later < earlier for earlier, later in itertools.pairwise(kept))


@pytest.mark.parametrize(("layer", "columns"), [("mlp.down_proj", slice(0, None, 2)), ("self_attn.o_proj", slice(0, 64))])
def test_units_without_weight_go_first_and_nothing_changes(
    layer: str, columns: slice, tiny_copy: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = silenced(tiny_copy("llama"), layer, columns)
    of_heads = {"ratio": 0.1, "of": "model", "multiple": 256}  # channels go by 256 or not at all
    api.run(recipe(text_file, **(of_heads if "o_proj" in layer else {})), model, tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"]) == ((1, 256) if "o_proj" in layer else (2, 128))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=0, atol=3e-5)


def test_a_run_that_is_broken_off_goes_on_to_the_same(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, spy: Spy
) -> None:
    class BrokenOffError(Exception):
        pass

    def breaks(event: Any) -> None:
        if (event.stage, event.done) == ("score", 2):
            raise BrokenOffError

    api.run(recipe(text_file), tiny("llama"), tmp_path / "whole", verify=False)
    with pytest.raises(BrokenOffError):
        api.run(recipe(text_file), tiny("llama"), tmp_path / "out", verify=False, tell=breaks)
    spy.seen.clear()
    api.run(recipe(text_file), tiny("llama"), tmp_path / "out", verify=False, resume=True)
    assert {len(steps) for steps in spy.seen.values()} == {2}
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("batch", 0), ("ratio", 1.0), ("multiple", 0), ("damp", 0.0), ("schedule", "square")]
)
def test_settings_that_make_no_sense_are_refused(key: str, value: object, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        recipe(text_file, **{key: value})
