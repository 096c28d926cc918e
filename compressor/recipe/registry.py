"""Registry of the names in recipes. They are module names: `pass: gptq` is the module gptq below compressor.passes.

The directories are the registry: every module in them that defines `EXPORT`, the class that a recipe builds, can be named in
recipes. A name with a dot is the full name of a module elsewhere.
"""

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from compressor.errors import RecipeError
from compressor.reading import elide

T = TypeVar("T")
PACKAGES = {"pass": "passes", "format": "formats"}  # key in a recipe -> package below compressor
EXPORTING = re.compile(r"^EXPORT\b", re.MULTILINE)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def node(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that rejects unknown keys, so that a recipe can describe it."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)  # type: ignore[attr-defined]
    return made


@cache
def modules(kind: str) -> Mapping[str, str]:
    """Return the names that `kind: NAME` may take in a recipe and their full module names, without importing any."""
    package = importlib.import_module(f"compressor.{PACKAGES[kind]}")
    root = Path(package.__path__[0])
    files = [file.relative_to(root) for file in root.rglob("*.py") if EXPORTING.search(file.read_text("utf-8"))]
    return {file.stem: ".".join([package.__name__, *file.with_suffix("").parts]) for file in files}


def available(kind: str) -> list[str]:
    """Return the names that `kind: NAME` may take in a recipe."""
    return sorted(modules(kind))


def suggestion(name: str, known: list[str]) -> str:
    """Return the end of an error message about an unknown name: a similar known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


def build(kind: str, spec: Any) -> Any:
    """Turn `{kind: NAME, field: value, …}` into an instance of that module's `EXPORT`; pass instances through.

    Raises:
        RecipeError: there is no such name, or a field is not valid.
    """
    if hasattr(type(spec), "__pydantic_config__"):
        return spec
    if not isinstance(spec, Mapping) or kind not in spec:
        raise RecipeError(
            f"expected a mapping with the key `{kind}`, got {elide(spec)}; write for example `{kind}: {available(kind)[0]}`"
        )
    name = str(spec[kind])
    return validate(exported(kind, name), {key: value for key, value in spec.items() if key != kind}, where=name)


def exported(kind: str, name: str) -> Any:
    """Return the class that `kind: NAME` builds.

    Raises:
        RecipeError: there is no such class.
    """
    if "." not in name and name not in available(kind):
        raise RecipeError(f"no {kind} named `{elide(name)}`; {suggestion(name, available(kind))}")
    try:
        return importlib.import_module(name if "." in name else modules(kind)[name]).EXPORT
    except (
        ImportError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # the last two: a relative name such as `.x`
        raise RecipeError(f"{kind} `{name}`: {error}; the module must be importable and define EXPORT") from error


def validate(cls: type[T], values: Any, where: str) -> T:
    """Build an instance of a `node` class from plain data.

    Raises:
        RecipeError: the data is not valid; the message names the path of the first fault.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where}: expected a mapping of keys to values, got {elide(values)}")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(elide(str(part), 40) for part in first["loc"])])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            hint = suggestion(str(first["loc"][-1]), _keys_at(cls, first["loc"]))
            raise RecipeError(f"{path}: no such key; {hint}") from error
        if first["type"] in ("missing", "missing_argument"):
            raise RecipeError(f"{path}: this key is required") from error
        message = elide(first["msg"].removeprefix("Value error, "), 150)
        got = "" if isinstance(first.get("ctx", {}).get("error"), ValueError) else f", got {elide(repr(first['input']))}"
        raise RecipeError(f"{path}: {message}{got}") from error


def _keys_at(cls: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are allowed where an unknown one was found."""
    for part in location[:-1]:
        kind = next((f.type for f in fields(cls) if f.name == part), None)
        cls = next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), cls)
    return sorted(f.name for f in fields(cls))


def describe(thing: Any) -> Any:
    """Return plain data from which `build` makes an equal instance, defaults written out."""
    if isinstance(thing, tuple | list):
        return [describe(item) for item in thing]
    if not hasattr(type(thing), "__pydantic_config__"):
        return thing
    own = {f.name: describe(getattr(thing, f.name)) for f in fields(thing)}
    module = type(thing).__module__
    for kind, package in PACKAGES.items():
        if module.startswith(f"compressor.{package}."):
            return {kind: module.rpartition(".")[2], **own}
        if getattr(thing, "kind", None) == kind:
            return {kind: module, **own}
    return own


def over(default: Any) -> BeforeValidator:
    """Return a field annotation: keys missing from a mapping take their values from the field's default, not its class."""
    return BeforeValidator(lambda spec: _merged(describe(default), spec))


def _merged(known: Any, given: Any) -> Any:
    if not (isinstance(known, Mapping) and isinstance(given, Mapping)):
        return given
    return {**known, **{key: _merged(known.get(key), value) for key, value in given.items()}}


def named(kind: str) -> BeforeValidator:
    """Return a field annotation: `Annotated[Format, named("format")]` accepts `{format: int_group, bits: 4}`."""

    def convert(spec: Any) -> Any:
        try:
            return build(kind, spec)
        except RecipeError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(convert)
