"""`compress fit`: the best model of a size."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli import _target as t
from compressor.cli._compress import compress


def fit(
    model: a.Model = Path(),
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
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Compare the result with the original.")] = True,
    levels: t.Levels = None,
    out: a.Out = None,
    changes: a.Changes = None,
    resume: a.Resume = False,
    overwrite: a.Overwrite = False,
    verify: a.Verify = True,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the recipe this stands for, and stop.")] = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Find and write the best model of a size: bits, and the sizes of groups, go where they matter.

    What every layer loses in each of some formats is measured; the choice that loses least as a whole is searched for, and
    written as `compress quantize` would. Give one of --size, --bits and --ratio.

    Example: `compress fit model/ --size 4GB`, or `compress fit model/ --bits 2.5 --time 30m`
    """
    from compressor.pipeline.target_search import fit_recipe
    from compressor.recipe.schema import changed_patterns, to_yaml

    recipe = fit_recipe(
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
        evaluate=evaluate,
        changes=changes or (),
    )
    if print_recipe:
        sys.stdout.write(to_yaml(recipe))
        return
    compress(
        recipe,
        model,
        out,
        levels=levels,
        required=[*(ignore or ()), *changed_patterns(changes or ())],
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        dry_run=False,
        as_json=as_json,
        device=device,
        dtype=dtype,
    )
