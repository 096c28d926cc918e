"""The example for CI in docs/evaluation.md does what it says, on the demo model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from compressor.assets import DEMO_MODEL

ROOT = Path(__file__).parents[1]


def test_the_ci_example_runs_and_keeps_its_limits(tmp_path: Path) -> None:
    block = (ROOT / "docs" / "evaluation.md").read_text().split("```yaml\njobs:")[1].split("```")[0]
    steps = yaml.safe_load(f"jobs:{block}")["jobs"]["int4"]["steps"]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("compress ")]
    (uploaded,) = [step["with"]["path"] for step in steps if "path" in step.get("with", {})]
    assert len(commands) == 2
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for command in commands:
        words = [sys.executable, "-m", "compressor", *command.split()[1:], "--device", "cpu"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / uploaded).is_file()
