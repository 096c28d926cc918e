"""Measure the cost of rounding activations to floating-point numbers of 4 and 8 bits: `scripts/bench activations MODEL …`.

Weights have 4 bits in all rows. Each chain of passes is run on the model as it is and, where one scale serves all
activations, on one that computes the same but has outliers in them: in every norm a few gains are multiplied by a power of
two, and the columns that read them divided by it. The texts to judge on should not be the one to calibrate on.

Exit status 1 if pre-shifted exponent biases (`preshift`, kinds of number searched as LLM-FP4 does) leave more than half of
the KL divergence that activations rounded to E2M1 by one scale for each layer add.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from outliers import SAME, judged, plant
from rich.console import Console
from rich.table import Table

from compressor import api
from compressor.cli._quiet import quiet
from compressor.recipe.schema import make_recipe

Chain = Sequence[Mapping[str, Any]]
LEAST = 0.5  # of what is lost that has to be recovered


def numbers(activations: str | None) -> list[dict[str, Any]]:
    """The three kinds of 4 bits, E2M1 first."""
    return [{"format": "float_group", "exponent": e, "mantissa": 3 - e, "activations": activations} for e in (2, 1, 3)]


def chain(options: Sequence[Mapping[str, Any]], *, shifted: bool = False, trained: bool = False) -> Chain:
    """Passes that round to one of some formats."""
    before = [{"pass": "preshift", "format": options[0]}] if shifted else []
    after = [{"pass": "learned"}] if trained else []
    return [*before, {"pass": "adadim" if len(options) > 1 else "gptq", "options": options}, *after]


ALL, ONE, SHIFTED = "weights alone", "E2M1, one scale", "pre-shifted, best kind"
BY_ONE_SCALE: Mapping[str, Chain] = {
    ALL: chain(numbers(None)),
    ONE: chain(numbers("e2m1-tensor")[:1]),
    "best kind, one scale": chain(numbers("fp4-tensor")),
    "pre-shifted, E2M1": chain(numbers("e2m1-tensor")[:1], shifted=True),
    SHIFTED: chain(numbers("fp4-tensor"), shifted=True),
    "fpq (that, learned)": chain(numbers("fp4-tensor"), shifted=True, trained=True),
    "8 bits, one scale": chain(numbers("fp8-tensor")),
}
TURNED = {"pass": "rotate", "residual": False, "heads": False, "online": True, "block": 32}
MXFP4 = [{"format": "mxfp4", "activations": "mxfp4"}]
BY_TOKENS: Mapping[str, Chain] = {
    "E2M1, a scale per token": chain(numbers("e2m1-token")[:1]),
    "nvfp4, fp8": chain([{"format": "nvfp4", "activations": "fp8"}]),
    "mxfp4, mxfp8": chain([{"format": "mxfp4", "activations": "mxfp8"}]),
    "mxfp4, mxfp4": chain(MXFP4),
    "mxfp4, mxfp4, blocks turned": [TURNED, *chain(MXFP4)],
    "mxfp4, mxfp4, blocks turned, learned": [TURNED, *chain(MXFP4, trained=True)],
}


def measure(
    model: Path, chains: Mapping[str, Chain], place: Path, options: argparse.Namespace, title: str
) -> list[dict[str, Any]]:
    """Every chain on a model, judged on every text against it."""
    outs, results = [], []
    for number, (name, passes) in enumerate(chains.items()):
        data = {"source": options.calibration, "samples": options.samples, "seq_len": options.seq_len}
        recipe = make_recipe({"passes": list(passes), "calibration": data, "evaluation": None})
        outs.append(place / f"{title}-{number}".replace(" ", "-"))
        report = api.run(recipe, model, outs[-1], verify=False, device="cpu")
        results.append(
            {"model": title, "chain": name, "bits_per_weight": report.bits_per_weight, "seconds": round(report.seconds, 1)}
        )
        print(f"{title}: {name}, {report.seconds:.0f} s", flush=True)
    for result, quality in zip(results, judged(outs, model, options), strict=True):
        result |= {key: quality[key] for key in ("kl", "perplexity", "reference_perplexity", "top1_agreement")}
    return results


def recovered(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of the loss of one scale for E2M1 activations that a chain avoids; by model and chain."""
    kl = {(r["model"], r["chain"]): r["kl"] for r in results}
    return {
        f"{model}: {name}": (kl[model, ONE] - kl[model, name]) / (kl[model, ONE] - kl[model, ALL])
        for model, name in kl
        if name in BY_ONE_SCALE and name not in (ALL, ONE)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--eval", action="append", required=True, help="text to judge on, repeatable")
    parser.add_argument("--channels", type=int, default=4, help="of each norm that are made outliers")
    parser.add_argument("--factor", type=float, default=16.0, help="by which their activations grow: a power of two")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=120, help="documents of each text, at most")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs="+", metavar="CHAIN", help="measure these, and keep what --out has of the others")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["results"] if options.only else []
    quiet()
    with tempfile.TemporaryDirectory() as place:
        planted = Path(place) / "planted"
        plant(options.model, planted, options.channels, 1 / options.factor)
        same = judged([planted], options.model, options)[0]["kl"]
        wanted = {"as it is": (options.model, {**BY_ONE_SCALE, **BY_TOKENS}), "outliers": (planted, BY_ONE_SCALE)}
        found = {(r["model"], r["chain"]): r for r in kept}
        for title, (model, chains) in wanted.items():
            asked = {name: passes for name, passes in chains.items() if options.only is None or name in options.only}
            found |= {(title, r["chain"]): r for r in measure(model, asked, Path(place), options, title)}
        results = [found[title, name] for title, (_, chains) in wanted.items() for name in chains]
    shares = recovered(results)
    table = Table(title=f"{options.model.resolve().name}, 4-bit weights, outliers x {options.factor:g}")
    for name in ("model", "chain", "bits/weight", "KL", "perplexity", "recovered", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        share = shares.get(f"{r['model']}: {r['chain']}")
        figures = (f"{r['bits_per_weight']:.3f}", f"{r['kl']:.4f}", f"{r['perplexity']:.4g}")
        table.add_row(r["model"], r["chain"], *figures, "" if share is None else f"{share:.0%}", f"{r['seconds']:.0f}")
    Console(width=140).print(table)
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {key: vars(options)[key] for key in ("channels", "factor", "samples", "seq_len", "eval_samples")}
        data = {"model": options.model.resolve().name, **settings, "machine": machine, "kl_of_planted": same}
        options.out.write_text(json.dumps({**data, "recovered": shares, "results": results}, indent=1) + "\n")
    if same > SAME:
        raise SystemExit(f"the model with outliers does not compute what the original does: KL {same}")
    if (worst := min(share for name, share in shares.items() if name.endswith(SHIFTED))) < LEAST:
        raise SystemExit(f"pre-shifted biases recover {worst:.0%} of what one scale loses, less than {LEAST:.0%}")


if __name__ == "__main__":
    main()
