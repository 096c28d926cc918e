"""How much faster a pruned model is on the CPU than its parameters promise: `scripts/bench pruned_speed [--out FILE.json]`.

A Llama of a billion parameters, random (which makes no difference to speed), beside one with the shape that
`compress prune --no-heads` gives it: a quarter of all parameters less, out of the MLPs. Both in bf16, and both in 4 bits,
each pair in turn in one run by `compress bench`'s own code. A model of r times the parameters promises to be 1 / r times as
fast.

Exit status: 0, or 1 if prefill or decoding of one sequence reaches less than 0.85 of what is promised.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from decode import ONE_BILLION, tell
from memory import Shape, write_model

import compressor
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import MLP
from compressor.passes.prune.shapes import parameters, shapes
from compressor.runtime.bench import bench

LEAST = 0.85
RATIO = 0.25
PROMPT = 64


def pruned(path: Path, blocks: int) -> Shape:
    """The shape that pruning leaves."""
    (found,) = shapes(ModelSource(path, torch.device("cpu")), RATIO, "model", heads=False, multiple=128)
    big = ONE_BILLION
    return Shape("pruned", blocks, big.hidden, found.keep[MLP], big.heads, big.vocab)


def measure(blocks: int, threads: int, place: Path) -> list[dict[str, Any]]:
    """Rows of both pairs."""
    big = ONE_BILLION
    dense, narrow = place / "dense", place / "narrow"
    write_model(Shape("dense", blocks, big.hidden, big.mlp, big.heads, big.vocab), dense)
    write_model(pruned(dense, blocks), narrow)
    share = parameters(ModelSource(narrow, torch.device("cpu"))) / parameters(ModelSource(dense, torch.device("cpu")))
    pairs = {"bf16": (narrow, dense)}
    packed = tuple(path.with_name(f"{path.name}-int4") for path in pairs["bf16"])
    for path, out in zip(pairs["bf16"], packed, strict=True):
        sys.stderr.write(f"writing {out.name}\n")
        compressor.quantize(path, out, bits=4, method="rtn", evaluate=False, verify=False)
    pairs["int4"] = (packed[0], packed[1])
    found = []
    for name, (model, reference) in pairs.items():
        speed = bench(
            model, reference, batches=(1,), prompt=PROMPT, rounds=5, threads=threads, dtype=torch.bfloat16, tell=tell
        ).to_dict()
        for row in speed["rows"]:
            if row.get("speedup") is not None and row["model"] == model.name:
                reached = row["speedup"] * share
                found.append({"numbers": name, "phase": row["phase"], "faster": row["speedup"], "reached": reached})
                print(
                    f"{name} {row['phase']}: {row['speedup']:.3f} times as fast, {reached:.2f} of 1 / {share:.3f}", flush=True
                )
    return found


def main() -> int:
    """Measure, show and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=ONE_BILLION.layers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compressor-pruned-") as place:
        rows = measure(options.blocks, options.threads, Path(place))
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "threads": options.threads}
        options.out.write_text(json.dumps({"machine": machine, "blocks": options.blocks, "rows": rows}, indent=1) + "\n")
    return int(any(row["reached"] < LEAST for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
