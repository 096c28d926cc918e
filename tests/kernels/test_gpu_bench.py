"""scripts/gpu/bench on a device that is none: what is multiplied by what, which bytes count, and what survives a failure."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import gpu_scripts  # noqa: F401

# isort: split
import bench_gpu
import model_speed
import pytest
import sections
import timing
import torch
from contestants import (
    ALONE,
    DENSE,
    FUSED,
    UNPACKED,
    Contestant,
    Weights,
    foreign,
    fused,
    layout_named,
    natively,
    one_after_the_other,
)
from contestants import unpacked as dequantised_first
from racing import LAST_MINUTES, Bench, switch_points
from rivals import RIVALS, Rival
from sections import Plan, candidate_tiles, in_words
from show import summary, table
from timing import Budget, OutOfTimeError, copies, in_turns
from tolerance import TOLERANCE, error
from torch import Tensor
from weights import MEASURED, layout_of, make, nbytes

from compressor.formats.numerics.codes import values
from compressor.runtime.kernels import reference
from compressor.runtime.kernels.cuda import instances
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout, named

SHAPE, OTHER, COPY = (256, 512), (512, 256), 4e12


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
    """Makes every call once, and says that bf16 takes 30 µs and all else 10."""

    device: str = "cpu"
    multiprocessors: int = 4
    cache_bytes: int = 100_000
    loaded: list[tuple[str, bool]] = field(default_factory=list)
    compiled: set[tuple[str, Tile]] = field(default_factory=set)
    timed: list[int] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"device": "none"}

    def copy_bytes_per_second(self) -> float:
        return COPY

    def compile(self, wanted: Sequence[tuple[Layout, tuple[Tile, ...]]]) -> None:
        self.compiled |= {(layout.name, tile) for layout, tiles in wanted for tile in tiles}

    def kernels(self, layout: str, tiles: tuple[Tile, ...] | None = None, overlapping: bool = True) -> Kernels:
        self.loaded.append((layout, overlapping))
        tiles = tiles or instances.tiles(named(layout))
        assert {(layout, tile) for tile in tiles} <= self.compiled
        return Kernels(named(layout), tiles)

    def chain(self, calls: Sequence[Any]) -> Callable[[], float]:
        for call in calls:
            call()
        self.timed.append(len(calls))
        return lambda: 3e-5 if calls[0].func is torch.nn.functional.linear else 1e-5

    def release(self) -> None:
        pass


def bench(path: Path, minutes: float = 10.0, formats: Sequence[str] = ("int4-g128", "nvfp4")) -> Bench:
    device: Any = Device()
    return Bench(device, Budget(minutes), path / "out" / "gpu.json", formats)


def plan(made: Bench, rivals: Mapping[str, Any] | None = None) -> Plan:
    return Plan(made, (SHAPE,), (SHAPE, OTHER), (1, 16, 128), ("int4-g128",), rivals or {})


def measured(made: Bench, *kinds: str, rivals: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Runs sections, and reads what they left in the file."""
    made.run(plan(made, rivals).sections(kinds), command="scripts/gpu/bench")
    found: dict[str, Any] = json.loads(made.path.read_text())
    return found


def test_rows_say_what_was_timed_and_what_it_comes_to(tmp_path: Path) -> None:
    made = bench(tmp_path)
    found = measured(made, "products")
    section = found["sections"]["products 256x512"]
    by_key = {(row["format"], row["tokens"], row["kernel"]): row for row in section["rows"]}
    kernels = {1: {FUSED, ALONE}, 16: {FUSED, ALONE, UNPACKED}, 128: {FUSED, UNPACKED}}
    expected = {(name, m, kernel) for name in made.formats for m, ways in kernels.items() for kernel in ways}
    assert set(by_key) == expected | {(DENSE, m, DENSE) for m in kernels}
    size = 256 * 512 // 2 + 4 * 256 * 4  # codes, and a word for each of 256 rows and 4 groups
    row = by_key["int4-g128", 1, FUSED]
    assert row["shape"] == [256, 512] and row["nbytes"] == size and row["spread"] == 0
    assert row["microseconds"] == pytest.approx(10) and row["speedup"] == pytest.approx(3)
    assert row["gb_per_second"] == pytest.approx(size / 1e-5 / 1e9)
    assert row["of_copy"] == pytest.approx(size / 1e-5 / COPY)
    assert by_key[DENSE, 1, DENSE]["gb_per_second"] == pytest.approx(2 * 256 * 512 / 3e-5 / 1e9)
    assert {overlapping for _, overlapping in made.gpu.loaded} == {True, False}  # type: ignore[attr-defined]
    assert (section["outcome"], found["machine"], found["command"]) == ("done", {"device": "none"}, "scripts/gpu/bench")
    assert {point["tokens"] for point in found["switch_points"]} == {None}  # all take the same


@pytest.mark.parametrize("name", MEASURED)
def test_bytes_are_those_of_the_parts(name: str) -> None:
    """And the format's bits for each weight, but for tables of one size."""
    bits = {"int4-g128": 4.25, "int4-rows128": 4.25, "int3-g128": 3.25, "int2-g64": 2.5, "int8-g128": 8.25, "nvfp4": 4.5,
            "mxfp4": 4.25, "mxfp8": 8.25, "fp8-row": 8, "signs1-g128": 1.125, "vectors12": 2,
            "lossless": 12}[name]  # fmt: skip
    layout = layout_of(codes := make(name, 1024, 4096))
    parts = layout.arrange(codes)
    tables = sum(parts[part].nbytes for part in ("codebook", "starts", "escapes") if part in parts)
    assert nbytes(parts) - tables == pytest.approx(bits * 1024 * 4096 / 8, rel=1e-3)


def test_the_native_product_is_that_of_rounded_activations() -> None:
    torch.manual_seed(0)
    gpu: Any = Device()
    contestant = natively(gpu, Weights.random("fp8-row", SHAPE, gpu, 2))
    first, second = (call() for call in contestant.calls(3))
    assert first.shape == (3, SHAPE[0]) and torch.equal(first, second)


def test_weights_are_more_than_the_cache_holds(tmp_path: Path) -> None:
    gpu = bench(tmp_path).gpu
    weights = Weights.random("int4-g128", SHAPE, gpu)
    assert len(weights.each) * weights.nbytes > 2 * gpu.cache_bytes
    assert len({part.data_ptr() for parts in weights.each for part in parts}) == 2 * len(weights.each)
    assert copies(10**9, 10**6) == 2  # one would be read again at once


def test_all_ways_compute_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = bench(tmp_path)
    codes = make("int4-g128", *SHAPE)
    monkeypatch.setattr("contestants.make", lambda *_: codes)
    weights = Weights.random("int4-g128", SHAPE, made.gpu, 2)
    made.gpu.compile([(weights.layout, instances.tiles(weights.layout))])
    for call in fused(made.gpu, weights).calls(16):
        call()
        x_MK, _, y_MN, _, tile = call.args  # type: ignore[attr-defined]
        assert error(y_MN, x_MK.double() @ values(codes).double().T) < TOLERANCE
        assert tile == instances.choose(weights.layout, 16, SHAPE[0], made.gpu.multiprocessors)
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr("contestants.dense_linear", lambda *operands: seen.append(operands))
    for call in dequantised_first(made.gpu, weights).calls(16):
        call()
    assert len(seen) == 2 and all(torch.equal(w_NK, values(codes).bfloat16()) for _, w_NK in seen)


def test_a_step_is_all_layers_in_the_models_order(tmp_path: Path) -> None:
    made = bench(tmp_path)
    rows = measured(made, "step")["sections"]["step"]["rows"]
    assert set(made.gpu.timed) == {2 * sections.HELD_BLOCKS}  # type: ignore[attr-defined]
    assert rows[0]["kernel"] == DENSE and rows[0]["step_milliseconds"] == pytest.approx(2 * sections.BLOCKS * 0.03)
    assert rows[1]["speedup"] == pytest.approx(3) and len(rows) == 2 * (1 + 2 * len(made.formats))

    def layer(name: str) -> Contestant:
        return Contestant("f", "k", 10, lambda tokens: [lambda i=i: f"{name}{i}" for i in range(2)])

    chain = one_after_the_other([layer("a"), layer("b")])
    assert [call() for call in chain.calls(1)] == ["a0", "b0", "a1", "b1"] and chain.nbytes == 10


def failing(rows: list[dict[str, Any]]) -> None:
    rows.append({"tokens": 1})
    raise RuntimeError("an illegal memory access was encountered\nlong story")


def test_a_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    made = bench(tmp_path)
    assert not made.run({"failing": failing, **plan(made).sections(["step"])})
    found = json.loads(made.path.read_text())["sections"]
    assert found["failing"]["outcome"] == "failed" and found["failing"]["rows"] == [{"tokens": 1}]
    assert found["failing"]["detail"] == "RuntimeError: an illegal memory access was encountered"
    assert found["step"]["outcome"] == "done" and found["step"]["rows"]


def test_what_was_found_is_in_the_file_before_the_section_ends(tmp_path: Path) -> None:
    made = bench(tmp_path)
    seen = []

    def killed(rows: list[dict[str, Any]]) -> None:
        made.race(plan_contestants(made), 1, rows, shape=list(SHAPE))
        seen.append(json.loads(made.path.read_text())["sections"]["products"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run({"products": killed})
    assert seen[0]["outcome"] == "started" and len(seen[0]["rows"]) == 1


def plan_contestants(made: Bench) -> list[Contestant]:
    return [fused(made.gpu, Weights.random("int4-g128", SHAPE, made.gpu))]


def ticking(seconds: int) -> Iterator[float]:
    return (float(now) for now in count(0, seconds))


def test_the_budget_ends_a_section_and_skips_the_rest(tmp_path: Path) -> None:
    made = bench(tmp_path)
    clock = ticking(150)  # for each look at the clock
    made.budget = Budget(minutes=10, now=lambda: next(clock))
    found = measured(made, "products", "step", "tiles")["sections"]
    assert [row["tokens"] for row in found["products 256x512"]["rows"]].count(1) == 1 + 2 * 2
    assert (found["products 256x512"]["outcome"], found["step"]["outcome"]) == ("cut short", "skipped")
    assert found["tiles int4-g128"] | {"seconds": 0} == {
        "outcome": "skipped", "detail": "10 minutes are spent", "seconds": 0, "rows": [],
    }  # fmt: skip


def test_minutes_are_kept_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_speed, "compare", lambda blocks, bits, *_: [{"blocks": blocks, "bits": bits}])
    made = bench(tmp_path)
    clock = ticking(28)
    made.budget = Budget(LAST_MINUTES + 0.9, now=lambda: next(clock))
    found = measured(made, "step", "model")["sections"]
    assert found["step"]["outcome"] == "skipped" and "only the 2 are left" in found["step"]["detail"]
    assert found["model"]["outcome"] == "cut short" and found["model"]["rows"] == [{"blocks": 32, "bits": [4]}]
    with pytest.raises(OutOfTimeError):
        made.budget.check()


def test_other_libraries_may_be_missing_or_fail(tmp_path: Path) -> None:
    def missing(rows: int, columns: int, count: int) -> Rival:
        raise ImportError("No module named 'nowhere'")

    def there(rows: int, columns: int, count: int) -> Rival:
        w_NK = torch.randn(rows, columns).bfloat16()
        return Rival([lambda x_MK: x_MK @ w_NK.T] * count, w_NK.nbytes)

    def only_one_token(rows: int, columns: int, count: int) -> Rival:
        def product(x_MK: Tensor) -> None:
            assert x_MK.dtype == torch.float16
            if len(x_MK) > 1:
                raise ValueError("too many")

        return Rival([product], 1, torch.float16)

    made = bench(tmp_path)
    rivals = {"missing": missing, "there": there, "one": only_one_token}
    found = measured(made, "rivals", rivals=rivals)["sections"]["rivals 256x512"]
    assert found["outcome"] == "done"
    rows = {(row["kernel"], row.get("tokens")): row for row in found["rows"]}
    assert rows["missing", None] == {
        "shape": [256, 512],
        "kernel": "missing",
        "failed": "ImportError: No module named 'nowhere'",
    }
    assert {m for kernel, m in rows if kernel == "there"} == set(sections.RIVAL_TOKENS)
    assert rows["there", 1]["nbytes"] == 2 * 256 * 512 and rows["there", 1]["speedup"] == pytest.approx(3)
    assert rows["one", 16]["failed"] == "ValueError: too many" and ("one", 64) not in rows
    assert "missing: ImportError: No module named" in table(found["rows"])


@pytest.mark.parametrize("name", sorted(set(RIVALS) - {"tinygemm"}))
def test_libraries_are_looked_for_when_they_are_timed(name: str) -> None:
    with pytest.raises((ImportError, RuntimeError, AssertionError)):  # without the library, or without a GPU
        RIVALS[name](128, 128, 1)


def test_a_foreign_product_gets_every_weight(tmp_path: Path) -> None:
    seen: list[int] = []
    products = [lambda x_MK, i=i: seen.append(i) for i in range(3)]
    for call in foreign(bench(tmp_path).gpu, "it", SHAPE, Rival(products, 7)).calls(2):
        call()
    assert seen == [0, 1, 2]


def test_the_switch_is_where_dequantising_stays_faster() -> None:
    def row(tokens: int, kernel: str, microseconds: float) -> dict[str, Any]:
        return {"shape": [8, 8], "format": "f", "tokens": tokens, "kernel": kernel, "microseconds": microseconds}

    taken = {16: (1.0, 5.0), 64: (6.0, 5.0), 128: (4.0, 5.0), 256: (9.0, 5.0), 512: (20.0, 6.0)}
    rows = [row(m, kernel, one) for m, both in taken.items() for kernel, one in zip((FUSED, UNPACKED), both, strict=True)]
    assert switch_points(rows) == [{"shape": [8, 8], "format": "f", "tokens": 256}]
    assert switch_points(rows[:2]) == [{"shape": [8, 8], "format": "f", "tokens": None}]
    assert switch_points([]) == []


@pytest.mark.parametrize("tokens", sections.TILE_TOKENS)
def test_candidates_fit_a_multiprocessor(tokens: int) -> None:
    candidates = candidate_tiles(tokens)
    assert all(8 * tile.nt >= tokens and 640 * tile.warps * tile.rb * tile.nt <= 48 << 10 for tile in candidates)
    assert len(set(candidates)) == len(candidates) > 10


def test_instances_are_timed_against_the_one_that_is_chosen(tmp_path: Path) -> None:
    found = measured(bench(tmp_path), "tiles")["sections"]["tiles int4-g128"]
    layout = layout_named("int4-g128")
    assert found["outcome"] == "done"
    for tokens in sections.TILE_TOKENS:
        chosen = in_words(instances.choose(layout, tokens, SHAPE[0], 4))
        kernels = [row["kernel"] for row in found["rows"] if (row["tokens"], row["shape"]) == (tokens, [*SHAPE])]
        assert kernels[0] == chosen and kernels.count(chosen) == 1
        assert {row["chosen"] for row in found["rows"] if row["tokens"] == tokens and row["shape"] == [*SHAPE]} == {chosen}


def test_contestants_take_turns_and_a_first_round_does_not_count() -> None:
    order: list[str] = []
    times = {"a": iter(range(10)), "b": iter(range(10, 20))}

    def timer(name: str) -> Callable[[], float]:
        def seconds() -> float:
            order.append(name)
            return next(times[name])

        return seconds

    assert in_turns({name: timer(name) for name in times}, rounds=3) == {"a": [1, 2, 3], "b": [11, 12, 13]}
    assert "".join(order) == "abbaabba"


def test_a_ratio_is_that_of_times_of_one_round(tmp_path: Path) -> None:
    """A device that slows down to a half on its way changes no ratio."""
    made = bench(tmp_path)
    made.results["copy_bytes_per_second"] = COPY
    first, own = [6.0, 6.0, 6.0, 12.0, 12.0], [2.0, 2.0, 2.0, 4.0, 4.0]
    assert made.figures(Contestant("f", "k", 1, lambda _: []), own, first)["speedup"] == 3


def test_the_summary_is_short_and_names_what_is_missing(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.run({"failing": failing, **plan(made).sections(["products"])})
    text = summary(made.results)
    assert "copy: 4.00 TB/s" in text and "failing: failed (RuntimeError: an illegal memory access was encountered)" in text
    assert text.count("3.00x bf16") == 2 * len(made.formats) and len(text.splitlines()) == 2 + 2 * len(made.formats)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    timing.write(tmp_path / "new" / "a.json", {"a": math.pi})
    timing.write(tmp_path / "new" / "a.json", {"a": 1})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench_gpu.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
