"""The CUDA sources that a layout needs, from the package or from beside a checkpoint.

A file includes no other; those of a layout are put one after the other, in this order, before they are compiled.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from compressor.errors import KernelError
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.floats import Floats
from compressor.runtime.kernels.layouts.input_groups import InputGroups
from compressor.runtime.kernels.layouts.int_groups import IntGroups
from compressor.runtime.kernels.layouts.lossless import Lossless
from compressor.runtime.kernels.layouts.signs import Signs
from compressor.runtime.kernels.layouts.vectors import Vectors

HERE = Path(__file__).parent
FOLDER, CONFIG_KEY = "kernels", "compressor_kernels"  # beside a checkpoint: where they are, and their sha256 in config.json
FRAME = ("primitives.cuh", "linear.cuh")
DECODERS: dict[type, tuple[str, ...]] = {
    IntGroups: ("int_groups.cuh",),
    InputGroups: ("int_groups.cuh", "input_groups.cuh"),
    Floats: ("floats.cuh",),
    Vectors: ("vectors.cuh",),
    Signs: ("signs.cuh",),
    Lossless: ("lossless.cuh",),
}


def files(layout: Layout) -> tuple[str, ...]:
    """Their names, in order."""
    return (*FRAME, *DECODERS[type(layout)])


def read(name: str, directory: Path = HERE) -> str:
    """The text of one file.

    Raises:
        KernelError: it is not there.
    """
    try:
        return (directory / name).read_text(encoding="utf-8")
    except OSError as error:
        raise KernelError(f"{directory / name}: cannot be read ({error}); get it again from where it came") from error


def text(layout: Layout, directory: Path = HERE) -> str:
    """Return the source text that is compiled for a layout."""
    return "\n".join(read(name, directory) for name in files(layout))


def digests(layout: Layout) -> dict[str, str]:
    """sha256 by file name."""
    return {name: sha256(name) for name in files(layout)}


def sha256(name: str, directory: Path = HERE) -> str:
    """Return the hash of one file."""
    return hashlib.sha256(read(name, directory).encode()).hexdigest()


def foreign(brought: Mapping[str, str]) -> list[str]:
    """Return the sources of a checkpoint, given with their sha256, that are not this package's."""
    own = {name for name in brought if (HERE / name).is_file()}
    return [name for name, digest in brought.items() if name not in own or sha256(name) != digest]


def beside(checkpoint: Path, brought: Mapping[str, str]) -> Path:
    """The folder with the sources that a checkpoint brings.

    Raises:
        KernelError: it brings none, or others than its config.json says.
    """
    folder = checkpoint / FOLDER
    if not brought:
        raise KernelError(f"{checkpoint}: brings no kernels to trust; leave out trust_kernels")
    for name, digest in brought.items():
        if Path(name).name != name or sha256(name, folder) != digest:
            raise KernelError(f"{folder / name}: is not the file that config.json names; get it again from where it came")
    return folder
