"""Measure the worth of each option of GPTQ on one model, alone and together: `scripts/bench ablation MODEL …`.

Each variant is written by the product, from the same calibration text, and judged on other text; the figures are ratios of KL
divergences for the same seed, so what the choice of calibration text does to all of them alike cancels.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch
from _process import tell
from rich.console import Console
from rich.table import Table

from compressor import api
from compressor.cli._quiet import quiet
from compressor.evaluation.evaluate import evaluate_all
from compressor.recipe.schema import make_recipe

PLAIN: Mapping[str, Any] = {"act_order": False, "refine": 0, "damp": 0.01, "asymmetric_calibration": 0.0}
ORDER = {**PLAIN, "act_order": True}
REFINE = {**ORDER, "refine": 4}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": PLAIN,
    "act_order": ORDER,
    "refine 1": {**ORDER, "refine": 1},
    "refine 4": REFINE,
    "damp .001": {**REFINE, "damp": 0.001},
    "damp .1": {**REFINE, "damp": 0.1},
    "damp of three": {**REFINE, "damp": [0.001, 0.01, 0.1]},
    "asymmetric .25": {**REFINE, "asymmetric_calibration": 0.25},
    "asymmetric .5": {**REFINE, "asymmetric_calibration": 0.5},
    "asymmetric 1": {**REFINE, "asymmetric_calibration": 1.0},
    "sequential": {**REFINE, "sequential": True},
    "sequential, asymmetric .25": {**REFINE, "sequential": True, "asymmetric_calibration": 0.25},
    "sequential, asymmetric .5": {**REFINE, "sequential": True, "asymmetric_calibration": 0.5},
}
BASE = "act_order"  # that others are compared with
TAPS = (["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.gate_proj", "*.up_proj"], ["*.down_proj"])


def passes(options: Mapping[str, Any], bits: int, group_size: int) -> list[dict[str, Any]]:
    """A recipe's passes: one, or one for each tensor that layers read, in turn."""
    fields = {key: value for key, value in options.items() if key != "sequential"}
    step = {"pass": "gptq", "options": [{"format": "int_group", "bits": bits, "group_size": group_size}], **fields}
    return [{**step, "layers": layers} for layers in TAPS] if options.get("sequential") else [step]


def measure(options: argparse.Namespace, bits: int, seed: int) -> list[dict[str, Any]]:
    """Write every variant, calibrated on the documents that a seed draws, and judge all of them together."""
    calibration = {"source": options.calibration, "samples": options.samples, "seq_len": options.seq_len, "seed": seed}
    with tempfile.TemporaryDirectory() as place:
        outs = {name: Path(place) / str(i) for i, name in enumerate(options.variants)}
        errors, seconds = {}, {}
        for name, out in outs.items():
            steps = passes(VARIANTS[name], bits, options.group_size)
            recipe = make_recipe({"passes": steps, "calibration": calibration, "evaluation": None})
            report = api.run(recipe, options.model, out, device="cpu", verify=False)
            errors[name], seconds[name] = mean(row.error for row in report.rows), round(report.seconds, 1)
            left = mean(seconds.values()) * (len(outs) - len(seconds)) / 60
            tell(f"{bits} bits, seed {seed}: {name}, {seconds[name]} s; {left:.0f} min left, then scoring")
        judged = evaluate_all(
            list(outs.values()),
            options.model,
            data=options.eval,
            samples=options.eval_samples,
            seq_len=options.seq_len,
            device="cpu",
        )
    return [
        {"variant": name, "bits": bits, "seed": seed, "kl": quality.overall.kl, "perplexity": quality.perplexity,
         "mean_error": errors[name], "seconds": seconds[name]}
        for name, quality in zip(outs, judged, strict=True)
    ]  # fmt: skip


def against_base(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By variant and bits: the KL divergence in units of the base's for the same seed, geometric mean over seeds."""
    kl = {(r["variant"], r["bits"], r["seed"]): r["kl"] for r in results}
    ratios: dict[str, dict[str, list[float]]] = {}
    for (variant, bits, seed), value in kl.items():
        ratios.setdefault(variant, {}).setdefault(str(bits), []).append(value / kl[BASE, bits, seed])
    return {v: {b: geometric_mean(found) for b, found in by_bits.items()} for v, by_bits in ratios.items()}


def show(ratios: Mapping[str, Mapping[str, float]]) -> None:
    """A row per variant, a column per number of bits."""
    table = Table(title=f"KL divergence from the original; {BASE} = 1")
    widths = list(next(iter(ratios.values())))
    for name in ("variant", *(f"{bits} bits" for bits in widths)):
        table.add_column(name, justify="right")
    for variant, found in ratios.items():
        table.add_row(variant, *(f"{found[bits]:.3f}" for bits in widths))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", action="append", required=True, help="text to judge on, repeatable")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="each draws other calibration documents")
    parser.add_argument("--eval-samples", type=int, default=64, help="of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.variants = list(dict.fromkeys([BASE, *options.variants]))
    quiet()
    results: list[dict[str, Any]] = []
    for bits in options.bits:
        for seed in options.seeds:
            results += measure(options, bits, seed)
    ratios = against_base(results)
    show(ratios)
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {k: v for k, v in vars(options).items() if k in ("group_size", "samples", "seq_len", "eval_samples")}
        variants = {name: VARIANTS[name] for name in options.variants}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "variants": variants}
        options.out.write_text(json.dumps({**data, f"kl / kl of {BASE}": ratios, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
