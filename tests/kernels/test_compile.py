"""Every decoder compiles for every architecture, and to the instructions that its speed rests on.

NVRTC compiles where it is installed, as at run time, else nvcc; the looks at machine code need NVIDIA's disassembler.
"""

import functools
import shutil
import subprocess
from pathlib import Path

import gpu_scripts  # noqa: F401
import kept
import pytest
import sass
from test_driver import OFFSETS_AND_SIZES
from test_nvrtc import installed
from weights import FORMATS, layout_of, make

from compressor.runtime.kernels.cuda import instances, nvrtc, sources
from compressor.runtime.kernels.cuda.cache import Cubin
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
LOOKED_AT = "sm_90a"
SIGNATURE = "(Arguments, const u16*, const u16*, u16*, int, int)"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(not installed() and NVCC is None, reason="neither NVRTC nor nvcc is installed")
needs_disassembler = pytest.mark.skipif(
    not (installed() and sass.tool("nvdisasm") and sass.tool("cuobjdump")),
    reason="no disassembler (pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump)",
)
# At most so many registers of a thread, of the instance for one token: with 64 an SM holds four blocks, with 80 three, with
# 128 two.
REGISTERS = {
    "int4-g128": 64, "int4-g32": 80, "int4-row-fp16-ordered": 64, "int3-g128": 80, "int2-g64": 80, "int2-g128-fp16": 80,
    "int8-g128": 64, "int4-rows16": 80, "int3-rows-ordered": 96, "int2-rows16": 80, "int8-rows16": 64,
    "nvfp4": 64, "mxfp4": 64, "mxfp8": 64, "fp4-row": 64, "fp4-g32": 64, "e1m2-g128": 64, "fp8-row": 64, "fp8-block": 64,
    "e2m3-row": 64, "vectors12": 64, "vectors8+8": 64, "signs1-g128": 64, "signs3-row": 80,
    "lossless": 80,
}  # fmt: skip
MOST_REGISTERS = 184  # of any instance: one block to an SM
SPILLED = {("sm_120a", "linear<IntGroups<2, 0, 1>, 1, 1, 8, 4>"): 8}  # bytes, by ptxas 13.5 to stay at 64 registers


@functools.cache
def layouts() -> dict[str, Layout]:
    """One of each format, by its name in scripts/gpu."""
    return {name: layout_of(make(name, 48, 640)) for name in FORMATS}


def expressions(layout: Layout, tiles: tuple[Tile, ...]) -> list[str]:
    return [*(instances.linear_name(layout, tile) for tile in tiles), instances.dequantize_name(layout)]


@functools.cache
def compiled(name: str, directory: Path) -> tuple[Cubin, Path]:
    """All instances of a format, with NVRTC, and the file that its machine code is in."""
    layout = layouts()[name]
    names = expressions(layout, instances.tiles(layout))
    cubin = nvrtc.compiled(sources.text(layout), names, LOOKED_AT, kept.directory("cubins"))
    path = directory / f"{name}.cubin"
    path.write_bytes(cubin.code)
    return cubin, path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def families() -> dict[tuple[str, ...], list[Layout]]:
    """Layouts by the sources that they need."""
    found: dict[tuple[str, ...], list[Layout]] = {}
    for layout in layouts().values():
        found.setdefault(sources.files(layout), []).append(layout)
    return found


@pytest.mark.parametrize("family", families(), ids=lambda files: Path(files[-1]).stem)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_compiles(architecture: str, family: tuple[str, ...], tmp_path: Path) -> None:
    """With the instance for one token, and the kernel that dequantises; with a disassembler, that they stay in registers."""
    of_family = families()[family]
    names = [name for layout in of_family for name in expressions(layout, instances.tiles(layout)[:1])]
    names = list(dict.fromkeys(names))
    text = sources.text(of_family[0])
    if installed():
        cubin = nvrtc.compiled(text, names, architecture, kept.directory("cubins"))
        assert len(set(cubin.names.values())) == len(names)
        if sass.tool("cuobjdump"):
            check_stack(cubin, architecture, tmp_path / "kernels.cubin")
    else:
        with_nvcc(text, names, architecture, tmp_path)


def check_stack(cubin: Cubin, architecture: str, path: Path) -> None:
    """Nothing is spilled, but for what is known to be."""
    path.write_bytes(cubin.code)
    used = sass.registers(path)
    for name, own in cubin.names.items():
        assert used[own][1] <= SPILLED.get((architecture, name), 0), name


def with_nvcc(text: str, names: list[str], architecture: str, directory: Path) -> None:
    of_linear = [f"template __global__ void {name}{SIGNATURE};\n" for name in names if name.startswith("linear")]
    others = [f"template __global__ void {name}(Arguments, u16*, int, int);\n" for name in names if name.startswith("deq")]
    source = directory / "kernels.cu"
    source.write_text("".join([text, *of_linear, *others]))
    target = f"arch=compute_{architecture[3:]},code={architecture}"
    command = [str(NVCC), "-std=c++17", "-gencode", target, "-cubin", "-o", str(source.with_suffix(".cubin")), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_nvcc_takes_the_sources_too(tmp_path: Path) -> None:
    layout = layouts()["int4-g128"]
    with_nvcc(sources.text(layout), expressions(layout, instances.tiles(layout)[:1]), LOOKED_AT, tmp_path)


@needs_disassembler
@pytest.mark.parametrize("name", FORMATS)
def test_machine_code_is_what_speed_rests_on(name: str, directory: Path) -> None:
    """Products on tensor cores, loads of 16 bytes for every tile of the ring, and nothing in local memory."""
    layout = layouts()[name]
    cubin, path = compiled(name, directory)
    found, used = sass.kernels(path), sass.registers(path)
    for tile in instances.tiles(layout):
        own = cubin.names[instances.linear_name(layout, tile)]
        code = found[own]
        assert code.count("HMMA") >= tile.nt * tile.rb * layout.chunk // 16, tile
        assert code.wide_loads() >= tile.pf * tile.rb, tile
        assert code.count("LDL") == code.count("STL") == 0, tile
        registers, stack = used[own]
        assert stack == 0 and registers <= MOST_REGISTERS, (tile, registers)
    assert used[cubin.names[instances.linear_name(layout, instances.tiles(layout)[0])]][0] <= REGISTERS[name]
    unpacking = found[cubin.names[instances.dequantize_name(layout)]]
    assert unpacking.count("LDL") == unpacking.count("STL") == 0


@needs_disassembler
def test_a_four_bit_code_costs_half_a_logic_instruction(directory: Path) -> None:
    """(word & mask) | bias is one LOP3 for two weights; the compiler left to itself takes two."""
    layout = layouts()["int4-g128"]
    cubin, path = compiled("int4-g128", directory)
    tile = instances.tiles(layout)[0]
    loop = sass.kernels(path)[cubin.names[instances.linear_name(layout, tile)]].main_loop()
    count = sass.kinds(loop)
    weights = 8 * count["HMMA"] / tile.nt  # of a lane, 16 x 16 / 32 to each product
    assert weights == tile.pf * layout.chunk / 2
    assert 0.5 <= count["LOP3"] / weights <= 0.6
    assert len(loop) / weights <= 3


@needs_disassembler
def test_parameters_lie_where_launches_put_them(directory: Path) -> None:
    cubin, path = compiled("int4-g128", directory)
    found = sass.parameters(path)
    assert len(found) == len(cubin.names)
    assert found.count(list(OFFSETS_AND_SIZES)) == len(cubin.names) - 1
    assert found.count([(0, 48), (48, 8), (56, 4), (60, 4)]) == 1


@needs_disassembler
def test_waiting_for_the_kernel_before_is_in_the_code(directory: Path) -> None:
    """ACQBULK is griddepcontrol.wait, PREEXIT launch_dependents; the first weights are asked for before."""
    layout = layouts()["int4-g128"]
    cubin, path = compiled("int4-g128", directory)
    code = sass.kernels(path)[cubin.names[instances.linear_name(layout, instances.tiles(layout)[0])]]
    names = [one.name.partition(".")[0] for one in code.instructions]
    assert names.index("LDG") < names.index("ACQBULK") < names.index("HMMA")
    assert "PREEXIT" in names
