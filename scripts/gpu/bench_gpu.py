"""How fast products by packed weights are, beside bf16 and beside other libraries.

    scripts/gpu/bench [--out FILE.json] [--minutes N] [--sections NAME …] [--formats NAME …]

Products are timed in chains inside CUDA graphs that go through more weights than the cache holds. Figures are microseconds of
a product, bytes of its weight over that time, that as a fraction of what a copy in memory reaches, and how many times as fast
as the same product in bf16 it is. Sections are written as they end, so that one that fails does not take the others with it.

Exit status: 0 measured (a section may have failed: it says so), 2 no GPU.
"""

import argparse
import functools
import gc
import itertools
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rivals import RIVALS, Product
from timing import Budget, Call, Gpu, OutOfTimeError, copies, write
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from weights import MEASURED, layout_of, make, nbytes

from compressor.kernels.cuda import instances
from compressor.kernels.cuda.instances import Tile
from compressor.kernels.layouts import Layout

BLOCK = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # the fused linear layers of a block of Llama-3-8B
BLOCKS = 32
SHAPES = (*BLOCK, (8192, 8192), (14336, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
ALONE_TOKENS = (1, 16)  # for which kernels are also timed without overlap
UNPACKED_TOKENS = TOKENS[3:]  # for which dequantising first may win
CHAIN_TOKENS = (1, 16)
CHAIN_FORMATS = ("int4-g128", "int2-g64", "int8-g128", "nvfp4", "lossless")
TILE_TOKENS = (1, 16, 64)
MOST_IN_FLIGHT = 16  # rb nt pf, which registers are taken for
FUSED, ALONE, UNPACKED, DENSE = "fused", "fused, without overlap", "dequantised", "bf16"

Row = dict[str, Any]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Weights:
    """Several of one shape and format."""

    layout: Layout
    each: list[list[Tensor]]
    shape: Shape
    nbytes: int  # of one

    @staticmethod
    def random(name: str, shape: Shape, count: int | None, gpu: Gpu) -> "Weights":
        """As many as the cache does not hold, or `count`. One is random, the others are copies of it."""
        codes = make(name, *shape, gpu.device)
        layout = layout_of(codes)
        parts = layout.arrange(codes)
        size = nbytes(parts)
        count = count or copies(size, gpu.cache_bytes)
        each = [list(parts.values()), *([part.clone() for part in parts.values()] for _ in range(count - 1))]
        return Weights(layout, each, shape, size)

    @property
    def columns(self) -> int:
        """Padded to whole chunks."""
        return self.shape[1] + -self.shape[1] % self.layout.chunk


@dataclass
class Bench:
    """What is measured, where, and what was found so far."""

    gpu: Gpu
    budget: Budget
    path: Path
    rivals: Mapping[str, Callable[[int, int, int], Sequence[Product]]] = field(default_factory=lambda: RIVALS)
    shapes: Sequence[Shape] = SHAPES
    formats: Sequence[str] = tuple(MEASURED)
    tokens: Sequence[int] = TOKENS
    blocks: int = BLOCKS
    block: Sequence[Shape] = BLOCK
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, names: Sequence[str]) -> None:
        """Measures sections, and writes the file after each."""
        self.results |= {"machine": self.gpu.facts(), "copy_bytes_per_second": self.gpu.copy_bytes_per_second()}
        self.gpu.compile([layout_of(make(name, 256, 512)) for name in self.formats])
        for name in names:
            rows: list[Row] = []
            section = self.results[name] = {"rows": rows, "stopped": None}
            try:
                SECTIONS[name](self, rows)
            except Exception as error:  # of any kind: the other sections are still wanted
                section["stopped"] = f"{type(error).__name__}: {error}"
                if not isinstance(error, OutOfTimeError):
                    traceback.print_exc()
            gc.collect()
            self.gpu.release()
            self.results["switch_points"] = switch_points(self.results.get("layers", {}).get("rows", []))
            write(self.path, self.results)
            print(f"{name}: {len(rows)} rows{f', {why}' if (why := section['stopped']) else ''}", flush=True)

    def row(self, calls: Sequence[Call], size: int, **about: Any) -> Row:
        """Times a chain of products by weights of a size."""
        self.budget.check()
        seconds = self.gpu.seconds(calls)
        rate = size / seconds
        found = {
            **about,
            "microseconds": 1e6 * seconds,
            "gb_per_second": rate / 1e9,
            "of_copy": rate / self.results["copy_bytes_per_second"],
        }
        print(
            "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in found.items()),
            flush=True,
        )
        return found


def fused_calls(bench: Bench, weights: Weights, tokens: int, overlapping: bool = True) -> list[Call]:
    """Our product by each of the weights, by the instance that the product chooses."""
    kernels = bench.gpu.kernels(weights.layout.name, None, overlapping)
    tile = instances.choose(weights.layout, tokens, weights.shape[0], bench.gpu.multiprocessors)
    return tile_calls(bench, weights, tokens, tile, kernels)


def tile_calls(bench: Bench, weights: Weights, tokens: int, tile: Tile, kernels: Any) -> list[Call]:
    """The same, by one instance."""
    x_MK = torch.randn(tokens, weights.columns, device=bench.gpu.device).bfloat16()
    y_MN = torch.empty(tokens, weights.shape[0], dtype=torch.bfloat16, device=bench.gpu.device)
    return [functools.partial(kernels.linear, x_MK, parts, y_MN, None, tile) for parts in weights.each]


def unpacked_calls(bench: Bench, weights: Weights, tokens: int) -> list[Call]:
    """Dequantise, then multiply by the dense weight."""
    kernels = bench.gpu.kernels(weights.layout.name)
    x_MK = torch.randn(tokens, weights.shape[1], device=bench.gpu.device).bfloat16()
    w_NK = torch.empty(weights.shape, dtype=torch.bfloat16, device=bench.gpu.device)

    def product(parts: list[Tensor]) -> None:
        kernels.dequantize(parts, w_NK)
        dense_linear(x_MK, w_NK)

    return [functools.partial(product, parts) for parts in weights.each]


def dense_calls(bench: Bench, shape: Shape, tokens: int, count: int | None = None) -> list[Call]:
    """The product in bf16."""
    first = torch.randn(shape, device=bench.gpu.device).bfloat16()
    count = count or copies(first.nbytes, bench.gpu.cache_bytes)
    x_MK = torch.randn(tokens, shape[1], device=bench.gpu.device).bfloat16()
    return [functools.partial(dense_linear, x_MK, w_NK) for w_NK in (first, *(first.clone() for _ in range(count - 1)))]


def ways(bench: Bench, weights: Weights, tokens: int) -> dict[str, Callable[[], list[Call]]]:
    """How a product is made, by name."""
    found: dict[str, Callable[[], list[Call]]] = {FUSED: lambda: fused_calls(bench, weights, tokens)}
    if tokens in ALONE_TOKENS:
        found[ALONE] = lambda: fused_calls(bench, weights, tokens, overlapping=False)
    if tokens in UNPACKED_TOKENS:
        found[UNPACKED] = lambda: unpacked_calls(bench, weights, tokens)
    return found


def layers(bench: Bench, rows: list[Row]) -> None:
    """Every shape, format and number of tokens: fused, one kernel at a time, dequantised, and bf16."""
    for shape in bench.shapes:
        dense = {}
        for tokens in bench.tokens:
            about = {"shape": list(shape), "format": DENSE, "tokens": tokens, "kernel": DENSE}
            row = bench.row(dense_calls(bench, shape, tokens), 2 * shape[0] * shape[1], **about)
            dense[tokens] = row["microseconds"]
            rows.append(row | {"speedup": 1.0})
        for name in bench.formats:
            weights = Weights.random(name, shape, None, bench.gpu)
            for tokens in bench.tokens:
                for kernel, calls in ways(bench, weights, tokens).items():
                    about = {"shape": list(shape), "format": name, "tokens": tokens, "kernel": kernel}
                    row = bench.row(calls(), weights.nbytes, **about)
                    rows.append(row | {"speedup": dense[tokens] / row["microseconds"]})
            bench.gpu.release()


def chain(bench: Bench, rows: list[Row]) -> None:
    """All fused linear layers of a model of Llama-3-8B's shape, one after the other in a graph: a decoding step's floor."""
    for tokens in CHAIN_TOKENS:
        size = sum(2 * n * k for n, k in bench.block) * bench.blocks
        of_shape = [dense_calls(bench, shape, tokens, bench.blocks) for shape in bench.block]
        dense = step(bench, rows, of_shape, size, DENSE, tokens)
        del of_shape
        for name in CHAIN_FORMATS:
            weights = [Weights.random(name, shape, bench.blocks, bench.gpu) for shape in bench.block]
            size = sum(one.nbytes for one in weights) * bench.blocks
            row = step(bench, rows, [fused_calls(bench, one, tokens) for one in weights], size, name, tokens)
            row["speedup"] = dense["step_milliseconds"] / row["step_milliseconds"]
            del weights
            bench.gpu.release()


def step(bench: Bench, rows: list[Row], of_shape: list[list[Call]], size: int, name: str, tokens: int) -> Row:
    """Times the layers in the order of the model, and keeps the row."""
    calls = [call for block in zip(*of_shape, strict=True) for call in block]
    row = bench.row(calls, size // len(calls), format=name, tokens=tokens)
    row["step_milliseconds"] = row["microseconds"] * len(calls) / 1000
    rows.append(row)
    return row


def rivals(bench: Bench, rows: list[Row]) -> None:
    """Other libraries. What one raises is its row."""
    for (name, builder), shape in itertools.product(bench.rivals.items(), bench.shapes):
        try:
            count = copies(shape[0] * shape[1] // 2, bench.gpu.cache_bytes)
            products = builder(*shape, count)
            for tokens in bench.tokens:
                x_MK = torch.randn(tokens, shape[1], device=bench.gpu.device).bfloat16()
                calls = [functools.partial(product, x_MK) for product in products]
                about = {"shape": list(shape), "format": "4 bits", "tokens": tokens, "kernel": name}
                rows.append(bench.row(calls, shape[0] * shape[1] * 17 // 32, **about))  # 4.25 bits
        except OutOfTimeError:
            raise
        except Exception as error:  # not installed, or not for this machine
            rows.append({"shape": list(shape), "kernel": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            if isinstance(error, ImportError):
                print(f"{name}: not installed", flush=True)
        bench.gpu.release()


def tiles(bench: Bench, rows: list[Row]) -> None:
    """Instances that could be chosen for int4, to see whether others should be."""
    for shape, tokens in itertools.product(bench.block, TILE_TOKENS):
        weights = Weights.random("int4-g128", shape, None, bench.gpu)
        candidates = candidate_tiles(tokens)
        kernels = bench.gpu.kernels(weights.layout.name, candidates)
        chosen = instances.choose(weights.layout, tokens, shape[0], bench.gpu.multiprocessors)
        for tile in candidates:
            about = {"shape": list(shape), "tokens": tokens, "tile": list(tile), "chosen": tile == chosen}
            rows.append(bench.row(tile_calls(bench, weights, tokens, tile, kernels), weights.nbytes, **about))
        bench.gpu.release()


def candidate_tiles(tokens: int) -> tuple[Tile, ...]:
    """Instances for a number of tokens that registers and shared memory have room for."""
    eights = -(-tokens // instances.TOKENS)
    widths = {nt for nt in (1, 2, 4, 8) if nt >= eights / 2 and nt < 2 * eights}
    every = itertools.starmap(Tile, itertools.product(sorted(widths), (1, 2, 4), (4, 8, 16), (1, 2, 4)))
    return tuple(
        tile for tile in every if tile.warps * tile.rb * tile.nt <= 76 and tile.rb * tile.nt * tile.pf <= MOST_IN_FLIGHT
    )


def switch_points(rows: Sequence[Row]) -> list[Row]:
    """For each shape and format, from how many tokens on dequantising first is faster, None where it never is."""
    taken: dict[tuple[tuple[int, ...], str], dict[int, dict[str, float]]] = {}
    for row in rows:
        of_tokens = taken.setdefault((tuple(row["shape"]), row["format"]), {}).setdefault(row["tokens"], {})
        of_tokens[row["kernel"]] = row["microseconds"]
    found = []
    for (shape, name), by_tokens in taken.items():
        both = {tokens: way for tokens, way in by_tokens.items() if UNPACKED in way}
        slower = [tokens for tokens, way in both.items() if way[FUSED] <= way[UNPACKED]]
        later = [tokens for tokens in sorted(both) if tokens > max(slower, default=0)]
        if both:
            found.append({"shape": list(shape), "format": name, "tokens": later[0] if later else None})
    return found


SECTIONS: dict[str, Callable[[Bench, list[Row]], None]] = {"chain": chain, "layers": layers, "rivals": rivals, "tiles": tiles}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/gpu/bench", description="Time the CUDA kernels on this machine's GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/gpu-DEVICE.json")
    parser.add_argument("--minutes", type=float, default=9, metavar="N", help="stop then, and keep what there is")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="NAME")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("scripts/gpu/bench: this machine has no CUDA GPU; run it on one that has\n")
        return 2
    gpu = Gpu()
    path = options.out or Path("benchmarks") / f"gpu-{gpu.name.replace(' ', '-')}.json"
    Bench(gpu, Budget(options.minutes), path, formats=options.formats).run(options.sections)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
