"""Where a run writes: finished parts and a journal while it works, a whole model directory in one step at its end.

    OUT.partial/work/    lock, journal.jsonl, one safetensors file per finished part (a block, or a tensor outside them), and
                         notes of passes on how far they have come with one that is not finished
    OUT.partial/model/   the directory as it will be
    OUT                  appears by renaming the latter, and only then

The journal's first line is the run's fingerprint: what must be the same for another run to go on from here. Each further
line names a part that is safely on disk, with what the report needs of it. A line cut short by a kill does not count.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.access import check_readable
from compressor.errors import OutputError, SourceError
from compressor.model.journal import Journal, load_tensors, remove_leftovers, save, sync, writing
from compressor.reading import cause, elide

NOTE = ".note"
UNFINISHED = (".partial", ".pruning", ".search")  # ends of the names of directories that runs work in
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt",
                "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite")  # fmt: skip


class Workspace:
    """The unfinished output of one run. Use as a context manager: it holds the lock."""

    def __init__(self, out: Path, fingerprint: Mapping[str, str], *, resume: bool = False, overwrite: bool = False) -> None:
        self.out, self.resume, self.overwrite = out, resume, overwrite
        self.partial = out.with_name(out.name + ".partial")
        self.work, self.model = self.partial / "work", self.partial / "model"
        self.journal = Journal(self.work, fingerprint)

    def __enter__(self) -> "Workspace":
        self.journal.lock(self.partial)
        try:
            with writing(self.partial):
                self._open()
        except BaseException:
            self.journal.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.release()

    def _open(self) -> None:
        lines = self.journal.lines()
        if self.out.exists() and not self.overwrite:
            if not lines:
                shutil.rmtree(self.partial)
            raise _exists(self.out)
        begun = " and one that is begun" if any(self.work.glob(f"*{NOTE}")) else ""
        if (len(lines) > 1 or begun) and not self.resume and not self.overwrite:
            raise OutputError(
                f"{self.partial}: holds {len(lines) - 1} finished parts{begun} of an interrupted run; "
                "give --resume to go on from there or --overwrite to start again"
            )
        if self.resume:
            self.journal.resume(self.partial, "restore it, or give --overwrite to start again")
        else:
            self.journal.start()
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()

    @property
    def finished(self) -> Mapping[str, dict[str, Any]]:
        """Lines of the journal, by part."""
        return self.journal.finished

    def add(self, part: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Put a finished part on disk, then its record in the journal."""
        self.journal.add(part, tensors, **record)
        with writing(self.work):
            for note in self.work.glob(f"{part}.*{NOTE}"):
                note.unlink()

    def notes(self, part: str, number: int) -> "PartNotes":
        """Return the notes of the pass with a number, on a part that is not finished."""
        return PartNotes(self.work, f"{part}.{number}")

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        return self.journal.read(part)

    def part(self, part: str) -> Path:
        """The file of a part."""
        return self.journal.part(part)

    def write_text(self, name: str, text: str) -> None:
        """A text file of the model directory."""
        with writing(self.model / name):
            (self.model / name).write_text(text, encoding="utf-8")

    def copy(self, file: Path, name: str) -> None:
        """A file to the model directory."""
        target = self.model / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    def publish(self, warn: Callable[[str], None]) -> None:
        """Let OUT appear, replacing what was there if that was agreed to, and clear up.

        Args:
            warn: Called with a sentence about what fails once OUT is whole.
        """
        with writing(self.out):
            for file in self.model.rglob("*"):
                if file.is_file():
                    sync(file)
            with self._replaced():
                self.model.rename(self.out)
        try:
            sync(self.out.parent)
        except OSError as error:
            warn(
                f"{elide(str(self.out), 150)}: is whole, but the system does not confirm that its name is on the disk "
                f"({cause(error)}); look for it after a crash of the machine"
            )
        remove_leftovers(self.partial, self.out, warn)

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Set aside what is at OUT; it comes back if nothing takes its place."""
        old = self.partial / "replaced"
        if not self.out.exists():
            yield
            return
        shutil.rmtree(old, ignore_errors=True)
        self.out.rename(old)
        try:
            yield
        except BaseException:
            if not self.out.exists():
                old.rename(self.out)
            raise


@dataclass(frozen=True)
class PartNotes:
    """How far a pass has come with a part: one file for each key."""

    work: Path
    prefix: str

    def load(self, key: str) -> dict[str, Tensor]:
        """Return the tensors that were saved last under a key."""
        path = self._path(key)
        return load_tensors(path) if path.is_file() else {}

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace it in one step."""
        save(self._path(key), tensors)

    def _path(self, key: str) -> Path:
        return self.work / f"{self.prefix}.{key}{NOTE}"


def copy_other_files(source: Path, to: Path, except_for: Path) -> list[str]:
    """Copy every file of a model directory that holds no weights, verbatim; a README under another name.

    Returns: their names as written.
    """
    copied = []
    for file in other_files(source, except_for, except_for.with_name(except_for.name + ".partial")):
        relative = file.relative_to(source)
        target = to / ("README.source.md" if relative.as_posix() == "README.md" else relative)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        copied.append(target.relative_to(to).as_posix())
    return copied


def other_files(source: Path, *except_for: Path) -> list[Path]:
    """Return every file of a model directory that holds no weights and belongs to no other model, after opening each.

    Raises:
        SourceError: one of them, or a directory, cannot be read.
    """
    skipped = {path.resolve() for path in except_for}
    skipped |= {config.parent.resolve() for config in source.rglob("config.json") if config.parent != source}  # other models
    skipped |= {config.parent.resolve() for config in source.rglob("adapter_config.json") if config.parent != source}
    skipped |= {path.resolve() for kind in UNFINISHED for path in source.rglob(f"*{kind}")}
    found = []
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or any(file.match(pattern) for pattern in WEIGHT_FILES):
            continue
        place = file.parent.resolve() / file.name
        if skipped.intersection((place, *place.parents)) or relative.as_posix() == "config.json":
            continue
        check_readable([file], SourceError)
        if file.is_file():
            found.append(file)
    return found


def check_target(out: Path, model: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a place that must not be written to.

    Raises:
        OutputError: there is something already, the original, or something that is no model directory.
    """
    if out.resolve() in (model.resolve(), *model.resolve().parents):
        raise OutputError(f"{out}: holds the original model; choose another --out")
    if not out.exists():
        return
    if not (resume or overwrite):
        raise _exists(out)
    if overwrite and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: is not a model directory, which --overwrite does not replace; choose another --out")


def _exists(out: Path) -> OutputError:
    return OutputError(f"{out}: exists already; give --overwrite to replace it or choose another --out")


def clear_up(out: Path, fingerprint: Mapping[str, str], warn: Callable[[str], None]) -> None:
    """Remove what a run that was killed right after publishing has left behind; another run's work stays.

    Args:
        out: Its result.
        fingerprint: Fingerprint of the run.
        warn: Called with a sentence if that cannot be removed.
    """
    partial = out.with_name(out.name + ".partial")
    journal = Journal(partial / "work", fingerprint)
    with contextlib.suppress(OutputError):  # a run is at work there, or its journal is damaged and not ours to judge
        found = journal.lines()
        if not partial.exists() or (found and found[0] != fingerprint):
            return
        journal.lock(partial)
        remove_leftovers(partial, out, warn)
        journal.release()


def check_space(out: Path, needed: int) -> None:
    """Refuse a run whose result, written once as parts and once as shards, cannot fit on the disk."""
    written = sum(file.stat().st_size for file in out.with_name(f"{out.name}.partial").rglob("*") if file.is_file())
    needed = max(0, 2 * needed - written)  # an interrupted run's parts are there already
    place = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{out}: {needed:,} bytes are needed while writing, {free:,} are free; make room or choose --out on another disk"
        )
