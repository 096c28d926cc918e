"""Damage files as accidents and attackers do: functions that take a random generator and a file's bytes and return others."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutate = Callable[[random.Random, bytes], bytes]
MARK = "@hostile@"

# JSON text, most of which YAML takes too.
VALUES = (
    *("0", "-1", "1", "1.5", "-0.0", "1e400", "true", "false", "null", "NaN", "-Infinity"),
    *("1000000000", "1000000000000000000", "18446744073709551616", "9" * 5000, "-" + "9" * 5000),
    *("[]", "{}", "[[]]", '[1, "a", null]', '{"a": {"b": [1]}}', "[null]", "[0, -1, 1.5]", "[" * 90 + "]" * 90),
    *('""', '"text"', '"2020-01-01"', '"1"', '"\\u0000"', '"\\ud800"', '"a\\nb"', '"\\u202e"', '"' + "x" * 100_000 + '"'),
    *(
        '"../outside"',
        '"../outside/config.json"',
        '"/etc/passwd"',
        '"."',
        '"' + "n" * 300 + '"',
        '"model.safetensors/../../outside/model.safetensors"',
    ),
    *('"re:([\\\\w.]+)+!"', '"re:["', '"re:(a)\\\\1"', '"' + "(" * 3000 + '"', '"int"', '"F64"', '"float32"', '"llama"'),
    "[" * 50_000 + "]" * 50_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
)
LINES = (  # of YAML
    *(
        "a: &a [1, *a]",
        "<<: {passes: []}",
        "? [1, 2]\n: 3",
        "!!python/object/apply:os.system ['true']",
        "\t- x",
        "x: 2020-01-01",
    ),
    *(
        "x: !!int ''",
        "x: !!bool no-bool",
        "x: !!timestamp x",
        "x: !!binary '*'",
        "x: !!set {a, b}",
        "x: !!float ''",
        "%YAML 9.9",
    ),
    *(
        "x: " + "1:" * 5000 + "1",
        "x: " + "1:" * 5000 + "1.0",
        "x: 0x" + "f" * 5000,
        "passes: []",
        "x: {" * 3000,
        "- " * 3000 + "x",
    ),
    "a: &b0 {k: v}\n" + "\n".join(f"a{n}: &b{n + 1} {{<<: [{', '.join([f'*b{n}'] * 10)}]}}" for n in range(9)),
    "\n".join(["x0: &y0 [1]", *(f"x{n + 1}: &y{n + 1} [{', '.join([f'*y{n}'] * 10)}]" for n in range(9))]),
)


def bytes_changed(draw: random.Random, content: bytes) -> bytes:
    """Flip, cut, double, insert or remove bytes."""
    at, many = draw.randrange(len(content) + 1), draw.randrange(1, 40)
    return draw.choice(
        (
            lambda: bytes(b ^ (1 << draw.randrange(8)) if draw.random() < 8 / len(content) else b for b in content),
            lambda: content[:at],
            lambda: content[:at] + content[at : at + many] + content[at:],
            lambda: content[:at] + draw.randbytes(many) + content[at:],
            lambda: content[:at] + content[at + many :],
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.decode("latin-1").encode("utf-16"),
            lambda: draw.choice(VALUES).encode(),
            lambda: b"",
        )
    )()


def json_changed(inside: str | None = None) -> Mutate:
    """Replace, remove, double or rename a value anywhere in a JSON document, or below one key of it."""

    def mutate(draw: random.Random, content: bytes) -> bytes:
        if draw.random() < 0.15:
            return bytes_changed(draw, content)
        data = json.loads(content)
        places = list(_places(data if inside is None else data[inside]))
        container, key = draw.choice(places)
        value, way = draw.choice(VALUES), draw.randrange(10)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[MARK] = container.pop(key)
        elif way == 2 and isinstance(container, list):
            container += container[key:] * draw.randrange(1, 4)
        else:
            container[key] = MARK
        text = json.dumps(data)
        if way == 1:
            value = json.dumps(f"{draw.choice(('../outside/config.json', 'x' * 100_000, 're:(.*)*!', '', chr(0)))}")
        if way == 3:  # the key twice
            value += f', "{key}": null' if isinstance(container, dict) else ", 0"
        return text.replace(json.dumps(MARK), value).encode()

    return mutate


def lines_changed(draw: random.Random, content: bytes) -> bytes:
    """Change one line of a file of JSON documents."""
    lines = content.split(b"\n")
    at = draw.choice([n for n, line in enumerate(lines) if line])
    if draw.random() < 0.2:
        lines.insert(
            at, draw.choice((b"[]", b"null", b"{}", b"{", b"\xff", b'"text"', b"7", *(line for line in lines if line)))
        )
    else:
        lines[at] = json_changed()(draw, lines[at])
    return b"\n".join(lines)


def yaml_changed(draw: random.Random, content: bytes) -> bytes:
    """Replace a value, change the structure by a line, or change bytes."""
    if draw.random() < 0.15:
        return bytes_changed(draw, content)
    lines = content.decode().split("\n")
    at = draw.choice([n for n, line in enumerate(lines) if ": " in line or line.endswith(":")])
    way = draw.randrange(6)
    if way < 3:
        lines[at] = lines[at][: lines[at].index(":") + 1] + " " + draw.choice(VALUES)
    elif way == 3:
        lines.insert(at, " " * draw.randrange(4) + draw.choice(LINES))
    elif way == 4:
        lines[at] = draw.choice((" ", "- ", "  - ", "", "? ")) + lines[at].strip()
    else:
        del lines[at]
    return "\n".join(lines).encode()


def header_changed(draw: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, its length or the file's."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    way = draw.randrange(12)
    if way == 0:
        return content[: draw.randrange(len(content))]
    if way == 1:
        return draw.choice((0, 1, length - 1, length + 8, 2**24, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if way == 2:
        return content + bytes(draw.randrange(1, 100))
    text = bytes_changed(draw, text) if way == 3 else json_changed()(draw, text.rstrip())
    return len(text).to_bytes(8, "little") + text + data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested dictionaries and lists, down to 2,000 of each container."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    for key in keys[:2000]:
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])
