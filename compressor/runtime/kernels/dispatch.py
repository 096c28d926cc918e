"""Choose the kernel that multiplies: tensor cores by themselves, the CUDA kernels, the CPU kernels, or the reference, in this
order.

A kernel is asked for by name, "auto" for the first that can. "cuda:DIRECTORY" are CUDA kernels whose sources are those of a
directory instead of the package's: whoever says so trusts them.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import KernelError
from compressor.runtime.kernels.layouts import named

AUTO, REFERENCE = "auto", "reference"
HOMES = {name: f"compressor.runtime.kernels.{name}" for name in ("native", "cuda", "cpu", REFERENCE)}
DEVICES = {"native": "cuda", "cuda": "cuda", "cpu": "cpu"}  # the kernel -> the device it runs on
ASKED = "asked for"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The chosen kernel, and why."""

    kernel: str
    reason: str
    linear: Callable[..., Tensor]  # x [M, K], parts, layout, rows, bias -> [M, N]
    rounding: Mapping[str, Callable[..., Tensor]]  # the same for x rounded first in a way that the kernel does itself


@functools.cache
def choose(layout: str, device: torch.device, dtype: torch.dtype, wanted: str = AUTO) -> Choice:
    """The kernel for activations of a device and dtype; says so in one log line, once for each combination.

    Args:
        layout: Name of the weight's layout.
        device: Where the activations are.
        dtype: Dtype of the activations.
        wanted: "auto", or the kernel that it has to be.

    Raises:
        KernelError: the wanted kernel does not exist or cannot do it.
    """
    asked, directory = wanted.partition(":")[0], directory_of(wanted)
    if asked not in (AUTO, *HOMES) or (directory and asked != "cuda"):
        raise KernelError(f"kernel: no kernel named `{wanted}`; known: {', '.join((AUTO, *HOMES))}")
    obstacles = {}
    for kernel, home in DEVICES.items():
        if asked in (AUTO, kernel):
            on_device = device.type == home
            obstacles[kernel] = _obstacle(kernel, layout, device, dtype) if on_device else f"the activations are on {device}"
            if obstacles[kernel] is None:
                return _told(kernel, backend(kernel).about(device), layout, directory)
    if asked in DEVICES:
        raise KernelError(
            f"kernel `{asked}` cannot multiply by {layout} on {device}: {obstacles[asked]}; kernel='auto' takes what can"
        )
    why = "; ".join(f"{kernel}: {obstacle}" for kernel, obstacle in obstacles.items()) or ASKED
    return _told(REFERENCE, why, layout, None)


def prepare(layout: str, device: torch.device, dtype: torch.dtype, wanted: str = AUTO) -> None:
    """Choose, and have the CUDA kernels compiled and loaded: in a graph that is being captured it would be too late.

    Raises:
        KernelError: as of `choose`, or they cannot be compiled.
    """
    if choose(layout, device, dtype, wanted).kernel == "cuda":
        directory = directory_of(wanted)
        backend("cuda").prepare(named(layout), device, *([directory] if directory else []))


def directory_of(wanted: str) -> Path | None:
    """The directory of CUDA sources that is part of a kernel's name, if one is."""
    directory = wanted.partition(":")[2]
    return Path(directory) if directory else None


@functools.cache
def backend(kernel: str) -> Any:
    """The module that implements a kernel: `obstacle`, `about`, `linear`, and `rounding`, as of `Choice`."""
    return importlib.import_module(HOMES[kernel])


def _obstacle(kernel: str, layout: str, device: torch.device, dtype: torch.dtype) -> str | None:
    found: str | None = backend(kernel).obstacle(named(layout), device, dtype)
    return found


def _told(kernel: str, reason: str, layout: str, directory: Path | None) -> Choice:
    slow = kernel == REFERENCE and reason != ASKED
    log.log(logging.WARNING if slow else logging.INFO, "%s: %s kernel (%s)", layout, kernel, reason)
    home = backend(kernel)
    linear: Callable[..., Tensor] = functools.partial(home.linear, directory=directory) if directory else home.linear
    return Choice(kernel, reason, linear, getattr(home, "rounding", {}))
