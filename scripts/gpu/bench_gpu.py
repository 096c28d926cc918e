"""How fast products by packed weights are, beside bf16 and beside other libraries.

    scripts/gpu/bench [--out FILE.json] [--minutes N] [--sections NAME …] [--formats NAME …] [--tiles NAME …]

Products are timed in chains inside CUDA graphs that go through more weights than the cache holds. Contestants take turns, and
ratios are medians of ratios within a round. Figures are microseconds of a product, bytes of its weight over that time, that
as a fraction of what a copy in memory reaches, and how many times as fast as the first contestant it is: the product in bf16,
or, of instances, the one that is chosen. Sections:

    products  each shape and format: fused, fused without overlap of kernels, dequantised first; and where to switch
    step      the linear layers of a model of Llama-3-8B's shape, one after the other: a decoding step's floor
    tiles     instances that could be chosen, against those that are; for the formats of --tiles
    rivals    other libraries, where they are installed
    model     a whole model (model_speed.py)

The file is written all the while. What the minutes do not suffice for is skipped, and says so; a section that fails leaves
the others alone.

Exit status: 0 measured, 1 a section failed, 2 no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from racing import Bench
from sections import KINDS, Plan
from show import summary
from timing import Budget, Gpu
from weights import MEASURED


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/gpu/bench", description="Time the CUDA kernels on this machine's GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/gpu-DEVICE.json")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="start nothing then, and keep what there is")
    parser.add_argument("--sections", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=list(MEASURED), default=list(MEASURED), metavar="NAME")
    parser.add_argument("--tiles", nargs="+", choices=list(MEASURED), default=["int4-g128"], metavar="NAME")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("scripts/gpu/bench: this machine has no CUDA GPU; run it on one that has\n")
        return 2
    torch.manual_seed(0)
    gpu = Gpu()
    path = options.out or Path("benchmarks") / f"gpu-{gpu.name.lower().replace(' ', '-')}.json"
    bench = Bench(gpu, Budget(options.minutes), path, options.formats)
    command = f"scripts/gpu/bench --minutes {options.minutes:g} --sections {' '.join(options.sections)}"
    fine = bench.run(Plan(bench, tiles=options.tiles).sections(options.sections), command=command)
    print(f"\n{summary(bench.results)}\n{path}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
