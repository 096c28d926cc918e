"""Schema of recipes: what to calibrate on, which passes to run, how to evaluate the result."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml

from compressor.access import check_readable, kind_of
from compressor.errors import RecipeError
from compressor.reading import parse_yaml, read_yaml
from compressor.recipe.registry import describe, named, node, validate


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive number")


@node
class Calibration:
    """Text that statistics are collected on.

    Args:
        source: `builtin`, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN].
        samples: Number of samples.
        seq_len: Tokens per sample; null takes the model's context length, at most 2048.
        seed: Seed for the order of documents.
        on_disk: Directory to hold hidden states in, for millions of tokens; null holds them in memory.
    """

    source: str = "builtin"
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    on_disk: str | None = None

    def __post_init__(self) -> None:
        _positive(samples=self.samples, seq_len=self.seq_len)


@node
class Evaluation:
    """Text that the result is compared with the original on.

    Args:
        source: One source as in `Calibration`, or several, each used in full; null takes the held-out part of the
            calibration source.
        samples: Maximum number of samples per source.
        seq_len: Tokens per sample; null takes that of calibration.
        stride: New tokens per sample; null for no overlap.
        bos: Whether each sample begins with the BOS token; null follows the tokenizer.
        generate: Number of prompts that both models continue, for the report.
    """

    source: str | tuple[str, ...] | None = None
    samples: int = 32
    seq_len: int | None = None
    stride: int | None = None
    bos: bool | None = None
    generate: int = 2

    def __post_init__(self) -> None:
        _positive(samples=self.samples, seq_len=self.seq_len, stride=self.stride)
        if self.generate < 0:
            raise ValueError(f"generate: {self.generate} is negative; 0 generates nothing")
        if self.source == ():
            raise ValueError("source: empty; name at least one, or null")


@node
class Target:
    """Limit for the size of the result; exactly one of the three is given.

    Args:
        size: Total size of the safetensors files, in bytes or with a unit: 4GB, 3.5GiB, 800MB.
        bits: Mean stored bits per weight of the compressed layers, scales and codebooks included.
        ratio: Share of the original's size to save.
    """

    size: str | int | None = None
    bits: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("size", "bits", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given; give exactly one of size, bits and ratio")
        if self.size is not None and not self.bytes:
            raise ValueError(f"size: {self.size!r} is no positive size; write such as 4GB, 3.5GiB or 800MB")
        if self.bits is not None and self.bits <= 0:
            raise ValueError(f"bits: {self.bits} is not a positive number")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not between 0 and 1")

    @property
    def bytes(self) -> int:
        """`size` in bytes; 0 if it is not a valid size."""
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?", str(self.size).strip().lower())
        if found is None:
            return 0
        letter = found[2][:1]
        return int(float(found[1]) * (1024 if found[2].endswith("i") else 1000) ** (" kmgt".index(letter) if letter else 0))

    @property
    def label(self) -> str:
        """Name of the target, file-name safe."""
        if self.size is not None:
            return str(self.size).strip().replace(" ", "")
        return f"{self.bits:g}bit" if self.bits is not None else f"save{100 * (self.ratio or 0):g}"


@node
class Evolve:
    """Settings of the evolutionary search.

    Args:
        generations: Maximum number of generations; 0 skips the evolutionary search.
        offspring: Number of offspring per generation.
        stages: Survivors and tokens of each stage; the last stage has one survivor.
        switches: Maximum number of units upgraded per offspring, before leftover budget is spent.
        patience: Number of generations without improvement after which the search stops.
    """

    generations: int = 100
    offspring: int = 32
    stages: tuple[tuple[int, int], ...] = ((8, 2048), (2, 8192), (1, 32768))
    switches: int = 3
    patience: int = 15

    def __post_init__(self) -> None:
        _positive(offspring=self.offspring, switches=self.switches, patience=self.patience)
        if self.generations < 0:
            raise ValueError(f"generations: {self.generations} is negative")
        if not self.stages or self.stages[-1][0] != 1 or any(min(stage) < 1 for stage in self.stages):
            raise ValueError(f"stages: {self.stages}; each is survivors and tokens, and the last one leaves one survivor")

    @property
    def tokens(self) -> int:
        """Tokens scored per generation: over all stages, candidates times tokens."""
        entering = [self.offspring, *(survivors for survivors, _ in self.stages)]
        return sum(count * tokens for count, (_, tokens) in zip(entering, self.stages, strict=False))


@node
class Search:
    """Settings of the search for a target: how levels are chosen.

    Args:
        tokens: Number of tokens used to score candidate models. A further eighth is held out for the final choice.
            Calibration text is separate.
        rounds: Maximum number of successive integer programmes; 0 skips them.
        radii: Distances, in levels per unit, that a proposal of an integer programme may have from the current choice.
        table_tokens: Number of tokens that the losses for the integer programmes are measured on.
        evolve: Evolutionary search that follows the integer programmes.
        rebuilds: Number of times that levels near the choice are rebuilt, on the outputs of the layers before as chosen, and
            searched again.
        drop: Whether an attention or MLP may be dropped; only our loader can read the result.
        minutes: Time limit for everything, from start to written model; null for none.
        resident: Whether to hold the model in memory; null does so if it takes less than half of what is available.
        seed: Seed of all random choices.
    """

    tokens: int = 131072
    rounds: int = 4
    radii: tuple[int, ...] = (1, 2, 3)
    table_tokens: int = 8192
    evolve: Evolve = Evolve()
    rebuilds: int = 0
    drop: bool = False
    minutes: float | None = None
    resident: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(tokens=self.tokens, table_tokens=self.table_tokens)
        if min(self.rounds, self.rebuilds) < 0:
            raise ValueError(f"rounds: {self.rounds}, rebuilds: {self.rebuilds}; neither may be negative")
        if not self.radii or min(self.radii) < 1:
            raise ValueError(f"radii: {self.radii}; name positive numbers")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes: {self.minutes} is not a positive number")


@node
class Recipe:
    """A validated recipe.

    Args:
        passes: Algorithms, applied to each decoder block in this order.
        calibration: Text that statistics are collected on.
        evaluation: Text that the result is compared with the original on; null measures nothing.
        target: Limit for the size of the result; the option of each unit is then searched. null if every pass has one option,
            or if a plan is given.
        search: Settings of that search; null for the defaults.
    """

    passes: tuple[Annotated[Any, named("pass")], ...]
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    target: Target | None = None
    search: Search | None = None

    def __post_init__(self) -> None:
        if not self.passes:
            raise ValueError("passes: empty; name at least one pass")
        if self.search is not None and self.search.drop and self.target is not None and self.target.bits is not None:
            raise ValueError("search.drop: an attention or MLP that goes has no bits; give a target of size or ratio")


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` changes to it.

    Raises:
        RecipeError: the file is not a recipe, or a change is not valid.
    """
    kind = kind_of(path, RecipeError)
    check_readable([path], RecipeError)
    if kind == "directory":
        raise RecipeError(f"{path}: is a directory where a recipe file is needed; write `compress run RECIPE MODEL`")
    if kind is None:
        raise RecipeError(f"{path}: no such recipe file; the shipped ones are in recipes/")
    return make_recipe(read_yaml(path, RecipeError), changes, str(path))


def make_recipe(data: Any, changes: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Make a recipe from plain data, with `--set` changes applied.

    Raises:
        RecipeError: see load_recipe.
    """
    for change in changes:
        _set(data, change)
    return validate(Recipe, data, where)


def changed_patterns(changes: Sequence[str]) -> list[str]:
    """Return the patterns of layers that `--set` changes give, as values of a key `layers` or `ignore`."""
    data: dict[str, Any] = {}
    for change in changes:
        path, _, text = change.partition("=")
        value = _parsed(change, text)
        for key in reversed(path.split(".")):
            value = {key: value}
        data[change] = value
    return _patterns(data, inside=False)


def _patterns(data: Any, inside: bool) -> list[str]:
    """Collect the texts below the keys `layers` and `ignore` of plain data."""
    if isinstance(data, dict):
        return [found for key, value in data.items() for found in _patterns(value, inside or key in ("layers", "ignore"))]
    if isinstance(data, list):
        return [found for value in data for found in _patterns(value, inside)]
    return [data] if inside and isinstance(data, str) else []


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML with all defaults written out; reading it gives an equal recipe."""
    return yaml.safe_dump(_plain(describe(recipe)), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(change: str, text: str) -> Any:
    """Return the value of a `--set` change."""
    return parse_yaml(text, f"--set {change}", RecipeError, "put the value in quotes")


def _set(data: Any, change: str) -> None:
    """Apply `passes.0.damp=0.1` to plain data; the value is YAML."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {change}: write KEY=VALUE, for example passes.0.damp=0.1")
    *parents, last = path.split(".")
    value = _parsed(change, text)
    try:
        here = data
        for key in parents:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[int(key)] if isinstance(here, list) else here[key]
        here[int(last) if isinstance(here, list) else last] = value
    except (LookupError, ValueError, TypeError) as error:
        raise RecipeError(f"--set {change}: the recipe has no place `{path}`; --print-recipe shows its keys") from error
