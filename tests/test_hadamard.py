"""Activations turned by a Hadamard matrix at run time: the product is known, and every loader and every pass computes it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.linalg import block_diag, hadamard
from tiny_models import change_config, exact, some_tokens, stock_logits, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

import compressor
from compressor import api
from compressor.errors import SourceError
from compressor.evaluation.verify.verify import verify
from compressor.model.source import ModelSource
from compressor.model.surgery.online_hadamard import largest_block, turned
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.ranks import Ranks
from compressor.recipe.schema import Recipe, make_recipe
from compressor.report.inspect import inspect_model

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


def recipe(bits: int = 8, **fmt: object) -> Recipe:
    rounding = {"pass": "rtn", "options": [{"format": "int_group", "bits": bits, "group_size": 64, **fmt}]}
    return make_recipe({"passes": [{"pass": "rotate", "online": True}, rounding], "evaluation": None})


@pytest.fixture(scope="module")
def rotated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose down projections read turned activations, in 8 bits."""
    out = tmp_path_factory.mktemp("rotated") / "out"
    api.run(recipe(), tiny("llama"), out, device="cpu", verify=False)
    return out


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


class TestProduct:
    @pytest.mark.parametrize(("width", "size"), [(8, 1), (8, 2), (96, 32), (192, 64), (256, 128), (2048, 2048), (8192, 8192)])
    def test_is_that_of_scipys_matrix(self, width: int, size: int) -> None:
        x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        matrix = torch.from_numpy(block_diag(*[hadamard(size) / size**0.5] * (width // size)))
        torch.testing.assert_close(turned(x, size), x @ matrix)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [2, 32, 64, 128, 2048])
    def test_is_rounded_in_half_precision_but_not_scaled(self, size: int, dtype: torch.dtype) -> None:
        x = torch.randn(200, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = x.double() @ torch.from_numpy(hadamard(size) / size**0.5)
        y = turned(x, size).double()
        assert float((y - expected).norm() / expected.norm()) < torch.finfo(dtype).eps
        assert abs(float((y * expected).sum() / expected.square().sum()) - 1) < torch.finfo(dtype).eps / 16

    @pytest.mark.parametrize(("width", "size"), [(1, 1), (7, 1), (12, 4), (64, 64), (11008, 256), (14336, 2048)])
    def test_the_largest_block_is_the_power_of_two_in_the_width(self, width: int, size: int) -> None:
        assert largest_block(width) == size


class TestLoading:
    @torch.no_grad()
    def test_eight_bits_leave_the_logits(self, rotated: Path, tiny: Tiny) -> None:
        expected = stock_logits(tiny("llama"), some_tokens())
        assert distance(exact(rotated)(some_tokens()).logits, expected) < 0.05

    @torch.no_grad()
    def test_without_turning_they_would_not(self, rotated: Path, tiny: Tiny) -> None:
        model = exact(rotated)
        for module in model.modules():
            module._forward_pre_hooks.clear()
        assert distance(model(some_tokens()).logits, stock_logits(tiny("llama"), some_tokens())) > 0.2

    @torch.no_grad()
    def test_every_loader_computes_the_same(self, rotated: Path) -> None:
        expected = exact(rotated)(some_tokens()).logits
        dense = compressor.load(rotated, dtype=torch.float32, dense=True)
        by_transformers = AutoModelForCausalLM.from_pretrained(rotated, dtype=torch.float32)
        torch.testing.assert_close(dense(some_tokens()).logits, expected)
        assert distance(by_transformers(some_tokens()).logits, expected) < 0.05  # its kernel rounds activations

    @torch.no_grad()
    @pytest.mark.parametrize("dense", [False, True])
    def test_what_is_saved_again_still_turns(self, rotated: Path, dense: bool, tmp_path: Path) -> None:
        compressor.load(rotated, dtype=torch.float32, dense=dense, kernel="reference").save_pretrained(tmp_path)
        again = compressor.load(tmp_path, dtype=torch.float32, kernel="reference")
        torch.testing.assert_close(again(some_tokens()).logits, exact(rotated)(some_tokens()).logits)

    @torch.no_grad()
    def test_a_model_in_half_precision_turns_in_it(self, rotated: Path) -> None:
        logits = compressor.load(rotated, dtype=torch.bfloat16, kernel="reference")(some_tokens()).logits
        assert logits.dtype == torch.bfloat16
        assert distance(logits.float(), exact(rotated)(some_tokens()).logits) < 0.05


class TestConfig:
    def test_names_the_layers_and_their_blocks(self, rotated: Path) -> None:
        entry = json.loads((rotated / "config.json").read_text())["quantization_config"]
        assert entry["quant_method"] == "compressor"
        assert entry["hadamard"] == {f"model.layers.{index}.mlp.down_proj": 256 for index in range(2)}

    def test_only_our_runtime_loads_it_and_inspect_says_why(self, rotated: Path) -> None:
        found = inspect_model(rotated)
        assert found.turned == 2
        assert [runtime.name for runtime in found.runtimes if runtime.loads] == ["compressor"]
        reasons = {runtime.name: runtime.reason for runtime in found.runtimes}
        assert reasons["vLLM"] == reasons["transformers"]
        assert reasons["vLLM"].startswith("does not turn the activations of 2 layers")

    @pytest.mark.parametrize(
        "entry",
        [
            {"model.layers.0.mlp.gone": 64},
            {"model.layers.0.mlp.down_proj": 512},
            {"model.layers.0.mlp.down_proj": 48},
            {"model.layers.0.mlp.down_proj": "64"},
            ["model.layers.0.mlp.down_proj"],
        ],
        ids=str,
    )
    def test_what_cannot_be_turned_is_refused(self, entry: object, tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe(), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        change_config(tmp_path / "out", quantization_config={**config, "hadamard": entry})
        with pytest.raises(SourceError, match="quantization_config cannot be read"):
            ModelSource(tmp_path / "out", CPU)


class TestRuns:
    def test_statistics_are_of_the_turned_activations(self, rotated: Path, tiny: Tiny) -> None:
        """H' = Rᵀ H R for the layer that turns, and R is orthogonal: the trace stays, the diagonal does not."""
        found = []
        for path in (tiny("llama"), rotated):
            source = ModelSource(path, CPU)
            block, (hidden,) = source.block(0), source.first_inputs([some_tokens()])
            name = "mlp.down_proj"
            stats = CalibrationStream([hidden], Ranks(), CPU).collect(block, [name], (Hessian,))
            found.append(stats[name, Hessian].value)
        matrix = torch.from_numpy(hadamard(256) / 16).float()
        assert distance(found[1], matrix @ found[0] @ matrix) < 0.05
        assert distance(found[1], found[0]) > 0.5

    def test_what_is_written_is_verified(self, rotated: Path, tiny: Tiny) -> None:
        checks = {check.check: check.outcome for check in verify(rotated, tiny("llama"))}
        assert checks["reference"] == checks["logits"] == "passed", checks

    def test_activations_are_rounded_after_they_were_turned(self, tiny: Tiny, tmp_path: Path) -> None:
        """An outlier channel before a rotated layer costs the other channels their digits only if it is not spread first."""
        model, losses = tiny("llama"), {}
        for online in (False, True):
            step = {"pass": "rotate", "online": online}
            fmt = {"format": "int_group", "bits": 8, "group_size": -1, "packed": False, "activations": "int8"}
            passes = [step, {"pass": "rtn", "options": [fmt], "layers": ["down_proj"]}]
            out = tmp_path / str(online)
            api.run(make_recipe({"passes": passes, "evaluation": None}), model, out, device="cpu", verify=False)
            with torch.no_grad():
                logits = compressor.load(out, dtype=torch.float32, kernel="reference")(some_tokens()).logits
            losses[online] = distance(logits, stock_logits(model, some_tokens()))
        assert losses[True] < losses[False]

    def test_goes_on_from_where_it_was_interrupted(self, tiny: Tiny, tmp_path: Path) -> None:
        def stop(event: api.Event) -> None:
            if event.stage == "compress" and event.done == 1 and not event.what:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.run(recipe(), tiny("llama"), tmp_path / "two", device="cpu", verify=False, tell=stop)
        api.run(recipe(), tiny("llama"), tmp_path / "two", device="cpu", verify=False, resume=True)
        api.run(recipe(), tiny("llama"), tmp_path / "one", device="cpu", verify=False)
        one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
        assert all(torch.equal(one[name], two[name]) for name in one)
