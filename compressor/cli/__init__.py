"""The command line: parse, call one function, print. Results go to stdout, everything else to stderr.

One file per verb, each with a function of the verb's name (`eval` is `eval_`). Heavy imports happen inside the commands, so
that `--help` answers at once. Exit status: 0 done, 1 a check failed, 2 could not run, 128 + n ended by signal n.
"""

import os

import typer

from compressor.cli._again import again
from compressor.cli._ending import ending
from compressor.cli._say import say
from compressor.cli.bench import bench
from compressor.cli.compare import compare
from compressor.cli.demo import demo
from compressor.cli.eval import eval_
from compressor.cli.fit import fit
from compressor.cli.generate import generate
from compressor.cli.inspect import inspect
from compressor.cli.prune import prune
from compressor.cli.quantize import quantize
from compressor.cli.report import report
from compressor.cli.run import run
from compressor.cli.search import search
from compressor.cli.verify import verify
from compressor.errors import CompressorError, LostRankError

app = typer.Typer(
    help="Post-training compression of language models: a Hugging Face model directory in, a smaller one out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for verb in (quantize, prune, fit, search, run, eval_, compare, report, verify, inspect, bench, generate, demo):
    app.command(verb.__name__.rstrip("_"))(ending(verb))


def main() -> None:
    """Run the command line."""
    # Read when torch is loaded. Threads that spin at the end of every small operation fight with whatever else runs on the
    # machine: with both of two cores busy, a run was measured 10 times slower than with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except CompressorError as error:
        lost = f" ({again()})" if isinstance(error, LostRankError) else ""
        say(f"error: {error}{lost}")
        raise SystemExit(error.status) from None
