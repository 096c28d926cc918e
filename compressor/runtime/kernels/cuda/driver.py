"""CUDA's driver, called through ctypes: loads compiled kernels and launches them on torch's streams.

A launch has to be cheap, there are hundreds to a token: each thread keeps the structures of a kernel's launch, and a call
packs its arguments and sets the grid. Beyond that it costs what the driver takes.
"""

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.errors import KernelError

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes aligned to 8."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Driver:
    """The library at a path.

    Raises:
        KernelError: it cannot be loaded.
    """

    def __init__(self, path: str = "libcuda.so.1") -> None:
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise KernelError(f"CUDA: the driver cannot be loaded ({error}); install NVIDIA's driver") from error
        self._call("cuInit", 0)

    def load(self, code: bytes, device: int) -> "Module":
        """A cubin, on a device that torch counts as `device`."""
        handle, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        self._call(
            "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle
        )  # torch's own; kept as long as the process lives
        self._call("cuCtxPushCurrent_v2", context)
        try:
            self._call("cuModuleLoadData", ctypes.byref(module), code)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return Module(self, context, module)

    def check(self, status: int, function: str) -> None:
        """Raises KernelError unless the status is success."""
        if status:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(name))
            reason = (name.value or b"unknown").decode()
            raise KernelError(
                f"CUDA: {function} fails with {reason} ({status}); `kernel='reference'` does without own kernels"
            )

    def _call(self, function: str, *arguments: object) -> None:
        self.check(self.library[function](*arguments), function)


@functools.cache
def driver() -> Driver:
    """The system's."""
    return Driver()


@dataclass(frozen=True)
class Module:
    """Machine code on a device. Never unloaded: graphs that were captured may still hold its kernels."""

    driver: Driver
    context: ctypes.c_void_p
    handle: ctypes.c_void_p

    def kernel(
        self, name: str, parameters: Sequence[str], threads: int, *, shared_bytes: int = 0, overlapping: bool = False
    ) -> "Kernel":
        """A kernel, ready to be launched.

        Args:
            name: As it is in the machine code.
            parameters: Parameters of the kernel, each a struct format: "P", "i", "4P4i".
            threads: Number of threads of a block.
            shared_bytes: Dynamic shared memory of a block.
            overlapping: May start while the kernel before it still runs (sm_90 and later); it waits where it has to.
        """
        function, library = ctypes.c_void_p(), self.driver.library
        status = library.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode())
        self.driver.check(status, "cuModuleGetFunction")
        if shared_bytes:  # with what is static it may be above the 48 KB that need no permission
            status = library.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            self.driver.check(status, "cuFuncSetAttribute")
        attributes = (LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", (ctypes.c_int * 16)(1)),) if overlapping else ()
        return Kernel(self, function, tuple(parameters), threads, shared_bytes, attributes)


class _Launch(threading.local):
    """One thread's structures for launches of a kernel. Their addresses do not change."""

    def __init__(self, kernel: "Kernel") -> None:
        self.arguments = ctypes.create_string_buffer(kernel.packed.size)
        first = ctypes.addressof(self.arguments)
        self.pointers = (ctypes.c_void_p * len(kernel.offsets))(*[first + offset for offset in kernel.offsets])
        self.attributes = (LaunchAttribute * len(kernel.attributes))(*kernel.attributes)
        self.config = LaunchConfig(
            1, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, None, self.attributes, len(self.attributes)
        )
        self.config_pointer = ctypes.byref(self.config)
        kernel.make_context_current()


def _alignment(parameter: str) -> str:
    """Return the end of a struct format with the padding that this parameter needs before it."""
    return "0P" if "P" in parameter else "0i"


class Kernel:
    """A kernel that is called with a grid, a stream and its arguments, by any thread."""

    def __init__(
        self,
        module: Module,
        function: ctypes.c_void_p,
        parameters: tuple[str, ...],
        threads: int,
        shared_bytes: int,
        attributes: tuple[LaunchAttribute, ...],
    ) -> None:
        self.module, self.threads, self.shared_bytes, self.attributes = module, threads, shared_bytes, attributes
        self.packed = struct.Struct("".join(parameters))  # as C aligns it
        before = itertools.accumulate(parameters, initial="")
        self.offsets = [struct.calcsize(some + _alignment(own)) for some, own in zip(before, parameters, strict=False)]
        self._function, self._enqueue = function, module.driver.library.cuLaunchKernelEx
        self._own = _Launch(self)

    def __call__(self, grid: tuple[int, int], stream: int, *arguments: int) -> None:
        """Enqueues a launch.

        Args:
            grid: Blocks across and down.
            stream: A CUstream, 0 for the default one.
            arguments: One for each item of the parameters' formats; pointers as integers.
        """
        own = self._own
        self.packed.pack_into(own.arguments, 0, *arguments)
        config = own.config
        config.grid_x, config.grid_y = grid
        config.stream = stream
        status = self._enqueue(own.config_pointer, self._function, own.pointers, None)
        if status:
            self.module.driver.check(status, "cuLaunchKernelEx")

    def make_context_current(self) -> None:
        """On a thread that has no context yet: the driver does not choose one by itself, as torch's runtime does."""
        library, current = self.module.driver.library, ctypes.c_void_p()
        self.module.driver.check(library.cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
        if not current:
            self.module.driver.check(library.cuCtxSetCurrent(self.module.context), "cuCtxSetCurrent")
