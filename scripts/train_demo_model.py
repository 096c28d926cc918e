"""Train the embedded demo model from scratch on the Python standard library and write it to compressor/assets/demo.

    .venv/bin/python scripts/train_demo_model.py [--steps N] [--out DIR]

A Llama of 4.2 M parameters: hidden 256, 4 blocks, 8 query and 4 key/value heads of 32, MLP 768, vocabulary 4096, tied
embeddings; every dimension is a multiple of 128. Nine tenths of the tokens are library files, one tenth are short
conversations made of the docstrings ("What does `textwrap.dedent` do?"), so that the chat template means something.
Held-out modules (compressor/pipeline/calibration/stdlib.py) are never seen. The result depends on the Python version whose
library is read; it is recorded in the model's README.
"""

import argparse
import ast
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.pipeline.calibration.stdlib import documents

VOCAB, LENGTH, BATCH = 4096, 256, 16
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversations() -> Iterator[str]:
    """One question and answer per documented function or class of the training modules."""
    for path, text in documents():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and (
                answer := ast.get_docstring(node)
            ):
                question = f"What does `{module}.{node.name}` do?"
                first = answer.split("\n\n")[0]
                yield f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{first}{TURN_END}\n"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits apart, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def rows(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """Documents in random order, each begun by the end token, cut into rows: int64 [N, LENGTH + 1]."""
    random.Random(seed).shuffle(texts)
    end = tokenizer.eos_token_id
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in (end, *ids)]
    count = (len(stream) - 1) // LENGTH
    return torch.tensor(stream[: count * LENGTH + 1]).unfold(0, LENGTH + 1, LENGTH)


def loss_on(model: Callable[..., Any], batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Callable[..., Any], data: torch.Tensor) -> float:
    return math.exp(sum(loss_on(model, batch).item() * len(batch) for batch in data.split(BATCH)) / len(data))


def train(model: LlamaForCausalLM, data: torch.Tensor, valid: torch.Tensor, steps: int) -> None:
    """AdamW with warm-up and linear decay to zero; the progress line shows perplexity on held-out modules."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    fast, start = torch.compile(model), time.monotonic()
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(steps * BATCH // len(data) + 1)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 100, (steps - step) / (0.8 * steps), 1.0)
        loss = loss_on(fast, data[order[step * BATCH : (step + 1) * BATCH]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - start
            held_out = f", held-out perplexity {perplexity(model, valid[:32]):.2f}" if (step + 1) % 500 == 0 else ""
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f}{held_out}, {left / 60:.0f} min left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "compressor/assets/demo")
    options = parser.parse_args()
    torch.manual_seed(0)
    code, chats = [text for _, text in documents()], list(conversations())
    tokenizer = train_tokenizer(code)
    data = rows(tokenizer, code + ["".join(chats[i : i + 20]) for i in range(0, len(chats), 20)], seed=0)
    valid = rows(tokenizer, [text for _, text in documents(held_out=True)], seed=0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {data[:, 1:].numel():,} training tokens", flush=True)
    train(model, data, valid, options.steps)
    model = model.bfloat16()
    result = {
        "perplexity": perplexity(model, valid),
        "tokens": valid[:, 1:].numel(),
        "python": platform.python_version(),
    }
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
