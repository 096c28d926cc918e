"""Accuracy on task files by lm-evaluation-harness beside a scorer of a few lines: `scripts/bench tasks MODEL FILE…`.

The scorer knows nothing of the harness: it reads the file, asks plain transformers, one question at a time, and counts. Exit
status 1 if they disagree on a single question.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.cli._quiet import quiet
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.harness import answer
from compressor.evaluation.tasks.harness import quiet as quiet_harness
from compressor.evaluation.tasks.loading import load
from compressor.evaluation.tasks.subject import Place, Subject
from compressor.model.memory import available_memory
from compressor.model.tokenizer import load_tokenizer

SHOTS = 5
ANSWER = 256  # tokens


class Scorer:
    """Right answers of a model, by the definition of each form."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.positions = int(self.model.config.max_position_embeddings)

    def right(self, rows: list[dict[str, Any]], limit: int, seed: int) -> list[bool]:
        """Return whether each answer is right, for the same questions that the product draws."""
        worked = "answer" in rows[0]
        shots = rows[:SHOTS] if worked else []
        asked = rows[len(shots) :]
        drawn = sorted(random.Random(seed).sample(range(len(asked)), min(limit, len(asked))))
        examples = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
        return [self.number(examples, asked[n]) if worked else self.choice(asked[n]) for n in drawn]

    def choice(self, row: dict[str, Any]) -> bool:
        if "text" in row:
            context, _, target = row["text"].rpartition(" ")
            return self.likelihood(context, f" {target}")[1]
        if "good" in row:
            return self.likelihood("", f" {row['good']}")[0] >= self.likelihood("", f" {row['bad']}")[0]
        before, blank, after = row["question"].partition(" _ ")
        if blank:
            scores = [self.likelihood(f"{before} {choice}", f" {after}")[0] for choice in row["choices"]]
        else:
            question = row["question"] if "Question:" in row["question"] else f"Question: {row['question']}"
            scores = [self.likelihood(f"{question}\nAnswer:", f" {choice}")[0] for choice in row["choices"]]
        return bool(scores.index(max(scores)) == row["label"])

    @torch.no_grad()
    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether it is the greedy one."""
        if context:
            before, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + continuation)
        else:
            before = [self.tokenizer.bos_token_id]
            whole = [*before, *self.tokenizer.encode(continuation, add_special_tokens=False)]
        ids: Tensor = torch.tensor([whole[-self.positions :]])
        count = len(whole) - len(before)
        logp = self.model(ids).logits[0, -count - 1 : -1].double().log_softmax(-1)
        following = ids[0, -count:]
        return float(logp.gather(-1, following[:, None]).sum()), bool((logp.argmax(-1) == following).all())

    @torch.no_grad()
    def number(self, examples: str, row: dict[str, Any]) -> bool:
        """Greedy, a token at a time, until the next question."""
        length = min(ANSWER, self.positions // 2)
        ids = self.tokenizer.encode(f"{examples}Question: {row['question']}\nAnswer:")[-(self.positions - length) :]
        written: list[int] = []
        cache, step = None, torch.tensor([ids])
        while len(written) < length and "Question:" not in self.tokenizer.decode(written):
            out = self.model(step, past_key_values=cache, use_cache=True)
            cache, best = out.past_key_values, int(out.logits[0, -1].argmax())
            if best == self.tokenizer.eos_token_id:
                break
            written.append(best)
            step = torch.tensor([[best]])
        text = self.tokenizer.decode(written).partition("Question:")[0]
        numbers = [found.replace(",", "").replace("$", "") for found in re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?", text)]
        return bool(numbers) and float(numbers[-1]) == float(row["answer"].rpartition("#### ")[2].replace(",", ""))


def by_harness(options: argparse.Namespace, file: Path, resident: bool, positions: int) -> list[bool]:
    """Return which questions are answered right by the product's count."""
    encoder = Encoder(load_tokenizer(options.model), positions)
    subject = Subject(options.model, Place(torch.device("cpu"), torch.float32, resident, available_memory))
    with quiet_harness():
        [found] = answer(subject, load([str(file.resolve())], encoder, options.limit, options.seed), encoder).each.values()
    return [value == 1.0 for value in found.get("acc,none") or found["exact_match,none"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=100, help="questions of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions")
    options = parser.parse_args()
    quiet()
    scorer = Scorer(options.model)
    table = Table(title=f"{options.model.resolve().name}, {options.limit} questions of each file")
    for name in ("file", "questions", "right: streamed", "resident", "few lines", "differing", "seconds of each"):
        table.add_column(name, justify="right")
    differing = 0
    for file in options.files:
        raw = file.read_bytes()
        lines = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode().split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        times, found = [time.perf_counter()], []
        for resident in (False, True):
            found.append(by_harness(options, file, resident, scorer.positions))
            times.append(time.perf_counter())
        found.append(scorer.right(rows, options.limit, options.seed))
        times.append(time.perf_counter())
        different = sum(len(set(three)) > 1 for three in zip(*found, strict=True))
        seconds = " ".join(f"{b - a:.1f}" for a, b in itertools.pairwise(times))
        table.add_row(file.name, str(len(found[0])), *(str(sum(one)) for one in found), str(different), seconds)
        differing += different
    Console().print(table)
    if differing:
        raise SystemExit(f"harness and scorer differ on {differing} questions")


if __name__ == "__main__":
    main()
