"""`compress prune`: fewer channels, heads or blocks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._compress import compress


def prune(
    model: a.Model = Path(),
    ratio: Annotated[
        float,
        typer.Option(help="Share of the parameters to drop: 0.25 drops a quarter, rounded up to whole units."),
    ] = 0.25,
    of: Annotated[
        str,
        typer.Option(help="Basis of the ratio: model (embeddings included), blocks, or mlp (which alone is then pruned)."),
    ] = "model",
    by: Annotated[
        str,
        typer.Option(
            help="width (channels and heads of each block), hidden (channels of the hidden state, in every layer: keeps most "
            "where the architecture allows it, and stores a tied embedding twice), depth (blocks, faster at small batches) "
            "or sublayers (attentions and MLPs one by one: more to choose among, but only compressor.load reads the result)."
        ),
    ] = "width",
    layout: Annotated[
        str,
        typer.Option(
            help="uniform: every block has the same shape, which any software reads; per-layer: each has widths of its own, "
            "found by search, which keeps more, but only compressor.load reads the result; block-configs: each MLP has, of a "
            "Llama, which vLLM and transformers load with trust_remote_code."
        ),
    ] = "uniform",
    score: Annotated[
        str,
        typer.Option(
            help="Score that decides what is dropped first. Width: obs, taylor, wanda, flap, cfsp or magnitude; hidden: pca "
            "or channels; depth: search, cosine or even. [default: obs, pca, search]",
            show_default=False,
        ),
    ] = "",
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Drop groups of attention heads too, with their part of the cache.")
    ] = True,
    multiple: Annotated[
        int | None,
        typer.Option(help="Divisor of the number of channels. [default: 256 to 16, by their number; 128 with --bits]"),
    ] = None,
    recover: Annotated[
        int,
        typer.Option(
            help="Number of steps that train the pruned model towards the original's predictions, such as 300; 0 trains "
            "nothing."
        ),
    ] = 0,
    bits: Annotated[
        float | None,
        typer.Option(help="Quantize the pruned model too, as `compress quantize --bits` does.", show_default=False),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN].")
    ] = "builtin",
    samples: Annotated[
        int, typer.Option(help="Number of calibration samples. Candidates are scored on more text from the same source.")
    ] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample. [default: the model's maximum, at most 2048]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of calibration documents.")] = 0,
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
    """Take parameters away from MODEL: what is left is smaller and faster.

    Every block keeps the same shape, so the result loads wherever the original does, but for --by sublayers and other
    layouts. What remains is fitted to the original's own outputs; --recover trains it too.

    Example: `compress prune --ratio 0.25 model/`, or `compress prune --ratio 0.25 --recover 300 --bits 4 model/`
    """
    from compressor.recipe.build import prune_recipe
    from compressor.recipe.schema import changed_patterns, to_yaml

    recipe = prune_recipe(
        ratio,
        of=of,
        by=by,
        layout=layout,
        score=score or None,
        heads=heads,
        multiple=multiple,
        recover=recover,
        bits=bits,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
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
        required=changed_patterns(changes or ()),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        dry_run=dry_run,
        as_json=as_json,
        device=device,
        dtype=dtype,
    )
