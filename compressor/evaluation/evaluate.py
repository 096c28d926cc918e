"""Judging models as functions: what `compress eval` and `compress compare` call, and what closes every run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from compressor.errors import RecipeError, SourceError
from compressor.evaluation.data import Judged, calibration_source, judged
from compressor.evaluation.predict import RESIDENT_LOGITS, Predictor, Resident, Streamed
from compressor.evaluation.quality import Quality, measure
from compressor.evaluation.tasks.harness import load_tasks, run_tasks
from compressor.evaluation.tasks.results import TaskResult
from compressor.evaluation.tasks.subject import Place
from compressor.evaluation.tasks.work import Work
from compressor.evaluation.text import make_protocol
from compressor.host import known_state
from compressor.model.device import compute_device
from compressor.model.memory import available_memory, dense_bytes
from compressor.model.source import ModelSource, return_freed_memory
from compressor.model.tokenizer import load_tokenizer
from compressor.model.unused import log_warnings
from compressor.pipeline.calibration.data import TOKENS_AT_ONCE
from compressor.pipeline.job import Event, Tell, silent
from compressor.pipeline.memory_estimate import generating
from compressor.pipeline.prepare import computation_dtype, sample_length
from compressor.pipeline.ranks import check_alone
from compressor.runtime.load import continuation

PROMPT_TOKENS = 32
NEW_TOKENS = 48


class EvaluateOptions(TypedDict, total=False):
    """The keywords of `evaluate_all`, which says what they mean."""

    data: str | Sequence[str]
    samples: int
    seq_len: int | None
    stride: int | None
    bos: bool | None
    documents: bool
    seed: int
    resident: bool
    device: str | None
    dtype: str | None


def evaluate(
    model: str | Path = ".",
    reference: str | Path | None = None,
    *,
    tell: Tell = silent,
    **options: Unpack[EvaluateOptions],
) -> Quality:
    """Perplexity of a model on text and, with a reference, its divergence from that.

    Args:
        model: Model directory, dense or packed.
        reference: The original.
        tell: Called with progress.
        options: Options of `evaluate_all`.
    """
    return evaluate_all([model], reference, tell=tell, **options)[0]


@known_state()
def evaluate_all(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    data: str | Sequence[str] = "builtin",
    samples: int = 64,
    seq_len: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    documents: bool = False,
    seed: int = 0,
    resident: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    tell: Tell = silent,
) -> list[Quality]:
    """Judge models on the same text, all in one go: the reference is computed once.

    Args:
        models: Model directories, dense or packed.
        reference: The original.
        data: Sources of text (see compressor.pipeline.calibration.data), whole; of what a model was calibrated on, as its
            report tells, the held-out part.
        samples: At most so many, of each source.
        seq_len: Tokens of each; None takes what the first model was made for, at most 2048.
        stride: New tokens of a sample; None for no overlap.
        bos: Begin each sample with the begin token; None does as the tokenizer does with a text.
        documents: Each document is a sample of its own.
        seed: Seed of the order of documents.
        resident: Hold the models in memory instead of streaming them block by block.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        dtype: Dtype of the computation; None takes float32.
        tell: Called with progress.
    """
    if samples < 1:
        raise RecipeError(f"samples {samples}: not a positive number; raise --samples")
    check_alone()
    place = compute_device(device)
    precision = computation_dtype(place, dtype or "float32", Path(models[0]))
    opened = [ModelSource(Path(path), place, precision) for path in models]
    original = ModelSource(Path(reference), place, precision) if reference is not None else None
    log_warnings(*(one.unused for one in (*opened, original) if one is not None))
    protocol = make_protocol(
        load_tokenizer(opened[0].path), sample_length(seq_len, opened[0]), stride, bos, one_by_one=documents
    )
    sources = (data,) if isinstance(data, str) else data
    text = judged(opened[0], sources, protocol, samples, seed, {calibration_source(one.path) for one in opened})
    return judge(opened, original, text, tell, resident=resident)


def judge(
    models: Sequence[ModelSource], reference: ModelSource | None, text: Judged, tell: Tell, *, resident: bool = False
) -> list[Quality]:
    """Judge opened models on prepared text. A source that is made resident must not be used afterwards."""

    def progress(done: int, total: int) -> None:
        tell(Event("evaluate", done, total))

    if resident:
        everything = [*models, *([reference] if reference is not None else [])]
        words, together = models[0].vocab_size, max(text.protocol.seq_len, TOKENS_AT_ONCE)
        logits = max(text.protocol.seq_len * words, min(together * words, RESIDENT_LOGITS)) * models[0].dtype.itemsize
        check_memory(everything, logits * len(everything))
    predictor: type[Resident] | type[Streamed] = Resident if resident else Streamed
    everyone: list[Predictor] = [predictor(one) for one in models]
    original = predictor(reference) if reference is not None else None
    return measure(everyone, text.texts, text.protocol, original, dtype=models[0].dtype, tell=progress)


@known_state()
def answer_tasks(
    model: str | Path,
    names: Sequence[str],
    reference: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    resident: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    announce: Callable[[Work, float], None] = lambda work, seconds: None,
    tell: Tell = silent,
) -> list[TaskResult]:
    """Accuracy of a model on tasks and, with a reference, which of its answers flipped.

    Args:
        model: Model directory, dense or packed.
        names: Names of tasks: of lm-evaluation-harness, of our own suites, or of files (see compressor.evaluation.tasks).
        reference: The original.
        limit: Questions of each task, at most.
        seed: Seed of the choice of questions.
        resident: Hold one model at a time in memory instead of streaming it block by block.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        dtype: Dtype of the computation; None takes float32.
        announce: Called once, before it starts, with the work and the seconds expected.
        tell: Called with progress.
    """
    check_alone()
    computed_on = compute_device(device)
    place = Place(computed_on, computation_dtype(computed_on, dtype or "float32", Path(model)), resident)
    return run_tasks(
        Path(model),
        names,
        place,
        reference=Path(reference) if reference is not None else None,
        limit=limit,
        seed=seed,
        announce=announce,
        tell=lambda done, total: tell(Event("answer", done, total)),
    )


@known_state()
def check_tasks(model: str | Path, names: Sequence[str], limit: int | None, seed: int) -> None:
    """Refuse tasks that cannot be loaded.

    Raises:
        RecipeError: see run_tasks.
    """
    load_tasks(Path(model), names, limit, seed)


def check_memory(models: Sequence[ModelSource], besides: int = 0) -> None:
    """Refuse to hold models in memory that do not fit; `besides` them so many bytes are needed.

    Raises:
        SourceError: with the numbers.
    """
    needed, free = sum(map(dense_bytes, models)) + besides, available_memory(models[0].device)
    if needed > free:
        raise SourceError(
            f"{models[0].path}: resident in {models[0].dtype} takes {needed / 1e9:.1f} GB with what it is compared to, "
            f"{free / 1e9:.1f} GB are available; leave out --resident, or give --dtype bfloat16"
        )


def continuations(model: Path, reference: Path, text: Judged, count: int, template: ModelSource) -> list[dict[str, str]]:
    """How both models, greedy, and the text itself continue the beginnings of samples.

    Args:
        model: The compressed model.
        reference: The original.
        text: Text whose samples are taken.
        count: How many.
        template: Says device and dtype.

    Raises:
        SourceError: a model does not fit into memory.
    """
    tokenizer = load_tokenizer(reference)
    passages = [text.texts[i % len(text.texts)].passages[i // len(text.texts) :][:1] for i in range(count)]
    beginnings = [passage.tokens for some in passages for passage in some]
    written: list[list[str]] = []
    for path in (reference, model):
        source = ModelSource(path, template.device, template.dtype)
        if not generating(source):
            raise SourceError(
                f"{path}: resident in {source.dtype} takes {dense_bytes(source) / 1e9:.1f} GB, more than half of the "
                f"{available_memory(source.device) / 1e9:.1f} GB that are available"
            )
        whole = source.whole()
        written.append([continuation(whole, tokenizer, ids[:PROMPT_TOKENS], NEW_TOKENS) for ids in beginnings])
        del whole, source
        return_freed_memory()
    return [
        {
            "prompt": str(tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=True)),
            "text": str(tokenizer.decode(ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS], skip_special_tokens=True)),
            "reference": original,
            "model": compressed,
        }
        for ids, original, compressed in zip(beginnings, *written, strict=True)
    ]
