"""NVIDIA's run-time compiler, called through ctypes: CUDA C++ without includes in, machine code out.

It needs one library, which torch's CUDA wheels bring along, and neither a GPU nor a driver nor a toolkit.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from compressor.errors import KernelError
from compressor.runtime.kernels.cuda import cache
from compressor.runtime.kernels.cuda.cache import Cubin

OPTIONS = ("-std=c++17",)
REMEDY = "pip install nvidia-cuda-nvrtc"
NAME = "libnvrtc.so"
HOMES = ("CUDA_HOME", "CUDA_PATH")


class Nvrtc:
    """The library at a path.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # the compiler opens it by its bare name, and finds this one
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.path, self.version = path, (major.value, minor.value)

    def compile(self, source: str, names: Sequence[str], architecture: str) -> Cubin:
        """Machine code for one architecture ("sm_90a") of the kernels that name expressions name.

        Raises:
            KernelError: the source is wrong, or the compiler is too old for the architecture.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            for name in names:
                self._call("nvrtcAddNameExpression", program, name.encode())
            options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
            if self._library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
                raise KernelError(
                    f"{self._name}: cannot compile the kernels for {architecture}; if it does not know this device, install "
                    f"a newer one ({REMEDY}), else report this log:\n{self._text(program, 'ProgramLog')}"
                )
            lowered = {name: self._lowered(program, name) for name in names}
            return Cubin(self._bytes(program, "CUBIN"), lowered)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    @property
    def _name(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    def _call(self, function: str, *arguments: object) -> None:
        status = self._library[function](*arguments)
        if status:
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise KernelError(f"NVRTC: {function} fails ({reason}); install it again ({REMEDY})")

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        return self._bytes(program, what).rstrip(b"\0\n").decode(errors="replace")

    def _lowered(self, program: ctypes.c_void_p, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
        return (lowered.value or b"").decode()


def candidates() -> list[Path]:
    """Where the library may be: wheels, toolkits, the system; those of torch's own CUDA version first."""
    wheels = [found for path in sys.path if path for found in _newest_first(Path(path), f"nvidia/*/lib/{NAME}*")]
    homes = [Path(os.environ[home]) for home in HOMES if os.environ.get(home)]
    toolkits = [*homes, *_newest_first(Path("/usr/local"), "cuda*")]
    found = wheels + [library for toolkit in toolkits for library in _newest_first(toolkit, f"lib64/{NAME}*")]
    own = f"{NAME}.{(torch.version.cuda or '').partition('.')[0]}"
    return [*sorted(found, key=lambda path: path.name != own), Path(NAME)]


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), reverse=True)


@functools.cache
def library() -> Nvrtc:
    """The first one that can be loaded.

    Raises:
        KernelError: there is none.
    """
    reasons = []
    for path in candidates():
        try:
            return Nvrtc(path)
        except OSError as error:
            reasons.append(str(error))
    raise KernelError(f"NVRTC: there is no libnvrtc ({reasons[-1]}); {REMEDY}")


def compiled(source: str, names: Sequence[str], architecture: str, directory: Path | None = None) -> Cubin:
    """Machine code as of `Nvrtc.compile`, from the cache where it is there.

    Args:
        source: All of the CUDA C++.
        names: Name expressions of the kernels, `linear<IntGroups<4, 0, 0>, 1, 1, 8, 4>`.
        architecture: "sm_80", "sm_90a", …
        directory: Directory of the cache; None for the user's.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    compiler = library()
    directory = directory or cache.default_directory()
    key = cache.key_of(source, tuple(names), architecture, OPTIONS, compiler.version)
    found = cache.read(directory, key) if directory else None
    if found is None:
        found = compiler.compile(source, names, architecture)
        if directory:
            cache.write(directory, key, found)
    return found
