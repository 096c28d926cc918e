"""The verbs as functions: what the command line calls, and what a program can call instead."""

import hashlib
import json
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from compressor import pipeline
from compressor.calibration.data import Samples, check_vocabulary, load_samples, load_tokenizer
from compressor.calibration.stream import CalibrationStream
from compressor.card import model_card
from compressor.distributed import Ranks
from compressor.errors import OutputError, RecipeError, SourceError
from compressor.evaluation.quality import Quality, measure
from compressor.model import quantization_config, shards
from compressor.model.architecture import LinearKind, linear_layers
from compressor.model.checkpoint import read_config
from compressor.model.source import ModelSource
from compressor.model.writer import Workspace, check_space, check_target, clear_up, copy_other_files, writing
from compressor.pipeline import Event, Job, Tell
from compressor.plan import describe_plan, expected_memory, make_plan, model_formats, output_headers
from compressor.recipe import Recipe, load_recipe, make_recipe, to_yaml
from compressor.report import Report, Row
from compressor.types import Plan

LONGEST = 2048  # tokens of a sample, unless the recipe or the model says otherwise
TOKENS_AT_ONCE = 4096  # that go through a block together
NOTHING: tuple[str, ...] = ()  # finished by an interrupted run
LIBRARIES_BYTES = 500 * 2**20  # of the process before it reads a weight
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def silent(event: Event) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Forecast:
    """What a run would do: `--dry-run`."""

    out: Path
    plan: Plan
    size_bytes: int  # of the safetensors files and their index, exact
    source_size_bytes: int
    bits_per_weight: float  # over the compressed layers
    expected_peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "out": str(self.out), "plan": describe_plan(self.plan)}


def run(
    recipe: Recipe | str | Path,
    model: str | Path = ".",
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
) -> Report:
    """Compress a model as a recipe says and write a model directory.

    Args:
        recipe: A recipe, or the path of one.
        model: Hugging Face model directory with safetensors weights.
        out: Directory to create; None appends what was done to the model's name.
        resume: Go on from an interrupted run of the same recipe, model and data.
        overwrite: Replace what is there.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        dtype: Calibration runs in; None takes the checkpoint's where the hardware computes in it, else float32.
            The result is always compared with the original in float32.
        tell: Called with progress.

    Raises:
        CompressorError: anything a user can mend.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    ranks = Ranks.from_environment(device)
    source, plan = prepare(recipe, Path(model), ranks.device, dtype)
    out = default_out(Path(model), plan) if out is None else Path(out)
    check_target(out, Path(model), resume=resume, overwrite=overwrite)
    calibration, evaluation = load_data(recipe, source)
    fingerprint = {
        "recipe": _sha256(to_yaml(recipe)),
        "model": fingerprint_model(source),
        "data": calibration.sha256 if calibration else "none",
        "computation": computation(source),
    }
    report = new_report(recipe, source, out, fingerprint, calibration)
    if resume and out.exists() and not overwrite:
        return finished_report(out, report)
    check_space(out, shards.total_bytes(shards.layout(output_headers(source, recipe.passes, plan))))
    job = Job(source, recipe.passes, plan, ranks)
    if not ranks.first:
        compress_blocks(job, calibration, None, ranks.agree(NOTHING), report, tell)
        ranks.barrier()
        return report
    with Workspace(out, fingerprint, resume=resume, overwrite=overwrite) as workspace:
        compress_blocks(job, calibration, workspace, ranks.agree(tuple(workspace.finished)), report, tell)
        tell(Event("write", 0, 1, str(out)))
        write_model(recipe, source, plan, workspace, report)
        if evaluation is not None:
            report.quality = compare(workspace.model, source, evaluation, tell).to_dict()
        workspace.write_text("report.json", json.dumps(report.to_dict(), indent=1) + "\n")
        workspace.write_text("README.md", model_card(report))
        workspace.publish()
    ranks.barrier()
    return report


def quantize(
    model: str | Path = ".", out: str | Path | None = None, *, bits: int = 4, tell: Tell = silent, **options: Any
) -> Report:
    """Quantize a model to integers of `bits` bits: `run` with the recipe of `quantize_recipe`.

    Args:
        model: Hugging Face model directory.
        out: Directory to create; None appends what was done to the model's name.
        bits: 2 to 8.
        tell: Called with progress.
        options: Of `quantize_recipe`, and resume, overwrite, device, dtype of `run`.
    """
    of_run = {key: options.pop(key) for key in ("resume", "overwrite", "device", "dtype") if key in options}
    return run(quantize_recipe(bits, **options), model, out, tell=tell, **of_run)


def quantize_recipe(
    bits: int = 4,
    *,
    method: str = "gptq",
    group_size: int = 128,
    symmetric: bool = True,
    calibration: str = "builtin",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    evaluate: bool = True,
    changes: Sequence[str] = (),
) -> Recipe:
    """The recipe that `compress quantize` runs.

    Args:
        bits: Width of a code.
        method: A pass: `gptq` (calibrated) or `rtn` (rounding only).
        group_size: Adjacent input channels that share a scale; -1 for whole rows.
        symmetric: False stores zero points, which only this project's loader reads.
        calibration: Where the text comes from.
        samples: Of calibration.
        seq_len: Tokens of each; None takes what the model was made for, at most 2048.
        seed: Of the order of documents.
        ignore: Patterns of layers to leave as they are.
        evaluate: Compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.
    """
    data = {
        "passes": [
            {
                "pass": method,
                "options": [{"format": "int_group", "bits": bits, "group_size": group_size, "symmetric": symmetric}],
                "ignore": list(ignore),
            }
        ],
        "calibration": {"source": calibration, "samples": samples, "seq_len": seq_len, "seed": seed},
        "evaluation": {} if evaluate else None,
    }
    return make_recipe(data, changes, "options")


def forecast(
    recipe: Recipe,
    model: str | Path,
    out: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Forecast:
    """What `run` would do and how large the result would be, from the headers alone."""
    source, plan = prepare(recipe, Path(model), Ranks.from_environment(device).device, dtype)
    files = shards.layout(output_headers(source, recipe.passes, plan))
    spec = recipe.calibration
    tokens = spec.samples * sample_length(spec.seq_len, source) if needs_data(recipe) else 0
    bits, weights = planned_bits(source, recipe, plan)
    return Forecast(
        out=default_out(Path(model), plan) if out is None else Path(out),
        plan=plan,
        size_bytes=shards.total_bytes(files),
        source_size_bytes=sum(file.stat().st_size for file in source.checkpoint.files()),
        bits_per_weight=bits / weights,
        expected_peak_memory_bytes=LIBRARIES_BYTES + expected_memory(source, recipe.passes, tokens),
    )


def evaluate(
    model: str | Path = ".",
    reference: str | Path | None = None,
    *,
    data: str = "builtin",
    samples: int = 64,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
) -> Quality:
    """Perplexity of a model on held-out text and, with a reference, its divergence from that.

    Args:
        model: Model directory, dense or packed.
        reference: The original.
        data: Source of the text (see compressor.calibration.data); its held-out part is used.
        samples: At most so many.
        seq_len: Tokens of each; None takes what the model was made for, at most 2048.
        seed: Of the order of documents.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        dtype: Of the computation; None takes float32.
        tell: Called with progress.
    """
    if samples < 1:
        raise RecipeError(f"samples {samples}: not a positive number; raise --samples")
    place = Ranks.from_environment(device).device
    judged = ModelSource(Path(model), place, computation_dtype(place, dtype or "float32", Path(model)))
    original = ModelSource(Path(reference), place, judged.dtype) if reference is not None else None
    text = load_samples(
        data,
        load_tokenizer(judged.path),
        samples=samples,
        seq_len=sample_length(seq_len, judged),
        seed=seed,
        held_out=True,
    )
    check_vocabulary(text, judged.vocab_size)
    return _measure(judged, original, text, tell)


def prepare(recipe: Recipe, model: Path, device: torch.device, dtype: str | None) -> tuple[ModelSource, Plan]:
    """The opened model and the plan for it. Reads headers only."""
    source = ModelSource(model, device, computation_dtype(device, dtype, model))
    if "quantization_config" in source.raw_config:
        method = source.raw_config["quantization_config"].get("quant_method")
        raise SourceError(f"{model}: already quantized ({method}); compress the original model instead")
    return source, make_plan(source, recipe.passes)


def needs_data(recipe: Recipe) -> bool:
    """Whether a pass of the recipe collects statistics."""
    return any(step.needs for step in recipe.passes)


def sample_length(wanted: int | None, source: ModelSource) -> int:
    """Tokens of a sample.

    Raises:
        RecipeError: more than the model was made for, or too few to predict one from another.
    """
    if wanted is not None and wanted < 2:
        raise RecipeError(f"seq_len {wanted}: a sample needs at least 2 tokens; raise --seq-len")
    if wanted is not None and wanted > source.max_positions:
        raise RecipeError(f"seq_len {wanted}: the model was made for at most {source.max_positions} tokens; lower --seq-len")
    return wanted or min(LONGEST, source.max_positions)


def load_data(recipe: Recipe, source: ModelSource) -> tuple[Samples | None, Samples | None]:
    """The tokens for calibration and for evaluation, where the recipe needs them. Fails before any long work."""
    spec, judge = recipe.calibration, recipe.evaluation
    if not needs_data(recipe) and judge is None:
        return None, None
    tokenizer = load_tokenizer(source.path)
    calibration = evaluation = None
    length = sample_length(spec.seq_len, source)
    if needs_data(recipe):
        calibration = load_samples(spec.source, tokenizer, samples=spec.samples, seq_len=length, seed=spec.seed)
        check_vocabulary(calibration, source.vocab_size)
    if judge is not None:
        evaluation = load_samples(
            judge.source or spec.source,
            tokenizer,
            samples=judge.samples,
            seq_len=sample_length(judge.seq_len or length, source),
            seed=spec.seed,
            held_out=True,
        )
        check_vocabulary(evaluation, source.vocab_size)
    return calibration, evaluation


def compress_blocks(
    job: Job,
    calibration: Samples | None,
    workspace: Workspace | None,
    finished: Sequence[str],
    report: Report,
    tell: Tell,
) -> None:
    """The pipeline, timed."""
    source, ranks = job.source, job.ranks
    started = time.monotonic()
    stream = None
    if calibration is not None:
        batches = ranks.mine(calibration.batches(TOKENS_AT_ONCE))
        stream = CalibrationStream(source.first_inputs(batches), ranks, source.device)
    pipeline.compress(job, stream, workspace, finished, report, tell)
    report.seconds = time.monotonic() - started
    report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if source.device.type == "cuda":
        report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(source.device)


def write_model(recipe: Recipe, source: ModelSource, plan: Plan, workspace: Workspace, report: Report) -> None:
    """Everything of the model directory but the report and the card."""
    with writing(workspace.model):
        files = shards.assemble((workspace.part(part) for part in workspace.finished), workspace.model)
    formats = model_formats(source, recipe.passes, plan)
    kinds = linear_layers(source.model)
    entry = quantization_config.write(
        formats,
        [name for name, kind in kinds.items() if type(kind) is LinearKind],
        [name for name, kind in kinds.items() if type(kind) is not LinearKind],
    )
    workspace.write_text("config.json", json.dumps({**source.raw_config, "quantization_config": entry}, indent=2) + "\n")
    copy_other_files(source.path, workspace.model, workspace.out)
    workspace.write_text("recipe.yaml", to_yaml(recipe))
    workspace.write_text("plan.yaml", yaml.safe_dump(describe_plan(plan), sort_keys=False))
    bits, weights = planned_bits(source, recipe, plan)
    report.layout = entry["quant_method"]
    report.size_bytes = shards.total_bytes(files)
    report.bits_per_weight = bits / weights
    dense = sum(p.numel() for p in source.model.parameters())
    report.model_bits_per_weight = 8 * sum(shard.data_bytes for shard in files) / dense


def planned_bits(source: ModelSource, recipe: Recipe, plan: Plan) -> tuple[int, int]:
    """Stored bits and number of weights of the layers that get packed."""
    bits = weights = 0
    for layer, fmt in model_formats(source, recipe.passes, plan).items():
        index, _, name = layer.removeprefix(f"{source.prefix}.").partition(".")
        shape = source.block(int(index), load=False).shape(name)
        bits, weights = bits + fmt.stored_bits(shape), weights + shape[0] * shape[1]
    return bits, weights


def compare(model: Path, source: ModelSource, evaluation: Samples, tell: Tell) -> Quality:
    """Measure what was written against the original, in float32."""
    return _measure(ModelSource(model, source.device), ModelSource(source.path, source.device), evaluation, tell)


def _measure(model: ModelSource, reference: ModelSource | None, text: Samples, tell: Tell) -> Quality:
    def progress(done: int, total: int) -> None:
        tell(Event("evaluate", done, total))

    return measure(model, text.batches(TOKENS_AT_ONCE), text.source, reference, progress)


def default_out(model: Path, plan: Plan) -> Path:
    """The model's name with what was done appended, beside it."""
    model = model.resolve()
    labels = sorted({option.label for option in plan.values()})
    return model.with_name(f"{model.name}-{labels[0] if len(labels) == 1 else 'mixed'}")


def computation_dtype(device: torch.device, wanted: str | None, model: Path) -> torch.dtype:
    """The dtype calibration runs in: by default the checkpoint's, where the hardware computes in it, else float32.

    Raises:
        RecipeError: an unknown name.
    """
    if wanted is not None:
        if wanted not in DTYPES:
            raise RecipeError(f"dtype {wanted}: not one of {', '.join(DTYPES)}")
        return DTYPES[wanted]
    config = read_config(model)
    stored = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    native = torch.cpu._is_avx512_bf16_supported() and stored is torch.bfloat16
    return stored if device.type == "cuda" or native else torch.float32


def new_report(
    recipe: Recipe, source: ModelSource, out: Path, fingerprint: dict[str, str], calibration: Samples | None
) -> Report:
    """A report with everything that is known before the run."""
    spec = recipe.calibration
    data = None
    if calibration is not None:
        count, length = calibration.tokens.shape
        data = {
            "source": spec.source,
            "samples": count,
            "seq_len": length,
            "seed": spec.seed,
            "sha256": calibration.sha256,
        }
    return Report(
        model=source.path.resolve().name,
        path=str(out),
        out=out.name,
        version=version("compressor"),
        fingerprint=fingerprint,
        recipe=yaml.safe_load(to_yaml(recipe)),
        calibration=data,
        versions={"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}},
        source_size_bytes=sum(file.stat().st_size for file in source.checkpoint.files()),
    )


def finished_report(out: Path, report: Report) -> Report:
    """The report of a run that is complete already: what --resume finds when the kill came too late.

    Raises:
        OutputError: the directory was written by another run.
    """
    try:
        found = json.loads((out / "report.json").read_text())
        same = found["fingerprint"] == dict(report.fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise OutputError(f"{out}: exists and is not the result of this run; give --overwrite or choose another --out")
    clear_up(out, report.fingerprint)
    known = {key: found[key] for key in vars(report) if key in found and key != "rows"}
    return replace(report, **known, rows=[Row(**row) for row in found["rows"]])


def fingerprint_model(source: ModelSource) -> str:
    """Hash of a checkpoint's config, headers and a sample of its bytes: cheap even for a very large one."""
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for file in source.checkpoint.files():
        size, piece, pieces = file.stat().st_size, 2**16, 64
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(pieces):
                opened.seek(i * max(0, size - piece) // (pieces - 1))
                digest.update(opened.read(piece))
    return digest.hexdigest()


def computation(source: ModelSource) -> str:
    """What the arithmetic of a run depends on besides its inputs."""
    return f"compressor {version('compressor')}, torch {torch.__version__}, {source.device.type}, {source.dtype}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
