"""What memory is said to be available: to a container no more than it may still take."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tensors

from compressor.model import memory
from compressor.model.memory import available_memory, cgroup_rooms, dense_bytes
from compressor.model.source import ModelSource

CPU = torch.device("cpu")


def group(directory: Path, limit: str, used: int, droppable: int, version: int = 2) -> None:
    """A control group as the kernel shows it."""
    names = memory.V2 if version == 2 else memory.V1
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 7\n{names[2]} {droppable}\nslab 1\n")


@pytest.fixture
def membership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The process is in the group `a/b` of version 2, mounted at `mount`; the machine has 10,000 bytes available."""
    file = tmp_path / "cgroup"
    file.write_text("0::/a/b\n")
    monkeypatch.setattr(memory, "MEMBERSHIP", file)
    monkeypatch.setattr(memory, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    return file


@pytest.mark.usefixtures("membership")
class TestContainer:
    def test_with_a_limit_gets_what_is_left_and_what_can_be_dropped(self, tmp_path: Path) -> None:
        group(tmp_path / "mount" / "a" / "b", "5000", 3000, 400)
        assert available_memory(CPU) == 2400

    def test_without_a_limit_gets_what_the_machine_has(self, tmp_path: Path) -> None:
        group(tmp_path / "mount" / "a" / "b", "max", 3000, 400)
        assert available_memory(CPU) == 10_000

    def test_with_more_than_the_machine_has_gets_that(self, tmp_path: Path) -> None:
        group(tmp_path / "mount" / "a" / "b", "50000", 3000, 400)
        assert available_memory(CPU) == 10_000

    def test_inside_another_is_bound_by_both(self, tmp_path: Path) -> None:
        group(tmp_path / "mount" / "a" / "b", "5000", 3000, 400)
        group(tmp_path / "mount" / "a", "6000", 5500, 100)
        assert available_memory(CPU) == 600

    def test_that_sees_only_its_own_group_at_the_mount_is_bound_by_it(self, tmp_path: Path) -> None:
        group(tmp_path / "mount", "5000", 3000, 400)
        assert available_memory(CPU) == 2400

    def test_beyond_its_limit_gets_nothing(self, tmp_path: Path) -> None:
        group(tmp_path / "mount" / "a" / "b", "5000", 6000, 0)
        assert available_memory(CPU) == 0

    def test_of_version_1_is_bound_by_the_memory_controller_alone(self, tmp_path: Path, membership: Path) -> None:
        membership.write_text("5:cpu,cpuacct:/c\n4:memory:/a\n1:name=systemd:/c\n0::/\n")
        group(tmp_path / "mount" / "memory" / "a", "5000", 3000, 400, version=1)
        group(tmp_path / "mount" / "memory" / "c", "1000", 0, 0, version=1)
        group(tmp_path / "mount" / "memory", str(2**63 - 4096), 4000, 500, version=1)
        assert available_memory(CPU) == 2400


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert cgroup_rooms(tmp_path / "none", tmp_path) == []


def test_of_a_gpu_counts_what_torch_keeps_for_itself_without_using_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert available_memory(torch.device("cuda")) == 1300


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_dense_bytes_count_what_is_tied_once(dtype: torch.dtype, size: int, tiny: Callable[..., Path]) -> None:
    model = tiny("llama_tied")
    stored = tensors(model)
    assert "lm_head.weight" not in stored
    assert dense_bytes(ModelSource(model, CPU, dtype)) == size * sum(tensor.numel() for tensor in stored.values())
