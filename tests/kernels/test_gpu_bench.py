"""scripts/gpu/bench on a device that is none: what is multiplied by what, which bytes count, and what survives a failure."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_scripts

# isort: split
import bench_gpu
import pytest
import torch
from bench_gpu import ALONE, DENSE, FUSED, UNPACKED, Bench, Weights, candidate_tiles, switch_points
from timing import Budget, copies
from tolerance import TOLERANCE, error
from torch import Tensor
from weights import MEASURED, layout_of, make, nbytes

from compressor.kernels import reference
from compressor.kernels.cuda import instances
from compressor.kernels.cuda.instances import Tile
from compressor.kernels.layouts import Layout, named

SHAPE, COPY = (256, 512), 4e12


@dataclass(frozen=True)
class Kernels:
    """`Program`, by the reference."""

    layout: Layout
    tiles: tuple[Tile, ...]

    def linear(self, x_MK: Tensor, parts: Sequence[Tensor], y_MN: Tensor, bias: Tensor | None, tile: Tile) -> None:
        assert tile in self.tiles
        y_MN.copy_(reference.linear(x_MK, parts, self.layout, y_MN.shape[1], bias))

    def dequantize(self, parts: Sequence[Tensor], w_NK: Tensor) -> None:
        w_NK.copy_(reference.dequantize(parts, self.layout, *w_NK.shape, w_NK.dtype))


@dataclass
class Device:
    """Takes 10 µs for every call, whatever it is."""

    device: str = "cpu"
    multiprocessors: int = 4
    cache_bytes: int = 200_000
    loaded: list[tuple[str, bool]] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"device": "none"}

    def copy_bytes_per_second(self) -> float:
        return COPY

    def compile(self, layouts: Sequence[Layout]) -> None:
        pass

    def kernels(self, layout: str, tiles: tuple[Tile, ...] | None = None, overlapping: bool = True) -> Kernels:
        self.loaded.append((layout, overlapping))
        return Kernels(named(layout), tiles or instances.tiles(named(layout)))

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        self.timed.append(len(calls))
        return 1e-5

    def release(self) -> None:
        pass


def bench(path: Path, rivals: Mapping[str, Any] | None = None, minutes: float = 10.0, **options: Any) -> Bench:
    small: dict[str, Any] = {"shapes": (SHAPE,), "formats": ("int4-g128", "nvfp4"), "tokens": (1, 16, 128)}
    small |= {"blocks": 2, "block": (SHAPE, (512, 256))}
    device: Any = Device()
    return Bench(device, Budget(minutes), path / "out" / "gpu.json", rivals or {}, **(small | options))


def test_rows_say_what_was_timed_and_what_it_comes_to(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.run(["layers"])
    rows = json.loads(made.path.read_text())["layers"]["rows"]
    by_key = {(row["format"], row["tokens"], row["kernel"]): row for row in rows}
    kernels = {1: {FUSED, ALONE}, 16: {FUSED, ALONE, UNPACKED}, 128: {FUSED, UNPACKED}}
    expected = {(name, m, kernel) for name in made.formats for m, ways in kernels.items() for kernel in ways}
    assert set(by_key) == expected | {(DENSE, m, DENSE) for m in kernels}
    size = 256 * 512 // 2 + 4 * 256 * 4  # codes, and a word for each of 256 rows and 4 groups
    row = by_key["int4-g128", 1, FUSED]
    assert row["microseconds"] == pytest.approx(10)
    assert row["gb_per_second"] == pytest.approx(size / 1e-5 / 1e9)
    assert row["of_copy"] == pytest.approx(size / 1e-5 / COPY)
    assert row["speedup"] == 1 and by_key[DENSE, 1, DENSE]["gb_per_second"] == pytest.approx(2 * 256 * 512 / 1e4)
    assert {overlapping for _, overlapping in made.gpu.loaded} == {True, False}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MEASURED)
def test_bytes_are_those_of_the_parts(name: str) -> None:
    """And close to the format's bits for each weight, but for tables of one size."""
    bits = {"int4-g128": 4.25, "int4-rows128": 4.25, "int3-g128": 3.25, "int2-g64": 2.5, "int8-g128": 8.25, "nvfp4": 4.5,
            "mxfp4": 4.25, "signs1-g128": 1.125, "vectors12": 2, "lossless": 12}[name]  # fmt: skip
    layout = layout_of(codes := make(name, 1024, 4096))
    parts = layout.arrange(codes)
    tables = sum(parts[part].nbytes for part in ("codebook", "starts", "escapes") if part in parts)
    assert nbytes(parts) - tables == pytest.approx(bits * 1024 * 4096 / 8, rel=1e-3)


def test_weights_are_more_than_the_cache_holds(tmp_path: Path) -> None:
    gpu = bench(tmp_path).gpu
    weights = Weights.random("int4-g128", SHAPE, None, gpu)
    assert (len(weights.each) - 1) * weights.nbytes >= 2 * gpu.cache_bytes
    assert len({parts[0].data_ptr() for parts in weights.each}) == len(weights.each)
    assert copies(10**9, 10**6) == 2


def test_all_ways_compute_the_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = bench(tmp_path)
    weights = Weights.random("int4-g128", SHAPE, 1, made.gpu)
    (call,) = bench_gpu.fused_calls(made, weights, 16)
    x_MK, parts, y_MN, _, tile = call.args  # type: ignore[attr-defined]
    assert tile == instances.choose(weights.layout, 16, SHAPE[0], made.gpu.multiprocessors)
    call()
    w_NK = reference.dequantize(parts, weights.layout, *SHAPE, torch.float32)
    assert error(y_MN, x_MK.double() @ w_NK.double().T) < TOLERANCE


def test_a_chain_is_all_layers_in_the_models_order(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.run(["chain"])
    rows = made.results["chain"]["rows"]
    assert set(made.gpu.timed) == {4}  # type: ignore[attr-defined] # two blocks of two layers
    assert all(row["step_milliseconds"] == pytest.approx(0.04) for row in rows)
    assert rows[0]["format"] == DENSE and rows[1]["speedup"] == 1
    assert rows[0]["gb_per_second"] == pytest.approx(2 * 256 * 512 / 1e4)


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(made: Bench, rows: list[dict[str, Any]]) -> None:
        rows.append({"kept": True})
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(bench_gpu.SECTIONS, "tiles", broken)
    made = bench(tmp_path)
    made.run(["tiles", "chain"])
    found = json.loads(made.path.read_text())
    assert found["tiles"] == {
        "rows": [{"kept": True}],
        "stopped": "RuntimeError: an illegal memory access was encountered",
    }
    assert found["chain"]["stopped"] is None and found["chain"]["rows"]


def test_the_budget_ends_a_section_and_keeps_what_there_is(tmp_path: Path) -> None:
    made = bench(tmp_path)
    seconds = iter(range(0, 10**6, 100))
    made.budget = Budget(minutes=10, now=lambda: next(seconds))
    made.run(["layers", "chain"])
    found = json.loads(made.path.read_text())
    assert len(found["layers"]["rows"]) == 5 + 1  # 100 s for each look at the clock, of which one starts it
    assert "10 minutes are spent" in found["layers"]["stopped"] and "10 minutes" in found["chain"]["stopped"]


def test_other_libraries_may_be_missing_or_fail(tmp_path: Path) -> None:
    def missing(rows: int, columns: int, count: int) -> list[Any]:
        raise ImportError("No module named 'nowhere'")

    def there(rows: int, columns: int, count: int) -> list[Any]:
        w_NK = torch.randn(rows, columns).bfloat16()
        return [lambda x_MK: x_MK @ w_NK.T] * count

    made = bench(tmp_path, {"missing": missing, "there": there})
    made.run(["rivals"])
    rows = made.results["rivals"]["rows"]
    assert rows[0] == {"shape": list(SHAPE), "kernel": "missing", "failed": "ImportError: No module named 'nowhere'"}
    assert [row["tokens"] for row in rows[1:]] == [1, 16, 128]


def test_the_switch_is_where_dequantising_stays_faster() -> None:
    def row(tokens: int, kernel: str, microseconds: float) -> dict[str, Any]:
        return {"shape": [8, 8], "format": "f", "tokens": tokens, "kernel": kernel, "microseconds": microseconds}

    taken = {16: (1.0, 5.0), 64: (6.0, 5.0), 128: (4.0, 5.0), 256: (9.0, 5.0), 512: (20.0, 6.0)}
    rows = [row(m, kernel, one) for m, both in taken.items() for kernel, one in zip((FUSED, UNPACKED), both, strict=True)]
    assert switch_points(rows) == [{"shape": [8, 8], "format": "f", "tokens": 256}]
    assert switch_points(rows[:2]) == [{"shape": [8, 8], "format": "f", "tokens": None}]
    assert switch_points([]) == []


@pytest.mark.parametrize("tokens", bench_gpu.TILE_TOKENS)
def test_candidates_have_what_is_chosen_among_them(tmp_path: Path, tokens: int) -> None:
    candidates = candidate_tiles(tokens)
    for rows, _ in bench_gpu.BLOCK:
        assert instances.choose(named("int4-g128-bf16"), tokens, rows, 132) in candidates
    assert all(640 * tile.warps * tile.rb * tile.nt <= 48 << 10 for tile in candidates)
    assert len(set(candidates)) == len(candidates) < 60


def test_tiles_are_timed_one_by_one(tmp_path: Path) -> None:
    made = bench(tmp_path, block=(SHAPE,))
    made.run(["tiles"])
    assert made.results["tiles"]["stopped"] is None
    assert sum(row["chosen"] for row in made.results["tiles"]["rows"]) == len(bench_gpu.TILE_TOKENS)


def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = subprocess.run([gpu_scripts.SCRIPTS / "bench"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "scripts/gpu/bench" in result.stderr
    assert bench_gpu.main([]) == 2
