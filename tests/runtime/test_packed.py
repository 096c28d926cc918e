"""Packed layers in memory: what they hold, what they compute, how they share, how they save."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import exact, some_tokens, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import compressor
from compressor import api
from compressor.errors import KernelError
from compressor.formats.int_group import IntGroup
from compressor.runtime.fuse import fuse
from compressor.runtime.kernels.op import packed_linear
from compressor.runtime.packed_linear import PackedLinear, PackedWeight, StoredLinear, packed_linear_module

CPU = torch.device("cpu")
FORMATS = [
    IntGroup(bits=4, group_size=128),
    IntGroup(bits=4, group_size=32, symmetric=False),
    IntGroup(bits=2, group_size=64),
    IntGroup(bits=3, group_size=96, symmetric=False),  # the layout divides the group
    IntGroup(bits=5, group_size=-1),  # the layout widens the codes
    IntGroup(bits=8, group_size=128),
    IntGroup(bits=4, group_size=24),  # no layout takes it
]
Tiny = Callable[..., Path]


class Calls(TorchDispatchMode):
    """Counts calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is packed_linear
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Calls]:
    with Calls() as calls:
        yield calls


def quantized(fmt: IntGroup, rows: int = 48, columns: int = 384, seed: int = 0) -> Any:
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = fmt.fit(w_OI, search=False)
    return grid.pack(grid.round(w_OI, 0))


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "int4"
    api.quantize(tiny("llama_biased", dtype="bfloat16"), out, bits=4, method="rtn", evaluate=False, verify=False)
    return out


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
class TestOneLayer:
    def test_it_computes_with_the_values_of_the_format(self, fmt: IntGroup) -> None:
        tensor, bias, x = quantized(fmt), torch.randn(48), torch.randn(2, 3, 384)
        layer = packed_linear_module(tensor, bias, CPU, "reference")
        assert isinstance(layer, StoredLinear if fmt.group_size == 24 else PackedLinear)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, tensor.dequantize(), bias))

    def test_its_state_is_what_lay_on_disk(self, fmt: IntGroup) -> None:
        tensor, bias = quantized(fmt), torch.randn(48)
        state = packed_linear_module(tensor, bias, CPU).state_dict()
        assert state.keys() == {*tensor.parts, "bias"}
        assert torch.equal(state["bias"], bias)
        for name, part in tensor.parts.items():
            assert state[name].dtype == part.dtype
            assert torch.equal(state[name], part), name

    def test_a_change_of_dtype_leaves_the_weight_alone(self, fmt: IntGroup) -> None:
        tensor, x = quantized(fmt), torch.randn(3, 384)
        layer = packed_linear_module(tensor, torch.randn(48), CPU, "reference")
        before = layer(x)
        layer.bfloat16()
        assert layer.bias is not None
        assert layer.bias.dtype == torch.bfloat16
        if isinstance(layer, PackedLinear):
            layer.float()
            torch.testing.assert_close(layer(x), before, atol=2e-2, rtol=0)  # the bias was rounded
            assert torch.equal(layer.dequantize(), tensor.dequantize())


class TestSharing:
    def group(self, columns: int = 256) -> nn.ModuleDict:
        layers = {
            name: packed_linear_module(
                quantized(IntGroup(bits=4, group_size=128), rows, columns, seed), None, CPU, "reference"
            )
            for seed, (name, rows) in enumerate((("q_proj", 64), ("k_proj", 32), ("v_proj", 32)))
        }
        return nn.ModuleDict(layers)

    def test_one_call_serves_all_and_the_results_are_the_same(self) -> None:
        alone, together, x = self.group(), self.group(), torch.randn(5, 256)
        assert fuse(together) == 1
        with counted() as calls:
            results = [layer(x) for layer in together.values()]
        assert calls.count == 1
        for result, layer in zip(results, alone.values(), strict=True):
            torch.testing.assert_close(result, layer(x))

    def test_each_still_saves_its_own_rows(self) -> None:
        alone, together = self.group(), self.group()
        fuse(together)
        before, after = alone.state_dict(), together.state_dict()
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name

    def test_other_activations_are_multiplied_anew(self) -> None:
        alone, together = self.group(), self.group()
        fuse(together)
        for x, name in itertools.product((torch.randn(5, 256), torch.randn(5, 256)), ("k_proj", "q_proj")):
            torch.testing.assert_close(together[name](x), alone[name](x))

    def test_activations_that_changed_in_place_are_multiplied_anew(self) -> None:
        alone, together, x = self.group(), self.group(), torch.randn(5, 256)
        fuse(together)
        together["q_proj"](x)
        x.mul_(2)
        torch.testing.assert_close(together["k_proj"](x), alone["k_proj"](x))

    def test_the_product_is_let_go_once_all_have_their_rows(self) -> None:
        together, x = self.group(), torch.randn(5, 256)
        fuse(together)
        with torch.inference_mode():
            for layer in together.values():
                layer(x)
        assert together["q_proj"].packed._product is None

    @pytest.mark.parametrize("other", [IntGroup(bits=8, group_size=128), IntGroup(bits=4, group_size=64)])
    def test_layers_packed_differently_stay_apart(self, other: IntGroup) -> None:
        layers = self.group()
        layers["k_proj"] = packed_linear_module(quantized(other, 32, 256), None, CPU, "reference")
        assert fuse(layers) == 0

    def test_rows_that_fill_no_whole_tile_stay_apart(self) -> None:
        layers = self.group()
        layers["k_proj"] = packed_linear_module(quantized(IntGroup(bits=4, group_size=128), 24, 256), None, CPU, "reference")
        assert fuse(layers) == 0

    def test_a_compiler_merges_the_calls(self) -> None:
        together, x, calls = self.group(), torch.randn(5, 256), []
        fuse(together)

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            calls.append(sum(node.target is packed_linear for node in graph.graph.nodes))
            return graph

        from torch._dynamo.backends.common import aot_autograd

        compiled = torch.compile(
            lambda x: [layer(x) for layer in together.values()], fullgraph=True, backend=aot_autograd(fw_compiler=backend)
        )
        with torch.no_grad():
            for result, layer in zip(compiled(x), self.group().values(), strict=True):
                torch.testing.assert_close(result, layer(x))
        assert calls == [1]


class TestWholeModel:
    def test_its_tensors_take_what_the_file_takes(self, packed: Path) -> None:
        model = compressor.load(packed, dtype=torch.bfloat16)
        held = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
        assert held <= 1.1 * (packed / "model.safetensors").stat().st_size

    def test_a_block_makes_four_calls(self, packed: Path) -> None:
        with counted() as calls, torch.no_grad():
            exact(packed)(some_tokens(), use_cache=False)
        assert calls.count == 2 * 4  # q+k+v, o, gate+up, down

    def test_it_computes_what_the_dense_one_does(self, packed: Path) -> None:
        dense = compressor.load(packed, dtype=torch.float32, dense=True)
        assert not any(isinstance(module, PackedWeight) for module in dense.modules())
        with torch.no_grad():
            torch.testing.assert_close(exact(packed)(some_tokens()).logits, dense(some_tokens()).logits)

    def test_it_saves_as_it_was(self, packed: Path, tmp_path: Path) -> None:
        compressor.load(packed).save_pretrained(tmp_path)
        before, after = tensors(packed), tensors(tmp_path)
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
        with torch.no_grad():
            assert torch.equal(exact(tmp_path)(some_tokens()).logits, exact(packed)(some_tokens()).logits)

    def test_it_takes_its_own_state_again(self, packed: Path) -> None:
        model, other = exact(packed), exact(packed)
        for module in other.modules():
            if isinstance(module, PackedWeight):
                for part in module.buffers():
                    part.zero_()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(other(some_tokens()).logits, model(some_tokens()).logits)

    def test_a_state_of_another_shape_is_refused(self, packed: Path) -> None:
        model = exact(packed)
        state = {
            name: part[:-1] if name.endswith("q_proj.weight_packed") else part for name, part in model.state_dict().items()
        }
        with pytest.raises(RuntimeError, match=r"q_proj\.weight_packed: has shape"):
            model.load_state_dict(state)

    def test_half_precision_is_multiplied_by_kernels_too(self, packed: Path) -> None:
        x, model = torch.randn(3, 128), compressor.load(packed, kernel="cpu")
        layer = model.get_submodule("model.layers.0.mlp.gate_proj")
        y = layer(x.half())
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.float(), layer(x.half().float()), atol=1e-2, rtol=1e-2)

    def test_a_static_cache_makes_no_difference(self, packed: Path) -> None:
        model, options = exact(packed), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        ids = some_tokens()[:1, :9]
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), plain)

    def test_it_compiles_as_one_graph(self, packed: Path) -> None:
        model = exact(packed)
        compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(some_tokens()), model(some_tokens()).logits)

    def test_layers_that_no_kernel_takes_are_told_of(
        self, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        api.quantize(tiny("llama"), tmp_path / "out", bits=4, group_size=8, method="rtn", evaluate=False, verify=False)
        model, dense = compressor.load(tmp_path / "out"), compressor.load(tmp_path / "out", dense=True)
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "int4g8: no kernel takes this; 14 layers are dequantised at every call"
        ]
        with torch.no_grad():
            torch.testing.assert_close(model(some_tokens()).logits, dense(some_tokens()).logits)

    def test_a_kernel_that_cannot_be_had_is_refused_at_once(self, packed: Path) -> None:
        with pytest.raises(KernelError, match="kernel `cuda` cannot multiply by int4-g0-bf16 on cpu"):
            compressor.load(packed, kernel="cuda")
