"""A recipe, validated: what to calibrate on, what to do, how to judge the result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml

from compressor.errors import RecipeError
from compressor.registry import describe, named, node, validate


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive number")


@node
class Calibration:
    """Args:
    source: `builtin`, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN].
    samples: How many.
    seq_len: Tokens of each; null takes what the model was made for, at most 2048.
    seed: Of the order of documents.
    on_disk: A directory to keep hidden states in instead of memory, for millions of tokens; null keeps them in memory.
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
    """Args:
    source: Like that of calibration, or several, and used whole; null takes the held-out part of the calibration source.
    samples: How many at most, of each source.
    seq_len: Tokens of each; null takes that of calibration.
    stride: New tokens of each; null for no overlap.
    bos: Begin each with the begin token; null does as the tokenizer does with a text.
    generate: Beginnings of samples that both models continue, for the report.
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
class Recipe:
    """Args:
    passes: Algorithms, applied to each decoder block in this order.
    calibration: The text that statistics are collected on.
    evaluation: The text that the result is compared with the original on; null measures nothing.
    """

    passes: tuple[Annotated[Any, named("pass")], ...]
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()

    def __post_init__(self) -> None:
        if not self.passes:
            raise ValueError("passes: empty; name at least one pass")


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` changes to it.

    Raises:
        RecipeError: not a recipe, or a change that does not fit.
    """
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory where a recipe file is needed; write `compress run RECIPE MODEL`")
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file; the shipped ones are in recipes/")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    return make_recipe(data, changes, str(path))


def make_recipe(data: Any, changes: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from plain data, with `--set` changes applied.

    Raises:
        RecipeError: see load_recipe.
    """
    for change in changes:
        _set(data, change)
    return validate(Recipe, data, where)


def to_yaml(recipe: Recipe) -> str:
    """The recipe with all defaults written out; reading it gives the same recipe."""
    return yaml.safe_dump(_plain(describe(recipe)), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _set(data: Any, change: str) -> None:
    """Apply `passes.0.damp=0.1` to plain data; the value is YAML."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {change}: write KEY=VALUE, for example passes.0.damp=0.1")
    *parents, last = path.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: the value is not valid YAML; put it in quotes") from error
    try:
        here = data
        for key in parents:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[int(key)] if isinstance(here, list) else here[key]
        here[int(last) if isinstance(here, list) else last] = value
    except (LookupError, ValueError, TypeError) as error:
        raise RecipeError(f"--set {change}: the recipe has no place `{path}`; --print-recipe shows its keys") from error
