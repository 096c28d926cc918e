"""How much memory there is, and how much a whole model takes."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from compressor.model.source import ModelSource

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
# Of a control group: the file with its limit, the file with what it uses, and what memory.stat calls file pages that the
# kernel drops first, which count as used. https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken without pushing anything out: of the GPU, or of the machine and of the container it runs in."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([int(psutil.virtual_memory().available), *cgroup_rooms(MEMBERSHIP, MOUNT)])


def cgroup_rooms(membership: Path, mount: Path) -> list[int]:
    """Return the memory left, in bytes, in each control group with a limit that the process is in; none where there are no
    such groups.

    Args:
        membership: Says which groups these are, a line for each hierarchy.
        mount: Where the hierarchies are.
    """
    if not membership.is_file():
        return []
    rooms = [_room(group, *names) for group, names in _groups(membership.read_text(), mount)]
    return [room for room in rooms if room is not None]


def parameters(source: ModelSource) -> int:
    """How many a model has; tied ones count once."""
    state = source.model.state_dict()
    count: int = sum(state[name].numel() for name in source.names)
    return count


def dense_bytes(source: ModelSource) -> int:
    """Return the bytes of a model with all its parameters in memory, in the dtype of computation; tied ones count once."""
    return parameters(source) * source.dtype.itemsize


def _groups(membership: str, mount: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Directories of the groups that count memory, from the process's own up to the root: the limits of all apply."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (mount / "memory", V1) if controllers else (mount, V2)
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            yield root / group, names


def _room(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """Return the memory left in one group; None if it has no limit, or cannot be seen from in here."""
    try:
        most = (group / limit).read_text().strip()
        taken = int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - taken + int(stat[droppable]))
