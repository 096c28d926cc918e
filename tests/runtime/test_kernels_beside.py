"""The CUDA sources beside the weights: they are the package's own, and others run only for those who trust them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor import api
from compressor.errors import KernelError
from compressor.runtime.kernels.cuda import sources
from compressor.runtime.load import _kernel

GPU = torch.device("cuda")
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "int4"
    api.quantize(tiny("llama"), out, bits=4, method="rtn", evaluate=False, verify=False)
    return out


def brought(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((path / "config.json").read_text())["compressor_kernels"]
    return found


def another(path: Path, to: Path) -> dict[str, str]:
    """A copy of a checkpoint's sources, one of them changed; their sha256."""
    (to / "kernels").mkdir()
    for name in brought(path):
        (to / "kernels" / name).write_text((path / "kernels" / name).read_text())
    (to / "kernels" / "linear.cuh").write_text("// faster\n")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (to / "kernels").iterdir()}


def test_they_are_what_decodes_the_formats_of_the_model(packed: Path) -> None:
    assert brought(packed).keys() == {"primitives.cuh", "linear.cuh", "int_groups.cuh"}
    for name, digest in brought(packed).items():
        written = (packed / "kernels" / name).read_bytes()
        assert written == (sources.HERE / name).read_bytes()
        assert hashlib.sha256(written).hexdigest() == digest


def test_the_manifest_knows_them(packed: Path) -> None:
    known = json.loads((packed / "manifest.json").read_text())["files"]
    assert {f"kernels/{name}": digest for name, digest in brought(packed).items()}.items() <= known.items()


@pytest.mark.parametrize("trust", [False, True])
def test_the_packages_own_are_used_where_they_are_the_same(trust: bool, packed: Path) -> None:
    assert sources.foreign(brought(packed)) == []
    assert _kernel(packed, brought(packed), GPU, "auto", trust) == "auto"


def test_others_are_left_alone(packed: Path, tmp_path: Path) -> None:
    digests = another(packed, tmp_path)
    assert sources.foreign(digests) == ["linear.cuh"]
    assert _kernel(tmp_path, digests, GPU, "auto", False) == "auto"


def test_others_are_used_when_they_are_trusted(packed: Path, tmp_path: Path) -> None:
    assert _kernel(tmp_path, another(packed, tmp_path), GPU, "auto", True) == f"cuda:{tmp_path / 'kernels'}"


def test_they_have_no_part_in_what_a_cpu_does(packed: Path, tmp_path: Path) -> None:
    assert _kernel(tmp_path, another(packed, tmp_path), torch.device("cpu"), "auto", True) == "auto"


def test_trusted_sources_must_be_those_that_the_config_names(packed: Path, tmp_path: Path) -> None:
    digests = another(packed, tmp_path)
    (tmp_path / "kernels" / "int_groups.cuh").write_text("// swapped afterwards\n")
    with pytest.raises(KernelError, match=r"int_groups.cuh: is not the file that config.json names"):
        _kernel(tmp_path, digests, GPU, "auto", True)


def test_a_name_does_not_lead_out_of_the_folder(packed: Path, tmp_path: Path) -> None:
    outside = tmp_path / "evil.cuh"
    outside.write_text("")
    digest = hashlib.sha256(b"").hexdigest()
    (tmp_path / "kernels").mkdir()
    with pytest.raises(KernelError, match=r"evil.cuh: is not the file"):
        sources.beside(tmp_path, {"../evil.cuh": digest})


def test_there_must_be_some_to_trust(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="brings no kernels to trust"):
        sources.beside(tmp_path, {})
