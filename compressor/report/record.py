"""Record of a run: one row per layer, the totals, the evidence. Saved as report.json with the keys below."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One compressed layer."""

    layer: str
    option: str
    bits_per_weight: float  # stored bits / weights before compression, metadata included
    error: float  # squared error relative to the layer's output (or to its weight, without data)


@dataclass
class Report:
    """Content of report.json."""

    model: str  # name of the source directory
    path: str  # path of the result
    out: str  # its name
    version: str
    fingerprint: Mapping[str, str]  # values that must be equal for two runs to count as the same run
    recipe: Any  # the resolved recipe, defaults written out
    calibration: Mapping[str, Any] | None  # source, samples, seq_len, seed, sha256 of the tokens
    versions: Mapping[str, str]  # versions of the packages that matter
    command: str = ""  # command that repeats the run
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bits_per_weight: float = 0.0  # over the compressed layers
    model_bits_per_weight: float = 0.0  # over everything: embeddings, norms, head
    size_bytes: int = 0  # total size of the safetensors files
    source_size_bytes: int = 0
    layout: str = ""  # quant_method of config.json, or `dense`
    runs_code: bool = False  # transformers must run a Python file of the result (compressor/model/hf_config/decilm.py)
    seconds: float = 0.0  # time for pruning and compression, evaluation not included
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    quality: Mapping[str, Any] | None = None  # see compressor.evaluation.quality
    tasks: list[Mapping[str, Any]] = field(default_factory=list)  # see compressor.evaluation.tasks
    samples: list[Mapping[str, str]] = field(default_factory=list)  # prompt, and its continuation: text, reference, model
    speed: Mapping[str, Any] | None = None  # see compressor.runtime.bench
    verification: list[Mapping[str, Any]] = field(default_factory=list)  # see compressor.evaluation.verify
    pruning: list[Mapping[str, Any]] = field(default_factory=list)  # notes of passes that prune or train the model
    search: Mapping[str, Any] | None = None  # how the plan was found, see compressor.pipeline.search.find
    plots: Mapping[str, Any] | None = None  # data that report.html plots, see compressor.report.html.plots

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; the main figures of `quality` are repeated at the top level."""
        return {**asdict(self), **at_the_top(self.quality)}


def at_the_top(quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the figures of `quality` that are repeated at the top level of a report; None if not measured."""
    return {key: (quality or {}).get(key) for key in ("perplexity", "reference_perplexity", "kl", "top1_agreement")}
