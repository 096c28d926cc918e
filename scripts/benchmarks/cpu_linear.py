"""How fast the CPU kernels multiply, beside torch: bf16 `F.linear`, and its own kernel for packed 4-bit weights.

    scripts/bench cpu_linear [--threads T …] [--tokens M …] [--seconds S] [--out FILE.json]

Every weight is there many times, 0.4 GB of copies in all, which take turns, so that each is read from memory. The rivals take
turns, too; a time is the least of all rounds, and ratios are of times of one run. Groups are of 128 columns.

Exit status: 0, or 1 if with one thread and 4 bits one of these does not hold: 3.5 times as fast as bf16 and 1.3 times as fast
as torch's 4-bit kernel with one token, 2.3 times as fast as bf16 with 16.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from compressor.formats.numerics.codes import IntCodes
from compressor.runtime.kernels import cpu
from compressor.runtime.kernels.layouts.int_groups import IntGroups

SHAPES = ((4096, 4096), (14336, 4096))
BITS = (2, 3, 4, 8)
GROUP = 128
ROTATED_BYTES = 400_000_000
BF16, TORCH_INT4, OWN4 = "bf16", "torch int4", "int4"
LIMITS = ((1, BF16, 3.5), (1, TORCH_INT4, 1.3), (16, BF16, 2.3))  # tokens, rival, times as fast
Product = Callable[[Tensor], Tensor]


def copies(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same tensors so often that no cache holds them all."""
    count = -(-ROTATED_BYTES // sum(part.nbytes for part in parts))
    return [[part.clone() for part in parts] for _ in range(max(2, count))]


def packed(rows: int, columns: int, bits: int) -> Product:
    """The kernels' product."""
    groups = columns // GROUP
    elements = torch.randint(0, 2**bits, (rows, columns + groups), dtype=torch.uint8)
    codes = IntCodes(bits, elements[:, groups:], torch.rand(rows, groups).bfloat16(), elements[:, :groups])
    layout = IntGroups(bits, GROUP, "bf16")
    weights = cycle(copies(list(layout.arrange(codes).values())))
    return lambda x: cpu.linear(x, next(weights), layout, rows, None)


def dense(rows: int, columns: int) -> Product:
    """`F.linear` in bf16."""
    weights = cycle(copies([torch.randn(rows, columns).bfloat16()]))
    return lambda x: linear(x, next(weights)[0])


def torch_int4(rows: int, columns: int) -> Product:
    """Torch's operator for weights of 4 bits."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
    weights = cycle(copies([codes, scales]))

    def product(x: Tensor) -> Tensor:
        codes, scales = next(weights)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales)
        return y

    return product


def measure(rivals: dict[str, Product], x: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds of each, the least of rounds that take so many seconds."""
    best = dict.fromkeys(rivals, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, product in rivals.items():
            begin = time.perf_counter()
            product(x)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def rows_of(shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures for one shape."""
    rivals = {BF16: dense(*shape), TORCH_INT4: torch_int4(*shape)} | {f"int{bits}": packed(*shape, bits) for bits in BITS}
    found = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for tokens in options.tokens:
            sys.stderr.write(f"{shape[0]} x {shape[1]}, {threads} threads, {tokens} tokens\n")
            times = measure(rivals, torch.randn(tokens, shape[1]).bfloat16(), options.seconds)
            faster = {name: times[BF16] / milliseconds for name, milliseconds in times.items()}
            figures = {"shape": shape, "threads": threads, "tokens": tokens}
            found.append(figures | {"milliseconds": times, "times_as_fast_as_bf16": faster})
    return found


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """The limits that do not hold, in words."""
    found = []
    for row in (row for row in rows if row["threads"] == 1):
        for tokens, rival, limit in LIMITS:
            faster = row["milliseconds"][rival] / row["milliseconds"][OWN4]
            if row["tokens"] == tokens and faster < limit:
                found.append(f"{row['shape']}, {tokens} tokens: {faster:.2f} times as fast as {rival}, {limit} is wanted")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Prints milliseconds, and how much faster than bf16."""
    names = list(rows[0]["milliseconds"])
    table = Table("shape", "threads", "tokens", *names)
    for row in rows:
        cells = [f"{row['milliseconds'][name]:.2f} ({row['times_as_fast_as_bf16'][name]:.1f}x)" for name in names]
        table.add_row("x".join(map(str, row["shape"])), str(row["threads"]), str(row["tokens"]), *cells)
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape, number of threads and of tokens")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    options = parser.parse_args()
    library = cpu.library()
    if library is None:
        sys.stderr.write("compressor: the package was built without a C compiler; there is nothing to measure\n")
        return 2
    rows = [row for shape in SHAPES for row in rows_of(shape, options)]
    show(rows)
    failures = broken(rows)
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "isas": library.isas}
        libraries = {name: version(name) for name in ("compressor", "torch")}
        data = {"machine": machine, **libraries, "group": GROUP, "rows": rows, "broken": failures}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    for failure in failures:
        sys.stderr.write(f"limit broken: {failure}\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
