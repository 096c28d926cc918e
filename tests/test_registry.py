"""Names in a recipe or a plan stand for what is there, or are refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.assets import DEMO_MODEL
from compressor.cli import main
from compressor.errors import RecipeError
from compressor.evaluation.verify.values import check_reference
from compressor.recipe import registry


@pytest.mark.parametrize("name", [".x", "..", ".", "no.such.module", "json.decoder"])
def test_a_name_that_no_module_has_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="the module must be importable and define EXPORT"):
        registry.build("format", {"format": name})


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--plan", "plan.yaml")])
def test_a_format_named_as_a_pass_is_refused(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: compressor.formats.fp8}]\n")
    (tmp_path / "plan.yaml").write_text("model.layers.0.mlp.up_proj: {format: fp8}\n")
    monkeypatch.setattr("sys.argv", ["compress", "run", "recipe.yaml", str(DEMO_MODEL), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: passes.0: compressor.formats.fp8 is not a pass; its EXPORT must inherit compressor.pipeline.contract.Pass\n"
    )


def test_a_recipe_beside_a_model_that_names_a_format_as_a_pass_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: compressor.formats.fp8}]\n")
    source = SimpleNamespace(path=tmp_path, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"^passes.0: compressor.formats.fp8 is not a pass; "):
        check_reference(source, tiny("llama"), lambda done, total, what: None)  # type: ignore[arg-type]
