"""`compress search`: find what each layer should get, and write only that."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli import _target as t
from compressor.cli._show import print_json, print_warnings, progress


def search(
    model: a.Model = Path(),
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe with a target, instead of --size, --bits, --ratio and --using.")
    ] = None,
    size: t.Size = None,
    bits: t.Bits = None,
    ratio: t.Ratio = None,
    using: t.Using = "int",
    time: t.Time = None,
    calibration: t.Calibration = "builtin",
    samples: t.Samples = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample. [default: the model's maximum, at most 2048]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of documents and of the search.")] = 0,
    ignore: t.Ignore = None,
    levels: t.Levels = None,
    out: Annotated[Path, typer.Option(help="Plan file to write.")] = Path("plan.yaml"),
    changes: a.Changes = None,
    overwrite: a.Overwrite = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Search as `compress fit` does, and write the plan alone: what each layer gets.

    A search that was broken off goes on when it is started again.

    Example: `compress search model/ --bits 2.5`, then `compress run RECIPE model/ --plan plan.yaml`
    """
    from compressor.cli._quiet import quiet
    from compressor.pipeline.job import silent
    from compressor.pipeline.ranks import Ranks
    from compressor.pipeline.target_search import fit_recipe, search_plan
    from compressor.recipe.schema import changed_patterns, load_recipe

    quiet()
    wanted = (
        load_recipe(recipe, changes or ())
        if recipe is not None
        else fit_recipe(
            model,
            size=size,
            bits=bits,
            ratio=ratio,
            using=using.split(","),
            time=time,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            ignore=("lm_head", *(ignore or ())),
            evaluate=False,
            changes=changes or (),
        )
    )
    first = Ranks.from_environment(device).first
    with progress() if first else nullcontext(silent) as tell:
        found = search_plan(
            wanted,
            model,
            out,
            levels=levels,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            required=[*(ignore or ()), *changed_patterns(changes or ())],
            tell=tell,
        )
    if first:
        print_json(found.to_dict()) if as_json else t.print_found(found)
        print_warnings(found.warnings)
