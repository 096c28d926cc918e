"""Storage of the hidden states between two blocks: in memory, or in a file for more text than memory can hold."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from compressor.errors import CalibrationError

Keep = Callable[[Iterable[Tensor]], "Hidden"]  # stores hidden states that are on the CPU


class OnDisk(Sequence[Tensor]):
    """Hidden states of batches in an unnamed file, which is deleted with this object or when the process ends.

    Only a requested batch is in memory. Changing it does not change the file.

    Args:
        directory: Directory of the file.
        batches: Hidden states on the CPU.

    Raises:
        CalibrationError: (also when a batch is replaced) the file cannot be written.
    """

    def __init__(self, directory: Path, batches: Iterable[Tensor]) -> None:
        self.directory = directory
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []  # first byte, shape, dtype
        with self._writing():
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - as long as this lives
        end = 0
        for batch in batches:
            self._places.append((end, batch.shape, batch.dtype))
            self[len(self) - 1] = batch
            end += batch.nbytes

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the batches."""
        return [shape for _, shape, _ in self._places]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, shape, dtype = self._places[index]
        values = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(values.view(-1).view(torch.uint8).numpy().data)
        return values

    def __setitem__(self, index: int, batch: Tensor) -> None:
        start, shape, dtype = self._places[index]
        assert (batch.shape, batch.dtype) == (shape, dtype)
        with self._writing():
            self._file.seek(start)
            self._file.write(batch.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CalibrationError(
                f"calibration.on_disk: hidden states cannot be kept in {self.directory} ({error}); "
                "make room there or name another directory"
            ) from error


Hidden = list[Tensor] | OnDisk


def shapes(hidden: Hidden) -> list[torch.Size]:
    """Return the shapes of the batches without reading any."""
    return hidden.shapes if isinstance(hidden, OnDisk) else [batch.shape for batch in hidden]


def keeping(directory: str | None) -> Keep:
    """Return a function that stores hidden states in a directory, or in memory if `directory` is None."""
    return list if directory is None else lambda batches: OnDisk(Path(directory), batches)
