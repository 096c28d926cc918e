"""Run every recipe in recipes/ and the demo, and record a hash of every file of weights, so that two commits can be compared.

    scripts/bench identical --out before.json                       # at one commit
    scripts/bench identical --out after.json --against before.json  # at another

A change that moves code must change no byte. Everything runs on the demo model, on one thread, with fewer samples and
training steps than the recipes have. Only the public API is used, so that the script of one commit runs at another. Exit
status 1 if any file differs or is missing.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

ROOT = Path(__file__).parents[2]
CALIBRATION = {"samples": 8, "seq_len": 64}
# Settings that take long, by the pass that has them, and what they are set to.
FEW: dict[str, dict[str, Any]] = {
    "compresso": {"steps": 3, "batch": 2},
    "distil_blocks": {"steps": 3, "batch": 2},
    "learned": {"steps": 3, "batch": 2},
    "pat": {"steps": 3, "batch": 2},
    "prune_taylor": {"steps": 3, "batch": 2},
    "pv_tune": {"steps": 3, "batch": 2},
    "recover": {"steps": 3, "batch": 2},
    "soft_prompt": {"steps": 3, "batch": 2, "judged": 64},
}
SEARCH = {"tokens": 1024, "table_tokens": 128, "rounds": 1}
EVOLVE = {"generations": 2, "offspring": 4, "stages": [[2, 128], [1, 512]]}


def shortened(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that does the same work on less data."""
    passes = [{**step, **FEW.get(step["pass"], {})} for step in recipe["passes"]]
    for step in passes:
        if step.get("learn"):
            step["learn"] = 3
    result = {**recipe, "passes": passes, "calibration": {**recipe.get("calibration", {}), **CALIBRATION}, "evaluation": None}
    if "target" in recipe:
        search = recipe.get("search", {})
        result["search"] = {**search, **SEARCH, "evolve": {**search.get("evolve", {}), **EVOLVE}}
    return result


def hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every safetensors file and of the plan in a model directory."""
    files = [*directory.glob("*.safetensors"), directory / "plan.yaml"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.exists()}


def run(name: str, work: Path) -> dict[str, str]:
    """Compress the demo model by one recipe, or as `compress demo` does, and return the hashes of what was written."""
    import compressor
    from compressor.assets import DEMO_MODEL

    out = work / name
    if name == "demo":
        recipe: Any = compressor.quantize_recipe(4, samples=8, seq_len=64, evaluate=False)
    else:
        path = work / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(shortened(yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())), sort_keys=False)
        )
        recipe = path
    compressor.run(recipe, DEMO_MODEL, out, verify=False, device="cpu")
    return hashes(out)


def main(
    out: Annotated[Path | None, typer.Option(help="File to write the hashes to.")] = None,
    against: Annotated[Path | None, typer.Option(help="File of hashes that another commit wrote.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Recipe to run, by name; give it more than once for more.")] = None,
) -> None:
    """Record what every recipe writes, and compare it with what another commit wrote."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    names = only or ["demo", *sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))]
    found: dict[str, Any] = {}
    for number, name in enumerate(names, 1):
        with tempfile.TemporaryDirectory() as work:
            try:
                found[name] = run(name, Path(work))
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:300].replace(work, "WORK")}
        sys.stderr.write(f"{number}/{len(names)} {name}: {next(iter(found[name].values()), 'nothing written')[:60]}\n")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(against.read_text()) if against is not None else found
    different = [name for name in names if found[name] != before.get(name)]
    failed = [name for name in names if "error" in found[name]]
    sys.stdout.write(f"{len(names)} runs, {len(failed)} failed {failed}, {len(different)} different {different}\n")
    raise SystemExit(bool(different or failed))


if __name__ == "__main__":
    typer.run(main)
