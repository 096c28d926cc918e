"""Recipes with a target: search for the option of each unit before anything is written."""

import hashlib
import math
import re
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from compressor.errors import OutputError, RecipeError
from compressor.formats.base import GONE, Format
from compressor.host import known_state
from compressor.model import shards
from compressor.model.architecture import matches
from compressor.model.edits import fewer_sublayers
from compressor.model.journal import remove_leftovers, replace_text
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import substitutes
from compressor.pipeline.blocks import open_stream
from compressor.pipeline.calibration.data import Samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.contract import Pass, Plan
from compressor.pipeline.job import Event, Job, Tell, silent
from compressor.pipeline.patterns import check_patterns
from compressor.pipeline.plan import make_plan, output_headers
from compressor.pipeline.plan_file import to_text
from compressor.pipeline.prepare import check_shares, load_calibration, open_model
from compressor.pipeline.provenance import fingerprint
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.clock import Clock
from compressor.pipeline.search.find import Found, find
from compressor.pipeline.search.levels import Level, LevelDB, Unit
from compressor.pipeline.search.text import search_text
from compressor.recipe import presets
from compressor.recipe.registry import validate
from compressor.recipe.schema import Recipe, Search, Target, load_recipe, make_recipe

OFFSETS = 8  # extra bytes of a tensor's offsets in a file's header, compared with another size
PADDING = 64  # extra bytes per file
DROP = "prune"  # item of `using` that allows attention layers and MLPs to be dropped


class FitOptions(TypedDict, total=False):
    """The keywords of `fit_recipe`, which documents them."""

    size: str | int | None
    bits: float | None
    ratio: float | None
    using: Sequence[str]
    time: str | None
    calibration: str
    samples: int
    seq_len: int | None
    seed: int
    ignore: Sequence[str]
    evaluate: bool
    changes: Sequence[str]


@known_state()
def fit_recipe(
    model: Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    using: Sequence[str] = (presets.INTEGERS,),
    time: str | None = None,
    calibration: str = "builtin",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    evaluate: bool = True,
    changes: Sequence[str] = (),
) -> Recipe:
    """Return the recipe that `compress fit` runs. Exactly one of `size`, `bits` and `ratio` is given, as in `Target`.

    Args:
        model: Hugging Face model directory. Its headers determine which options are near the target.
        size: Total size of the weight files.
        bits: Bits per weight of the compressed layers.
        ratio: Share of the original's size to save.
        using: Kinds of numbers to mix: `int`, `fp4`, `vq`. With `prune`, attention layers and MLPs may be dropped.
        time: Time limit for the whole run: 90s, 30m, 2h.
        calibration: Source of the calibration text.
        samples: Number of calibration samples.
        seq_len: Tokens per sample. None takes the number of tokens that the model was made for, at most 2048.
        seed: Seed of the order of documents and of the search.
        ignore: Patterns of layers to leave unchanged.
        evaluate: Whether to compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.

    Raises:
        RecipeError: the arguments do not make a valid recipe.
    """
    numbers = [kind for kind in using if kind != DROP]
    if DROP in using and (bits is not None or not numbers):
        raise RecipeError(
            f"--using {','.join(using)}: an attention or MLP that goes has no bits; give --size or --ratio, and numbers for "
            "the rest, or take some away alone with `compress prune --by sublayers`"
        )
    given = {key: value for key, value in (("size", size), ("bits", bits), ("ratio", ratio)) if value is not None}
    target = validate(Target, given, "target")
    data = {
        "passes": presets.ladder(numbers, mean_bits(target, model, ignore), ignore),
        "calibration": {"source": calibration, "samples": samples, "seq_len": seq_len, "seed": seed},
        "evaluation": {} if evaluate else None,
        "target": given,
        "search": {"seed": seed, "drop": DROP in using, **({} if time is None else {"minutes": minutes(time)})},
    }
    return make_recipe(data, changes, "options")


def minutes(text: str) -> float:
    """Convert a time such as 90s, 30m or 2h to minutes. A number without a unit counts minutes.

    Raises:
        RecipeError: the text is not a time, or the time is 0.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise RecipeError(f"--time {text}: not a time; write such as 90s, 30m or 2h")
    return float(found[1]) * {"s": 1 / 60, "m": 1, "": 1, "h": 60}[found[2]]


def mean_bits(target: Target, model: Path, ignore: Sequence[str]) -> float:
    """Estimate the bits that a target leaves per weight of the layers to compress. Only headers are read."""
    if target.bits is not None:
        return target.bits
    source = ModelSource(model, torch.device("cpu"))
    names = {
        full: source.names[f"{full}.weight"]
        for block in (source.block(index, load=False) for index in range(len(source.layers)))
        for name in block.layers
        if not matches(full := f"{block.prefix}.{name}", ignore)
    }
    headers = source.checkpoint.headers
    weights = sum(math.prod(headers[stored].shape) for stored in names.values())
    beside = sum(header.nbytes for name, header in headers.items() if name not in set(names.values()))
    return 8 * (target_bytes(target, source) - beside) / max(weights, 1)


def target_bytes(target: Target, source: ModelSource) -> int:
    """Return the size of the weight files that a target allows, in bytes. The target gives a size or a ratio."""
    if target.ratio is None:
        return target.bytes
    return int((1 - target.ratio) * sum(file.stat().st_size for file in source.checkpoint.files()))


@known_state()
def search_plan(
    recipe: Recipe | str | Path,
    model: str | Path = ".",
    out: str | Path = "plan.yaml",
    *,
    levels: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    required: Sequence[str] = (),
    tell: Tell = silent,
) -> Found:
    """Find the best plan for a recipe's target and write only the plan. For the arguments see `run`.

    Measured levels are kept in `levels`; by default in a directory next to `out`, which is removed once `out` is written.
    Repeating an interrupted call resumes from them.

    Raises:
        RecipeError: the recipe has no target or prunes, or no plan meets the target.
        OutputError: `out` exists and `overwrite` is not given.
    """
    started = clock.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    if recipe.target is None:
        raise RecipeError("target: none given; a search needs the size or the bits that the result may take")
    if any(step.prunes for step in recipe.passes):
        raise RecipeError(
            "passes: a plan is for a model of the shape that it has, and the recipe prunes it; let `compress run` do both, "
            "or prune first and search for the result"
        )
    out, ranks = Path(out), Ranks.from_environment(device)
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; give --overwrite to replace it or choose another --out")
    source = open_model(recipe, Path(model), ranks.device, dtype, lambda done, total: tell(Event("rotate", done, total)))
    unmatched = check_patterns(source, recipe.passes, required)
    calibration = load_calibration(recipe, source)
    check_shares(calibration, ranks)
    found = find_plan(recipe, source, calibration, ranks, levels_place(out, levels), tell, started=started)
    if ranks.first:
        replace_text(out, to_text(found.plan))
        if levels is None:
            remove_leftovers(levels_place(out, levels), out, unmatched.append)
    return replace(found, warnings=unmatched)


def levels_place(out: Path, levels: str | Path | None) -> Path:
    """Return the directory for the levels that a search measures."""
    return Path(levels) if levels is not None else out.with_name(f"{out.name}.search")


def find_plan(
    recipe: Recipe,
    source: ModelSource,
    calibration: Samples | None,
    ranks: Ranks,
    place: Path,
    tell: Tell,
    *,
    started: float,
    judged: int | None = None,
) -> Found:
    """Find the best plan for a recipe's target.

    Args:
        recipe: Recipe with a target, and with passes that have options to choose among.
        source: The model.
        calibration: Text for measuring levels.
        ranks: The ranks that share the work.
        place: Directory for measured levels and the steps of the search.
        tell: Called after each step.
        started: Start of the recipe's time limit, on the clock of `time.monotonic`.
        judged: Number of tokens that the written model will be evaluated on; None if no model will be written.

    Raises:
        RecipeError: nothing meets the target, there is nothing to choose among, or the passes read no text.
    """
    assert recipe.target is not None
    if calibration is None:
        raise RecipeError("target: levels are measured on text, which no pass of the recipe reads; use `gptq` or `vptq`")
    settings = recipe.search or Search()
    if settings.drop and source.hadamard:
        raise RecipeError(
            "search.drop: activations are turned (rotate: online), which needs every layer; leave out one of the two"
        )
    job = Job(source, choosable(recipe.passes), {}, ranks)
    before = [step for step in recipe.passes if step.rewrites or step.prunes]
    measured = repr((before, job.passes, recipe.calibration))
    known = {**fingerprint(recipe, source, calibration), "recipe": hashlib.sha256(measured.encode()).hexdigest()}
    return find(
        job,
        lambda: open_stream(job, calibration, keeping(recipe.calibration.on_disk), tell),
        search_text(recipe, settings.tokens, source, calibration),
        LevelDB(place, known),
        recipe.target,
        settings,
        limit=Limit(recipe.target, source, recipe.passes),
        clock=Clock.of(settings.minutes, started, ranks),
        judged=judged or 0,
        training=0 if judged is None else sum(step.training_samples for step in recipe.passes),
        tell=tell,
    )


def settle(source: ModelSource, plan: Plan | None) -> tuple[ModelSource, Plan | None, Plan]:
    """Drop the sub-layers that a plan drops from the model.

    Returns: the model, the rest of the plan (None without a plan), and the part of the plan that drops sub-layers.

    Raises:
        RecipeError: the model has no such sub-layer.
    """
    gone = {name: option for name, option in (plan or {}).items() if option == GONE}
    known = [f"{source.prefix}.{i}.{name}" for i, block in enumerate(source.layers) for name in substitutes(block)]
    going = gone.keys() - source.absent
    if going - set(known):
        raise RecipeError(f"plan: has {min(going - set(known))} go, which is no attention or MLP of this model")
    rest = None if plan is None else {name: option for name, option in plan.items() if name not in gone}
    return (source.rewritten(fewer_sublayers(source, frozenset(going))) if going else source), rest, gone


def shortened(recipe: Recipe, share: float) -> Recipe:
    """Return the recipe with a share of each pass's training steps, without passes that would keep hardly any."""
    shorter = (step.shortened(share) for step in recipe.passes)
    return replace(recipe, passes=tuple(step for step in shorter if step is not None))


def choosable(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Return the passes whose options are formats to choose among.

    Raises:
        RecipeError: there is nothing to choose, or an earlier pass changes dense weights, in which levels cannot be tried.
    """
    found = [(number, step) for number, step in enumerate(passes) if any(isinstance(o, Format) for o in step.offers)]
    if sum(len(step.offers) for _, step in found) < 2:
        raise RecipeError("target: the passes offer one option, so there is nothing to choose; name more `options`")
    for number, step in enumerate(passes[: found[-1][0]]):
        if not step.offers and not step.rewrites and not step.prunes:
            raise RecipeError(
                f"passes.{number}: changes dense weights of blocks, in which levels cannot be tried one by one; leave it "
                "out, or search without it and apply the plan with it"
            )
    return tuple(step for _, step in found)


@dataclass(frozen=True)
class Limit:
    """The limit that a target sets for the stored bits of all units together."""

    target: Target
    source: ModelSource
    passes: Sequence[Pass]

    def __call__(self, units: Sequence[Unit]) -> int:
        if self.target.bits is not None:
            return int(self.target.bits * sum(unit.weights for unit in units))
        return 8 * (target_bytes(self.target, self.source) - self.beside(units))

    def beside(self, units: Sequence[Unit]) -> int:
        """Return the largest number of bytes that the files may need besides the units' own tensors."""
        headers = [max(unit.levels, key=partial(self._header, unit)) for unit in units]
        plan = make_plan(
            self.source, self.passes, {unit.name: level.option for unit, level in zip(units, headers, strict=True)}
        )
        written = output_headers(self.source, self.passes, plan)
        files = shards.layout(written)
        own = sum(level.bits for level in headers) // 8
        return shards.total_bytes(files) - own + OFFSETS * len(written) + PADDING * len(files)

    def _header(self, unit: Unit, level: Level) -> int:
        """Estimate the length of a level's entries in a file's header."""
        assert isinstance(level.option, Format)
        block = self.source.block(unit.block, load=False)
        return sum(len(str(level.option.checkpoint_parts(block.shape(layer)))) for layer in unit.layers)
