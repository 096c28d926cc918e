"""Launches reach the driver as CUDA's headers and the compiled kernels want them; libcuda is a stub that remembers."""

import ctypes
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import stub_driver
from stub_driver import Stub

from compressor.errors import KernelError
from compressor.runtime.kernels.cuda.driver import Driver, Kernel, LaunchAttribute, LaunchConfig
from compressor.runtime.kernels.cuda.program import DEQUANTIZE, MULTIPLY

pytestmark = stub_driver.needs_gcc

# (Arguments {const void* part[4]; int rows, columns, group, extra}, const u16*, const u16*, u16*, int, int), as C lays it out
OFFSETS_AND_SIZES = ((0, 48), (48, 8), (56, 8), (64, 8), (72, 4), (76, 4))
ARGUMENTS = "<4Q4i3Q2i"
VALUES = (1 << 40, 2, 3, 4, 5, -6, 7, 8, 1 << 63, 10, 11, 12, 13)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub_driver.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(library: Path) -> Stub:
    return Stub(library)


def kernel(stub: Stub, **options: int) -> Kernel:
    stub.expect(*OFFSETS_AND_SIZES)
    return stub.driver.load(b"a cubin", 1).kernel("kernel", MULTIPLY, 256, **options)  # type: ignore[arg-type]


def test_a_launch_says_what_it_was_told(stub: Stub) -> None:
    kernel(stub)((7, 3), 0xABCDEF0123, *VALUES)
    (launch,) = stub.launches
    assert list(launch.grid) == [7, 3, 1] and list(launch.block) == [256, 1, 1]
    assert (launch.shared_bytes, launch.attribute_count, launch.stream) == (0, 0, 0xABCDEF0123)
    assert stub.name(launch) == "kernel" and stub.library.stub_loaded() == b"a cubin"
    assert struct.unpack_from(ARGUMENTS, bytes(launch.arguments)) == VALUES


def test_the_argument_block_is_patched_by_every_call(stub: Stub) -> None:
    launched = kernel(stub)
    for i in range(3):
        launched((i + 1, 1), i, *[i] * len(VALUES))
    for i, launch in enumerate(stub.launches):
        assert (launch.grid[0], launch.stream) == (i + 1, i)
        assert struct.unpack_from(ARGUMENTS, bytes(launch.arguments)) == (i,) * len(VALUES)


def test_an_overlapping_launch_carries_the_attribute(stub: Stub) -> None:
    kernel(stub, overlapping=True)((1, 1), 0, *VALUES)
    (launch,) = stub.launches
    assert (launch.attribute_count, launch.attribute_id, launch.attribute_value) == (1, 6, 1)


def test_dynamic_shared_memory_is_allowed_for_and_given(stub: Stub) -> None:
    kernel(stub, shared_bytes=65536)((1, 1), 0, *VALUES)
    assert stub.launches[0].shared_bytes == 65536
    assert [stub.library.stub_allowed(i) for i in range(2)] == [8, 65536]  # MAX_DYNAMIC_SHARED_SIZE_BYTES


def test_a_module_is_loaded_in_the_context_of_its_device(stub: Stub) -> None:
    module = stub.driver.load(b"", 3)
    assert module.handle.value == 0xC3 and module.context.value == 0xC3
    current = ctypes.c_void_p()
    stub.library.cuCtxGetCurrent(ctypes.byref(current))
    assert not current, "loading left its context behind"


def test_threads_do_not_mix_their_arguments(stub: Stub) -> None:
    """Nor does a thread that has no context launch without one."""
    launched, each, threads = kernel(stub), 200, 8

    def launch(number: int) -> None:
        for _ in range(each):
            launched((number, number), number, *[number] * len(VALUES))

    started = [threading.Thread(target=launch, args=(number,)) for number in range(1, threads + 1)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert len(stub.launches) == each * threads
    for one in stub.launches:
        seen = {one.grid[0], one.grid[1], one.stream, *struct.unpack_from(ARGUMENTS, bytes(one.arguments))}
        assert len(seen) == 1
        assert one.context == 0xC1


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernelEx"])
def test_a_failure_is_named(stub: Stub, function: str) -> None:
    stub.library.stub_fail(function.encode(), 700)
    with pytest.raises(KernelError, match=f"{function} fails with CUDA_ERROR_ILLEGAL_ADDRESS"):
        kernel(stub)((1, 1), 0, *VALUES)


def test_no_driver_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="the driver cannot be loaded"):
        Driver(str(tmp_path / "libcuda.so.1"))


def test_structures_are_those_of_cudas_header(tmp_path: Path) -> None:
    header = next(Path("/usr/local").glob("cuda*/include/cuda.h"), None)
    if header is None:
        pytest.skip("no cuda.h")
    names = {
        "grid_x": "gridDimX",
        "grid_y": "gridDimY",
        "grid_z": "gridDimZ",
        "block_x": "blockDimX",
        "block_y": "blockDimY",
        "block_z": "blockDimZ",
        "shared_bytes": "sharedMemBytes",
        "stream": "hStream",
        "attributes": "attrs",
        "attribute_count": "numAttrs",
    }
    facts = [f"offsetof(CUlaunchConfig, {theirs}) == {getattr(LaunchConfig, ours).offset}" for ours, theirs in names.items()]
    facts += [f"offsetof(CUlaunchAttribute, {name}) == {getattr(LaunchAttribute, name).offset}" for name in ("id", "value")]
    facts += [f"sizeof(CUlaunchConfig) == {ctypes.sizeof(LaunchConfig)}"]
    facts += [f"sizeof(CUlaunchAttribute) == {ctypes.sizeof(LaunchAttribute)}"]
    facts += ["CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == 6"]
    facts += ["CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8"]
    facts += ["offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0"]
    text = "#include <stddef.h>\n#include <cuda.h>\n" + "".join(f'_Static_assert({fact}, "");\n' for fact in facts)
    source = tmp_path / "facts.c"
    source.write_text(text)
    command = [stub_driver.GCC or "gcc", "-fsyntax-only", f"-I{header.parent}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_parameters_lie_where_the_compiler_puts_them(tmp_path: Path) -> None:
    """The offsets above against C's own, for both kernels, and for one whose parameters leave gaps."""
    source = tmp_path / "layout.c"
    source.write_text("""
#include <stddef.h>
typedef struct { const void* part[4]; int rows, columns, group, extra; } Arguments;
struct Linear { Arguments a; const void *x, *bias, *y; int M, N; };
struct Dequantize { Arguments a; void* w; int N, K; };
struct Padded { int a; const void* b; int c; Arguments d; };
const size_t linear[] = {offsetof(struct Linear, a), offsetof(struct Linear, x), offsetof(struct Linear, bias),
                         offsetof(struct Linear, y), offsetof(struct Linear, M), offsetof(struct Linear, N)};
const size_t dequantize[] = {offsetof(struct Dequantize, a), offsetof(struct Dequantize, w), offsetof(struct Dequantize, N),
                             offsetof(struct Dequantize, K)};
const size_t padded[] = {offsetof(struct Padded, a), offsetof(struct Padded, b), offsetof(struct Padded, c),
                         offsetof(struct Padded, d)};
""")
    library = tmp_path / "layout.so"
    subprocess.run([stub_driver.GCC or "gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    module = Stub(stub_driver.build(tmp_path)).driver.load(b"", 0)
    for name, parameters in (("linear", MULTIPLY), ("dequantize", DEQUANTIZE), ("padded", ("i", "P", "i", "4P4i"))):
        theirs = (ctypes.c_size_t * len(parameters)).in_dll(ctypes.CDLL(str(library)), name)
        assert module.kernel(name, parameters, 32).offsets == list(theirs)
