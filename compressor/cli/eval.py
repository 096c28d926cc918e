"""`compress eval`: perplexity of a model, and what it lost against the original."""

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, progress, quality_fields


def eval_(
    model: a.Model = Path(),
    reference: Annotated[
        Path | None, typer.Option(help="The original model: adds KL divergence and top-1 agreement.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]."),
    ] = "builtin",
    samples: Annotated[int, typer.Option(help="At most so many.")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample. [default: the model's maximum, at most 2048]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the documents.")] = 0,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Measure perplexity on held-out text, streamed block by block: a model larger than memory is no problem.

    Example: `compress eval model-int4 --reference model/`
    """
    from compressor import api
    from compressor.cli._quiet import quiet

    quiet()
    with progress() as tell:
        quality = api.evaluate(
            model,
            reference,
            data=data,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            tell=tell,
        )
    if as_json:
        print_json(quality.to_dict())
    else:
        print_table(str(model), ("", ""), quality_fields(quality.to_dict()))
