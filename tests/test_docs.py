"""What README.md and docs/ show works: commands parse, recipes and files exist, examples run."""

import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
import yaml

from compressor import api
from compressor.cli import app
from compressor.recipe import registry
from compressor.recipe.schema import load_recipe, make_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDING = (ROOT / "docs" / "adding.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Yield every command line of ours that the pages show."""
    for page in PAGES:
        lines = "".join(blocks(page.read_text(), "sh")).splitlines()
        lines += [line.strip().removeprefix("- run: ") for line in "".join(blocks(page.read_text(), "yaml")).splitlines()]
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = ["compress", *words[words.index("compressor") + 1 :]]
            if words[:1] == ["compress"]:
                yield shlex.join(words)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_is_one_that_there_is(line: str) -> None:
    """Parsed with all its options, not run; recipes that it names are loaded, with the changes that it makes."""
    group = typer.main.get_command(app)
    verb, *arguments = shlex.split(line)[1:]
    group.commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    for recipe in (word for word in arguments if word.startswith("recipes/")):
        changes = [after for word, after in itertools.pairwise(arguments) if word == "--set"]
        load_recipe(ROOT / recipe, changes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:compressor|recipes|scripts|benchmarks|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def example(name: str, language: str) -> str:
    """Return the example of docs/adding.md whose first line is `# name`."""
    return next(block for block in blocks(ADDING, language) if block.startswith(f"# {name}\n"))


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that can be imported, of the modules in docs/adding.md."""
    package = tmp_path / "mypackage"
    package.mkdir()
    for name in ("clip.py", "e5m2_group.py"):
        (package / name).write_text(example(name, "python"))
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def test_the_pass_that_is_added_runs(examples: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    data = yaml.safe_load(example("clipped.yaml", "yaml"))
    data["passes"][0]["pass"] = "mypackage.clip"
    recipe = make_recipe({**data, "evaluation": None})
    report = api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    assert {row.option for row in report.rows} == {"int3g32"}


def test_the_format_that_is_added_loses_nothing_but_what_rounding_does(examples: Path) -> None:
    fmt = registry.build("format", {"format": "mypackage.e5m2_group"})
    w_OI = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    grid = fmt.fit(w_OI)
    codes = grid.round(w_OI, 0)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes, 0))
    assert (packed.dequantize() - w_OI).abs().max() <= w_OI.abs().max() / 8  # two bits of mantissa: an eighth at most
    assert fmt.stored_bits((16, 128)) == sum(8 * part.nbytes for part in packed.parts.values())
