"""Whether files can be read, asked before any work.

`Path.exists` and `Path.is_file` say no of a broken link, of a pipe and, in some versions of Python, of a place that the user
must not look into; a sentence that such a file is missing would be wrong. The functions here name the cause.
"""

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from compressor.errors import CompressorError
from compressor.reading import cause, elide

SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: Path, error: type[CompressorError]) -> Literal["file", "directory"] | None:
    """Return what is at a path; None if there is nothing.

    Raises:
        CompressorError: (`error`) a broken link, no file and no directory, or a place that cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as reason:
        if path.is_symlink():
            raise error(f"{_named(path)}: cannot be read (a broken symbolic link)") from reason
        return None
    except (OSError, ValueError) as reason:  # ValueError: a NUL character in the name
        raise error(f"{_named(path)}: cannot be read ({cause(reason)})") from reason
    if stat.S_ISDIR(mode):
        return "directory"
    if not stat.S_ISREG(mode):
        raise error(f"{_named(path)}: is {SPECIAL.get(stat.S_IFMT(mode), 'no file')} where a file is needed")
    return "file"


def check_readable(paths: Iterable[Path], error: type[CompressorError]) -> None:
    """Open each of some files and directories for reading; those that are missing are passed over.

    Raises:
        CompressorError: (`error`) one cannot be opened, see `kind_of`.
    """
    for path in paths:
        kind = kind_of(path, error)
        try:
            if kind == "directory":
                next(path.iterdir(), None)
            elif kind == "file":
                with path.open("rb") as file:
                    file.read(1)
        except OSError as reason:
            raise error(f"{_named(path)}: cannot be read ({cause(reason)})") from reason


def _named(path: Path) -> str:
    return elide(str(path), 150)
