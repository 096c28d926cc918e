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
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Reload the result through every loader that claims to read it."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan, the exact output size and the expected memory; read no weight."),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change to a key of the recipe: passes.0.damp=0.1")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for the computation.")]

# What text a model is judged on.
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]; repeatable, "
        "each is reported by itself too. [default: builtin]"
    ),
]
Samples = Annotated[int, typer.Option(help="Maximum number of samples from each text.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of a sample. [default: the model's maximum, at most 2048]")]
Stride = Annotated[
    int | None, typer.Option(help="New tokens of a sample; fewer than --seq-len overlap. [default: no overlap]")
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Begin each sample with the begin token. [default: as the tokenizer does with a text]"
    ),
]
Documents = Annotated[bool, typer.Option("--documents", help="Make each document a sample, cut off at --seq-len tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of the order of documents.")]
Resident = Annotated[
    bool, typer.Option("--resident", help="Hold the models in memory instead of streaming them: faster for many samples.")
]
Save = Annotated[bool, typer.Option("--save", help="Put the figures into MODEL's report.json, report.html and README.md.")]
