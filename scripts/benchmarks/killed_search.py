"""Kill `compress fit` at random moments of its search, resume it, and compare the result with an uninterrupted run's.

    scripts/bench killed_search --kills 200

Every run is a process of its own, forked from one that has imported torch. A kill is SIGKILL, at a moment drawn evenly from
the time that the search takes; every third run is killed a second time while it resumes. The plan and the weights of each
must equal, byte for byte, those of the run that was left alone. Exit status 1 if any differs.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import typer

FORKS = multiprocessing.get_context("forkserver")
INTS = ", ".join(f"{{format: int_group, bits: {bits}, group_size: 32}}" for bits in (2, 3, 4, 8))
SETTINGS = (
    *("--samples", "4", "--seq-len", "64", "--bits", "4.5", "--no-eval", "--no-verify", "--json"),
    *("--set", f"passes.0.options=[{INTS}]", "--set", "passes.0.refine=0", "--set", "passes.0.search=false"),
    *("--set", "search.tokens=1024", "--set", "search.table_tokens=256", "--set", "search.rounds=3"),
    *("--set", "search.evolve.generations=6", "--set", "search.evolve.offspring=6"),
    *("--set", "search.evolve.stages=[[3, 128], [1, 512]]"),
)
DEADLINE = 300.0  # seconds after which a run hangs


def tiny(path: Path, text: str) -> Path:
    """Make a random Llama of two blocks, with a tokenizer of 300 tokens for a text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=2, vocab_size=300, max_position_embeddings=256, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(path)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def compress(arguments: list[str], log: str) -> None:
    """Run `compress ARGUMENTS` in this process, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    import torch

    from compressor.cli import main as compress_main

    torch.set_num_threads(1)
    sys.argv = ["compress", *arguments]
    compress_main()


def started(out: Path, model: Path, text: Path, *more: str) -> BaseProcess:
    """Start a fit."""
    arguments = ["fit", str(model), "--out", str(out), "--calibration", str(text), *SETTINGS, *more]
    process: BaseProcess = FORKS.Process(target=compress, args=(arguments, str(out.with_name("log"))))
    process.start()
    return process


def finish(process: BaseProcess, out: Path) -> None:
    """Wait for a run that must succeed."""
    process.join(DEADLINE)
    if process.exitcode != 0:
        process.kill()
        raise SystemExit(f"a run ended with {process.exitcode}: {out.with_name('log').read_text()[-2000:]}")


def wait_for(path: Path, process: BaseProcess) -> float:
    """Return when a path has appeared, or the process has ended."""
    end = time.monotonic() + DEADLINE
    while not path.exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    return time.monotonic()


def result(out: Path) -> dict[str, str]:
    """The plan and the hashes of the weights."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.glob("*.safetensors*"))}
    return {"plan": (out / "plan.yaml").read_text(), **found}


def stage(search: Path) -> str:
    """How far a killed search had come, by what it left."""
    steps = [json.loads(line)["stage"] for trail in search.glob("search-*.jsonl") for line in trail.read_text().splitlines()]
    if not steps:
        return "measuring levels, or scoring allocators"
    return steps[-1] if steps[-1] in ("successive programmes", "evolution") else "after the allocators"


def kill(out: Path, process: BaseProcess, seconds: float) -> str | None:
    """Kill a run some seconds into its search; return the stage, or None if the search was over before."""
    search = out.with_name(f"{out.name}.search")
    wait_for(search, process)
    process.join(seconds)
    over = out.with_name(f"{out.name}.partial").exists() or not process.is_alive()
    process.kill()
    process.join()
    return None if over else stage(search)


def main(
    kills: Annotated[int, typer.Option(help="Number of runs that are killed.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the counts to.")] = None,
) -> None:
    """Kill and resume searches, and count which results differ."""
    FORKS.set_forkserver_preload(["compressor.api", "compressor.cli", "datasets"])
    place = Path(tempfile.mkdtemp())
    text = place / "text.txt"
    lines = (f"The number {n} and its square, {n * n}, stand in line {n} of this text." for n in range(3000))
    text.write_text("\n\n".join(lines))
    model = tiny(place / "model", text.read_text())
    whole = place / "whole" / "out"
    whole.parent.mkdir()
    process = started(whole, model, text)
    began = wait_for(whole.with_name("out.search"), process)
    took = wait_for(whole.with_name("out.partial"), process) - began
    finish(process, whole)
    expected, rng = result(whole), random.Random(seed)
    stages: Counter[str] = Counter()
    different: list[int] = []
    twice = late = number = 0
    while sum(stages.values()) < kills:
        number += 1
        killed = place / str(number) / "out"
        killed.parent.mkdir()
        found = kill(killed, started(killed, model, text), rng.uniform(0, took))
        if found is None:
            late += 1  # a machine that was faster this time: not a kill of the search
        else:
            stages[found] += 1
        if found is not None and number % 3 == 0:
            twice += kill(killed, started(killed, model, text, "--resume"), rng.uniform(0, took)) is not None
        finish(started(killed, model, text, "--resume"), killed)
        if result(killed) != expected:
            different.append(number)
        shutil.rmtree(killed.parent)
        sys.stderr.write(f"{sum(stages.values())} of {kills} kills, {len(different)} different\n")
    answer: dict[str, Any] = {"kills": kills, "seed": seed, "search_seconds": round(took, 1), "stages": dict(stages)}
    answer |= {"killed_twice": twice, "after_the_search": late, "different": different}
    sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    if out is not None:
        out.write_text(json.dumps(answer, indent=1) + "\n")
    shutil.rmtree(place)
    raise SystemExit(bool(different))


if __name__ == "__main__":
    typer.run(main)
