"""Read files that other programs wrote: the one guarded entry for text, JSON and YAML.

For any content, a reader either returns plain data within the limits below or raises one sentence that names the file, the
cause and the remedy. The limits are far above what model directories need and far below what a parser, a recursive function
or a C integer can handle.

This module imports only the standard library and PyYAML, so that every package can use it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import CompressorError, shorten

MAX_DEPTH = 64  # nesting of containers; config.json of the largest published models has 6
MAX_NODES = 10_000_000  # values in one JSON file; the index of a model with 10⁶ tensors has 10⁶
MAX_YAML_NODES = (
    1_000_000  # values in one YAML file, where aliases multiply them; the plan of a model with 10⁴ layers has 10⁵
)
MAX_INTEGER = 2**64  # above every size, offset and count
MAX_BYTES = 2**30  # size of a file that is read at once
MAX_JSON_BYTES = 2**26  # parsing needs about 30 times as much memory; the index of a model with 10⁵ tensors has 2**23
MAX_YAML_BYTES = 2**21  # a megabyte takes ten seconds to parse; the plan of a model with 10⁴ layers has 10⁶
MAX_NUMBER = 400  # characters of a number in YAML
MAX_QUOTED = 80  # characters of a value that a message quotes


class _Loader(yaml.SafeLoader):
    """YAML loader without dates and merged mappings.

    `2020-01-01` is text, as in JSON. `<<` is an ordinary key, because merging can double the data with every line.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Construct a number, but refuse long ones: `1:1:…` is base 60 and takes quadratic time."""
    if len(node.value) > MAX_NUMBER:
        raise ValueError(f"a number of {len(node.value):,} characters")
    whole = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def elide(value: object, limit: int = MAX_QUOTED) -> str:
    """Return a value as text of at most `limit` characters, its middle left out if it is longer."""
    return shorten(value if isinstance(value, str) else repr(value), limit)


def cause(error: BaseException) -> str:
    """Return why an operation on a file failed, as part of a sentence.

    This is the system's message without the path, which the sentence already names. For a file that the user is not allowed
    to read, it is `permission denied`.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return elide(" ".join(str(error).split()) or type(error).__name__, 120)


def read_bytes(path: Path, error: type[CompressorError], remedy: str = "get it again from where it came") -> bytes:
    """Read a whole file.

    Args:
        path: File to read.
        error: Class of the error that is raised.
        remedy: Advice to the user if the content is at fault.

    Raises:
        CompressorError: (`error`) the file is missing, is not readable, or is longer than `MAX_BYTES`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as reason:  # ValueError: a NUL character in the name
        raise error(f"{elide(str(path), 150)}: cannot be read ({cause(reason)})") from reason
    if len(content) > MAX_BYTES:
        raise error(f"{elide(str(path), 150)}: is longer than {MAX_BYTES:,} bytes; {remedy}")
    return content


def read_text(path: Path, error: type[CompressorError], remedy: str = "get it again from where it came") -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args and errors are those of `read_bytes`. A file in another encoding is refused too.
    """
    content = read_bytes(path, error, remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not UTF-8 text (byte {reason.start:,} is 0x{content[reason.start]:02x}); {remedy}") from reason


def parse_json(text: str | bytes, where: str, error: type[CompressorError], remedy: str) -> Any:
    """Parse JSON.

    Args:
        text: JSON document.
        where: Start of the message: a file, or a file and a line.
        error: Class of the error that is raised.
        remedy: Advice to the user about a bad document.

    Raises:
        CompressorError: (`error`) not JSON, or beyond the limits of this module.
    """
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
        data = json.loads(text)
        check_plain(data)
    except (ValueError, RecursionError) as reason:
        raise error(f"{elide(where, 150)}: not valid JSON ({_reason(reason)}); {remedy}") from reason
    return data


def parse_json_lines(text: str, where: str, error: type[CompressorError], remedy: str) -> Iterator[tuple[int, Any]]:
    r"""Parse JSON Lines and yield pairs of line number (from 1) and data; empty lines are skipped.

    Only `\n` (and so `\r\n`) ends a line, because JSON strings may contain Unicode's other line separators unescaped.
    Args and errors are those of `parse_json`; `where` is the file, to which the line number is added.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(" \t\r"):
            yield number, parse_json(line, f"{where}:{number}", error, remedy)


def read_json(path: Path, error: type[CompressorError], remedy: str = "get it again from where it came") -> Any:
    """Read a JSON file; errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path, error, remedy), str(path), error, remedy)


def read_json_object(
    path: Path, error: type[CompressorError], remedy: str = "get it again from where it came"
) -> dict[str, Any]:
    """Read a JSON file that holds an object; errors are those of `read_json`. Any other value is refused too."""
    data = read_json(path, error, remedy)
    if not isinstance(data, dict):
        raise error(f"{path}: holds a JSON {type(data).__name__} where an object is needed; {remedy}")
    return data


def parse_yaml(text: str, where: str, error: type[CompressorError], remedy: str) -> Any:
    """Parse YAML as plain data: dates stay text, mappings have text keys.

    Args and errors are those of `parse_json`.
    """
    try:
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"longer than {MAX_YAML_BYTES:,} bytes")
        data = yaml.load(text, _Loader)
        check_plain(data, MAX_YAML_NODES)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, LookupError, AttributeError, ArithmeticError) as reason:
        raise error(f"{elide(where, 150)}: not valid YAML ({_reason(reason)}); {remedy}") from reason
    return data


def read_yaml(path: Path, error: type[CompressorError], remedy: str = "correct it") -> Any:
    """Read a YAML file; errors are those of `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, error, remedy), str(path), error, remedy)


def check_plain(data: Any, max_nodes: int = MAX_NODES) -> None:
    """Check that parsed data is within the limits of this module.

    Args:
        data: Dictionaries, lists and scalars.
        max_nodes: Number of values allowed; a list that aliases repeat counts each time.

    Raises:
        ValueError: nested too deeply, too many values, an integer beyond 64 bits, text that UTF-8 cannot hold, or a key that
            is not text.
    """
    waiting: list[Iterator[Any]] = [iter((data,))]
    nodes = 0
    while waiting:
        for value in waiting[-1]:
            nodes += 1
            if nodes > max_nodes:
                raise ValueError(f"more than {max_nodes:,} values")
            if isinstance(value, dict | list):
                if len(waiting) > MAX_DEPTH:
                    raise ValueError(f"nested more than {MAX_DEPTH} deep")
                waiting.append(_items(value))
                break
            _check_scalar(value)
        else:
            waiting.pop()


def _items(container: dict[Any, Any] | list[Any]) -> Iterator[Any]:
    if isinstance(container, list):
        yield from container
        return
    for key, value in container.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {elide(key, 40)} is no text")
        _check_scalar(key)
        yield value


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"text with half a surrogate pair: {elide(ascii(value), 40)}") from None
    elif isinstance(value, int):
        if abs(value) >= MAX_INTEGER:
            raise ValueError(f"the number {elide(hex(value), 24)} is beyond 64 bits")
    elif value is not None and not isinstance(value, float):
        raise ValueError(f"a value of type {type(value).__name__}")


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {elide(' '.join(error.problem.split()))}"
    text = " ".join(str(error).split())
    return "a number of thousands of digits" if text.startswith("Exceeds the limit") else elide(text, 120)
