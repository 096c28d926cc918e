"""Compiles many kernels at once, into the cache that they are loaded from: one after the other, they take half a minute."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from compressor.runtime.kernels.cuda import instances, nvrtc, sources
from compressor.runtime.kernels.cuda.instances import Tile
from compressor.runtime.kernels.layouts import Layout, named

Wanted = tuple[Layout, tuple[Tile, ...]]


def compile_all(wanted: Iterable[Wanted], architecture: str) -> None:
    """As `program.load` would, layout by layout.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    nvrtc.library()  # finds it once for all
    work = [(layout.name, tiles, architecture) for layout, tiles in wanted]
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:  # forked: they compile, and touch no GPU
        list(pool.map(_compile, work))


def _compile(work: tuple[str, tuple[Tile, ...], str]) -> None:
    name, tiles, architecture = work
    layout = named(name)
    expressions = [*(instances.linear_name(layout, tile) for tile in tiles), instances.dequantize_name(layout)]
    nvrtc.compiled(sources.text(layout), expressions, architecture)
