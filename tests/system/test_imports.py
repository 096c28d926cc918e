"""Imports go one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compressor

ROOT = Path(compressor.__file__).parent

# Passes that search for what they take away, or train what they leave.
PRUNING = (
    *("compresso", "distil_blocks", "pat", "prune_depth", "prune_hidden", "prune_taylor", "prune_width"),
    *("recover", "soft_prompt"),
)
# From the ground up. A module imports from its own floor and from those below.
FLOORS = (
    ("errors", "reading", "access"),
    ("recipe",),
    ("types", "assets", "codes", "activations", "floats", "hadamard", "absent", "narrow", "kv_cache", "magnitudes", "host"),
    ("_on_import",),
    ("kernels",),
    ("report", "report_html", "distributed"),
    ("card",),
    ("formats",),
    ("model", "calibration"),
    ("passes",),
    ("plan", "evaluation", "patterns"),
    ("plan_file", "forecast"),
    ("verification", "results"),
    ("pipeline", "inputs", "output", "provenance"),
    ("judging", "tuning", "search"),
    ("pruning", *(f"passes.{name}" for name in PRUNING)),
    ("fitting",),
    ("api", "comparison"),
    ("cli", "__main__"),
)
# These stand on the model's floor and know nothing of compressing; only the upper floors use them.
BESIDE = {"runtime", "inspection"}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in sorted(ROOT.rglob("*.py"))
    if file != ROOT / "__init__.py"
}


def imported(file: Path) -> set[str]:
    """First names below `compressor.` that a module imports, anywhere in it but for type checkers."""
    tree = ast.parse(file.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {top(name.removeprefix("compressor.")) for name in names if name.startswith("compressor.")}
    return found


def top(module: str) -> str:
    """What of a module's name has a floor: its first part, unless it has one of its own."""
    own = next((name for name in FLOOR if "." in name and f"{module}.".startswith(f"{name}.")), None)
    return own or module.split(".", maxsplit=1)[0]


def upto(floor: int) -> set[str]:
    return {name for name, number in FLOOR.items() if number <= floor}


def test_every_module_has_its_floor() -> None:
    assert {top(module) for module in MODULES} <= FLOOR.keys() | BESIDE


@pytest.mark.parametrize("module", [name for name in MODULES if top(name) in FLOOR])
def test_no_module_imports_from_a_floor_above(module: str) -> None:
    floor = FLOOR[top(module)]
    assert imported(MODULES[module]) <= upto(floor) | (BESIDE if floor >= FLOOR["judging"] else set())


@pytest.mark.parametrize("module", [name for name in MODULES if top(name) in BESIDE])
def test_the_runtime_imports_nothing_that_compresses(module: str) -> None:
    assert imported(MODULES[module]) <= upto(FLOOR["model"]) | {top(module)}


@pytest.mark.parametrize("statement", ["import compressor", "import compressor.cli", "import compressor.errors"])
def test_importing_is_cheap(statement: str) -> None:
    code = f"import sys; {statement}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
