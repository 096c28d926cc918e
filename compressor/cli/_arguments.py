"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path,
    typer.Argument(help="Hugging Face model directory with safetensors weights.", metavar="MODEL", show_default="."),
]
Out = Annotated[Path | None, typer.Option(help="Directory to create. [default: MODEL with what was done appended]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run of the same command.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or start an interrupted run again.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan, the exact output size and the expected memory; read no weight."),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: passes.0.damp=0.1")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for the computation.")]
