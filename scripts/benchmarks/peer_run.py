"""One step of the peers benchmark, inside a contestant's own environment: quantize a model, or score a result.

    VENV/bin/python scripts/benchmarks/peer_run.py JOB.json RESULT.json

`peers.py` writes the job and reads the result; this file therefore needs torch, transformers and the one peer, nothing of
`compressor`. A failure is a result too, `{"error": ...}`, and the exit status is then 1.

Quantize: the peer reads the model and its libraries first, outside the clock. `seconds` is its own call that turns dense
weights into quantized ones, calibration included; `save_seconds`, what it then takes to pack and write them, is kept apart.

Score: the result is read back from disk, as a user would. Each document is cut after so many tokens; from the fp32 logits of
the dense and of the quantized model come, over all predicted positions of all documents alike, the mean of
KL(dense || quantized) in nats, perplexity, and how often both put the same token first.

Shape suffixes: S tokens of a document, V vocabulary.
"""

import importlib
import json
import math
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4  # rows at a time: faster on a CPU than the peers' default of 1


@dataclass(frozen=True)
class Job:
    """What to do; the keys of the job file."""

    action: str  # quantize or score
    tool: str  # a key of ADAPTERS to quantize, of READERS to score
    model: str  # directory of the dense model
    out: str  # directory of the quantized one
    bits: int
    group_size: int
    dtype: str  # of the dense model while it is quantized: auto, float32, bfloat16 ...
    calibration: str
    samples: int
    seq_len: int
    evaluation: list[str]
    documents: int  # scored of each evaluation file
    document_tokens: int  # scored of each document, at most

    def dense(self, dtype: str | torch.dtype) -> Any:
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()


def texts(path: str) -> Iterator[str]:
    """The `text` of every line of a JSONL file."""
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}:{number}: has no string under `text`; rename the column that holds the text")
            yield row["text"]


def calibration_rows(job: Job, tokenizer: Any) -> list[list[int]]:
    """Rows of exactly `seq_len` tokens, cut from the documents joined by the end token: no padding."""
    ids: list[int] = []
    for text in texts(job.calibration):
        end = [tokenizer.eos_token_id] if ids and tokenizer.eos_token_id is not None else []
        ids += end + tokenizer(text).input_ids
        if len(ids) >= job.samples * job.seq_len:
            return [ids[i * job.seq_len : (i + 1) * job.seq_len] for i in range(job.samples)]
    raise ValueError(
        f"{job.calibration}: {len(ids)} tokens, {job.samples} rows of {job.seq_len} need {job.samples * job.seq_len}; "
        "name a larger file, or lower --samples or --seq-len"
    )


class Adapter(ABC):
    """How one tool is driven. `load` is not timed, `quantize` and `save` are, each on its own clock."""

    package: str  # the distribution whose version is reported
    model: Any  # dense, then quantized

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def load(self, tokenizer: Any, rows: list[list[int]]) -> None:
        """Import the tool, read the dense model, and put the calibration rows into the form the tool wants."""

    @abstractmethod
    def quantize(self) -> None:
        """Turn the loaded model into a quantized one."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Write it to `job.out`; return what the files themselves cannot tell."""


class LlmCompressor(Adapter):
    """GPTQ of llm-compressor, block by block (its `sequential` pipeline), symmetric groups."""

    package = "llmcompressor"

    def load(self, tokenizer: Any, rows: list[list[int]]) -> None:
        self.oneshot = importlib.import_module("llmcompressor").oneshot
        modifiers = importlib.import_module("llmcompressor.modifiers.gptq")
        schemes = importlib.import_module("compressed_tensors.quantization")
        size = self.job.group_size
        groups = {"strategy": "group", "group_size": size} if size != -1 else {"strategy": "channel"}
        weights = schemes.QuantizationArgs(num_bits=self.job.bits, type="int", symmetric=True, **groups)
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=weights)
        self.recipe = modifiers.GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
        dataset = importlib.import_module("datasets").Dataset
        self.data = dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        self.model = self.job.dense(self.job.dtype)

    def quantize(self) -> None:
        self.oneshot(
            model=self.model,
            dataset=self.data,
            recipe=self.recipe,
            max_seq_length=self.job.seq_len,
            num_calibration_samples=self.job.samples,
            batch_size=BATCH,
        )

    def save(self) -> dict[str, Any]:
        self.model.save_pretrained(self.job.out, save_compressed=True)
        return {}


class GptqModel(Adapter):
    """GPTQ of GPTQModel with its defaults: symmetric groups, its own activation-aware order of columns."""

    package = "gptqmodel"

    def load(self, tokenizer: Any, rows: list[list[int]]) -> None:
        library = importlib.import_module("gptqmodel")
        # By default it keeps finished layers on disk; the models compared here fit in memory, and so it is faster.
        config = library.QuantizeConfig(bits=self.job.bits, group_size=self.job.group_size, offload_to_disk=False)
        dtype = self.job.dtype if self.job.dtype == "auto" else getattr(torch, self.job.dtype)
        self.model = library.GPTQModel.load(self.job.model, config, dtype=dtype)
        self.data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]

    def quantize(self) -> None:
        self.model.quantize(self.data, batch_size=BATCH)

    def save(self) -> dict[str, Any]:
        self.model.save(self.job.out)
        return {}


class AutoRound(Adapter):
    """Learned rounding of auto-round, block by block, with its default of 200 iterations; symmetric groups."""

    package = "auto-round"

    def load(self, tokenizer: Any, rows: list[list[int]]) -> None:
        library = importlib.import_module("auto_round")
        importlib.import_module("compressed_tensors")  # needed at saving; better missed before the tuning than after
        self.model = self.job.dense(self.job.dtype)
        self.tuner = library.AutoRound(
            self.model,
            tokenizer,
            bits=self.job.bits,
            group_size=self.job.group_size,
            sym=True,
            dataset=[torch.tensor([row]) for row in rows],
            nsamples=self.job.samples,
            seqlen=self.job.seq_len,
            device_map="cpu",
        )

    def quantize(self) -> None:
        self.tuner.quantize()

    def save(self) -> dict[str, Any]:
        self.tuner.save_quantized(self.job.out, format="llm_compressor")
        return {}


class Hqq(Adapter):
    """HQQ: half-quadratic fit of scale and zero point to the weights alone, no calibration."""

    package = "hqq"

    def load(self, tokenizer: Any, rows: list[list[int]]) -> None:
        self.model = self.job.dense(self.job.dtype)
        self.library = importlib.import_module("hqq.models.hf.base").AutoHQQHFModel
        config = importlib.import_module("hqq.core.quantize").BaseQuantizeConfig
        size = self.job.group_size
        self.config = config(nbits=self.job.bits, group_size=size if size != -1 else None)

    def quantize(self) -> None:
        self.library.quantize_model(self.model, quant_config=self.config, compute_dtype=self.model.dtype, device="cpu")

    def save(self) -> dict[str, Any]:
        self.library.save_quantized(self.model, self.job.out)
        stored = weights = 0
        for module in self.library.serialize_weights(self.model, verbose=False).values():
            if "W_q" in module:
                stored += sum(part.nbytes for part in module.values() if isinstance(part, Tensor))
                weights += math.prod(module["shape"])
        return {"bits_per_weight": 8 * stored / weights}


def read_stock(out: str) -> Any:
    """What stock transformers, with compressed-tensors beside it, makes of a directory."""
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def read_gptqmodel(out: str) -> Any:
    """Its layers compute in 16 bits only; to be judged like the others, each is replaced by its weight in fp32."""
    library = importlib.import_module("gptqmodel")
    model = library.GPTQModel.load(out, backend=library.BACKEND.TORCH, device="cpu").model
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "dequantize_weight"):
            weight = layer.float().dequantize_weight().T.float().contiguous()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            linear.weight.data = weight
            if layer.bias is not None:
                linear.bias.data = layer.bias.float()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model.float().eval()


def read_hqq(out: str) -> Any:
    """HQQ keeps a file of its own kind, which only its own loader reads."""
    library = importlib.import_module("hqq.models.hf.base").AutoHQQHFModel
    return library.from_quantized(out, compute_dtype=torch.float32, device="cpu").eval()


ADAPTERS: dict[str, type[Adapter]] = {
    "llmcompressor": LlmCompressor,
    "gptqmodel": GptqModel,
    "autoround": AutoRound,
    "hqq": Hqq,
}
READERS: dict[str, Callable[[str], Any]] = {
    "stock": read_stock,
    "llmcompressor": read_stock,
    "gptqmodel": read_gptqmodel,
    "autoround": read_stock,
    "hqq": read_hqq,
}


def quantize(job: Job) -> dict[str, Any]:
    """Quantize and save, timing both."""
    adapter = ADAPTERS[job.tool](job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    adapter.load(tokenizer, calibration_rows(job, tokenizer))
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
    """Read the result back and compare it with the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    documents = []
    for path in job.evaluation:
        for _, text in zip(range(job.documents), texts(path), strict=False):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=job.document_tokens).input_ids
            if ids.shape[1] > 1:  # something to predict
                documents.append(ids)
    if not documents:
        raise ValueError(f"{', '.join(job.evaluation)}: no document of two tokens or more; name a file with text")
    return compare(job.dense(torch.float32), READERS[job.tool](job.out), documents)


def main() -> int:
    job_file, result_file = map(Path, sys.argv[1:])
    job = Job(**json.loads(job_file.read_text(encoding="utf-8")))
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
