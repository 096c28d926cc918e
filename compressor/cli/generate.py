"""`compress generate`: let a model write."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, progress


def generate(
    model: a.Model = Path(),
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Treat the prompt as a user's turn of a conversation.")] = False,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. [default: the likeliest token each time]")] = None,
    kernel: Annotated[
        str, typer.Option(help="auto, native, cuda, cpu, or reference, to multiply by packed weights.")
    ] = "auto",
    as_json: a.Json = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Continue a prompt with MODEL, dense or compressed.

    Example: `compress generate model-int4 --chat --prompt "What is a list?"`
    """
    from compressor.cli._quiet import quiet, tell_kernels
    from compressor.model.device import compute_device
    from compressor.runtime.load import generate as continue_prompt

    quiet()
    tell_kernels()
    place = str(compute_device(device))
    with progress():
        text = continue_prompt(
            model, prompt, max_new_tokens=max_new_tokens, chat=chat, device=place, seed=seed, kernel=kernel
        )
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        sys.stdout.write(text + "\n")
