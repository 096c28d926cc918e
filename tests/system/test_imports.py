"""Imports go down the floors of the house, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compressor

ROOT = Path(compressor.__file__).parent
# Every package answers one question; a package imports from the floors below its own.
FLOORS = (
    ("assets", "errors", "reading", "access", "host"),
    ("recipe",),
    ("formats",),
    ("model",),
    ("report", "runtime"),
    ("pipeline",),
    ("passes", "evaluation"),
    ("api",),
    ("cli", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
    if file != ROOT / "__init__.py"
}


def package(module: str) -> str:
    """Return the package that a module is in, below `compressor`."""
    return module.split(".", maxsplit=1)[0]


def imported(file: Path) -> Iterator[str]:
    """Yield the modules below `compressor` that a file imports, anywhere in it, for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in (name.removeprefix("compressor.") for name in names if name.startswith("compressor.")):
            yield name if name in MODULES else name.rpartition(".")[0] or name


def test_every_module_is_on_a_floor() -> None:
    assert {package(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_no_package_imports_from_its_own_floor_or_from_one_above(name: str) -> None:
    found = {
        (name, package(there))
        for module, file in MODULES.items()
        if package(module) == name
        for there in imported(file)
        if package(there) != name and FLOOR[package(there)] >= FLOOR[name] > 0 and name != "__main__"
    }
    assert found == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Oracle: the order in which modules can be taken away that import nothing that is left."""
    left = {module: {there for there in imported(file) if there in MODULES} - {module} for module, file in MODULES.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    assert left == {}


def test_what_begins_with_an_underscore_stays_in_its_package() -> None:
    private = {
        (module, there)
        for module, file in MODULES.items()
        for there in imported(file)
        if there.rpartition(".")[2].startswith("_") and not file.is_relative_to(MODULES[there].parent)
    }
    assert private == set()


@pytest.mark.parametrize("statement", ["import compressor", "import compressor.cli", "import compressor.errors"])
def test_importing_is_cheap(statement: str) -> None:
    code = f"import sys; {statement}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
