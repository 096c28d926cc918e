"""State that a run shares with the rest of its process: torch's settings, random number generators, other threads.

Building a model with transformers temporarily changes the process (how modules register parameters, the default dtype), so
only one thread may do so at a time. A caller may also have set other defaults than a run expects. `known_state` gives every
verb of the API exclusive use of a known state, and restores the caller's state afterwards.
"""

import contextlib
import os
import random
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import torch

BUSY = threading.RLock()  # held by the thread that runs a verb; all threads of a process share transformers
os.register_at_fork(after_in_child=BUSY._at_fork_reinit)  # type: ignore[attr-defined]  # as in `logging`: no run in a child


@contextlib.contextmanager
def known_state() -> Iterator[None]:
    """Wait until no other thread runs a verb, then set the state of a process that has just started.

    Gradients are recorded. Inference mode, autocast, anomaly detection, deterministic algorithms and default devices are off.
    New tensors are float32, products of float32 are exact, random number generators are seeded, and warnings are not errors.
    Afterwards the caller's state is restored. Use as a context manager or as a decorator; may be nested.
    """
    with BUSY, contextlib.ExitStack() as stack:
        stack.enter_context(_random_numbers())
        stack.enter_context(_switches())
        stack.enter_context(warnings.catch_warnings())
        warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error"]  # type: ignore[index]
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _switches() -> Iterator[None]:
    """Set torch's process-wide switches, and restore them."""
    dtype, precision, anomaly = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_anomaly_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    nan_check = torch.is_anomaly_check_nan_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.autograd.set_detect_anomaly(anomaly, nan_check)


@contextlib.contextmanager
def _random_numbers() -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python, and restore their state."""
    ours, theirs, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(theirs)
        np.random.set_state(numpys)
        torch.set_rng_state(ours)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
