"""`compress quantize`: the recipe of a method, from a few options."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._compress import compress


def quantize(
    model: a.Model = Path(),
    bits: Annotated[
        float | None,
        typer.Option(help="Bits of a weight: 2 to 8; with vq 1 to 4, also 2.25. [default: 4, vq 2, or what the format has]"),
    ] = None,
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="int; floating point: nvfp4, mxfp4 or fp4 (4 bits), fp8 or mxfp8 (8 bits); or vq, vectors out of codebooks. "
            "[default: int, or what the method is for]",
        ),
    ] = None,
    activations: Annotated[
        int, typer.Option(help="Bits of activations: 16 (not rounded), 8, or with 4-bit floating point 4.")
    ] = 16,
    method: Annotated[
        str | None,
        typer.Option(
            help="learned, gptq, rotated, rotated-learned, adadim, fpq, awq, vptq or vptq-learned (calibrated), hqq, search "
            "or rtn (weights alone). [default: learned up to 4 bits (fpq for fp4, vptq-learned for vq), else gptq; without "
            "text hqq (int) or search]"
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Adjacent input channels that share a scale; -1 for a whole row. [default: 128]")
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Store zero points too. Then only compressor.load reads the result.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]. [default: builtin]"),
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Use the weights alone: the best method that reads no text.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Number of calibration samples.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample. [default: the model's maximum, at most 2048]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of calibration documents.")] = 0,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave unchanged; repeatable.")] = None,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Compare the result with the original.")] = True,
    out: a.Out = None,
    changes: a.Changes = None,
    resume: a.Resume = False,
    overwrite: a.Overwrite = False,
    verify: a.Verify = True,
    dry_run: a.DryRun = False,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the recipe this stands for, and stop.")] = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Quantize the weights of MODEL to integers or to floating-point numbers, and activations if asked to.

    The result loads in stock transformers and vLLM (compressed-tensors layout; fp4 and vq in compressor.load only), and
    comes with its quality against the original.

    Example: `compress quantize --bits 4 model/`, or `compress quantize --format nvfp4 --activations 4 model/`
    """
    from compressor.recipe.build import quantize_recipe
    from compressor.recipe.schema import changed_patterns, to_yaml

    recipe = quantize_recipe(
        bits,
        fmt=fmt,
        activations=activations,
        method=method,
        calibrated=not no_calibration,
        group_size=group_size,
        symmetric=not asymmetric,
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
        required=[*(ignore or ()), *changed_patterns(changes or ())],
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        dry_run=dry_run,
        as_json=as_json,
        device=device,
        dtype=dtype,
    )
