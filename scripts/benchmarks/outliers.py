"""Measure the cost of outlier input channels with groups along either axis: `scripts/bench outliers MODEL …`.

A Llama is changed so that it computes the same as before, but some input channels of its layers have large weights: in every
norm a few gains are divided by a power of two, and the columns that read them multiplied by it. It is then quantized with
groups of input channels (per-OC: int_group), of output channels within one input channel (per-IC: int_input_group), and with
either, layer by layer (AdaDim), each by rounding and by GPTQ; so is the model as it was. The texts to judge on should not be
the one to calibrate on.

Exit status 1 if, with outliers, per-IC has more than half of per-OC's KL divergence at 3 bits, by rounding or by GPTQ.
"""

import argparse
import json
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from compressor import api
from compressor.cli._quiet import quiet
from compressor.evaluation.evaluate import evaluate_all
from compressor.recipe.schema import make_recipe

MOST = 0.5  # of per-OC's KL that per-IC may have at 3 bits
SAME = 1e-6  # KL of the changed model from the original, at most: it computes the same
AXES = {"per-OC": ["int_group"], "per-IC": ["int_input_group"], "AdaDim": ["int_group", "int_input_group"]}
PASSES = {"RTN": ("rtn", "adadim_rtn"), "GPTQ": ("gptq", "adadim")}  # with one format, with both
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(model: Path, out: Path, channels: int, factor: float) -> None:
    """A copy of a Llama whose norms' readers have outlier input channels."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in READERS:
            chosen = torch.randperm(len(tensors[name]), generator=generator)[:channels]
            tensors[name][chosen] /= factor
            for layer in READERS[norm]:
                tensors[f"{block}.{layer}.weight"][:, chosen] *= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def compress(model: Path, out: Path, options: argparse.Namespace, solver: str, axis: str, bits: int) -> dict[str, Any]:
    """Write one output."""
    formats = [{"format": name, "bits": bits, "group_size": options.group_size} for name in AXES[axis]]
    recipe = make_recipe(
        {
            "passes": [{"pass": PASSES[solver][len(formats) > 1], "options": formats}],
            "calibration": {"source": options.calibration, "samples": options.samples, "seq_len": options.seq_len},
            "evaluation": None,
        }
    )
    report = api.run(recipe, model, out, verify=False, device="cpu")
    return {
        "method": solver,
        "axis": axis,
        "bits": bits,
        "bits_per_weight": report.bits_per_weight,
        "seconds": round(report.seconds, 1),
        "pass": {k: v for k, v in report.recipe["passes"][0].items() if k not in ("options", "layers", "ignore")},
        "formats": dict(sorted(Counter(row.option for row in report.rows).items())),
    }


def measure(model: Path, place: Path, options: argparse.Namespace, title: str) -> list[dict[str, Any]]:
    """Every output of a model, judged on every text against it."""
    outs, results = [], []
    for bits in options.bits:
        for solver in PASSES:
            for axis in AXES:
                outs.append(place / f"{title}-{solver}-{axis}-{bits}")
                results.append({"model": title, **compress(model, outs[-1], options, solver, axis, bits), "texts": {}})
    for result, quality in zip(results, judged(outs, model, options), strict=True):
        result["kl"] = quality["kl"]
        for text in quality["texts"]:
            keys = ("perplexity", "reference_perplexity", "kl", "top1_agreement", "tokens")
            result["texts"][Path(text["name"]).stem] = {key: text[key] for key in keys}
    return results


def judged(models: Sequence[Path], reference: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each model against the reference."""
    kwargs = {"samples": options.eval_samples, "seq_len": options.seq_len, "documents": True, "device": "cpu"}
    return [quality.to_dict() for quality in evaluate_all(models, reference, data=options.eval, **kwargs)]


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """KL of per-IC over that of per-OC, by model, method and bits."""
    by = {(r["model"], r["method"], r["bits"], r["axis"]): r["kl"] for r in results}
    return {f"{m} {s} {b}": by[m, s, b, "per-IC"] / by[m, s, b, "per-OC"] for m, s, b, axis in by if axis == "per-IC"}


def show(results: Sequence[Mapping[str, Any]], title: str) -> None:
    """One table, a row per output; perplexity and KL of every text."""
    table = Table(title=title)
    texts = list(results[0]["texts"])
    for name in (
        "model",
        "bits",
        "method",
        "axis",
        "bits/weight",
        *(f"{t} {q}" for t in texts for q in ("ppl", "KL")),
        "formats",
    ):
        table.add_column(name, justify="right")
    for r in results:
        figures = [f"{r['texts'][t][key]:.4g}" for t in texts for key in ("perplexity", "kl")]
        formats = ", ".join(f"{count} {label}" for label, count in r["formats"].items())
        table.add_row(r["model"], str(r["bits"]), r["method"], r["axis"], f"{r['bits_per_weight']:.3f}", *figures, formats)
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--eval", action="append", required=True, help="text to judge on, repeatable")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=4, help="of each norm that are made outliers")
    parser.add_argument(
        "--factor", type=float, default=16.0, help="by which their weights grow: a power of two changes nothing else"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=120, help="documents of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as place:
        planted = Path(place) / "planted"
        plant(options.model, planted, options.channels, options.factor)
        same = judged([planted], options.model, options)[0]["kl"]
        results = [
            result
            for title, model in (("as it is", options.model), ("outliers", planted))
            for result in measure(model, Path(place), options, title)
        ]
    found = ratios(results)
    show(results, f"{options.model.resolve().name}, group size {options.group_size}, outliers x {options.factor:g}")
    print("KL of per-IC / KL of per-OC:", ", ".join(f"{name} bits {ratio:.3f}" for name, ratio in found.items()))
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        keys = ("bits", "group_size", "channels", "factor", "samples", "seq_len", "eval_samples")
        settings = {key: vars(options)[key] for key in keys}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "kl_of_planted": same}
        options.out.write_text(json.dumps({**data, "per-IC/per-OC": found, "results": results}, indent=1) + "\n")
    if same > SAME:
        raise SystemExit(f"the model with outliers does not compute what the original does: KL {same}")
    worst = max((ratio for name, ratio in found.items() if name.startswith("outliers") and name.endswith(" 3")), default=0.0)
    if worst > MOST:
        raise SystemExit(f"with outliers per-IC has {worst:.3f} of per-OC's KL at 3 bits, more than {MOST}")


if __name__ == "__main__":
    main()
