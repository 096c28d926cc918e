"""The stages of a run do their work once: the original is opened once, and planned for once."""

from pathlib import Path
from typing import Any

import pytest

from compressor import api
from compressor.model.source import ModelSource
from compressor.pipeline import run as stages

OPTIONS: dict[str, Any] = {"method": "rtn", "group_size": 32, "device": "cpu", "verify": False}


@pytest.mark.parametrize(("evaluate", "times"), [(False, 1), (True, 2)])
def test_the_original_is_opened_once_and_once_more_to_be_evaluated(
    evaluate: bool, times: int, tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    init = ModelSource.__init__

    def counting(self: ModelSource, path: Path, *arguments: Any) -> None:
        opened.append(path)
        init(self, path, *arguments)

    monkeypatch.setattr(ModelSource, "__init__", counting)
    changes = ["evaluation.samples=1", "evaluation.seq_len=32", "evaluation.generate=0"] if evaluate else []
    api.quantize(tiny, out, evaluate=evaluate, changes=changes, **OPTIONS)
    assert opened.count(tiny) == times


def test_the_plan_is_made_once(tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make_plan = stages.make_plan
    monkeypatch.setattr(stages, "make_plan", lambda *given: made.append(given) or make_plan(*given))
    api.quantize(tiny, out, evaluate=False, **OPTIONS)
    assert len(made) == 1
