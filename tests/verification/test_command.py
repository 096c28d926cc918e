"""`compress verify`: exit status and what is printed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import change_tensors

from compressor import api
from compressor.cli import main
from compressor.evaluation.verify import verify as verification
from compressor.evaluation.verify.check import NotCheckedError
from compressor.recipe.build import quantize_recipe

SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    api.run(quantize_recipe(4, method="rtn", group_size=64, evaluate=False), tiny("llama"), out, device="cpu", verify=False)
    return out


@pytest.fixture
def compress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int | str | None, str, str]]:
    """Exit status, stdout and stderr of a command; stock transformers is left out."""

    def skip(*_: Any) -> str:
        raise NotCheckedError("left out")

    monkeypatch.setattr(verification, "check_transformers", skip)

    def call(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    change_tensors(out, lambda content: content[SCALE].mul_(2))
    return out


def test_sound_output_exits_with_0_and_shows_every_check(made: Path, tiny: Callable[..., Path], compress: Any) -> None:
    code, out, _ = compress("verify", made, "--reference", tiny("llama"))
    assert code == 0
    lines = [line.split()[:2] for line in out.splitlines()]
    passed = [["passed", name] for name in ("files", "hashes", "config", "copies", "values", "logits")]
    assert lines == [*passed, ["skipped", "transformers"], ["passed", "reference"]]


def test_damage_exits_with_1_and_names_the_tensor_on_one_line(damaged: Path, compress: Any) -> None:
    code, out, err = compress("verify", damaged)
    assert code == 1
    assert err.endswith(f"{damaged}: 2 of 7 checks failed; get it again from where it came, or make it again\n")
    assert [line for line in out.splitlines() if line.startswith("failed") and SCALE in line]


def test_json_says_the_same(made: Path, damaged: Path, compress: Any) -> None:
    code, out, _ = compress("verify", damaged, "--json")
    answer = json.loads(out)
    assert (code, answer["passed"]) == (1, False)
    assert {check["check"] for check in answer["checks"] if check["outcome"] == "failed"} == {"hashes", "logits"}
    code, out, _ = compress("verify", made, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_nothing_to_verify_exits_with_2(tmp_path: Path, compress: Any) -> None:
    code, out, err = compress("verify", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "no such directory" in err
