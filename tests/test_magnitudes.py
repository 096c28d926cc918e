"""Counts of magnitudes: against the numbers themselves."""

import pytest
import torch
from torch import Tensor

from compressor.formats.numerics.histogram import BINS, Magnitudes, bins
from compressor.formats.numerics.minifloat import Minifloat
from compressor.pipeline.calibration.stats import Spread

CPU = torch.device("cpu")


def some(tokens: int = 3000, channels: int = 8) -> Tensor:
    """Channels of very different sizes, of both signs."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-8, 8, channels, base=2.0)


def counted(*batches: Tensor) -> Magnitudes:
    spread = Spread(batches[0].shape[1], CPU)
    for batch in batches:
        spread.update(batch)
    return spread.value


def test_every_number_is_in_one_bin() -> None:
    x = some()
    assert torch.equal(counted(x).counts_IB.sum(1), torch.full((8,), len(x)))
    assert torch.equal(counted(x[:100], x[100:]).counts_IB, counted(x).counts_IB)
    assert torch.equal(counted(-x).counts_IB, counted(x).counts_IB)
    many = some(600_000)  # more than are counted at a time
    assert torch.equal(counted(many).counts_IB, counted(many[:300_000], many[300_000:]).counts_IB)
    assert int(counted(many).counts_IB.sum()) == many.numel()


def test_bins_are_an_eighth_of_a_power_of_two_wide() -> None:
    x = torch.logspace(-15.9, 15.9, 5000, base=2.0)
    exponent = x.log2().floor()
    assert torch.equal(bins(x), ((exponent + 16) * 8 + ((x / 2**exponent - 1) * 8).floor()).long())


def test_what_is_too_small_or_too_large_counts_at_the_ends() -> None:
    x = torch.tensor([0.0, 1e-30, 2.0**-17, 2.0**17, 1e30, float("inf")])
    assert bins(x).tolist() == [0, 0, 0, BINS - 1, BINS - 1, BINS - 1]


def test_the_largest_is_bounded_closely() -> None:
    x = some()
    peak, found = x.abs().amax(0), counted(x).largest
    assert (peak < found).all()
    assert (found <= peak * 9 / 8).all()
    assert (counted(torch.zeros(4, 2)).largest < 2.0**-15).all()


def test_the_mean_square_is_nearly_that_of_the_numbers() -> None:
    x = some()
    torch.testing.assert_close(counted(x).energy(), x.double().square().mean(0), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e4m3"])
def test_the_error_of_rounding_is_nearly_that_of_the_numbers(name: str) -> None:
    x, element = some(30_000), Minifloat.parse(name)
    scales = [0.01, 0.3, 2.0, 40.0]
    exact = torch.stack([(element.round(x / s) * s - x).double().square().mean(0) for s in scales])
    torch.testing.assert_close(counted(x).missed(element, scales), exact, rtol=0.1, atol=1e-7)
