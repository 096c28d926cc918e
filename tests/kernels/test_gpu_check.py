"""scripts/gpu/check, as far as that can be tested without a GPU: the plain-torch reference stands in for the kernels."""

import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gpu_scripts

# isort: split
import check
import compiling
import concurrency
import parity
import pytest
import sanitizer
import torch
import weights
from checks import Case, Finding, Kernels, Load, dequantised, laid_out, natively, products, worst
from concurrency import REPLAYS, TIMES, Product, alone, chain, different, in_a_graph, on_two_streams
from tolerance import TOLERANCE, error
from torch import Tensor

from compressor.runtime.kernels import cuda, native, reference
from compressor.runtime.kernels.cuda import instances, nvrtc, program
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout

CPU = torch.device("cpu")
SMALL = tuple((name, check.fitting(weights.FORMATS[name], shape)) for name in weights.FORMATS for shape in check.SMALL)


class Reference:
    """Right, but for what a test makes wrong of it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        y_MN.copy_(reference.linear(x_MK.float(), parts, self.layout, y_MN.shape[1], None if bias is None else bias.float()))

    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        w_NK.copy_(reference.dequantize(parts, self.layout, *w_NK.shape, torch.float32))


class LastRowMissing(Reference):
    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        super().linear(x_MK, parts, y_MN, bias, tile)
        y_MN[-1, -1] = math.nan  # as it was

    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        super().dequantize(parts, w_NK)
        w_NK[-1, -1] = math.nan


class OneTooMany(Reference):
    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        super().linear(x_MK, parts, y_MN, bias, tile)
        y_MN.as_strided((y_MN.numel() + 1,), (1,), y_MN.storage_offset())[-1] = 0

    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        super().dequantize(parts, w_NK)
        w_NK.as_strided((1,), (1,), w_NK.storage_offset() - 1)[0] = 0


class WithoutBias(Reference):
    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        super().linear(x_MK, parts, y_MN, None, tile)


class OneWeightWrong(Reference):
    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        super().dequantize(parts, w_NK)
        w_NK[0, 0] *= 1.02  # three steps


def loading(kernels: type[Kernels]) -> Load:
    return lambda layout, overlapping: kernels(layout)


def wrong(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.right]


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    return laid_out("int4-g128", 45, 256, CPU)


@pytest.mark.parametrize(("name", "shape"), SMALL, ids=str)
def test_what_is_right_passes(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    case = laid_out(name, *shape, CPU)
    found = [*products(case, loading(Reference), (1, 33)), *dequantised(case, loading(Reference))]
    assert found and not wrong(found)


@pytest.mark.parametrize("kernels", [LastRowMissing, OneTooMany])
def test_what_is_not_written_and_what_is_written_outside_is_found(case: Case, kernels: type[Kernels]) -> None:
    found = list(products(case, loading(kernels), (1,)))
    assert len(wrong(found)) == len(found) / 2  # each launch is asked for its error and for its margins
    assert len(wrong(list(dequantised(case, loading(kernels))))) == 2


def test_a_bias_that_is_left_out_is_found(case: Case) -> None:
    assert {"with bias" in finding.what for finding in wrong(list(products(case, loading(WithoutBias), (7,))))} == {True}


def test_a_wrong_weight_is_found(case: Case) -> None:
    assert len(wrong(list(dequantised(case, loading(OneWeightWrong))))) == 2


def test_a_number_that_differs_or_is_none_is_found() -> None:
    ones = [torch.ones(2, 3), torch.ones(2, 3)]
    assert different("", ones, [one.clone() for one in ones]).right
    other = torch.ones(2, 3)
    other[0, 0], other[1, 2] = 1.001, math.nan
    assert different("", [ones[0], other], ones).error == 2
    assert different("", [other], [other]).error == 1


class Graph:
    """Captures nothing. A replay repeats the chain that was run last, or, if it is broken, does nothing."""

    broken = False
    chains: ClassVar[list[tuple[Callable[[], list[Tensor]], list[Tensor]]]] = []

    def __init__(self) -> None:
        self.captured = len(self.chains)

    def replay(self) -> None:
        again, outputs = self.chains[self.captured]
        for output, new in zip(outputs, again(), strict=not self.broken):
            if not self.broken:
                output.copy_(new)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Of a device that is none: torch.cuda's functions do nothing, and the package's product is the reference's."""

    def remembered(order: Sequence[Case], x_MK: Tensor, product: Product) -> list[Tensor]:
        outputs = chain(order, x_MK, product)
        Graph.chains.append((lambda: chain(order, x_MK, product), outputs))
        return outputs

    def multiplied(x_MK: Tensor, parts: Sequence[Tensor], layout: Layout, rows: int, bias: Tensor | None) -> Tensor:
        y_MN = torch.empty(len(x_MK), rows, dtype=x_MK.dtype)
        Reference(layout).linear(x_MK, parts, y_MN, bias, Tile(1, 1, 8, 1))
        return y_MN

    Graph.chains.clear()
    stream = SimpleNamespace(synchronize=lambda: None)
    fakes = {"synchronize": lambda: None, "Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph}
    fakes |= dict.fromkeys(("device", "stream", "graph"), lambda _: nullcontext())
    fakes |= {"get_device_properties": lambda _: SimpleNamespace(multi_processor_count=4)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda, "linear", multiplied)
    monkeypatch.setattr(concurrency, "chain", remembered)
    torch.manual_seed(0)
    return [laid_out("int4-row-fp16-ordered", 48, 48, CPU) for _ in range(3)]


def test_chains_in_graphs_and_on_streams_pass_where_they_are_right(layers: list[Case]) -> None:
    found = [*in_a_graph(layers, loading(Reference), 2), *on_two_streams(layers, loading(Reference), 2)]
    assert len(found) == REPLAYS + 2 * TIMES and not wrong(found)


def test_a_replay_that_does_nothing_is_found(layers: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "broken", True)
    found = list(in_a_graph(layers, loading(Reference), 2))
    assert [finding.error for finding in found] == [3 * 2 * 48] * REPLAYS


def test_a_stream_that_gets_in_the_way_is_found(layers: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    times = count()
    right = cuda.linear

    def disturbed(*operands: Any) -> Tensor:
        return right(*operands) * (1.01 if next(times) == 7 else 1)

    monkeypatch.setattr(cuda, "linear", disturbed)
    assert len(wrong(list(on_two_streams(layers, loading(Reference), 2)))) == 1


def test_a_chain_feeds_each_product_with_the_one_before(layers: list[Case]) -> None:
    x_MK = torch.randn(2, 48).bfloat16()
    outputs = chain(layers, x_MK, alone(loading(Reference)))
    for layer, given, got in zip(layers, (x_MK, *outputs), outputs, strict=False):
        assert error(got, parity.product(given, layer.codes)) < TOLERANCE


def test_native_products_pass_and_one_without_rounding_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(natively(check.NATIVE, 45, 1000, CPU, (1, 17)))
    assert len(found) == 2 and not wrong(found)
    monkeypatch.setattr(native, "product", reference.linear)
    assert len(wrong(list(natively(check.NATIVE, 45, 1000, CPU, (1, 17))))) == 2


def test_what_is_compiled_in_parallel_is_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key of the cache."""
    asked = []

    def compiled(*what: Any) -> None:
        asked.append(what)
        raise InterruptedError

    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nvrtc, "compiled", compiled)
    for name in weights.FORMATS:
        layout = check.laid_out(name, 48, 640, CPU).layout
        with pytest.raises(InterruptedError):
            program.load(layout.name, 0)
        with pytest.raises(InterruptedError):
            compiling._compile((layout.name, instances.tiles(layout), program.architecture((9, 0))))
    assert len(asked) == 2 * len(weights.FORMATS) and asked[::2] == asked[1::2]


def test_every_format_fits_its_shapes_and_some_are_ragged() -> None:
    ragged_rows, ragged_columns = set(), set()
    for name, form in weights.FORMATS.items():
        for shape in check.SMALL:
            rows, columns = check.fitting(form, shape)
            chunk = weights.layout_of(weights.make(name, rows, columns)).chunk
            ragged_rows |= {name} if rows % 16 else set()
            ragged_columns |= {name} if columns % chunk else set()
    assert {name for name in weights.FORMATS if "rows16" not in name} == ragged_rows
    assert {"int4-g32", "int2-g64", "nvfp4", "mxfp4", "fp4-row", "vectors12", "signs1-g128", "lossless"} <= ragged_columns


def test_what_is_not_a_number_comes_first() -> None:
    found = [Finding("a", 0.1, 0), Finding("b", math.nan, 0), Finding("c", 0.2, 0)]
    assert [finding.what for finding in worst(found, 2)] == ["b", "c"]
    assert not found[1].right


def test_what_a_sanitizer_says_is_understood() -> None:
    assert sanitizer.judged(0, ["ok"]).outcome == "passed"
    assert sanitizer.judged(sanitizer.ERRORS, ["Invalid __global__ write of size 2"]).outcome == "failed"
    assert sanitizer.judged(1, ["17 wrong"]).outcome == "failed"
    assert sanitizer.judged(255, ["Device not supported"]).outcome == "skipped"
    assert sanitizer.judged(1, ["Device not supported", "done"]).outcome == "skipped"


def test_a_sanitizer_is_run_on_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\nexit {sanitizer.ERRORS}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sanitizer.watched("racecheck", ["python", "check.py"]).outcome == "failed"
    assert (tmp_path / "arguments").read_text() == f"--tool racecheck --error-exitcode {sanitizer.ERRORS} python check.py\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("name", "module"), [("check", "check"), ("bench", "bench_gpu"), ("model_speed", "model_speed")])
def test_without_a_gpu_the_scripts_say_so_in_one_sentence(name: str, module: str) -> None:
    for command in ([gpu_scripts.SCRIPTS / name], [sys.executable, gpu_scripts.SCRIPTS / f"{module}.py"]):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2 and not done.stdout, done.stderr
        assert done.stderr.count("\n") == 1 and f"scripts/gpu/{name}: " in done.stderr and "GPU" in done.stderr


def test_the_kernels_of_the_check_need_no_other_package() -> None:
    """Those machines have torch and transformers; the package is not installed on them."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'rich', 'typer', 'plotly', 'datasets', 'psutil')))"
    environment = os.environ | {"PYTHONPATH": f".:tests/kernels:{gpu_scripts.SCRIPTS}"}
    code = f"{blocked}; import check, bench_gpu, model_speed"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=gpu_scripts.SCRIPTS.parents[1])


def test_the_wrappers_can_be_run() -> None:
    for name in ("check", "bench", "model_speed", "on_gpu"):
        assert shutil.which(gpu_scripts.SCRIPTS / name)
