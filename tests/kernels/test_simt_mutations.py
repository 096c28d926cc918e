"""The emulator and the comparisons see what they are there for: kernels with one mistake each do not go unnoticed."""

from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.runtime.kernels.layouts.int_groups import IntGroups

pytestmark = simt.needs_gxx

LAUNCH = Launch(2, 2, 4, 2)
WRONG_RESULTS = {
    "a barrier is missing": ("  __syncthreads();\n", ""),
    "two registers of a fragment are swapped": ("a[i] = difference(step, i);", "a[i] = difference(step, i ^ 2);"),
    "a shift is wrong": ("and_or(word >> 4 * i,", "and_or(word >> 4 * (i & 2),"),
    "the zero point is the other row's": ("permute_bytes(scale_zero[row], 0", "permute_bytes(scale_zero[1 - row], 0"),
    "a group is the one before": (
        "group_reciprocal = group ? 0xffffffffu / (u32)group + 1",
        "group_reciprocal = group ? 1",
    ),
    "operands of the two halves are swapped": ("a, b0, b1);\n", "a, b1, b0);\n"),
    "warps take the same chunk": ("int first = warp; first", "int first = 0; first"),
    "the ring is not refilled": ("load(ring[slot], chunk + WARPS * PF);", ";"),
    "sums go to the wrong token": ("8 * n + 2 * t + i % 2", "8 * n + 2 * t + 1 - i % 2"),
}
STOPPED = {
    "rows beyond the last tile are loaded": (
        "tiles[r].load(parts, min(first_tile_row + r, last_tile_row)",
        "tiles[r].load(parts, first_tile_row + r",
        "outside every tensor",
    ),
    "tokens beyond the last are loaded": ("min(8 * n + g, M - 1 - first_token)", "(8 * n + g)", "outside every tensor"),
    "loads are not aligned": ("offset + 8 * eight", "offset + 4 * eight", "misaligned access of 16 bytes"),
    "some warps do not come to the barrier": ("  __syncthreads();\n", "  if (warp) __syncthreads();\n", "wait at a barrier"),
    "some lanes do not come to the product": (
        "multiply_accumulate(partial",
        "if (threadIdx.x != 5) multiply_accumulate(partial",
        "31 of 32 lanes",
    ),
}


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert text.count(old) == 1, f"`{old}` is there {text.count(old)} times"
        return text.replace(old, new)

    return change


def difference(libraries: Path, change: Callable[[str], str]) -> list[float]:
    """The error of int4 products with the changed kernels, for several orders in which threads run."""
    torch.manual_seed(0)
    decoder = "IntGroups<4, 0, 0>"
    library = simt.build(libraries, ["int_groups"], [decoder], [LAUNCH], change)
    codes = parity.int_codes(4, 40, 1024, 1, 128)
    layout = IntGroups.of(codes)
    assert layout is not None
    parts, x_MK = list(layout.arrange(codes).values()), parity.activations(11, 1024)
    found = [library.linear(decoder, LAUNCH, x_MK, parts, 40, group=layout.group, seed=seed) for seed in range(3)]
    return [error(one, parity.product(x_MK, codes)) for one in found]


def test_the_kernels_as_they_are_pass(libraries: Path) -> None:
    assert max(difference(libraries, lambda text: text)) < TOLERANCE


@pytest.mark.parametrize("mistake", WRONG_RESULTS)
def test_a_mistake_shows_in_the_result(libraries: Path, mistake: str) -> None:
    errors = difference(libraries, replaced(*WRONG_RESULTS[mistake]))
    assert not all(one < 2 * TOLERANCE for one in errors), errors  # nan is not below anything


@pytest.mark.parametrize("mistake", STOPPED)
def test_a_mistake_stops_the_launch(libraries: Path, mistake: str) -> None:
    old, new, message = STOPPED[mistake]
    with pytest.raises(simt.EmulatorError, match=message):
        difference(libraries, replaced(old, new))
