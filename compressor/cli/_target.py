"""Define the options of the verbs that search for a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli._show import print_table, print_warnings

if TYPE_CHECKING:
    from compressor.pipeline.search.find import Found

Size = Annotated[
    str | None, typer.Option(help="Maximum size of the weight files: 4GB, 3.5GiB, 800MB or bytes.", show_default=False)
]
Bits = Annotated[
    float | None,
    typer.Option(help="Maximum bits of a weight of the compressed layers, scales and codebooks counted: 2.75."),
]
Ratio = Annotated[float | None, typer.Option(help="Minimum share of the original's size to save: 0.8 leaves a fifth.")]
Using = Annotated[
    str,
    typer.Option(
        help="Numbers to mix, separated by commas: int, fp4, vq. With prune, attentions and MLPs may be dropped. Results of "
        "vq or prune are read by compressor.load only."
    ),
]
Time = Annotated[
    str | None,
    typer.Option(
        help="Time limit for the whole run: 90s, 30m, 2h. A tighter limit means that fewer options are tried. "
        "[default: no limit]"
    ),
]
Levels = Annotated[
    Path | None,
    typer.Option(help="Directory for measured levels, kept for other targets. [default: next to OUT, until OUT is complete]"),
]
Calibration = Annotated[str, typer.Option(help="builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN].")]
Samples = Annotated[int, typer.Option(help="Number of calibration samples. The search reads more text from the same source.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave unchanged; repeatable.")]


def print_found(found: "Found") -> None:
    """Print the loss of the choices that the search found, the best at the end."""
    rows = [
        (one.name, f"{one.bits_per_weight:.3f}", f"{one.kl:.4f}", f"{one.seconds:.0f} s" if one.seconds else "")
        for one in sorted(found.contestants, key=lambda one: -one.kl)
    ]
    print_table("choices, judged on text that none was made on", ("", "bits/weight", "KL", "after"), rows)
    print_warnings(found.warnings)
