"""Compare the loss of vectors out of codebooks with that of integers, from 2 to 3 bits: `scripts/bench vectors MODEL …`.

Two sizes stand in each row: that of the model at hand, whose codebooks weigh much if its layers are small and do not share
them, and that of layers of 4096 x 4096, where they weigh little. A chain is compared with the best integers by each of them:
those of no fewer bits that take the fewest. By the second size the comparison flatters vectors where a codebook has many
numbers for the weights of a small layer.

Exit status 1 if no trained vectors of 2 to 2.5 bits, all counted, lose less than a share of what the integers lose.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _plot import Point, scatter
from activations import Chain, measure
from rich.console import Console
from rich.table import Table

from compressor.cli._quiet import quiet
from compressor.recipe import registry

LARGE = (4096, 4096)
TRAINED = ", learned"
MOST = 0.6  # of the KL divergence of the integers
UP_TO = 2.5  # bits
SIZES = ("bits_per_weight", "bits_in_large_layers")
LEARNED = [{"pass": "learned"}]


def integers(bits: int, group_size: int) -> Chain:
    """The method for integers that lost least where measured."""
    option = {"format": "int_group", "bits": bits, "group_size": group_size}
    return [{"pass": "rotate", "learn": 200}, {"pass": "gptq", "options": [option]}, *LEARNED]


def vectors(length: int, bits: int, residual_bits: int = 0, *, share: str = "layer") -> Chain:
    """Without training."""
    option = {"format": "vq", "vector": length, "bits": bits, "residual_bits": residual_bits}
    norm = {} if share == "layer" else {"norm": "layer"}
    return [{"pass": "vptq", "share": share, "options": [{**option, **norm}]}]


def trained(name: str, chain: Chain) -> Mapping[str, Chain]:
    """With and without training."""
    return {name: chain, f"{name}{TRAINED}": [*chain, *LEARNED]}


CHAINS: Mapping[int, Mapping[str, Chain]] = {
    2: {
        "integers, groups of 128": integers(2, 128),
        "integers, groups of 64": integers(2, 64),
        "integers, groups of 32": integers(2, 32),
        **trained("4 of 2^8", vectors(4, 8)),
        **trained("8 of 2^8 + 2^8", vectors(8, 8, 8)),
        **trained("4 of 2^8, shared in a block", vectors(4, 8, share="block")),
        **trained("4 of 2^9, shared in a block", vectors(4, 9, share="block")),
        **trained("8 of 2^9 + 2^9, shared in a block", vectors(8, 9, 9, share="block")),
    },
    3: {
        "integers, groups of 128": integers(3, 128),
        "integers, groups of 32": integers(3, 32),
        **trained("4 of 2^6 + 2^6", vectors(4, 6, 6)),
        **trained("4 of 2^12, shared in a block", vectors(4, 12, share="block")),
    },
}


def large_bits(chain: Chain) -> float:
    """Bits of a weight in a large layer."""
    option = next(step["options"][0] for step in chain if "options" in step)
    size: int = registry.build("format", option).stored_bits(LARGE)
    return size / (LARGE[0] * LARGE[1])


def ratios(results: list[dict[str, Any]], size: str) -> dict[str, float]:
    """The KL divergence of each chain of vectors relative to that of the integers nearest in size that are not smaller."""
    rivals = [r for r in results if is_rival(r)]
    found = {}
    for r in results:
        larger = [rival for rival in rivals if rival[size] >= r[size]]
        if not is_rival(r) and larger:
            found[r["chain"]] = r["kl"] / min(larger, key=lambda rival: float(rival[size]))["kl"]
    return found


def is_rival(result: Mapping[str, Any]) -> bool:
    """Whether a row is one of integers."""
    return str(result["chain"]).startswith("integers")


def drawn(results: list[dict[str, Any]], title: str) -> str:
    """A plot of all rows, by all bits."""
    series: dict[str, list[Point]] = {"integers, rotated and learned": [], "vectors": [], "vectors, learned": []}
    for r in results:
        kind = "integers, rotated and learned" if is_rival(r) else "vectors"
        kind += TRAINED if r["chain"].endswith(TRAINED) else ""
        series[kind].append((r["bits_per_weight"], r["kl"], r["chain"].removesuffix(TRAINED).removeprefix("integers, ")))
    return scatter(series, title, "bits a weight, codebooks and scales counted", "KL divergence, nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--eval", action="append", required=True, help="text to judge on, repeatable")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], choices=list(CHAINS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=120, help="documents of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a plot beside it")
    parser.add_argument("--only", nargs="+", metavar="CHAIN", help="measure these, and keep what --out has of the others")
    options = parser.parse_args()
    quiet()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for bits in options.bits:
            chains = {name: chain for name, chain in CHAINS[bits].items() if not options.only or name in options.only}
            found = measure(options.model, chains, Path(place), options, f"{bits} bits")
            large = [large_bits(chain) for chain in chains.values()]
            results += [{**r, "bits": bits, "bits_in_large_layers": size} for r, size in zip(found, large, strict=True)]
    if options.out and options.only:
        measured = {(r["bits"], r["chain"]) for r in results}
        results += [r for r in json.loads(options.out.read_text())["results"] if (r["bits"], r["chain"]) not in measured]
        order = [(bits, chain) for bits, chains in CHAINS.items() for chain in chains]
        results.sort(key=lambda r: order.index((r["bits"], r["chain"])))
    shares = {size: ratios(results, size) for size in SIZES}
    table = Table(title=f"{options.model.resolve().name}")
    for name in (
        "chain",
        "bits/weight here",
        "of 4096 x 4096",
        "KL",
        "perplexity",
        "of integers",
        "by large layers",
        "seconds",
    ):
        table.add_column(name, justify="right")
    for r in results:
        share = [f"{shares[size][r['chain']]:.2f}" if r["chain"] in shares[size] else "" for size in SIZES]
        sizes = (f"{r['bits_per_weight']:.3f}", f"{r['bits_in_large_layers']:.3f}")
        table.add_row(r["chain"], *sizes, f"{r['kl']:.4f}", f"{r['perplexity']:.4g}", *share, f"{r['seconds']:.0f}")
    Console(width=150).print(table)
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {key: vars(options)[key] for key in ("samples", "seq_len", "eval_samples")}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "kl / kl of integers": shares}
        options.out.write_text(json.dumps({**data, "results": results}, indent=1) + "\n")
        options.out.with_suffix(".svg").write_text(drawn(results, options.model.resolve().name))
    small = {r["chain"] for r in results if r["bits_per_weight"] <= UP_TO and r["chain"].endswith(TRAINED)}
    best = min((share for chain, share in shares[SIZES[0]].items() if chain in small), default=1.0)
    if best > MOST:
        raise SystemExit(f"trained vectors lose {best:.2f} of what integers lose, more than {MOST}")


if __name__ == "__main__":
    main()
