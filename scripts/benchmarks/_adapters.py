"""How each peer is driven and what it wrote is read back, inside its own environment: for peer_run.py.

Needs torch, transformers and the one peer, nothing of `compressor`.
"""

import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

BATCH = 4  # rows at a time: faster on a CPU than the peers' default of 1


@dataclass(frozen=True)
class Job:
    """The task of a peer; the keys of the job file."""

    action: str  # quantize or score
    tool: str  # a key of ADAPTERS to quantize, of READERS to score
    model: str  # directory of the dense model
    out: str  # directory of the quantized one

    bits: int = 4  # these are for quantize
    group_size: int = 128
    dtype: str = "auto"  # of the dense model while it is quantized: auto, float32, bfloat16 ...
    rows: list[list[int]] = field(default_factory=list)  # calibration tokens, all rows of one length
    options: Mapping[str, Any] = field(default_factory=dict)  # the adapter says which it knows

    evaluation: list[str] = field(default_factory=list)  # and these for score: JSONL files
    documents: int = 0  # scored of each file
    document_tokens: int = 0  # scored of each document, at most

    def dense(self, dtype: str | torch.dtype) -> Any:
        """The dense model."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()


class Adapter(ABC):
    """How one tool is driven. `load` is not timed, `quantize` and `save` are, each on its own clock."""

    package: str  # the distribution whose version is reported
    model: Any  # dense, then quantized

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def load(self, tokenizer: Any) -> None:
        """Import the tool, read the dense model, and put the calibration rows into the form the tool wants."""

    @abstractmethod
    def quantize(self) -> None:
        """Turn the loaded model into a quantized one."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Write it to `job.out`; return what the files themselves cannot tell."""


class LlmCompressor(Adapter):
    """GPTQ or AWQ of llm-compressor, block by block (its `sequential` pipeline).

    Options: `method`, gptq (default), awq or rtn; `symmetric`, without which zero points are stored too, true by default;
    `format`, nvfp4, mxfp4 or fp8, and `activations`, their bits: a scheme of the tool then stands instead of integers.
    """

    SCHEMES: ClassVar[Mapping[tuple[str, int], str]] = {
        ("nvfp4", 16): "NVFP4A16",
        ("nvfp4", 4): "NVFP4",
        ("mxfp4", 16): "MXFP4A16",
        ("mxfp4", 4): "MXFP4",
        ("fp8", 8): "FP8_DYNAMIC",
    }

    package = "llmcompressor"

    def load(self, tokenizer: Any) -> None:
        self.oneshot = importlib.import_module("llmcompressor").oneshot
        self.recipe = self.modifiers({**self.numbers(), "ignore": ["lm_head"]})
        dataset = importlib.import_module("datasets").Dataset
        rows = self.job.rows
        self.data = dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        self.model = self.job.dense(self.job.dtype)

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that weights are stored as."""
        if "format" in self.job.options:
            scheme = self.SCHEMES[self.job.options["format"], self.job.options["activations"]]
            return {"scheme": scheme, "targets": "Linear"}
        schemes = importlib.import_module("compressed_tensors.quantization")
        size = self.job.group_size
        groups = {"strategy": "group", "group_size": size} if size != -1 else {"strategy": "channel"}
        symmetric = self.job.options.get("symmetric", True)
        weights = schemes.QuantizationArgs(num_bits=self.job.bits, type="int", symmetric=symmetric, **groups)
        return {"config_groups": {"group_0": schemes.QuantizationScheme(targets=["Linear"], weights=weights)}}

    def modifiers(self, grid: dict[str, Any]) -> list[Any]:
        """The method; AWQ with the search that the tool's own examples ask for."""
        if self.job.options.get("method", "gptq") == "gptq":
            return [importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier(**grid)]
        rounding = importlib.import_module("llmcompressor.modifiers.quantization").QuantizationModifier
        if self.job.options["method"] == "rtn":
            return [rounding(**grid)]
        # Its AWQ pins memory for transfers to a GPU, which fails where there is none; it makes no difference to the result.
        if not torch.cuda.is_available():
            importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache.pin_memory = lambda *_, **__: None
        awq = importlib.import_module("llmcompressor.modifiers.transform.awq").AWQModifier
        return [awq(duo_scaling="both"), rounding(**grid)]

    def quantize(self) -> None:
        self.oneshot(
            model=self.model,
            dataset=self.data,
            recipe=self.recipe,
            max_seq_length=len(self.job.rows[0]),
            num_calibration_samples=len(self.job.rows),
            batch_size=BATCH,
        )

    def save(self) -> dict[str, Any]:
        self.model.save_pretrained(self.job.out, save_compressed=True)
        return {}


class GptqModel(Adapter):
    """GPTQ of GPTQModel with its defaults: symmetric groups, its own activation-aware order of columns."""

    package = "gptqmodel"

    def load(self, tokenizer: Any) -> None:
        library = importlib.import_module("gptqmodel")
        # By default it keeps finished layers on disk; the models compared here fit in memory, and so it is faster.
        config = library.QuantizeConfig(bits=self.job.bits, group_size=self.job.group_size, offload_to_disk=False)
        dtype = self.job.dtype if self.job.dtype == "auto" else getattr(torch, self.job.dtype)
        self.model = library.GPTQModel.load(self.job.model, config, dtype=dtype)
        self.data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in self.job.rows]

    def quantize(self) -> None:
        self.model.quantize(self.data, batch_size=BATCH)

    def save(self) -> dict[str, Any]:
        self.model.save(self.job.out)
        return {}


class AutoRound(Adapter):
    """Learned rounding of auto-round, block by block, with its default of 200 iterations; symmetric groups.

    Options: what AutoRound itself takes, such as `iters`; `format` and `activations` as of llm-compressor.
    """

    package = "auto-round"

    def load(self, tokenizer: Any) -> None:
        library = importlib.import_module("auto_round")
        importlib.import_module("compressed_tensors")  # needed at saving; better missed before the tuning than after
        self.model = self.job.dense(self.job.dtype)
        self.tuner = library.AutoRound(
            self.model,
            tokenizer,
            dataset=[torch.tensor([row]) for row in self.job.rows],
            nsamples=len(self.job.rows),
            seqlen=len(self.job.rows[0]),
            device_map="cpu",
            **self.numbers(),
            **{key: value for key, value in self.job.options.items() if key not in ("format", "activations")},
        )

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that weights and activations are stored as."""
        if "format" not in self.job.options:
            return {"bits": self.job.bits, "group_size": self.job.group_size, "sym": True}
        scheme = {"scheme": self.job.options["format"].upper()}
        return scheme if self.job.options["activations"] == 4 else {**scheme, "act_bits": self.job.options["activations"]}

    def quantize(self) -> None:
        self.tuner.quantize()

    def save(self) -> dict[str, Any]:
        self.tuner.save_quantized(self.job.out, format="llm_compressor")
        return {}


class Hqq(Adapter):
    """HQQ: half-quadratic fit of scale and zero point to the weights alone, no calibration."""

    package = "hqq"

    def load(self, tokenizer: Any) -> None:
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
    """Load a directory with stock transformers and compressed-tensors, in fp32.

    Of 4-bit floating-point numbers it makes bf16 ones, which hold them exactly, at the first forward.
    """
    config = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    floats = "fp4" in config.get("quantization_config", {}).get("format", "")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16 if floats else torch.float32).eval()
    if floats:
        model(torch.zeros(1, 1, dtype=torch.long))
        torch.nn.Module.float(model)  # which transformers refuses to a model that was packed
    return model


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
