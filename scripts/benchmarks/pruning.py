"""Compare the loss of structured pruning with that of other methods, on held-out text: `scripts/bench pruning MODEL …`.

Everybody takes at least the same share of the blocks' parameters away and sees the same calibration text. Ours are written as
models by `compress prune` and read back; the others are tried in memory with the widths that their papers give each block:

* CFSP: channels alone, of each block as many as its turn of the hidden states calls for;
* FLAP: one threshold over all channels and groups of heads, and biases in the place of what is gone on average;
* Wanda-sp and magnitude: in every block the same; channels alone, or heads too, whichever loses less;
* cosine: whole blocks that turn what passes them least.

Exit status 1 if the best of ours, nothing trained, loses more than a share of what the best of the others loses.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _plot import Point, scatter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compressor.api import run
from compressor.cli._quiet import quiet
from compressor.evaluation.predict import final_hidden
from compressor.model.block import Trial
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP
from compressor.model.tokenizer import load_tokenizer
from compressor.passes.prune.depth import Depth, least, turns
from compressor.passes.prune.prunable import Part, find_parts
from compressor.passes.prune.scores import SCORES, Seen
from compressor.passes.prune.shapes import parameters
from compressor.pipeline.blocks import open_stream
from compressor.pipeline.calibration.data import Samples, load_samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.calibration.stats import Hessian, Mean
from compressor.pipeline.job import Job
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.fitness import Fitness, Teacher, opened
from compressor.pipeline.search.levels import Level, Unit
from compressor.recipe.build import prune_recipe

MOST = 0.6  # of the KL divergence of the best of the others
CPU = torch.device("cpu")
COARSE = 13.1  # temperature of CFSP's allocation: 131072 tokens over the 10^4 of its code
OURS: Mapping[str, Mapping[str, Any]] = {
    "width": {},
    "width, any number": {"multiple": 1},
    "depth": {"by": "depth"},
    "hidden": {"by": "hidden"},
    "sublayers": {"by": "sublayers"},
    "per-layer": {"layout": "per-layer"},
    "block-configs": {"layout": "block-configs"},
    "width, recovered": {"recover": 150},
}


@dataclass(frozen=True)
class Observed:
    """The statistics of the dense model that the scores of others use."""

    parts: Sequence[Sequence[Part]]  # by block
    scores: Sequence[Mapping[str, Mapping[str, Tensor]]]  # by block, part, name of a score
    means: Sequence[Mapping[str, Tensor]]  # of what the writer reads, by block, part
    writers: Sequence[Mapping[str, Tensor]]
    angles: Sequence[float]  # by block
    turned: Sequence[float]


Keep = Sequence[Mapping[str, Tensor]]  # by block, part: the units that stay


@dataclass(frozen=True)
class Tried:
    """Contestants as levels of a search in which each takes the whole model."""

    source: ModelSource
    made: dict[str, Sequence[Trial]] = field(default_factory=dict)

    @property
    def units(self) -> list[Unit]:
        nothing = Level(None, 0, 0.0, 0.0)  # type: ignore[arg-type]
        levels = tuple(nothing for _ in self.made)
        return [Unit(f"{i}", i, (), 1, 0.0, 0.0, 0.0, levels) for i in range(len(self.source.layers))]

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        return list(self.made.values())[level][int(unit)]


@torch.no_grad()
def observe(job: Job, calibration: Samples) -> Observed:
    """One sweep over the dense model."""
    found: list[list[Any]] = [[], [], [], [], []]
    stream = open_stream(job, calibration, keeping(None), lambda event: None)
    for index in range(len(job.source.layers)):
        block = job.source.block(index)
        parts = find_parts(job.source, block)
        stats = stream.collect(block, [part.writer for part in parts], (Hessian, Mean))
        seen = {part.name: Seen.of(block, part, stats) for part in parts}
        scores = {part: {n: s(one) for n, s in SCORES.items() if n != "cfsp" or part == MLP} for part, one in seen.items()}
        angle = [
            cosine_similarity(x, block.forward(x), dim=-1).clamp(-1, 1).arccos().mean() / torch.pi for x in stream.hidden
        ]
        means = {part: one.mean_I for part, one in seen.items()}
        writers = {part: one.w_OI.clone() for part, one in seen.items()}
        for some, one in zip(found, (parts, scores, means, writers, float(torch.stack(angle).mean())), strict=True):
            some.append(one)
        stream.advance(block)
        job.source.release(block)
    turned = turns(job, open_stream(job, calibration, keeping(None), lambda event: None), "blocks", lambda event: None)
    return Observed(found[0], found[1], found[2], found[3], found[4], turned)


def best_units(score_U: Tensor, count: int) -> Tensor:
    return score_U.topk(count).indices.sort().values


def uniform(seen: Observed, score: str, going: float, cost: Mapping[str, int], *, heads: bool) -> Keep:
    """In every block the same share: of the channels, or of the heads too, as near to it as their number allows."""
    attention, mlp = seen.parts[0]
    groups = round((1 - going) * attention.count) if heads else attention.count
    total = going * (attention.count * cost[ATTENTION] + mlp.count * cost[MLP])
    channels = mlp.count - round((total - (attention.count - groups) * cost[ATTENTION]) / cost[MLP])
    return [
        {ATTENTION: best_units(s[ATTENTION][score], groups), MLP: best_units(s[MLP][score], channels)} for s in seen.scores
    ]


def cfsp(seen: Observed, going: float, cost: Mapping[str, int]) -> Keep:
    """Channels alone."""
    attention, mlp = seen.parts[0]
    share = 1 - going * (attention.count * cost[ATTENTION] + mlp.count * cost[MLP]) / (mlp.count * cost[MLP])
    angle = torch.tensor(seen.angles)
    weight = torch.sigmoid(COARSE * (angle - angle.mean()))
    kept = weight / weight.mean() * share
    while kept.max() > 1:
        kept = kept.mean() + (kept - kept.mean()) / 1.05
    everyone = torch.arange(attention.count)
    return [
        {ATTENTION: everyone, MLP: best_units(s[MLP]["cfsp"], max(1, round(float(part) * mlp.count)))}
        for s, part in zip(seen.scores, kept, strict=True)
    ]


def flap(seen: Observed, going: float, cost: Mapping[str, int]) -> Keep:
    """One threshold on scores made alike in each block."""
    ranked = []
    for index, scores in enumerate(seen.scores):
        for part, of_part in scores.items():
            score = of_part["flap"]
            alike = (score - score.mean()) / score.std()
            ranked += [(float(value), index, part, unit) for unit, value in enumerate(alike)]
    total = going * sum(len(parts) and sum(p.count * cost[p.name] for p in parts) for parts in seen.parts)
    gone: dict[tuple[int, str], set[int]] = {}
    for _, index, part, unit in sorted(ranked):
        some = gone.setdefault((index, part), set())
        if total < cost[part] / 2:
            break
        if len(some) + 1 < next(p.count for p in seen.parts[index] if p.name == part):  # one stays
            some.add(unit)
            total -= cost[part]
    return [
        {p.name: torch.tensor([u for u in range(p.count) if u not in gone.get((i, p.name), ())]) for p in parts}
        for i, parts in enumerate(seen.parts)
    ]


def narrowed(source: ModelSource, seen: Observed, keep: Keep, *, bias: bool = False) -> list[Trial]:
    """Blocks with these units, and with `bias` what the others give on average."""
    made = []
    for index, of_block in enumerate(keep):
        block = source.block(index)
        weights: dict[str, Tensor] = {}
        for part in seen.parts[index]:
            units = of_block[part.name]
            at = part.columns_of(units)
            weights |= part.sliced(block, units)
            writer = seen.writers[index][part.name]
            weights[part.writer] = writer[:, at]
            if bias:
                gone = torch.ones(writer.shape[1], dtype=torch.bool)
                gone[at] = False
                weights[f"{part.writer}.bias"] = writer[:, gone] @ seen.means[index][part.name][gone]
        made.append(Trial({name: w.clone() for name, w in weights.items()}, {}))
        source.release(block)
    return made


def lost(source: ModelSource, model: Path, tokens_NS: Tensor) -> float:
    """KL divergence of a model that was written from the original, as `Fitness` has it."""
    found, batches = [], list(tokens_NS.split(1))
    one, other = (each.logits(final_hidden(each, batches, lambda: None)) for each in (source, ModelSource(model, CPU)))
    with torch.no_grad():
        for wanted, logits in zip(one, other, strict=True):
            found.append(Teacher.of(wanted).divergence(logits).mean())
    return float(torch.stack(found).mean())


def others(source: ModelSource, seen: Observed, going: float, cost: Mapping[str, int]) -> dict[str, Sequence[Trial]]:
    """Blocks as others have them."""
    ways: dict[str, Callable[[], Keep]] = {
        "CFSP": lambda: cfsp(seen, going, cost),
        "FLAP": lambda: flap(seen, going, cost),
        "Wanda-sp, channels": lambda: uniform(seen, "wanda", going, cost, heads=False),
        "Wanda-sp, heads too": lambda: uniform(seen, "wanda", going, cost, heads=True),
        "magnitude, channels": lambda: uniform(seen, "magnitude", going, cost, heads=False),
        "magnitude, heads too": lambda: uniform(seen, "magnitude", going, cost, heads=True),
    }
    made: dict[str, Sequence[Trial]] = {
        name: narrowed(source, seen, keep(), bias=name == "FLAP") for name, keep in ways.items()
    }
    depth = Depth(source)
    away = depth.enough(math.ceil(going * parameters(source, "blocks")), lambda count: least(seen.turned, count))
    made["cosine, blocks"] = [
        depth.trial(unit.name, level, source.device, source.dtype) for unit, level in zip(depth.units, away, strict=True)
    ]
    return made


def ours(
    options: argparse.Namespace, source: ModelSource, texts: Mapping[str, Tensor], going: float, place: Path
) -> list[dict[str, Any]]:
    """A row for each of ours."""
    rows = []
    for name in options.ours:
        out, started = place / f"{name}{going}", time.monotonic()
        recipe = prune_recipe(
            going,
            of="blocks",
            **OURS[name],
            calibration=str(options.calibration),
            samples=options.samples,
            seq_len=options.seq_len,
            evaluate=False,
        )
        run(recipe, options.model, out, verify=False)
        seconds = time.monotonic() - started
        rows.append(row(going, f"ours, {name}", {text: lost(source, out, tokens) for text, tokens in texts.items()}, seconds))
        shutil.rmtree(out)
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def row(ratio: float, name: str, kl: Mapping[str, float], seconds: float | None = None) -> dict[str, Any]:
    """Return the record of a contestant."""
    return {"ratio": ratio, "name": name, "kl": dict(kl), "mean": sum(kl.values()) / len(kl), "seconds": seconds}


def main() -> int:
    """Measure, show and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--judged", type=int, default=32, help="samples of each text")
    parser.add_argument("--ours", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="rows of other runs, to show with these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    quiet()
    source, ranks = ModelSource(options.model, CPU), Ranks()
    tokenizer = load_tokenizer(options.model)
    calibration = load_samples(str(options.calibration), tokenizer, samples=options.samples, seq_len=options.seq_len, seed=0)
    texts = {
        e.stem: load_samples(str(e), tokenizer, samples=options.judged, seq_len=options.seq_len, seed=0).tokens
        for e in options.eval
    }
    seen = observe(Job(source, (), {}, ranks), calibration)
    cost = {part.name: part.parameters(source.block(0, load=False)) for part in seen.parts[0]}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for ratio in options.ratios:
            made = others(source, seen, ratio, cost)
            found: dict[str, dict[str, float]] = {name: {} for name in made}
            with opened(source, resident=True) as model:
                for text, tokens in texts.items():
                    fitness = Fitness(source, model, Tried(source, made), tokens, ranks)
                    choices = [(n,) * len(source.layers) for n in range(len(made))]
                    for name, kl in zip(made, fitness(choices, range(len(tokens))), strict=True):
                        found[name][text] = kl
            rows += [row(ratio, name, kls) for name, kls in found.items()]
            rows += ours(options, source, texts, ratio, Path(place))
    before = [row for file in options.beside for row in json.loads(file.read_text())["rows"]]
    each = {(one["ratio"], one["name"]): one for one in [*before, *rows]}
    return conclude(options, sorted(each.values(), key=lambda one: float(one["ratio"])), list(texts))


def conclude(options: argparse.Namespace, rows: list[dict[str, Any]], texts: Sequence[str]) -> int:
    """Show, keep, judge."""
    table = Table("share of the blocks", "", *texts, "seconds")
    for row in rows:
        spent = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        table.add_row(f"{row['ratio']:.1%}", row["name"], *(f"{row['kl'][t]:.4f}" for t in texts), spent)
    Console(width=120).print(table)
    worst, shares = 0.0, {}
    untrained = [row for row in rows if not row["name"].endswith("recovered")]
    for ratio in dict.fromkeys(row["ratio"] for row in untrained if row["name"].startswith("ours")):
        here = [row for row in untrained if row["ratio"] == ratio]
        ours = min(row["mean"] for row in here if row["name"].startswith("ours"))
        others = min(row["mean"] for row in here if not row["name"].startswith("ours"))
        shares[str(ratio)] = ours / others
        worst = max(worst, ours / others)
        print(f"{ratio:.1%}: ours loses {ours / others:.2f} of what the best of the others loses")
    if options.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "model": options.model.name,
            "samples": options.samples,
        }
        options.json.write_text(json.dumps({**about, "rows": rows, "ours / best of others": shares}, indent=2) + "\n")
    if options.plot:
        series: dict[str, list[Point]] = {"ours": [], "ours, trained": [], "others": []}
        for row in rows:
            ours, trained = row["name"].startswith("ours"), row["name"].endswith("recovered")
            which = "ours, trained" if trained else "ours" if ours else "others"
            series[which].append((100 * row["ratio"], row["mean"], row["name"]))
        options.plot.write_text(scatter(series, f"Pruning {options.model.name}", "% of the blocks' parameters gone", "KL"))
    return int(worst > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
