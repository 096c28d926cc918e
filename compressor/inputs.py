"""What a run needs before it can start: the opened model, the plan, the tokens. What can fail early, fails here."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.access import kind_of
from compressor.calibration.data import Samples, Split, check_vocabulary, load_samples, load_tokenizer
from compressor.contract import Pass
from compressor.distributed import Ranks
from compressor.errors import CalibrationError, RecipeError, SourceError
from compressor.evaluation.score import TOKENS_AT_ONCE
from compressor.evaluation.text import Protocol, Text, load_text, make_protocol
from compressor.model.checkpoint import native_dtype
from compressor.model.rewritten import Progress, Prunes, silent
from compressor.model.source import ModelSource
from compressor.model.writer import other_files
from compressor.plan import rewritten
from compressor.reading import read_json
from compressor.recipe.schema import Recipe

LONGEST = 2048  # tokens of a sample, unless the recipe or the model says otherwise
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Judged:
    """What a model is judged on."""

    texts: tuple[Text, ...]
    protocol: Protocol

    @property
    def tokens(self) -> int:
        """That go through the models."""
        return sum(passage.tokens.numel() for text in self.texts for passage in text.passages)


def open_model(
    recipe: Recipe, model: Path, device: torch.device, dtype: str | None, tell: Progress = silent, *, sizes_only: bool = False
) -> ModelSource:
    """The model as the passes will see it; `tell` and `sizes_only` as of `Rewrites.rewriting`.

    Reads headers only, unless a pass changes the whole model.
    """
    source = ModelSource(model, device, computation_dtype(device, dtype, model))
    other_files(model)  # will be copied in the end: what cannot be read is to be said now
    shaped = source.absent or source.widths
    dense = shaped and not source.packed() and not source.hadamard and source.cache is None
    if "quantization_config" in source.raw_config and not dense:
        method = source.raw_config["quantization_config"].get("quant_method")
        raise SourceError(f"{model}: already quantized ({method}); compress the original model instead")
    return rewritten(source, recipe.passes, tell, sizes_only=sizes_only)


def needs_data(recipe: Recipe) -> bool:
    """Whether a pass of the recipe reads text."""
    return streams(recipe.passes) or any(isinstance(step, Prunes) for step in recipe.passes)


def streams(passes: Sequence[Pass]) -> bool:
    """Whether one of them collects statistics on blocks as they are compressed."""
    return any(step.needs or step.together for step in passes)


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


def load_data(recipe: Recipe, source: ModelSource) -> tuple[Samples | None, Judged | None]:
    """The text for calibration and for evaluation, where the recipe needs it. Fails before any long work."""
    spec, judge = recipe.calibration, recipe.evaluation
    if not needs_data(recipe) and judge is None:
        return None, None
    tokenizer = load_tokenizer(source.path)
    calibration = evaluation = None
    length = sample_length(spec.seq_len, source)
    if needs_data(recipe):
        calibration = load_samples(spec.source, tokenizer, samples=spec.samples, seq_len=length, seed=spec.seed)
        check_vocabulary(calibration.tokens, source.vocab_size, spec.source)
    if judge is not None:
        named = (judge.source,) if isinstance(judge.source, str) else judge.source or (spec.source,)
        protocol = make_protocol(tokenizer, sample_length(judge.seq_len or length, source), judge.stride, judge.bos)
        evaluation = judged(source, named, protocol, judge.samples, spec.seed, {spec.source})
    return calibration, evaluation


def judged(
    model: ModelSource,
    sources: Sequence[str],
    protocol: Protocol,
    samples: int,
    seed: int = 0,
    calibrated_on: Set[str | None] = frozenset(),
) -> Judged:
    """Texts to judge a model on: whole ones, but the held-out part of those that it was calibrated on."""
    tokenizer = load_tokenizer(model.path)
    known = {_place(name) for name in calibrated_on if name is not None}
    texts = []
    for name in dict.fromkeys(sources):
        split: Split = "held-out" if _place(name) in known else "all"
        texts.append(load_text(name, tokenizer, protocol, samples=samples, seed=seed, split=split))
        check_vocabulary(torch.cat([p.tokens for p in texts[-1].passages]), model.vocab_size, name)
    return Judged(tuple(texts), protocol)


def calibration_source(model: Path) -> str | None:
    """Where the text came from that a model was calibrated on, if its report tells."""
    try:
        found = read_json(model / "report.json", SourceError)["calibration"]["source"]
    except (SourceError, LookupError, TypeError):
        return None
    return str(found)


def _place(source: str) -> str:
    """The same for every way to write the same file."""
    return str(Path(source).resolve()) if kind_of(Path(source), CalibrationError) == "file" else source


def check_shares(calibration: Samples | None, ranks: Ranks) -> None:
    """Refuse to start more processes than there is calibration text for.

    Raises:
        RecipeError: a process would get no batch.
    """
    batches = ranks.world if calibration is None else len(calibration.batches(TOKENS_AT_ONCE))
    if batches < ranks.world:
        raise RecipeError(
            f"calibration: {batches} batches of about {TOKENS_AT_ONCE} tokens for {ranks.world} processes; "
            "start fewer processes or raise --samples"
        )


def computation_dtype(device: torch.device, wanted: str | None, model: Path) -> torch.dtype:
    """The dtype calibration runs in: by default the checkpoint's, where the hardware computes in it, else float32.

    Raises:
        RecipeError: an unknown name.
    """
    if wanted is not None:
        if wanted not in DTYPES:
            raise RecipeError(f"dtype {wanted}: not one of {', '.join(DTYPES)}")
        return DTYPES[wanted]
    return native_dtype(model, device)
