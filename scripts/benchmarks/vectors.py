"""What vectors out of codebooks lose beside integers, at 2 and 3 bits: `scripts/bench vectors MODEL …`.

Two sizes stand in each row: that of the model at hand, whose codebooks weigh much if its layers are small, and that of a
layer of 4096 x 4096, where they weigh little. Comparing by the second flatters vectors where a codebook has many numbers for
the weights of a small layer, so the chains here have one at most for sixteen weights of a layer of 256 x 256.

Exit status 1 if, by the second size, trained vectors lose more than a share of what the best trained integers lose.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from activations import Chain, measure
from rich.console import Console
from rich.table import Table

from compressor import registry
from compressor.cli._quiet import quiet

LARGE = (4096, 4096)
MOST = 0.45  # of the KL divergence of the best integers
LEARNED = [{"pass": "learned"}]


def integers(bits: int, group_size: int) -> Chain:
    """The method for integers that lost least where measured."""
    option = {"format": "int_group", "bits": bits, "group_size": group_size}
    return [{"pass": "rotate", "learn": 200}, {"pass": "gptq", "options": [option]}, *LEARNED]


def vectors(length: int, bits: int, residual_bits: int = 0) -> Chain:
    """Without training."""
    option = {"format": "vq", "vector": length, "bits": bits, "residual_bits": residual_bits}
    return [{"pass": "vptq", "options": [option]}]


CHAINS: Mapping[int, Mapping[str, Chain]] = {
    2: {
        "integers, groups of 128": integers(2, 128),
        "integers, groups of 64": integers(2, 64),
        "4 of 2^8": vectors(4, 8),
        "4 of 2^8, learned": [*vectors(4, 8), *LEARNED],
        "8 of 2^8 + 2^8": vectors(8, 8, 8),
        "8 of 2^8 + 2^8, learned": [*vectors(8, 8, 8), *LEARNED],
    },
    3: {
        "integers, groups of 128": integers(3, 128),
        "4 of 2^6 + 2^6": vectors(4, 6, 6),
        "4 of 2^6 + 2^6, learned": [*vectors(4, 6, 6), *LEARNED],
    },
}


def large_bits(chain: Chain) -> float:
    """Bits of a weight in a large layer."""
    option = next(step["options"][0] for step in chain if "options" in step)
    size: int = registry.build("format", option).stored_bits(LARGE)
    return size / (LARGE[0] * LARGE[1])


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """The KL divergence of each chain of vectors relative to that of the best integers of as many bits."""
    best = {
        bits: min(r["kl"] for r in results if r["bits"] == bits and r["chain"].startswith("integers"))
        for bits in {r["bits"] for r in results}
    }
    return {f"{r['bits']} bits, {r['chain']}": r["kl"] / best[r["bits"]] for r in results if "of 2^" in r["chain"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--eval", action="append", required=True, help="text to judge on, repeatable")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], choices=list(CHAINS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=120, help="documents of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    quiet()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for bits in options.bits:
            found = measure(options.model, CHAINS[bits], Path(place), options, f"{bits} bits")
            large = [large_bits(chain) for chain in CHAINS[bits].values()]
            results += [{**r, "bits": bits, "bits_in_large_layers": size} for r, size in zip(found, large, strict=True)]
    shares = ratios(results)
    table = Table(title=f"{options.model.resolve().name}")
    for name in ("bits", "chain", "bits/weight here", "of 4096 x 4096", "KL", "perplexity", "of integers", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        share = shares.get(f"{r['bits']} bits, {r['chain']}")
        sizes = (f"{r['bits_per_weight']:.3f}", f"{r['bits_in_large_layers']:.3f}")
        figures = (f"{r['kl']:.4f}", f"{r['perplexity']:.4g}", "" if share is None else f"{share:.2f}", f"{r['seconds']:.0f}")
        table.add_row(str(r["bits"]), r["chain"], *sizes, *figures)
    Console(width=140).print(table)
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {key: vars(options)[key] for key in ("samples", "seq_len", "eval_samples")}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "kl / kl of integers": shares}
        options.out.write_text(json.dumps({**data, "results": results}, indent=1) + "\n")
    trained = [share for name, share in shares.items() if name.endswith("learned")]
    if min(trained) > MOST:
        raise SystemExit(f"trained vectors lose {min(trained):.2f} of what integers lose, more than {MOST}")


if __name__ == "__main__":
    main()
