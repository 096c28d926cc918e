"""Measure the gain of a search over levels on one option for all, at equal bytes, on held-out text: `scripts/bench search
MODEL …`.

Levels are measured once and serve all targets. Every choice is judged on texts that neither the levels nor the search saw:

* uniform: the best of the choices that give all units one option, or one of two that are next in size, and fit;
* LIM, ZD, Hessian trace, block errors (an integer programme): what the allocators of the search begin with;
* successive programmes, evolution: the search; `search` is the one of all that it takes itself, on text of its own.

`--depth` takes a quarter of the attentions and MLPs away: those that turn least what passes them, those of the blocks that
do (ShortGPT's criterion), and those that a search finds.
`--sizes` writes models with `compress fit` for ten sizes between 2 and 8 bits a weight and tells how near each came.
`--pace` tells how many choices a minute are scored, in memory and streamed, by their number, tokens and blocks.

Exit status 1 if the search loses more than its share of what the others lose, or a size is exceeded or missed by over 0.5 %.
"""

import argparse
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _plot import Point, scatter
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.api import run
from compressor.cli._quiet import quiet
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.passes.prune.depth import GOES, STAYS, Depth, least, turns
from compressor.passes.prune.prune_depth import PruneDepth
from compressor.pipeline.blocks import open_stream
from compressor.pipeline.calibration.data import load_samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.job import Event, Job
from compressor.pipeline.provenance import fingerprint
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.allocate import Budget, BudgetError, by_order
from compressor.pipeline.search.clock import Clock
from compressor.pipeline.search.find import EVOLUTION, PROGRAMMES, Contestant, allocations, improve
from compressor.pipeline.search.fitness import Fitness, opened
from compressor.pipeline.search.importance import ladder
from compressor.pipeline.search.levels import Choice, LevelDB, Unit
from compressor.pipeline.search.measure import measure
from compressor.pipeline.search.text import search_text
from compressor.pipeline.search.trail import Trail
from compressor.pipeline.target_search import choosable, fit_recipe
from compressor.recipe.presets import ladder as passes_near
from compressor.recipe.schema import Evolve, Recipe, Search, make_recipe

FINE, ROUGH = 0.8, 0.6  # the most that a search may lose of what uniform options lose; up to ROUGH_BITS
ROUGH_BITS, LOSSLESS = 2.5, 4.0  # from here on no gain is asked for
NEAR = 0.005  # of a size
AWAY, SHALLOW = 0.25, 0.7  # of attentions and MLPs; the most that the search may lose of what the cosine does
SIZES = (2.2, 2.4, 2.7, 3.0, 3.4, 3.9, 4.5, 5.3, 6.4, 7.8)  # bits
SETTINGS = Search(  # for one core in minutes: a tenth of the usual work
    tokens=32768,
    rounds=3,
    radii=(1, 2),
    table_tokens=2048,
    evolve=Evolve(generations=12, offspring=16, stages=((4, 1024), (1, 8192)), patience=6),
)
STARTS = 2  # steps of a search that are allocators' choices and named in the plot
LIKELY = 3  # uniform choices that are judged on all of the text, of those that lose least on a part
QUICK = (
    *("calibration.samples=16", "search.rounds=1", "search.tokens=4096", "search.table_tokens=512"),
    "search.evolve={generations: 2, offspring: 4, stages: [[1, 1024]]}",
    *("passes.0.refine=0", "passes.0.search=false"),  # sizes do not hang on how well weights are rounded
)
PACES = {"choices": (1, 4, 16), "tokens": (512, 1024, 4096), "blocks": (4, 16)}


def silent(event: Event) -> None:
    """Tells nobody."""


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Levels near any of the targets, of the same passes."""
    steps: dict[str, dict[str, Any]] = {}
    for bits in options.bits:
        for step in passes_near(options.using, bits, ["lm_head"]):
            if "options" in step:
                known = steps.setdefault(str({k: v for k, v in step.items() if k != "options"}), {**step, "options": []})
                known["options"] += [option for option in step["options"] if option not in known["options"]]
    data = {"source": str(options.calibration), "samples": options.samples, "seq_len": options.seq_len}
    return make_recipe({"passes": list(steps.values()), "calibration": data, "target": {"bits": options.bits[0]}})


def uniforms(units: Sequence[Unit], budget: Budget) -> list[Choice]:
    """Every option by itself that all units have and that fits, and mixtures of two that are next in size."""
    rungs = ladder(units)
    found = []
    for rung in rungs:
        levels = tuple(level for level in rung if level is not None)
        if len(levels) == len(units) and budget.fits(levels):
            found.append(levels)
    everybody = range(len(units))
    for some in (rungs, *([rung] for rung in rungs), *map(list, itertools.pairwise(rungs))):
        try:
            found.append(by_order(everybody, some, budget))
        except BudgetError:
            continue
    return list(dict.fromkeys(choice for choice in found if budget.fits(choice)))


def searched(
    options: argparse.Namespace, bits: float, levels: LevelDB, fitness: Fitness, judge: Fitness
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one target, and the steps of its search."""
    units = levels.units
    weights = sum(unit.weights for unit in units)
    budget = Budget({"bits": [[level.bits for level in unit.levels] for unit in units]}, {"bits": int(bits * weights)})
    settings, trail = replace(SETTINGS, **({} if options.seed is None else {"seed": options.seed})), Trail(None)
    alike = uniforms(units, budget)
    ways = allocations(units, budget)
    contestants: Sequence[Contestant] = improve(
        ways, weights, budget, fitness, settings, trail, clock=Clock.of(None, 0.0, Ranks()), tell=silent
    )
    everyone = range(judge.samples)
    rough = fitness(alike, range(min(fitness.samples, 8)))
    alike = [choice for _, choice in sorted(zip(rough, alike, strict=True))[:LIKELY]]
    losses = judge(alike, everyone)
    best = min(range(len(alike)), key=losses.__getitem__)
    chosen = min(contestants, key=lambda one: one.kl)
    last = judge([one.choice for one in contestants], everyone)
    rows = [{"name": "uniform", "bits": budget.used(alike[best])["bits"] / weights, "kl": losses[best], "seconds": None}]
    for one, kl in zip(contestants, last, strict=True):
        if one.name != "uniform":
            rows.append({"name": one.name, "bits": one.bits_per_weight, "kl": kl, "seconds": one.seconds})
        if one is chosen:
            took = trail.steps[-1]["seconds"]
            rows.append({"name": "search", "bits": one.bits_per_weight, "kl": kl, "seconds": took, "took": one.name})
    steps = [{k: v for k, v in step.items() if k != "choice"} for step in trail.steps]
    return [{"target": bits, **row} for row in rows], steps


def quality(options: argparse.Namespace, place: Path, note: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for all targets, and by target the steps of the search."""
    source, ranks, recipe = ModelSource(options.model, torch.device("cpu")), Ranks(), recipe_of(options)
    tokenizer = load_tokenizer(options.model)
    spec = recipe.calibration
    calibration = load_samples(spec.source, tokenizer, samples=spec.samples, seq_len=options.seq_len, seed=spec.seed)
    held_out = [
        load_samples(str(e), tokenizer, samples=options.judged, seq_len=options.seq_len, seed=0).tokens for e in options.eval
    ]
    job = Job(source, choosable(recipe.passes), {}, ranks)
    levels = LevelDB(place, {**fingerprint(recipe, source, calibration), "recipe": repr(job.passes)})
    rows, trails = [], {}
    with levels.open():
        measure(job, lambda: open_stream(job, calibration, keeping(None), silent), levels, note)
        measured = sum(unit.seconds for unit in levels.units)
        text_NS = search_text(recipe, SETTINGS.tokens, source, calibration)
        with opened(source, resident=True) as model:
            fitness = Fitness(source, model, levels, text_NS, ranks, 2**30)
            judge = Fitness(source, model, levels, torch.cat(held_out), ranks, 2**30)
            for bits in options.bits:
                found, trails[str(bits)] = searched(options, bits, levels, fitness, judge)
                rows += found
                print(bits, {row["name"]: round(row["kl"], 4) for row in found}, flush=True)
    return rows, {"seconds measuring": measured, "trails": trails}


def sizes(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """How near `compress fit` comes to sizes of files."""
    rows = []
    source = ModelSource(options.model, torch.device("cpu"))
    weights = sum(
        source.block(i, load=False).weight(name).numel()
        for i in range(len(source.layers))
        for name in source.block(i, load=False).layers
    )
    whole = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    for bits in SIZES:
        wanted, started = int(whole - weights * (16 - bits) / 8), time.monotonic()
        recipe = fit_recipe(
            options.model,
            size=wanted,
            calibration=str(options.calibration),
            samples=options.samples,
            seq_len=options.seq_len,
            evaluate=False,
            changes=QUICK,
        )
        recipe = replace(recipe, passes=recipe.passes[:1])  # nor on training
        out = place / f"size{bits}"
        report = run(recipe, options.model, out, verify=False)
        got = sum(file.stat().st_size for file in out.glob("*.safetensors*"))
        seconds = time.monotonic() - started
        rows.append({"bits": bits, "wanted": wanted, "bytes": got, "share": got / wanted, "seconds": seconds})
        print(f"{bits}: {got / wanted:.5f} of {wanted:,} bytes, {report.bits_per_weight:.3f} bits", flush=True)
    return rows


def depth(options: argparse.Namespace) -> dict[str, Any]:
    """Return the loss without a share of the attentions and MLPs, on held-out text."""
    source, ranks, tokenizer = ModelSource(options.model, torch.device("cpu")), Ranks(), load_tokenizer(options.model)
    data = {"source": str(options.calibration), "samples": options.samples, "seq_len": options.seq_len}
    recipe = make_recipe({"passes": [{"pass": "prune_depth", "ratio": 0.25, "parts": "sublayers"}], "calibration": data})
    (step,) = recipe.passes
    assert isinstance(step, PruneDepth)
    calibration = load_samples(
        str(options.calibration), tokenizer, samples=options.samples, seq_len=options.seq_len, seed=recipe.calibration.seed
    )
    job, levels, started = Job(source, (), {}, ranks), Depth(source, "sublayers"), time.monotonic()
    turned = turns(job, open_stream(job, calibration, keeping(None), silent), "sublayers", silent)
    units, blocks = len(levels.units), len(source.layers)
    cosine = least(turned, round(AWAY * units))
    whole = least(turns(job, open_stream(job, calibration, keeping(None), silent), "blocks", silent), round(AWAY * blocks))
    by_block = tuple(level for level in whole for _ in range(units // blocks))
    budget = Budget({"bits": [[0, 1]] * units}, {"bits": sum(level == STAYS for level in cosine)})
    text_NS, settings = search_text(recipe, step.search.tokens, source, calibration), replace(step.search, radii=(1,))
    with opened(source, resident=True) as model:
        fitness, trail = Fitness(source, model, levels, text_NS, ranks), Trail(None)
        clock = Clock.of(None, 0.0, ranks)
        found = improve({"cosine": cosine}, units, budget, fitness, settings, trail, clock=clock, tell=silent)
        best = min(found, key=lambda one: one.kl).choice
        seconds, rows = time.monotonic() - started, []
        for e in options.eval:
            tokens = load_samples(str(e), tokenizer, samples=options.judged, seq_len=options.seq_len, seed=0).tokens
            kl = Fitness(source, model, levels, tokens, ranks)([by_block, cosine, best], range(len(tokens)))
            rows.append({"text": e.stem, **dict(zip(("cosine of blocks", "cosine", "search"), kl, strict=True))})
    gone = {
        name: [unit.name for unit, level in zip(levels.units, choice, strict=True) if level == GOES]
        for name, choice in (("cosine of blocks", by_block), ("cosine", cosine), ("search", best))
    }
    sums = {name: sum(float(row[name]) for row in rows) for name in gone}
    shares = {name: sums["search"] / kl for name, kl in sums.items() if name != "search"}
    print(f"without {len(gone['search'])} of {units} attentions and MLPs: {rows}, shares {shares}", flush=True)
    return {"rows": rows, "gone": gone, "search / cosine": shares, "seconds": seconds}


class Computed(Depth):
    """Blocks that are all computed, whatever the level."""

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Any:
        return replace(super().trial(unit, level, device, dtype), whole=False)


def pace(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Choices that are scored in a minute, one thing varied at a time."""
    base = json.loads((options.model / "config.json").read_text())
    rows = []
    usual = {"choices": 16, "tokens": 1024, "blocks": 8}
    for axis, values in PACES.items():
        for value in values:
            case = {**usual, axis: value}
            path = place / f"blocks{case['blocks']}"
            if not path.exists():
                config = LlamaConfig(**{**base, "num_hidden_layers": case["blocks"]})
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
            source = ModelSource(path, torch.device("cpu"))
            length = options.seq_len
            tokens = torch.randint(0, source.vocab_size, (case["tokens"] // length, length))
            levels = Computed(source)
            choices = [tuple((n >> i) & 1 for i in range(case["blocks"])) for n in range(case["choices"])]
            for resident in (True, False):
                with opened(source, resident=resident) as model:
                    fitness = Fitness(source, model, levels, tokens, Ranks())
                    started = time.monotonic()
                    fitness(choices, range(len(tokens)))
                    rate = 60 * len(choices) / (time.monotonic() - started)
                rows.append({"varied": axis, **case, "resident": resident, "choices per minute": rate})
                print(rows[-1], flush=True)
    return rows


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By target, what the search loses of what uniform options lose."""
    kl = {(row["target"], row["name"]): row["kl"] for row in rows}
    return {str(target): kl[target, "search"] / kl[target, "uniform"] for target, name in kl if name == "search"}


def wrong(rows: Sequence[Mapping[str, Any]], near: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the promises that do not hold."""
    found = []
    kl = {(row["target"], row["name"]): row["kl"] for row in rows}
    for target, share in shares(rows).items():
        bits = float(target)
        most = ROUGH if bits <= ROUGH_BITS else FINE if bits < LOSSLESS else 1.0
        if share > most:
            found.append(f"{target} bits: the search loses {share:.2f} of what uniform options lose, more than {most}")
        for name in ("LIM", "ZD", "block errors"):
            if (bits, name) in kl and kl[bits, "search"] > kl[bits, name]:
                found.append(
                    f"{target} bits: the search loses {kl[bits, 'search'] / kl[bits, name]:.3f} of what {name} loses"
                )
    return found + [
        f"{row['bits']} bits: {row['share']:.4f} of the size" for row in near if not 1 - NEAR <= row["share"] <= 1
    ]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    table = Table("bits, at most", *names)
    for target in dict.fromkeys(row["target"] for row in rows):
        kl = {row["name"]: row["kl"] for row in rows if row["target"] == target}
        table.add_row(f"{target:g}", *(f"{kl[name]:.4f}" if name in kl else "" for name in names))
    Console(width=160).print(table)


def trajectory(steps: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> str:
    """A plot of all searches over time."""
    series: dict[str, list[Point]] = {}
    for target, trail in steps.items():
        kept = [step for step in trail if step["stage"] in ("uniform", "block errors", PROGRAMMES, EVOLUTION)]
        last = len(kept) - 1
        series[f"{target} bits"] = [
            (step["seconds"] / 60, step["fitness"], f"{target} bits" if n == last else step["stage"] if n < STARTS else "")
            for n, step in enumerate(kept)
        ]
    return scatter(series, title, "minutes of search", "KL divergence on the samples of the step, nats")


def main() -> int:
    """Measure, show and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--using", nargs="+", default=["int"])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.25, 2.5, 3.0, 3.5, 4.0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--judged", type=int, default=24, help="samples of each text")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--levels", type=Path, help="directory for levels, kept")
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--pace", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="write figures as JSON, and a plot beside it; what is there of others, stays"
    )
    options = parser.parse_args()
    quiet()
    about: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    about["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine()}
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        if options.bits:
            rows, more = quality(options, options.levels or Path(place) / "levels", silent)
            key = ",".join(options.using)
            about[key] = {"rows": rows, "search / uniform": shares(rows), **more, "seconds": time.monotonic() - started}
            show(rows)
        if options.depth:
            about["depth"] = depth(options)
        if options.sizes:
            about["sizes"] = sizes(options, Path(place))
        if options.pace:
            about["pace"] = pace(options, Path(place))
    if options.out:
        options.out.write_text(json.dumps(about, indent=1) + "\n")
        if rows:
            name = options.model.resolve().name
            options.out.with_name(f"{options.out.stem}-{'-'.join(options.using)}.svg").write_text(
                trajectory(more["trails"], f"Searches for levels of {name}, {', '.join(options.using)}")
            )
    missed = wrong(rows, about.get("sizes", ()) if options.sizes else ())
    for name, share in about["depth"]["search / cosine"].items() if options.depth else ():
        missed += [f"depth: {share:.2f} of what the {name} loses, more than {SHALLOW}"] if share > SHALLOW else []
    print("\n".join(missed) or "all as promised")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
