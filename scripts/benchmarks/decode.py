"""How fast a packed model writes on the CPU, beside the same model in bf16, and what memory it takes.

    scripts/bench decode [--blocks N] [--bits B] [--threads T …] [--keep DIR] [--out FILE.json]

The model has the shape of the trained test model (a Llama) scaled up to a billion parameters; its weights are random, which
makes no difference to speed. It is rounded to integers in groups of 128 and measured by `compress bench`'s own code:
both models in turn, each in a process of its own, medians of the rounds, ratios within a round. What the process holds
after loading is compared with the file.

Exit status: 0, or 1 if decoding one sequence is not 2.5 times as fast or the memory exceeds 1.1 of the file.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory import Shape, write_model

import compressor
from compressor.cli.bench import print_speed
from compressor.runtime.bench import bench

FASTER, MORE_MEMORY = 2.5, 1.1
PROMPT = 32  # tokens: prompts are not what this is about
ONE_BILLION = Shape("1B", 16, 2048, 8192, 32, 2048)


def held_bytes(path: Path) -> int:
    """Return the bytes of all tensors of the loaded model."""
    model = compressor.load(path, dtype=torch.bfloat16)
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(blocks: int, bits: int, threads: list[int], place: Path) -> dict[str, Any]:
    """Speed for each number of threads, and memory."""
    model, packed = place / f"model-{blocks}", place / f"model-{blocks}-int{bits}"
    shape = Shape(f"{blocks} blocks", blocks, ONE_BILLION.hidden, ONE_BILLION.mlp, ONE_BILLION.heads, ONE_BILLION.vocab)
    if not model.exists():
        write_model(shape, model)
    if not packed.exists():
        sys.stderr.write(f"writing {packed}\n")
        compressor.quantize(model, packed, bits=bits, method="rtn", evaluate=False, verify=False)
    stored = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    speeds = []
    for count in threads:
        speed = bench(
            packed, model, batches=(1, 4, 16), prompt=PROMPT, rounds=3, threads=count, dtype=torch.bfloat16, tell=tell
        )
        speeds.append(speed.to_dict())
    return {"blocks": blocks, "bits": bits, "file_bytes": stored, "held_bytes": held_bytes(packed), "speeds": speeds}


def tell(done: int, total: int, what: str) -> None:
    """Progress."""
    if what:
        sys.stderr.write(f"{done + 1}/{total} {what}\n")


def broken(figures: dict[str, Any]) -> list[str]:
    """The limits that do not hold, in words."""
    found = []
    ratio = figures["held_bytes"] / figures["file_bytes"]
    if ratio > MORE_MEMORY:
        found.append(f"memory is {ratio:.2f} of the file, at most {MORE_MEMORY} is allowed")
    for speed in figures["speeds"]:
        rows = [row for row in speed["rows"] if (row["phase"], row["batch"]) == ("decode", 1)]
        faster = rows[-1]["speedup"]  # the original comes first
        if figures["bits"] == 4 and faster < FASTER:
            found.append(f"{speed['threads']} threads: decoding is {faster:.2f} times as fast, {FASTER} is wanted")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=ONE_BILLION.layers)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the models here, and use those that are here already")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compressor-decode-") as temporary:
        figures = measure(options.blocks, options.bits, options.threads, options.keep or Path(temporary))
    for speed in figures["speeds"]:
        print_speed(speed)
    print(f"tensors in memory: {figures['held_bytes'] / figures['file_bytes']:.3f} of the file")
    failures = broken(figures)
    if options.out:
        machine = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine()}
        libraries = {name: version(name) for name in ("compressor", "torch", "transformers")}
        data = {"machine": {**machine, "cpus": os.cpu_count()}, **libraries, **figures, "broken": failures}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    for failure in failures:
        sys.stderr.write(f"limit broken: {failure}\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
