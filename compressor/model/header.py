"""The header of a safetensors file, checked: which tensors it holds, where their bytes lie, and what they are.

A file is 8 bytes of header length (little endian), a JSON header and the data without gaps.
Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import SourceError
from compressor.reading import cause, elide, parse_json

METADATA = "__metadata__"
MAX_HEADER = 2**25  # bytes; of the largest published shards it has less than 2**21
MAX_NAME = 1000  # characters of a tensor's name
MAX_DIMENSIONS = 16
REMEDY = "download it again"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's data lies in a file, and what it is."""

    begin: int
    end: int
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


def spans(file: Path) -> dict[str, Span]:
    """Read the header of a safetensors file. The file may end before the data does.

    Returns: every tensor by name, in the order of the header. Their data follows one another without gaps from the end of the
    header, and each has as many bytes as its shape and dtype need, if the dtype is one of `DTYPES`.

    Raises:
        SourceError: the header cannot be read or contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header would take {length} bytes of {size}, and at most {MAX_HEADER:,} are read")
            text = opened.read(length)
        entries = parse_json(text, str(file), SourceError, REMEDY)
        if not isinstance(entries, dict):
            raise ValueError(f"its header is a {type(entries).__name__}")
        found = {name: _span(name, entry, 8 + length) for name, entry in entries.items() if name != METADATA}
        end = 8 + length
        for name, span in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
            if span.begin != end:
                raise ValueError(f"{elide(name)} begins at byte {span.begin} where the data before it ends at {end}")
            end = span.end
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({cause(error)})") from error
    except (ValueError, SourceError) as error:
        reason = str(error) if isinstance(error, ValueError) else cause(error)
        raise SourceError(f"{file}: not a whole safetensors file ({elide(reason, 120)}); {REMEDY}") from error
    return found


def _span(name: str, entry: Any, start: int) -> Span:
    """One entry of a header whose data begins at the byte `start` of the file. Raises ValueError."""
    if not 0 < len(name) <= MAX_NAME or "\0" in name:
        raise ValueError(f"a tensor named {elide(name, 40)!r}")
    if not isinstance(entry, dict):
        raise ValueError(f"{elide(name)} is a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"{elide(name)} has the dtype {elide(dtype, 40)}")
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{elide(name)} has the shape {elide(entry.get('shape'), 40)}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{elide(name)} has the offsets {elide(entry.get('data_offsets'), 40)}")
    if dtype in DTYPES and (needed := math.prod(shape) * DTYPES[dtype].itemsize) != offsets[1] - offsets[0]:
        raise ValueError(
            f"{elide(name)} has {offsets[1] - offsets[0]} bytes where its shape and dtype need {elide(needed, 40)}"
        )
    return Span(start + offsets[0], start + offsets[1], dtype, tuple(shape))


def _counts(value: Any) -> list[int] | None:
    """A value if it is a list of natural numbers."""
    return value if isinstance(value, list) and all(type(number) is int and number >= 0 for number in value) else None
