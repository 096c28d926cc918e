"""A libcuda that only remembers (stub_libcuda.c), for tests of launches where there is no GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from compressor.runtime.kernels.cuda.driver import Driver

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc to compile a stand-in for libcuda with")
SOURCE = Path(__file__).parent / "stub_libcuda.c"


class Launch(ctypes.Structure):
    """What the stub remembers of a launch."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("attribute_count", ctypes.c_uint32),
        ("attribute_id", ctypes.c_uint32),
        ("attribute_value", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("arguments", ctypes.c_uint8 * 96),
    )


class Stub:
    """The library, and the product's driver on it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.stub_launch.restype = ctypes.POINTER(Launch)
        self.library.stub_name.restype = self.library.stub_loaded.restype = ctypes.c_char_p
        self.library.stub_reset()
        self.driver = Driver(str(path))

    def expect(self, *parameters: tuple[int, int]) -> None:
        """Offset and size of each parameter of the kernels to come, as the compiler lays them out."""
        self.library.stub_forget_parameters()
        for offset, size in parameters:
            self.library.stub_parameter(offset, size)

    @property
    def launches(self) -> list[Launch]:
        return [self.library.stub_launch(i).contents for i in range(self.library.stub_launches())]

    def name(self, launch: Launch) -> str:
        found: bytes = self.library.stub_name(ctypes.c_uint64(launch.function))
        return found.decode()


def build(directory: Path) -> Path:
    """Compiles the stub."""
    path = directory / "libcuda.so.1"
    command = [GCC or "gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return path
