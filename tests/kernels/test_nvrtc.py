"""Compiling and keeping what was compiled. What needs NVIDIA's compiler is skipped where it is not installed."""

import logging
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from compressor.errors import KernelError
from compressor.runtime.kernels.cuda import cache, nvrtc
from compressor.runtime.kernels.cuda.cache import Cubin

SOURCE = "template <int N> __global__ void fill(int* out) { out[threadIdx.x] = N; }"
GCC = shutil.which("gcc")
CUBIN = Cubin(bytes(range(256)) * 4096, {"fill<1>": "_Z4fillILi1EEvPi"})


def installed() -> bool:
    try:
        nvrtc.library()
    except KernelError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not installed(), reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


class Compiler:
    """Counts what it is asked for."""

    def __init__(self, version: tuple[int, int] = (13, 0)) -> None:
        self.version, self.asked = version, 0

    def compile(self, source: str, names: Sequence[str], architecture: str) -> Cubin:
        self.asked += 1
        return Cubin(f"{source} {architecture}".encode(), {name: f"_{name}" for name in names})


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(nvrtc, "library", lambda: fake)
    return fake


def test_what_was_compiled_is_not_compiled_again(compiler: Compiler, tmp_path: Path) -> None:
    found = [nvrtc.compiled("a", ["k"], "sm_80", tmp_path) for _ in range(3)]
    assert compiler.asked == 1
    assert found[0] == found[1] == found[2] == Cubin(b"a sm_80", {"k": "_k"})


def test_everything_that_matters_is_in_the_key(compiler: Compiler, tmp_path: Path) -> None:
    asked = [("a", ["k"], "sm_80"), ("b", ["k"], "sm_80"), ("a", ["l"], "sm_80"), ("a", ["k"], "sm_90a")]
    for source, names, architecture in asked:
        nvrtc.compiled(source, names, architecture, tmp_path)
    compiler.version = (13, 1)
    nvrtc.compiled("a", ["k"], "sm_80", tmp_path)
    assert compiler.asked == 5
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "empty"])
def test_a_damaged_file_is_compiled_again(
    compiler: Compiler, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvrtc.compiled("a", ["k"], "sm_80", tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes({"cut short": data[:-1], "a bit flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    assert nvrtc.compiled("a", ["k"], "sm_80", tmp_path).code == b"a sm_80"
    assert compiler.asked == 2
    assert path.read_bytes() == data
    assert "damaged" in caplog.text


def test_a_directory_that_cannot_be_written_costs_only_the_cache(
    compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "kernels"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert nvrtc.compiled("a", ["k"], "sm_80", directory).code == b"a sm_80"
    assert compiler.asked == 2
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text


def _write_and_read(directory: Path) -> None:
    for _ in range(50):
        cache.write(directory, "key", CUBIN)
        assert cache.read(directory, "key") == CUBIN


def test_processes_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_and_read, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_directory_follows_the_platforms_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_directory() == tmp_path / "xdg" / "compressor" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / ".cache" / "compressor" / "kernels"


def test_a_user_without_a_home_lacks_only_the_cache(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    cache._tell.cache_clear()
    for _ in range(2):
        assert nvrtc.compiled("a", ["k"], "sm_80").code == b"a sm_80"
    assert compiler.asked == 2
    assert len(caplog.records) == 1 and "Could not determine home directory" in caplog.text


@pytest.mark.skipif(GCC is None, reason="no gcc to compile a stand-in for NVRTC with")
def test_the_library_finds_the_builtins_that_lie_beside_it(tmp_path: Path) -> None:
    """It asks for them by their bare name, and some of its versions do not look where they lie themselves."""
    builtins = "libnvrtc-builtins.so.13.0"
    (tmp_path / "builtins.c").write_text("int there;")
    (tmp_path / "nvrtc.c").write_text(f"""
#include <dlfcn.h>
int nvrtcVersion(int* major, int* minor) {{ *major = 13; *minor = 0; return dlopen("{builtins}", RTLD_LAZY) ? 0 : 7; }}
const char* nvrtcGetErrorString(int status) {{ (void)status; return "no builtins"; }}
""")
    for source, options in (
        ("builtins.c", (f"-Wl,-soname,{builtins}", "-o", builtins)),
        ("nvrtc.c", ("-o", "libnvrtc.so.13")),
    ):
        subprocess.run([str(GCC), "-shared", "-fPIC", source, *options], cwd=tmp_path, check=True)
    assert nvrtc.Nvrtc(tmp_path / "libnvrtc.so.13").version == (13, 0)


def test_the_library_of_torchs_own_cuda_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = [tmp_path / "nvidia" / folder / "lib" for folder in ("cu13", "cuda_nvrtc")]
    home = tmp_path / "toolkit"
    for directory, name in ((wheels[0], "libnvrtc.so.13"), (wheels[1], "libnvrtc.so.12"), (home / "lib64", "libnvrtc.so")):
        directory.mkdir(parents=True)
        (directory / name).touch()
        (directory / "libnvrtc-builtins.so.13.0").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("CUDA_HOME", str(home))
    for version, first in (("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13")):
        monkeypatch.setattr("torch.version.cuda", version)
        found = nvrtc.candidates()
        assert found[0].name == first
        assert {path.name for path in found} == {"libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"}


def test_no_library_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "candidates", lambda: [Path("/nowhere/libnvrtc.so.13")])
    with pytest.raises(KernelError, match=r"there is no libnvrtc .*pip install nvidia-cuda-nvrtc"):
        nvrtc.library.__wrapped__()


@needs_nvrtc
def test_name_expressions_get_their_names_in_the_code(tmp_path: Path) -> None:
    cubin = nvrtc.compiled(SOURCE, ["fill<1>", "fill<2>"], "sm_80", tmp_path)
    assert cubin.names == {"fill<1>": "_Z4fillILi1EEvPi", "fill<2>": "_Z4fillILi2EEvPi"}
    assert cubin.code.startswith(b"\x7fELF")
    assert all(name.encode() in cubin.code for name in cubin.names.values())
    assert nvrtc.compiled(SOURCE, ["fill<1>", "fill<2>"], "sm_80", tmp_path) == cubin


@needs_nvrtc
def test_the_compilers_log_comes_with_the_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match='identifier "wrong" is undefined'):
        nvrtc.compiled("__global__ void k() { wrong(); }", ["k"], "sm_80", tmp_path)
    assert not list(tmp_path.iterdir())


@needs_nvrtc
def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cannot compile the kernels for sm_999"):
        nvrtc.compiled(SOURCE, ["fill<1>"], "sm_999", tmp_path)
