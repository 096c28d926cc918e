"""From a layout and tensors to a launch, and what the launch computes.

The driver is a stub that remembers, and what it remembers is run by the emulator: so the decoder's type, the order of the
parts, the group, the shared memory, the instance and its grid are those that give the product.
"""

import ctypes
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gpu_scripts  # noqa: F401
import parity
import pytest
import simt
import stub_driver
import torch
from simt import Launch
from stub_driver import Stub
from test_driver import ARGUMENTS, OFFSETS_AND_SIZES
from tolerance import TOLERANCE, error
from torch import Tensor
from weights import FORMATS, layout_of, make

from compressor.errors import KernelError
from compressor.formats.numerics.codes import values
from compressor.runtime.kernels import cuda
from compressor.runtime.kernels.cuda import instances, nvrtc, program, sources
from compressor.runtime.kernels.cuda.cache import Cubin
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout, named

pytestmark = [stub_driver.needs_gcc, simt.needs_gxx]
STREAM = 0x57EA


class Compiler:
    """Gives every name expression itself as its name."""

    version = (13, 0)

    def compile(self, source: str, names: list[str], architecture: str) -> Cubin:
        return Cubin(architecture.encode() + b"\0", {name: name for name in names})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub_driver.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def device(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A GPU of four multiprocessors, as far as torch and the driver can tell."""
    stub = Stub(library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "library", Compiler)
    monkeypatch.setattr(program, "driver", lambda: stub.driver)
    properties = SimpleNamespace(multi_processor_count=4, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    program.load.cache_clear()
    yield stub
    program.load.cache_clear()


@dataclass(frozen=True)
class Emulated:
    """Does on the emulator what the last launch that the stub remembers would do."""

    stub: Stub
    libraries: Path
    layout: Layout
    tile: Tile

    def linear(self, tensors: list[Tensor]) -> None:
        launch = self.stub.launches[-1]
        assert self.stub.name(launch) == instances.linear_name(self.layout, self.tile)
        assert launch.block[0] == 32 * self.tile.warps
        *_, x, bias, y, tokens, rows = struct.unpack_from(ARGUMENTS, bytes(launch.arguments))
        assert list(launch.grid) == [-(-rows // (16 * self.tile.rb)), -(-tokens // (8 * self.tile.nt)), 1]
        self._run(launch, self.tile, tensors, (x, bias, y), (tokens, rows))

    def dequantize(self, tensors: list[Tensor]) -> None:
        launch = self.stub.launches[-1]
        assert self.stub.name(launch) == instances.dequantize_name(self.layout)
        *_, w, rows, columns = struct.unpack_from("<4Q4i1Q2i", bytes(launch.arguments))
        self._run(launch, None, tensors, (w,), (rows, columns))

    def _run(
        self,
        launch: stub_driver.Launch,
        tile: Tile | None,
        tensors: list[Tensor],
        pointers: tuple[int, ...],
        numbers: tuple[int, ...],
    ) -> None:
        assert launch.stream == STREAM and (launch.attribute_count, launch.attribute_id) == (1, 6)
        families = [name.removesuffix(".cuh") for name in sources.files(self.layout)[2:]]
        decoder = instances.decoder(self.layout)
        library = simt.build(self.libraries, families, [decoder], [Launch(*self.tile)])
        library._declare(tensors)
        library._call(
            library.names[decoder, Launch(*tile) if tile else None],
            bytes(launch.arguments)[:48],
            *(ctypes.c_void_p(pointer or None) for pointer in pointers),
            *(ctypes.c_int(number) for number in numbers),
            ctypes.c_size_t(launch.shared_bytes),
            ctypes.c_uint(1),
        )


@pytest.mark.parametrize("name", FORMATS)
def test_launches_multiply_and_dequantise(device: Stub, libraries: Path, name: str) -> None:
    torch.manual_seed(0)
    codes = make(name, 48, 640)
    layout = layout_of(codes)
    parts = list(layout.arrange(codes).values())
    x_MK, bias_N = parity.activations(3, 640), torch.randn(48).bfloat16()
    own = program.load(layout.name, 0)
    emulated = Emulated(device, libraries, layout, instances.choose(layout, 3, 48, own.multiprocessors))
    stored = parity.in_stored_order(x_MK, codes, layout.chunk)
    y_MN, w_NK = (torch.full(shape, float("nan")).bfloat16() for shape in ((3, 48), (48, 640)))

    device.expect(*OFFSETS_AND_SIZES)
    own.linear(stored, parts, y_MN, bias_N, emulated.tile)
    emulated.linear([*parts, stored])
    assert error(y_MN, parity.product(x_MK, codes, bias_N)) < TOLERANCE

    device.expect((0, 48), (48, 8), (56, 4), (60, 4))
    own.dequantize(parts, w_NK)
    emulated.dequantize(parts)
    order = getattr(codes, "order_I", None)
    expected = values(codes) if order is None else values(codes)[:, order]
    assert parity.steps_apart(w_NK, expected.bfloat16()) <= 1


@pytest.mark.parametrize("tokens", [1, 12, 30, 60])
def test_every_instance_computes_the_product(device: Stub, libraries: Path, tokens: int) -> None:
    """Of int4: few rows and many, for four numbers of tokens."""
    torch.manual_seed(0)
    for rows in (40, 16 * instances.MANY_ROW_TILES * 4 + 8):
        device.library.stub_reset()
        codes = parity.int_codes(4, rows, 256, 1, 128)
        layout = layout_of(codes)
        parts, x_MK = list(layout.arrange(codes).values()), parity.activations(tokens, 256)
        device.expect(*OFFSETS_AND_SIZES)
        program.load.cache_clear()
        own = program.load(layout.name, 0)
        tile = instances.choose(layout, tokens, rows, own.multiprocessors)
        y_MN = torch.full((tokens, rows), float("nan")).bfloat16()
        own.linear(x_MK, parts, y_MN, None, tile)
        Emulated(device, libraries, layout, tile).linear([*parts, x_MK])
        assert error(y_MN, parity.product(x_MK, codes)) < TOLERANCE, tile


def test_activations_that_are_not_aligned_are_copied(device: Stub) -> None:
    codes = parity.int_codes(4, 16, 64, 1, 64)
    layout = layout_of(codes)
    x_MK = torch.zeros(65).bfloat16()[1:].view(1, 64)
    device.expect(*OFFSETS_AND_SIZES)
    y_MN = torch.empty(1, 16).bfloat16()
    program.load(layout.name, 0).linear(x_MK, list(layout.arrange(codes).values()), y_MN, None, instances.tiles(layout)[0])
    x_pointer = struct.unpack_from(ARGUMENTS, bytes(device.launches[0].arguments))[8]
    assert x_MK.data_ptr() % 16 and x_pointer % 16 == 0


@pytest.mark.parametrize("tokens", [0, 1, cuda.FUSED_ROWS, cuda.FUSED_ROWS + 1])
def test_few_tokens_are_multiplied_fused_and_many_by_the_dense_weight(
    device: Stub, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layout = layout_of(codes := parity.int_codes(4, 32, 64, 1, 64))
    y_MN = cuda.linear(torch.zeros(tokens, 64).bfloat16(), list(layout.arrange(codes).values()), layout, 32, None)
    assert y_MN.shape == (tokens, 32)
    names = [device.name(launch) for launch in device.launches]
    if tokens > cuda.FUSED_ROWS:
        assert names == [instances.dequantize_name(layout)]
    else:
        assert names == [instances.linear_name(layout, instances.choose(layout, tokens, 32, 4))] * min(tokens, 1)


def test_nothing_is_compiled_while_a_graph_is_captured(device: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="not loaded yet"):
        program.load("int4-g128-bf16", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    loaded = program.load("int4-g128-bf16", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert program.load("int4-g128-bf16", 0) is loaded


def test_kernels_overlap_only_where_the_device_can(device: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4, major=8, minor=6)
    )
    own = program.load("int4-g128-bf16", 0)
    assert not own.unpack.attributes and device.library.stub_loaded() == b"sm_86"


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 1), "sm_121a")],
)
def test_architectures_have_their_names(capability: tuple[int, int], name: str) -> None:
    assert program.architecture(capability) == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_the_chosen_instance_exists_and_fits(name: str, tokens: int) -> None:
    layout = layout_of(make(name, 48, 640))
    for rows in (16, 4096, 28672):
        tile = instances.choose(layout, tokens, rows, 132)
        assert tile in instances.tiles(layout)
        sums = 640 * tile.warps * tile.rb * tile.nt  # linear.cuh
        assert sums <= 48 << 10 and sums + instances.shared_bytes(layout) <= 99 << 10  # what a block may have on sm_86


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, gpu = named("int4-g128-bf16"), torch.device("cuda", 0)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(nvrtc, "library", Compiler)
    assert "on cpu" in str(cuda.obstacle(layout, torch.device("cpu"), torch.bfloat16))
    assert "torch.float16" in str(cuda.obstacle(layout, gpu, torch.float16))
    assert "7.5 is below 8.0" in str(cuda.obstacle(layout, gpu, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert cuda.obstacle(layout, gpu, torch.bfloat16) is None
    monkeypatch.setattr("torch.version.cuda", None)
    assert "not built" in str(cuda.obstacle(layout, gpu, torch.bfloat16))
