"""Check the openers of docstrings: `scripts/check_prose.py [FOLDER …]`, by default all of compressor/ and scripts/.

A docstring and an entry of `Args:` must not begin with a relative clause or a preposition that hangs on nothing ("Of a
weight", "What a run does"). A docstring begins with an imperative verb or a noun phrase, an entry with a noun phrase. Exit
status 1 if one does not. compressor/assets is left out: its code is copied into models, where it must not change.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BANNED = r"(Of|That|Those|What|Whatever|Who|Whom|Whose|Which|Such|As of|(?:By|In|For|To|From|With) which)"
OPENER = re.compile(rf"{BANNED}\b")
ENTRY = re.compile(rf"\s+`?[*\w]+`?: {BANNED}\b")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of every opener that is banned."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, DOCUMENTED) or (text := ast.get_docstring(node, clean=False)) is None:
            continue
        first = node.body[0].lineno
        if OPENER.match(text) or text.startswith("Args:"):
            yield first, text.splitlines()[0]
        for number, line in enumerate(text.splitlines()[1:], first + 1):
            if ENTRY.match(line):
                yield number, line.strip()


def main(folders: list[str]) -> int:
    """Print the faults of all Python files below some folders; return 1 if there are any."""
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py") if "assets" not in file.parts)
    found = [f"{file}:{line}: {text}" for file in files for line, text in faults(file)]
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or ["compressor", "scripts"]))
