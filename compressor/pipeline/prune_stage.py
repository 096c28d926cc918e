"""The pruning stage, before compression: passes make the model smaller, each starting from the previous pass's result."""

import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor

from compressor.errors import CalibrationError, OutputError, RecipeError
from compressor.model.edited import Rewriting
from compressor.model.journal import LOCK, Journal, load_tensors, remove_leftovers, save, sound, writing
from compressor.model.source import ModelSource
from compressor.pipeline.blocks import open_stream
from compressor.pipeline.calibration.data import Samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.contract import Pass
from compressor.pipeline.job import Job, Tell
from compressor.pipeline.memory_estimate import collecting
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.text import search_text
from compressor.recipe.registry import node
from compressor.recipe.schema import Recipe

ANEW = "give --overwrite to start again, or choose another --out"


@dataclass(frozen=True)
class Pruned:
    """The result of a pruning pass.

    Args:
        rewriting: The change; None if there is none.
        report: Report of the pass, plain data.
    """

    rewriting: Rewriting | None
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Sketch:
    """A prediction of the names, dtypes and shapes after a pruning pass, made before any weight is read.

    Args:
        rewriting: The change; None if there is none.
        certain: Whether this is the only possible result.
        more: Maximum number of additional parameters, if the result is uncertain.
    """

    rewriting: Rewriting | None
    certain: bool = True
    more: int = 0


@dataclass(frozen=True)
class Work:
    """The context of a pruning pass.

    Args:
        recipe: The complete recipe.
        original: The model before any pruning.
        source: The model after the previous passes.
        calibration: Calibration text.
        ranks: The ranks that share the work.
        place: Directory for intermediate files; it must be kept until the model is written.
        known: Properties that must be equal for earlier results to be reused.
        tell: Called with progress.
    """

    recipe: Recipe
    original: ModelSource
    source: ModelSource
    calibration: Samples
    ranks: Ranks
    place: Path
    known: Mapping[str, str]
    tell: Tell

    @property
    def job(self) -> Job:
        """Job of the model, without passes and plan."""
        return Job(self.source, (), {}, self.ranks)

    def stream(self) -> CalibrationStream:
        """Open a calibration stream before the first block."""
        return open_stream(self.job, self.calibration, keeping(self.recipe.calibration.on_disk), self.tell)

    def once(self, name: str, settings: object, make: Callable[[Path], Mapping[str, Tensor]]) -> Path:
        """Return a file of tensors. Make it unless an interrupted run has left it.

        Args:
            name: Name of the content.
            settings: Settings of the pass. A file made with other settings is not used.
            make: Function that computes the tensors; called on all ranks with the path of a file for intermediate results.
                The first rank's tensors are saved.
        """
        known = hashlib.sha256(repr((sorted(self.known.items()), settings)).encode()).hexdigest()[:12]
        file = self.place / f"{name}-{known}.safetensors"
        if self.ranks.first:
            with writing(self.place):
                self.place.mkdir(parents=True, exist_ok=True)
        if not self.ranks.agree(file.exists()):
            unfinished = file.with_suffix(".training")
            made = make(unfinished)
            if self.ranks.first:
                save(file, made)
                with writing(unfinished):
                    unfinished.unlink(missing_ok=True)
        self.ranks.barrier()
        return file

    def text(self, tokens: int, key: str = "search.tokens") -> Tensor:
        """Return at least `tokens` tokens [N, S] that calibration does not read. `key` is the recipe key for the message."""
        return search_text(self.recipe, tokens, self.source, self.calibration, key)


def as_stored(source: ModelSource, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors by name in the model to tensors by name on disk, in the dtype that they have on disk."""
    return {(at := source.names[name]): new.to(source.checkpoint.headers[at].dtype) for name, new in tensors.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file that `Work.once` made."""
    return load_tensors(file)


def stored(file: Path, names: Iterable[str], **others: Any) -> Rewriting:
    """Return the change that takes tensors, by name on disk, from such a file. `others` are fields of `Rewriting`."""
    return Rewriting({name: partial(_read, file, name) for name in names}, **others)


def _read(file: Path, name: str, old: Tensor) -> Tensor:
    with sound(file), safe_open(file, framework="pt") as opened:
        new: Tensor = opened.get_tensor(name)
    return new.to(old.dtype)


@node
class PruningPass(Pass):
    """Base class of pruning passes. They do nothing on single blocks."""

    prunes: ClassVar[bool] = True
    must_be_last: ClassVar[bool] = False  # its result is useless once another pruning pass changes the model
    requires_pruned_model: ClassVar[bool] = False  # it compensates for earlier pruning
    compares_with_original_blocks: ClassVar[bool] = False  # it compares each block with the original's
    changes_hidden_basis: ClassVar[bool] = False  # hidden states between blocks differ from the original's

    @abstractmethod
    def sketch(self, source: ModelSource) -> Sketch:
        """Predict the shapes of the result."""

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory of `prune` in bytes, as defined in memory_estimate.py. The default is the stream's.

        Args:
            source: The model.
            tokens: Number of calibration tokens of this rank.
            batch: Number of tokens in a batch.
        """
        return collecting(source, tokens, batch)

    @abstractmethod
    def prune(self, work: Work) -> Pruned:
        """Prune the model."""


def pruning(passes: Sequence[Pass]) -> list[tuple[int, PruningPass]]:
    """Return the pruning passes, each with its number in the recipe."""
    return [(number, step) for number, step in enumerate(passes) if isinstance(step, PruningPass)]


def check_order(source: ModelSource, passes: Sequence[Pass]) -> None:
    """Refuse pruning passes in a wrong order, or for a model whose layers receive rotated activations.

    Raises:
        RecipeError: a pass prunes after one that changes blocks or one that must be last, compares blocks with the
            original's after the hidden basis has changed, or the activations are rotated.
    """
    if source.hadamard and any(step.prunes for step in passes):
        raise RecipeError(
            f"passes: activations of {len(source.hadamard)} layers are turned (rotate: online), which pruning does not take "
            "into account; leave out online: true, or prune without rotating"
        )
    for number, step in pruning(passes):
        before = passes[:number]
        if not all(other.prunes or other.rewrites for other in before):
            raise RecipeError(
                f"passes.{number}: takes parts of the model away before any block is compressed; put it before the others"
            )
        if any(other.must_be_last for _, other in pruning(before)):
            raise RecipeError(
                f"passes.{number}: changes the model that a prompt was learned for; put `soft_prompt` behind it"
            )
        rebased = (
            [(first, other) for first, other in pruning(before) if other.changes_hidden_basis]
            if step.compares_with_original_blocks
            else []
        )
        for first, other in rebased:
            raise RecipeError(
                f"passes.{number}: {named(step)} compares every block with the original's, but {named(other)} "
                f"(passes.{first}) leaves other hidden channels between blocks; put it before that, or take `recover`"
            )


def check_pruned(step: PruningPass, original: ModelSource, source: ModelSource) -> None:
    """Refuse a pass that compensates for pruning if nothing was pruned.

    Raises:
        RecipeError: nothing was pruned.
    """
    if step.requires_pruned_model and source is original:
        raise RecipeError(
            f"{named(step)}: nothing was pruned, so nothing was lost; put `prune_width` or `prune_depth` before it"
        )


def named(step: object) -> str:
    """Return the name of a pass in recipes."""
    return type(step).__module__.rpartition(".")[2]


def sketched(source: ModelSource, passes: Sequence[Pass]) -> tuple[ModelSource, bool, int]:
    """Predict the result of pruning.

    Returns: the model with the predicted shapes, whether these are certain, and the number of parameters that may be added.

    Raises:
        RecipeError: see `check_order` and `check_pruned`.
    """
    check_order(source, passes)
    original, certain, more = source, True, 0
    for _, step in pruning(passes):
        check_pruned(step, original, source)
        found = step.sketch(source)
        source = source if found.rewriting is None else source.rewritten(found.rewriting)
        certain, more = certain and found.certain, more + found.more
    return source, certain, more


def expected_peak(source: ModelSource, passes: Sequence[Pass], tokens: int, batch: int) -> int:
    """Return the largest peak of any pruning pass, in bytes. For the arguments see `PruningPass.expected_memory`."""
    most = 0
    for _, step in pruning(passes):
        most = max(most, step.expected_memory(source, tokens, batch))
        rewriting = step.sketch(source).rewriting
        source = source if rewriting is None else source.rewritten(rewriting)
    return most


def pruned(
    recipe: Recipe,
    source: ModelSource,
    calibration: Samples | None,
    ranks: Ranks,
    place: Path,
    known: Mapping[str, str],
    tell: Tell,
) -> tuple[ModelSource, list[Mapping[str, Any]]]:
    """Run all pruning passes. Return the pruned model and the report of each pass. For the arguments see `Work`.

    Raises:
        RecipeError: a pass cannot be applied.
        CalibrationError: there is no calibration text.
    """
    check_order(source, recipe.passes)
    original, done = source, []
    for number, step in pruning(recipe.passes):
        if calibration is None:
            raise CalibrationError(f"passes.{number}: needs calibration text")
        check_pruned(step, original, source)
        found = step.prune(Work(recipe, original, source, calibration, ranks, place / str(number), known, tell))
        source = source if found.rewriting is None else source.rewritten(found.rewriting)
        done.append(found.report)
    return source, done


def pruning_place(out: Path) -> Path:
    """Return the directory for intermediate files, which are kept until the model is written."""
    return out.with_name(f"{out.name}.pruning")


@contextmanager
def held(out: Path, warn: Callable[[str], None], *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Lock `pruning_place(out)` against other runs while open. Remove it on success, or if it is empty.

    Args:
        out: Result of the run, which is complete when the context exits without an error.
        warn: Called with a sentence if the directory cannot be removed then.
        resume: Whether the files of an interrupted run may be used.
        overwrite: Whether to remove those files if `resume` is false.

    Raises:
        OutputError: another run uses the directory, or it holds files and neither `resume` nor `overwrite` is given.
    """
    place = pruning_place(out)
    lock = Journal(place, {})
    lock.lock(place)
    try:
        if overwrite and not resume:
            _empty(place)
        if _content(place) and not resume:
            raise OutputError(
                f"{place}: holds what a run has made that did not come to its end; give --resume to go on from there or "
                "--overwrite to start again"
            )
        yield
        remove_leftovers(place, out, warn)
    finally:
        lock.release()
        with suppress(OSError):  # an empty directory does no harm
            if not _content(place):
                shutil.rmtree(place)


def clear(out: Path, warn: Callable[[str], None]) -> None:
    """Remove the intermediate files of a complete run's pruning. For the arguments see `held`.

    Raises:
        OutputError: another run uses the directory.
    """
    if pruning_place(out).exists():
        with held(out, warn, resume=True, overwrite=False):
            pass


def _content(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name != LOCK]


def _empty(place: Path) -> None:
    with writing(place):
        for path in _content(place):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
