"""One step of a benchmark against peers, inside a contestant's own environment: quantize a model, or score a result.

    VENV/bin/python scripts/benchmarks/peer_run.py JOB.json RESULT.json

`_contestants.py` writes the job and reads the result; this file therefore needs torch, transformers and the one peer, nothing
of `compressor`. A failure is a result too, `{"error": ...}`, and the exit status is then 1.

Quantize: the peer reads the model and its libraries first, outside the clock. `seconds` is its own call that turns dense
weights into quantized ones, calibration included; `save_seconds`, what it then takes to pack and write them, is kept apart.

Score: the result is read back from disk, as a user would. Each document is cut after so many tokens; from the fp32 logits of
the dense and of the quantized model come, over all predicted positions of all documents alike, the mean of
KL(dense || quantized) in nats, perplexity, and how often both put the same token first.

Shape suffixes: S tokens of a document, V vocabulary.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _adapters import ADAPTERS, READERS, Job
from torch import Tensor
from transformers import AutoTokenizer


def quantize(job: Job) -> dict[str, Any]:
    """Quantize and save, timing both."""
    adapter = ADAPTERS[job.tool](job)
    adapter.load(AutoTokenizer.from_pretrained(job.model))
    dtype = str(next(adapter.model.parameters()).dtype).removeprefix("torch.")
    start = time.perf_counter()
    adapter.quantize()
    quantized = time.perf_counter()
    extra = adapter.save()
    saved = time.perf_counter()
    return {
        "version": version(adapter.package),
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "dtype": dtype,
        "seconds": quantized - start,
        "save_seconds": saved - quantized,
        **extra,
    }


def texts(path: str) -> Iterator[str]:
    """The `text` of every line of a JSONL file."""
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}:{number}: has no string under `text`; rename the column that holds the text")
            yield row["text"]


def tensors(model: str) -> dict[str, tuple[int, list[int]]]:
    """Bytes and shape of every tensor in a directory's safetensors files."""
    found = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = end - begin, entry["shape"]
    return found


def bits_per_weight(dense: str, quantized: str) -> float | None:
    """Stored bits of the linear layers of all blocks, per dense weight; None if the result is in files of another kind.

    A layer that the tool passed over counts as it is stored.
    """
    before, after = tensors(dense), tensors(quantized)
    if not after:
        return None
    parts: dict[str, dict[str, int]] = {}
    for name, (nbytes, _) in after.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = nbytes
    stored = weights = 0
    quantized_any = False
    for name, (_, shape) in before.items():
        layer, _, part = name.rpartition(".")
        in_block = any(piece.isdecimal() for piece in layer.split("."))
        if part == "weight" and in_block and len(shape) == 2 and layer in parts:
            stored += sum(nbytes for part, nbytes in parts[layer].items() if part != "bias")
            weights += math.prod(shape)
            quantized_any |= not set(parts[layer]) <= {"weight", "bias"}
    if not quantized_any:
        raise ValueError("it left every layer dense; see its log, and whether --group-size divides the layers' inputs")
    return 8 * stored / weights


@torch.no_grad()
def compare(dense: Any, quantized: Any, documents: Sequence[Tensor]) -> dict[str, Any]:
    """The figures of the module docstring, for two transformers models, over documents of token ids [1, S]."""
    count = agree = 0
    kl = nll = dense_nll = 0.0
    for ids in documents:
        expected_SV, got_SV = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (dense, quantized))
        following_S = ids[0, 1:, None]
        kl += float((expected_SV.exp() * (expected_SV - got_SV)).sum())
        nll -= float(got_SV.gather(1, following_S).sum())
        dense_nll -= float(expected_SV.gather(1, following_S).sum())
        agree += int((expected_SV.argmax(1) == got_SV.argmax(1)).sum())
        count += len(got_SV)
    return {
        "kl": kl / count,
        "perplexity": math.exp(min(nll / count, 700.0)),  # e^700 is about the largest double
        "dense_perplexity": math.exp(min(dense_nll / count, 700.0)),
        "top1": agree / count,
        "predictions": count,
    }


def score(job: Job) -> dict[str, Any]:
    """Read the result back, count its bits and compare it with the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    documents = []
    for path in job.evaluation:
        for _, text in zip(range(job.documents), texts(path), strict=False):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=job.document_tokens).input_ids
            if ids.shape[1] > 1:  # something to predict
                documents.append(ids)
    if not documents:
        raise ValueError(f"{', '.join(job.evaluation)}: no document of two tokens or more; name a file with text")
    stored = {"bits_per_weight": bits_per_weight(job.model, job.out)}
    return compare(job.dense(torch.float32), READERS[job.tool](job.out), documents) | stored


def main() -> int:
    job_file, result_file = map(Path, sys.argv[1:])
    given = json.loads(job_file.read_text(encoding="utf-8"))
    job = Job(**{key: value for key, value in given.items() if key in Job.__dataclass_fields__})
    result: dict[str, Any]
    try:
        result = {"quantize": quantize, "score": score}[job.action](job)
    except Exception as error:  # whatever a peer raises is its result
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        result = {"error": f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
