"""`compress run`: do what a recipe file says."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._compress import compress
from compressor.cli._target import Levels


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML. The shipped ones are in recipes/.")],
    model: a.Model = Path(),
    out: a.Out = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="plan.yaml of a search or another run: what each layer gets of the options."),
    ] = None,
    levels: Levels = None,
    changes: a.Changes = None,
    resume: a.Resume = False,
    overwrite: a.Overwrite = False,
    verify: a.Verify = True,
    dry_run: a.DryRun = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe with all defaults, and stop.")
    ] = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Compress MODEL as RECIPE says.

    Example: `compress run recipes/int4-gptq.yaml model/ --out model-int4 --set passes.0.damp=0.1`
    """
    from compressor.recipe.schema import changed_patterns, load_recipe, to_yaml

    loaded = load_recipe(recipe, changes or ())
    if print_recipe:
        sys.stdout.write(to_yaml(loaded))
        return
    compress(
        loaded,
        model,
        out,
        plan=plan,
        levels=levels,
        required=changed_patterns(changes or ()),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        dry_run=dry_run,
        as_json=as_json,
        device=device,
        dtype=dtype,
    )
