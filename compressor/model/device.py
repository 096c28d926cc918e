"""Find the device that a run computes on."""

import torch

from compressor.errors import RecipeError


def compute_device(name: str | None) -> torch.device:
    """The device of a name; None takes a GPU if there is one.

    Raises:
        RecipeError: neither `cpu` nor `cuda`, or a GPU that is not there.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name}: not one of cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise RecipeError(f"device {name}: torch finds {found} CUDA devices here; use another, or cpu")
    return device
