"""Prepare a run: open the model and load the calibration text. Whatever can fail early fails here."""

from collections.abc import Sequence
from pathlib import Path

import torch

from compressor.errors import RecipeError, SourceError
from compressor.model.checkpoint import native_dtype
from compressor.model.edited import Progress, silent
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.model.writer import other_files
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE, Samples, check_vocabulary, load_samples
from compressor.pipeline.contract import Pass
from compressor.pipeline.plan import rewritten
from compressor.pipeline.ranks import Ranks
from compressor.recipe.schema import Recipe

LONGEST = 2048  # default tokens per sample; a model made for fewer gets fewer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(
    recipe: Recipe, model: Path, device: torch.device, dtype: str | None, tell: Progress = silent, *, sizes_only: bool = False
) -> ModelSource:
    """Open the model as the passes will see it. For `tell` and `sizes_only` see `Pass.rewriting`.

    Only headers are read, unless a pass changes the checkpoint before any block is read.

    Raises:
        SourceError: the model is already quantized.
    """
    source = ModelSource(model, device, computation_dtype(device, dtype, model))
    other_files(model)  # these are copied at the end, so a file that cannot be read must fail now
    shaped = source.absent or source.widths
    dense = shaped and not source.packed() and not source.hadamard and source.cache is None
    if "quantization_config" in source.raw_config and not dense:
        method = source.raw_config["quantization_config"].get("quant_method")
        raise SourceError(f"{model}: already quantized ({method}); compress the original model instead")
    return rewritten(source, recipe.passes, tell, sizes_only=sizes_only)


def needs_data(recipe: Recipe) -> bool:
    """Return whether a pass of the recipe reads text."""
    return streams(recipe.passes) or any(step.prunes for step in recipe.passes)


def streams(passes: Sequence[Pass]) -> bool:
    """Return whether a pass needs the calibration stream while blocks are compressed."""
    return any(step.needs or step.together for step in passes)


def sample_length(wanted: int | None, source: ModelSource) -> int:
    """Return the number of tokens per sample.

    Raises:
        RecipeError: more tokens than the model was made for, or fewer than 2 (there is nothing to predict).
    """
    if wanted is not None and wanted < 2:
        raise RecipeError(f"seq_len {wanted}: a sample needs at least 2 tokens; raise --seq-len")
    if wanted is not None and wanted > source.max_positions:
        raise RecipeError(f"seq_len {wanted}: the model was made for at most {source.max_positions} tokens; lower --seq-len")
    return wanted or min(LONGEST, source.max_positions)


def load_calibration(recipe: Recipe, source: ModelSource) -> Samples | None:
    """Return the calibration text of a recipe; None if no pass reads text."""
    spec = recipe.calibration
    if not needs_data(recipe):
        return None
    length, tokenizer = sample_length(spec.seq_len, source), load_tokenizer(source.path)
    calibration = load_samples(spec.source, tokenizer, samples=spec.samples, seq_len=length, seed=spec.seed)
    check_vocabulary(calibration.tokens, source.vocab_size, spec.source)
    return calibration


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
    """Return the dtype of calibration. The default is the checkpoint's dtype if the hardware supports it, otherwise float32.

    Raises:
        RecipeError: the name is unknown.
    """
    if wanted is not None:
        if wanted not in DTYPES:
            raise RecipeError(f"dtype {wanted}: not one of {', '.join(DTYPES)}")
        return DTYPES[wanted]
    return native_dtype(model, device)
