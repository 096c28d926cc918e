"""Blocks that are trained one by one: towards the right hidden states, only what was named, and on from where they were."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.edited import Rewriting
from compressor.model.edits import fewer_sublayers
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.passes.prune.depth import fewer_blocks
from compressor.passes.train.blockwise import Twins, fit
from compressor.passes.train.distillation import Schedule
from compressor.pipeline.calibration.data import Samples, load_samples
from compressor.pipeline.job import Event, Tell, silent
from compressor.pipeline.prune_stage import Work
from compressor.pipeline.ranks import Ranks
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
NARROW = {"pass": "prune_width", "ratio": 0.5, "of": "mlp", "multiple": 32}
SHORT = {"pass": "prune_depth", "ratio": 0.5, "of": "blocks", "by": "even"}  # of four blocks, the first and the last stay
DISTIL = {"pass": "distil_blocks", "steps": 25, "batch": 4}
DEEP = {"num_hidden_layers": 4}
CALIBRATION = {"samples": 16, "seq_len": 32}


def run(model: Path, out: Path, text: Path, *passes: Mapping[str, Any], **options: Any) -> Any:
    calibration = {"source": str(text), **CALIBRATION}
    recipe = make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})
    return api.run(recipe, model, out, verify=False, **options)


def calibration_text(model: Path, text: Path) -> Samples:
    return load_samples(str(text), load_tokenizer(model), **CALIBRATION)


def states(model: Path, tokens: Tensor) -> list[Tensor]:
    """What leaves each block, by transformers alone."""
    found: list[Tensor] = []
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for block in loaded.model.layers:
        block.register_forward_hook(lambda module, given, made: found.append(made))
    with torch.no_grad():
        loaded(tokens, use_cache=False)
    return found


def divergence(original: Path, pruned: Path, text: Path) -> float:
    """KL of predictions on the text that was learned from."""
    tokens = calibration_text(original, text).tokens
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits.log_softmax(-1)
            for path in (original, pruned)
        )
    return float((a.exp() * (a - b)).sum(-1).mean())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(
        (torch.linalg.vector_norm(found - wanted, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)).square().mean()
    )


def test_a_block_is_compared_with_the_last_original_one_that_it_stands_for(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny("llama", **DEEP)
    run(model, tmp_path / "plain", text_file, SHORT)
    (_, report) = run(model, tmp_path / "out", text_file, SHORT, {**DISTIL, "steps": 0}).pruning
    tokens = calibration_text(model, text_file).tokens
    wanted, plain, out = (states(path, tokens) for path in (model, tmp_path / "plain", tmp_path / "out"))
    first, last = report["blocks"]
    assert first["before"] == pytest.approx(relative(plain[0], wanted[2]), rel=1e-4)
    assert first["trained"] == pytest.approx(relative(out[0], wanted[2]), rel=1e-4)
    assert last["trained"] == pytest.approx(relative(out[1], wanted[3]), rel=1e-4)
    assert first["fitted"] < first["before"]


def test_a_block_knows_its_number_in_the_original_after_any_changes(tiny: Callable[..., Path]) -> None:
    original = ModelSource(tiny("llama", num_hidden_layers=6), CPU)
    once = original.rewritten(fewer_blocks(original, (1, 0, 1, 1, 0, 1)))
    between = once.rewritten(Rewriting({}))
    twice = between.rewritten(fewer_blocks(between, (0, 1, 1, 1)))
    assert once.numbers_in(original) == [0, 2, 3, 5]
    assert twice.numbers_in(original) == [2, 3, 5]
    assert twice.numbers_in(between) == [1, 2, 3]
    assert twice.numbers_in(twice) == [0, 1, 2]


def work(
    original: ModelSource, pruned: ModelSource, text: Path, ranks: Ranks, place: Path, tell: Tell = silent, **step: Any
) -> Work:
    recipe = make_recipe({"passes": [{**DISTIL, **step}]})
    return Work(recipe, original, pruned, calibration_text(original.path, text), ranks, place, {}, tell)


def distilled(original: ModelSource, pruned: ModelSource, text: Path, place: Path, tell: Tell = silent, **step: Any) -> Any:
    """What the pass alone leaves."""
    given = work(original, pruned, text, Ranks(), place, tell, **step)
    return given.recipe.passes[0].prune(given)


def test_the_fit_is_the_weighted_least_squares_solution(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Against a solver that sees all tokens, and besides them the weight as it was; in a block with no attention."""
    whole = ModelSource(tiny("llama"), CPU)
    bare = whole.rewritten(fewer_sublayers(whole, frozenset({"model.layers.0.self_attn"})))
    removed = frozenset(name for name in bare.checkpoint if name.startswith("model.layers.1."))
    original = ModelSource(tiny("llama"), CPU)
    pruned = bare.rewritten(Rewriting({}, config={"num_hidden_layers": 1}, removed=removed, blocks=(0,)))
    twins = Twins.start(work(original, pruned, text_file, Ranks(), tmp_path))
    twins.lead(2)
    block = twins.student.block(0)
    mlp: Any = block.module.get_submodule("mlp")
    x_TD = torch.cat(list(twins.inputs)).flatten(0, 1)
    t_TD = torch.cat(list(twins.targets)).flatten(0, 1)
    with torch.no_grad():
        read_TD = block.module.get_submodule("post_attention_layernorm")(x_TD)
        hidden_TI = mlp.act_fn(mlp.gate_proj(read_TD)) * mlp.up_proj(read_TD)
    size_T1 = torch.linalg.vector_norm(t_TD, dim=-1, keepdim=True)
    rows_TI, wanted_TD = (hidden_TI / size_T1).double(), ((t_TD - x_TD) / size_T1).double()
    ridge = (0.01 * rows_TI.square().sum(0).mean()).sqrt()
    rows_TI = torch.cat([rows_TI, ridge * torch.eye(256, dtype=torch.float64)])
    wanted_TD = torch.cat([wanted_TD, ridge * block.weight("mlp.down_proj").T.double()])
    expected = torch.linalg.lstsq(rows_TI, wanted_TD).solution.T
    new = fit(twins, block, 0.01)
    assert new.keys() == {"mlp.down_proj.weight"}
    torch.testing.assert_close(new["mlp.down_proj.weight"].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def narrow(tiny: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned, and nothing else."""
    out = tmp_path_factory.mktemp("narrow") / "out"
    run(tiny("llama"), out, text_file, NARROW)
    return out


CHANGES: dict[str, Callable[[Tensor, Tensor], bool]] = {  # of a layer that is not fitted
    "norms": torch.equal,
    "scales": lambda old, new: float(((new / old) / (new / old)[:, :1] - 1).abs().median()) < 1e-3,
    "lora": lambda old, new: int((torch.linalg.svdvals(new - old) > 1e-4).sum()) == 4,
    "all": lambda old, new: int((torch.linalg.svdvals(new - old) > 1e-4).sum()) > 4,
}


@pytest.mark.parametrize("train", CHANGES)
def test_what_is_trained_changes_and_brings_blocks_nearer(
    train: str, narrow: Path, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    step = {**DISTIL, "train": train, "rank": 4}
    (_, report) = run(tiny("llama"), tmp_path / "out", text_file, NARROW, step).pruning
    old, new = tensors(narrow), tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    assert all(block["trained"] < block["fitted"] < block["before"] for block in report["blocks"])
    assert all(torch.equal(old[name], new[name]) for name in old if ".layers." not in name)
    for name in (name for name in old if ".layers." in name):
        if "norm" in name:
            assert not torch.equal(old[name], new[name])
        elif name.rpartition(".")[0].endswith(("q_proj", "gate_proj")):
            assert CHANGES[train](old[name], new[name]), name
    assert divergence(tiny("llama"), tmp_path / "out", text_file) < divergence(tiny("llama"), narrow, text_file)


def test_blocks_with_norms_behind_what_writes_learn_to_stand_for_those_that_went(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny("gemma2", **DEEP)
    report = run(model, tmp_path / "out", text_file, SHORT, {**DISTIL, "steps": 10}).pruning[1]
    run(model, tmp_path / "plain", text_file, SHORT)
    assert report["blocks"][-1]["trained"] < report["blocks"][-1]["before"]
    assert divergence(model, tmp_path / "out", text_file) < divergence(model, tmp_path / "plain", text_file)


def test_what_is_left_of_blocks_without_attention_or_mlp_or_both_learns(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    original = ModelSource(tiny("llama", **DEEP), CPU)
    gone = frozenset(f"model.layers.{name}" for name in ("0.self_attn", "1.mlp", "2.self_attn", "2.mlp"))
    found = distilled(original, original.rewritten(fewer_sublayers(original, gone)), text_file, tmp_path, steps=10)
    first, second, third, _ = found.report["blocks"]
    assert first["trained"] < first["before"]
    assert second["trained"] < second["before"]
    assert third["trained"] == third["before"]
    assert {name.split(".")[2] for name in found.rewriting.tensors} == {"0", "1", "3"}


def test_blocks_before_the_first_that_went_stay_as_they_are(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    original = ModelSource(tiny("llama", **DEEP), CPU)
    pruned = original.rewritten(fewer_blocks(original, (1, 1, 0, 1)))
    told: list[str] = []
    found = distilled(original, pruned, text_file, tmp_path, lambda event: told.append(event.what), steps=2)
    assert {name.split(".")[2] for name in found.rewriting.tensors} == {"1", "2"}
    assert not any("layers.0" in what for what in told)  # nor is time spent on them
    assert found.report["blocks"][0]["trained"] == found.report["blocks"][0]["before"] < 1e-12


class Split(Ranks):
    """One of two ranks, which keeps its sums for itself."""

    def sum_(self, tensors: Any) -> None:
        pass


def test_the_gradients_of_two_ranks_add_up_to_those_of_one(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    original = ModelSource(tiny("llama", **DEEP), CPU)
    pruned = original.rewritten(fewer_blocks(original, (1, 0, 0, 1)))
    found = []
    for ranks in ([Ranks()], [Split(rank, 2) for rank in range(2)]):
        slope, error, loss = torch.zeros(()), 0.0, 0.0
        for one in ranks:
            twins = Twins.start(work(original, pruned, text_file, one, tmp_path))
            twins.lead(3)
            block = twins.student.block(0)
            weight = torch.nn.Parameter(block.weight("mlp.up_proj").clone())
            loss += float(twins.backward(block, {"mlp.up_proj.weight": weight}, 3, Schedule(5, 6, 0.1, 0)))
            error += twins.error(block, {})
            assert weight.grad is not None
            slope = slope + weight.grad
        found.append((slope, torch.tensor([error, loss])))
    torch.testing.assert_close(found[0], found[1])


def test_one_block_of_each_model_is_in_memory_at_a_time(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelSource(tiny("llama", **DEEP), CPU)
    pruned = original.rewritten(fewer_blocks(original, (1, 0, 1, 1)))
    most: dict[int, int] = {}
    load = ModelSource.block

    def counted(self: ModelSource, index: int, load_it: bool = True) -> Any:
        block = load(self, index, load_it)
        resident = sum(all(not p.is_meta for p in layer.parameters()) for layer in self.layers)
        most[id(self)] = max(most.get(id(self), 0), resident)
        return block

    monkeypatch.setattr(ModelSource, "block", counted)
    distilled(original, pruned, text_file, tmp_path, steps=1)
    assert set(most.values()) == {1}
    assert len(most) == 2


def test_a_run_that_is_broken_off_goes_on_to_the_same(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.what == "model.layers.1: step 22 of 25":  # put down after 20
            raise KeyboardInterrupt

    run(tiny("llama"), tmp_path / "whole", text_file, NARROW, DISTIL)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), tmp_path / "out", text_file, NARROW, DISTIL, tell=interrupt)
    steps: list[str] = []
    run(tiny("llama"), tmp_path / "out", text_file, NARROW, DISTIL, resume=True, tell=lambda event: steps.append(event.what))
    assert next(step for step in steps if "step" in step) == "model.layers.1: step 21 of 25"
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    assert not (tmp_path / "out.pruning").exists()


def test_without_pruning_there_is_nothing_to_learn(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="distil_blocks: nothing was pruned"):
        run(tiny("llama"), tmp_path / "out", text_file, {"pass": "rotate"}, DISTIL)


@pytest.mark.parametrize(("key", "value"), [("steps", -1), ("batch", 0), ("rank", 0), ("lr", 0), ("damp", 0), ("train", "x")])
def test_settings_that_make_no_sense(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        make_recipe({"passes": [{"pass": "distil_blocks", key: value}]})
