"""Define the measurements of scripts/gpu/bench, section by section."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from contestants import (
    ALONE,
    FUSED,
    Contestant,
    Shape,
    Weights,
    dense,
    foreign,
    fused,
    layout_named,
    natively,
    one_after_the_other,
    unpacked,
)
from racing import LAST, Bench, Row, Section
from rivals import RIVALS, Rival
from show import in_a_line
from timing import copies

from compressor.runtime.kernels import native
from compressor.runtime.kernels.cuda import instances
from compressor.runtime.kernels.cuda.instances import Tile

BLOCK = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # the fused linear layers of a block of Llama-3-8B
SHAPES = (*BLOCK, (8192, 8192), (14336, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
KINDS = ("products", "step", "tiles", "rivals", LAST)
BLOCKS, HELD_BLOCKS = 32, 4  # of the model, and those that there are weights for: more than any cache holds
ALONE_TOKENS, UNPACKED_TOKENS = (1, 4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512)  # where it may make a difference
STEP_TOKENS, TILE_TOKENS, RIVAL_TOKENS = (1, 16), (1, 16), (1, 16, 64, 256)
NATIVE_FORMAT = "fp8-row"  # that tensor cores multiply by as it is
MOST_SUMS = 76  # warps rb nt, which 48 KB of shared memory have room for (linear.cuh)
MOST_IN_FLIGHT = 16  # rb nt pf, which registers are taken for
MODEL_BITS, MODEL_TOKENS, MODEL_CONTEXT = (4, 2), (1, 16), 512


@dataclass(frozen=True)
class Plan:
    """The sections of a bench."""

    bench: Bench
    shapes: Sequence[Shape] = SHAPES
    block: Sequence[Shape] = BLOCK
    tokens: Sequence[int] = TOKENS
    tiles: Sequence[str] = ("int4-g128",)
    rivals: Mapping[str, Callable[[int, int, int], Rival]] = field(default_factory=lambda: RIVALS)

    def sections(self, kinds: Sequence[str]) -> dict[str, Section]:
        """Return the sections of some kinds by their names, in the order in which they are measured."""
        every: dict[str, Section] = {
            **{f"products {n}x{k}": functools.partial(self.measure_products, (n, k)) for n, k in self.shapes},
            "step": self.measure_step,
            **{f"tiles {name}": functools.partial(self.measure_tiles, name) for name in self.tiles},
            **{f"rivals {n}x{k}": functools.partial(self.measure_rivals, (n, k)) for n, k in self.block},
            LAST: self.measure_model,
        }
        return {name: section for name, section in every.items() if name.split()[0] in kinds}

    def measure_products(self, shape: Shape, rows: list[Row]) -> None:
        """Every format and number of tokens: fused, one kernel at a time, dequantised, and bf16."""
        gpu, plain = self.bench.gpu, dense(self.bench.gpu, shape)
        weights = [Weights.random(name, shape, gpu) for name in self.bench.formats]
        for tokens in self.tokens:
            contestants = [plain, *(fused(gpu, one) for one in weights)]
            if tokens in ALONE_TOKENS:
                contestants += [fused(gpu, one, ALONE) for one in weights]
            if tokens in UNPACKED_TOKENS:
                contestants += [unpacked(gpu, one) for one in weights]
            if native.lacking(torch.device(gpu.device)) is None:
                contestants += [natively(gpu, one) for one in weights if one.format == NATIVE_FORMAT]
            self.bench.race(contestants, tokens, rows, shape=list(shape))

    def measure_step(self, rows: list[Row]) -> None:
        """All linear layers of a block after each other, block after block."""
        gpu = self.bench.gpu

        def packed(name: str) -> list[Contestant]:
            weights = [Weights.random(name, shape, gpu, HELD_BLOCKS) for shape in self.block]
            return [one_after_the_other([fused(gpu, one, kernel) for one in weights]) for kernel in (FUSED, ALONE)]

        plain = one_after_the_other([dense(gpu, shape, HELD_BLOCKS) for shape in self.block])
        contestants = [plain, *(one for name in self.bench.formats for one in packed(name))]
        for tokens in STEP_TOKENS:
            before = len(rows)
            self.bench.race(contestants, tokens, rows)
            for row in rows[before:]:
                row["step_milliseconds"] = row["microseconds"] * len(self.block) * BLOCKS / 1000

    def measure_tiles(self, name: str, rows: list[Row]) -> None:
        """Instances that could be chosen for a format, against the one that is."""
        gpu, layout = self.bench.gpu, layout_named(name)
        every = {tile for tokens in TILE_TOKENS for tile in candidate_tiles(tokens)} | set(instances.tiles(layout))
        gpu.compile([(layout, (tile,)) for tile in sorted(every)])
        for shape in self.block:
            weights = Weights.random(name, shape, gpu)
            for tokens in TILE_TOKENS:
                chosen = instances.choose(layout, tokens, shape[0], gpu.multiprocessors)
                others = [tile for tile in candidate_tiles(tokens) if tile != chosen]
                contestants = [fused(gpu, weights, in_words(tile), tile) for tile in (chosen, *others)]
                self.bench.race(contestants, tokens, rows, shape=list(shape), chosen=in_words(chosen))

    def measure_rivals(self, shape: Shape, rows: list[Row]) -> None:
        """Other libraries beside int4 and bf16. What one raises is its row."""
        gpu = self.bench.gpu
        count = copies(shape[0] * shape[1] // 2, gpu.cache_bytes)
        contestants = [dense(gpu, shape), fused(gpu, Weights.random("int4-g128", shape, gpu))]
        for name, build in self.rivals.items():
            try:
                contestants.append(foreign(gpu, name, shape, build(*shape, count)))
            except Exception as error:  # not installed, or not for this machine
                rows.append({"shape": list(shape), "kernel": name, "failed": in_a_line(error)})
        for tokens in RIVAL_TOKENS:
            contestants = self.bench.race(contestants, tokens, rows, shape=list(shape))

    def measure_model(self, rows: list[Row]) -> None:
        """A step of a whole model."""
        import model_speed  # needs transformers, which the rest does without

        device = torch.device(self.bench.gpu.device)
        for bits in MODEL_BITS:
            self.bench.budget.check()
            rows += model_speed.compare(BLOCKS, [bits], [*MODEL_TOKENS], MODEL_CONTEXT, device)


def candidate_tiles(tokens: int) -> tuple[Tile, ...]:
    """Instances for a number of tokens that registers and shared memory have room for."""
    eights = -(-tokens // instances.TOKENS)
    every = [Tile(eights, rb, warps, pf) for rb in (1, 2, 4) for warps in (4, 8, 16) for pf in (1, 2, 4, 8)]
    return tuple(
        one for one in every if one.warps * one.rb * one.nt <= MOST_SUMS and one.rb * one.nt * one.pf <= MOST_IN_FLIGHT
    )


def in_words(tile: Tile) -> str:
    """As it is written in C++."""
    return f"<{', '.join(map(str, tile))}>"
