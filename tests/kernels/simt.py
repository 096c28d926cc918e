"""The CUDA kernels on the CPU: their sources, unmodified, compiled by g++ with the emulator in `simt/` and called on tensors.

    library = simt.build(directory, ["int_groups"], ["IntGroups<4, 0, 0>"], [Launch(1, 1, 8, 4)])
    y_MN = library.linear("IntGroups<4, 0, 0>", Launch(1, 1, 8, 4), x_MK, parts, rows, group=128)

Outputs are NaN before the kernel runs, and so are margins around them, which must still be NaN afterwards.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kept
import pytest
import torch
from torch import Tensor

from compressor.runtime.kernels import cuda

SOURCES = Path(cuda.__path__[0])
EMULATOR = Path(__file__).parent / "simt"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
)
MARGIN = 64  # elements before and after an output
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++ to compile the kernels with")


class EmulatorError(Exception):
    """The emulator stopped a launch."""


class Launch(NamedTuple):
    """The numbers of the kernel's template (linear.cuh)."""

    nt: int
    rb: int
    warps: int
    pf: int


class Arguments(ctypes.Structure):
    """`Arguments` of linear.cuh."""

    _fields_ = (
        ("part", ctypes.c_void_p * 4),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("group", ctypes.c_int),
        ("extra", ctypes.c_int),
    )


@dataclass(frozen=True)
class Library:
    """Compiled kernels of one family."""

    compiled: ctypes.CDLL
    names: dict[tuple[str, Launch | None], str]  # None: dequantisation

    def linear(
        self,
        decoder: str,
        launch: Launch,
        x_MK: Tensor,
        parts: Sequence[Tensor],
        rows: int,
        *,
        group: int = 0,
        extra: int = 0,
        bias_N: Tensor | None = None,
        shared: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """x W^T + bias [M, N]; x is bf16, its columns padded to whole chunks."""
        tokens, columns = x_MK.shape
        x_MK = x_MK.contiguous()
        y_MN, whole = _poisoned(tokens, rows)
        self._declare([*parts, x_MK])
        self._call(
            self.names[decoder, launch],
            ctypes.byref(_arguments(parts, rows, columns, group, extra)),
            _address(x_MK),
            _address(bias_N) if bias_N is not None else None,
            _address(y_MN),
            ctypes.c_int(tokens),
            ctypes.c_int(rows),
            ctypes.c_size_t(shared),
            ctypes.c_uint(seed),
        )
        return _checked(y_MN, whole)

    def dequantize(
        self,
        decoder: str,
        parts: Sequence[Tensor],
        shape: tuple[int, int],
        padded: int,
        *,
        group: int = 0,
        extra: int = 0,
        shared: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """The weight in bf16; `padded` is its number of columns in whole chunks."""
        w_NK, whole = _poisoned(*shape)
        self._declare(parts)
        self._call(
            self.names[decoder, None],
            ctypes.byref(_arguments(parts, shape[0], padded, group, extra)),
            _address(w_NK),
            ctypes.c_int(shape[0]),
            ctypes.c_int(shape[1]),
            ctypes.c_size_t(shared),
            ctypes.c_uint(seed),
        )
        return _checked(w_NK, whole)

    def _declare(self, tensors: Sequence[Tensor]) -> None:
        self.compiled.simt_forget()
        for tensor in tensors:
            assert tensor.is_contiguous()
            self.compiled.simt_declare(_address(tensor), ctypes.c_size_t(tensor.nbytes))

    def _call(self, name: str, *arguments: object) -> None:
        function = self.compiled[name]
        function.restype = ctypes.c_char_p
        wrong = function(*arguments)
        if wrong:
            raise EmulatorError(wrong.decode())


def source(families: Sequence[str]) -> str:
    """The concatenation that NVRTC gets, too."""
    return "".join((SOURCES / f"{name}.cuh").read_text() for name in ("primitives", "linear", *families))


def build(
    directory: Path,
    families: Sequence[str],
    decoders: Sequence[str],
    launches: Sequence[Launch],
    change: Callable[[str], str] = lambda text: text,
) -> Library:
    """Compiles the instances, unless the directory has them.

    Args:
        directory: Where libraries are kept.
        families: Names of the decoders' files, in order.
        decoders: C++ types.
        launches: Each decoder's kernel is compiled for each.
        change: Of the kernels' source text, to see that the emulator catches it.
    """
    names: dict[tuple[str, Launch | None], str] = {}
    text = change(source(families))
    for decoder in decoders:
        for launch in (*launches, None):
            name = names[decoder, launch] = f"entry_{len(names)}"
            text += _linear_entry(name, decoder, launch) if launch else _dequantize_entry(name, decoder)
    return Library(ctypes.CDLL(str(compiled(directory, text))), names)


def compiled(directory: Path, text: str) -> Path:
    """The shared library of a source text that may use the kernels' functions and the emulator."""
    emulator = "".join((EMULATOR / name).read_text() for name in ("simt.h", "simt.cpp"))
    depends = repr((text, emulator, FLAGS, kept.version(GXX or "g++")))
    path = directory / f"{hashlib.sha256(depends.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unit, unfinished = path.with_suffix(f".{os.getpid()}.cpp"), path.with_suffix(f".{os.getpid()}.so")
        unit.write_text(text)
        command = (GXX or "g++", *FLAGS, "-include", EMULATOR / "simt.h", unit, EMULATOR / "simt.cpp", "-o", unfinished)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        unfinished.replace(path)
    return path


def _linear_entry(name: str, decoder: str, launch: Launch) -> str:
    nt, rb, warps, pf = launch
    return f"""
extern "C" const char* {name}(
    const Arguments* arguments, const u16* x, const u16* bias, u16* y, int M, int N, size_t shared, unsigned seed) {{
  const unsigned tile_rows = (N + 15) / 16, across = (tile_rows + {rb - 1}) / {rb}, down = (M + {8 * nt - 1}) / {8 * nt};
  const auto kernel = [&] {{ linear<{decoder}, {nt}, {rb}, {warps}, {pf}>(*arguments, x, bias, y, M, N); }};
  return simt::launch({{across, down, 1}}, {{{32 * warps}, 1, 1}}, shared, seed, kernel);
}}
"""


def _dequantize_entry(name: str, decoder: str) -> str:
    return f"""
extern "C" const char* {name}(const Arguments* arguments, u16* w, int N, int K, size_t shared, unsigned seed) {{
  return simt::launch({{3, 1, 1}}, {{64, 1, 1}}, shared, seed, [&] {{ dequantize<{decoder}>(*arguments, w, N, K); }});
}}
"""


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _arguments(tensors: Sequence[Tensor], rows: int, columns: int, group: int, extra: int) -> Arguments:
    pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (4 - len(tensors))
    return Arguments((ctypes.c_void_p * 4)(*pointers), rows, columns, group, extra)


def _poisoned(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """An output full of NaN, and the larger tensor that it lies in."""
    whole = torch.full((rows * columns + 2 * MARGIN,), float("nan"), dtype=torch.bfloat16)
    return whole[MARGIN:-MARGIN].view(rows, columns), whole


def _checked(output: Tensor, whole: Tensor) -> Tensor:
    assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all(), "written outside of the output"
    return output
