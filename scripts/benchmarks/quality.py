"""Quality of our outputs on one model, at several bit widths, by every method: `scripts/bench quality MODEL …`.

Each output is written by the product, then judged by `compress eval` on text that calibration did not see. Exit status 1 if
GPTQ does not stay below six tenths of rounding's KL divergence at 3 bits.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compressor import api, evaluate
from compressor.cli._quiet import quiet

MOST = 0.6  # of rounding's KL that GPTQ may have at 3 bits


def measure(model: Path, options: argparse.Namespace, method: str, bits: int, place: Path) -> dict[str, Any]:
    """Write one output and judge it on every text."""
    out = place / f"{method}{bits}"
    report = api.quantize(
        model,
        out,
        bits=bits,
        method=method,
        group_size=options.group_size,
        calibration=options.calibration,
        samples=options.samples,
        seq_len=options.seq_len,
        evaluate=not options.eval,
        device="cpu",
    )
    texts: dict[str, dict[str, Any]] = {"held out": dict(report.quality)} if report.quality else {}
    for text in options.eval or ():
        judged = evaluate(out, model, data=text, samples=options.eval_samples, seq_len=options.seq_len, device="cpu")
        texts[Path(text).stem] = judged.to_dict()
    for quality in texts.values():
        for key in ("source", "texts", "positions"):
            quality.pop(key)
    return {
        "method": method,
        "bits": bits,
        "bits_per_weight": report.bits_per_weight,
        "seconds": round(report.seconds, 1),
        "texts": texts,
    }


def show(results: list[dict[str, Any]], title: str) -> None:
    """One table, a row per output and text."""
    table = Table(title=title)
    for name in ("method", "bits", "bits/weight", "seconds", "text", "perplexity", "of the original", "KL", "top-1"):
        table.add_column(name, justify="right")
    for r in results:
        for name, q in r["texts"].items():
            table.add_row(
                r["method"], str(r["bits"]), f"{r['bits_per_weight']:.3f}", str(r["seconds"]), name,
                f"{q['perplexity']:.3f}", f"{q['reference_perplexity']:.3f}", f"{q['kl']:.4f}", f"{q['top1_agreement']:.1%}",
            )  # fmt: skip
    Console().print(table)


def kl(results: list[dict[str, Any]], method: str, bits: int) -> float:
    """Mean KL over texts, weighted by their tokens."""
    texts = next(r["texts"].values() for r in results if (r["method"], r["bits"]) == (method, bits))
    return float(sum(q["kl"] * q["tokens"] for q in texts) / sum(q["tokens"] for q in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument(
        "--eval",
        action="append",
        help="text to judge on, repeatable; without, the held-out part of the calibration text is",
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out samples of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as place:
        results = [measure(options.model, options, m, b, Path(place)) for b in options.bits for m in ("rtn", "gptq")]
    ratios = {str(bits): kl(results, "gptq", bits) / kl(results, "rtn", bits) for bits in options.bits}
    show(results, f"{options.model.resolve().name}, group size {options.group_size}")
    print("KL of gptq / KL of rtn:", ", ".join(f"{bits} bits {ratio:.3f}" for bits, ratio in ratios.items()))
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {k: v for k, v in vars(options).items() if k in ("bits", "group_size", "samples", "seq_len")}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "gptq/rtn": ratios, "results": results}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    if ratios.get("3", 0.0) > MOST:
        raise SystemExit(f"at 3 bits gptq has {ratios['3']:.3f} of rounding's KL, more than {MOST}")


if __name__ == "__main__":
    main()
