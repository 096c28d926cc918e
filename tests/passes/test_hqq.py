import itertools

import pytest
import torch

from compressor.formats.gptq_int import GptqInt
from compressor.formats.int_group import IntGroup
from compressor.passes.quantize.hqq import half_quadratic
from compressor.recipe.registry import build

NORMS = [0.7, 1.0, 2.0, 2.4]


@pytest.fixture
def weight():
    """Heavy tails: a few weights of each group are far out."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(32, 256, generator=g)
    return 0.02 * w * (1 + 4 * (torch.rand(32, 256, generator=g) > 0.98))


def loss(weight, grid, norm):
    """Of each group, computed from the packed bytes."""
    missed = grid.pack(grid.round(weight, 0)).dequantize() - weight
    return missed.double().abs().pow(norm).unflatten(1, (-1, grid.group_size)).sum(-1)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_rounds_never_raise_the_error_of_a_group(bits, norm, symmetric, search, weight):
    start = IntGroup(bits=bits, group_size=64, symmetric=symmetric).fit(weight, search=search)
    losses = [loss(weight, start, norm)]
    losses += [loss(weight, half_quadratic(weight, start, norm=norm, steps=steps), norm) for steps in range(1, 8)]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < float(losses[0].sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", [2.0, 2.4])  # smaller ones have many local minima
def test_it_gets_near_the_best_scale_there_is(norm, symmetric, weight):
    """Of one group; the best is found by trying everything."""
    w = weight[:1, :32]
    fmt = IntGroup(bits=3, group_size=32, symmetric=symmetric)
    found = float(loss(w, half_quadratic(w, fmt.fit(w), norm=norm, steps=20), norm).sum())
    scales = torch.linspace(0.02, 1, 400)[:, None] * float(w.abs().max()) * (1 if symmetric else 2) / 3.5
    scales = torch.cat([scales, -scales]) if symmetric else scales
    losses = [
        (((w / scales + zero).round().clamp(0, 7) - zero) * scales - w).abs().pow(norm).sum(1)
        for zero in ([4] if symmetric else range(8))
    ]
    assert found <= 1.05 * float(torch.stack(losses).min())


def test_a_least_squares_fit_cannot_be_improved_by_another_scale_of_the_same_codes(weight):
    grid = half_quadratic(weight, IntGroup(bits=3, group_size=64).fit(weight), norm=2.0, steps=50)
    codes = (grid.round(weight, 0).float() - 4).unflatten(1, (-1, 64))
    w = weight.unflatten(1, (-1, 64))
    exact = (w * codes).sum(-1) / codes.square().sum(-1)
    gain = loss(weight, grid, 2.0) - (w - codes * exact[..., None]).square().sum(-1)
    assert float(gain.max()) < 1e-3 * float(loss(weight, grid, 2.0).max())  # what rounding a scale to bf16 costs


def test_a_small_norm_serves_the_many_and_a_large_one_the_few(weight):
    start = IntGroup(bits=3, group_size=64).fit(weight, search=False)
    small, large = (half_quadratic(weight, start, norm=norm, steps=20) for norm in (0.7, 4.0))
    median, worst = (
        [float(measure((grid.decode(grid.round(weight, 0), 0) - weight).abs())) for grid in (small, large)]
        for measure in (torch.median, torch.max)
    )
    assert median[0] < median[1]
    assert worst[0] > worst[1]


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e15])
def test_the_fit_scales_with_the_weight(magnitude, weight):
    fmt = IntGroup(bits=3, group_size=64)
    one = half_quadratic(weight, fmt.fit(weight), norm=2.4, steps=10)
    other = half_quadratic(weight * magnitude, fmt.fit(weight * magnitude), norm=2.4, steps=10)
    same = one.round(weight, 0) == other.round(weight * magnitude, 0)
    assert float(same.float().mean()) > 0.97  # scales are rounded elsewhere in the stored dtype


def test_groups_of_zeros_and_of_one_value_stay_exact():
    weight = torch.zeros(4, 64)
    weight[:, 32:] = 0.5
    grid = half_quadratic(weight, IntGroup(bits=4, group_size=32).fit(weight), norm=0.7, steps=5)
    assert torch.equal(grid.decode(grid.round(weight, 0), 0), weight)


def test_zero_points_stay_codes_and_the_symmetric_kind_keeps_its_own(weight):
    shifted = weight + 0.03
    for fmt in (IntGroup(bits=2, group_size=64, symmetric=False), GptqInt(bits=2, group_size=64, symmetric=False)):
        zero = half_quadratic(shifted, fmt.fit(shifted, search=False), norm=2.4, steps=10).zero_OG
        assert torch.equal(zero, zero.round().clamp(0, 3))
    assert half_quadratic(shifted, IntGroup(bits=2).fit(shifted), norm=2.4, steps=10).zero_OG.unique().tolist() == [2]


def test_the_weight_is_left_alone_and_the_result_repeats(weight):
    before, start = weight.clone(), IntGroup(bits=3, group_size=64).fit(weight)
    first, second = (half_quadratic(weight, start, norm=2.4, steps=10) for _ in range(2))
    assert torch.equal(weight, before)
    assert torch.equal(first.scale_OG, second.scale_OG)


@pytest.mark.parametrize("options", [{"norm": 0}, {"norm": 9}, {"steps": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(Exception, match=next(iter(options))):
        build("pass", {"pass": "hqq", "options": [{"format": "int_group"}], **options})
