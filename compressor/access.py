"""Checks that files can be read, made before any work starts.

`Path.exists` and `Path.is_file` return False for a broken link, for a pipe and, in some versions of Python, in a directory
that the user may not search. An error message "no such file" would then be wrong. The functions here name the cause.
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
        CompressorError: (`error`) it is a broken link, is neither file nor directory, or cannot be examined.
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
    """Open each of the given files and directories for reading; missing ones are skipped.

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
