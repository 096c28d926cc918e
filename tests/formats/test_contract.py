"""What every format promises, tested on every format that a shipped recipe uses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.formats.base import Contextual, Format, QuantizedTensor
from compressor.formats.numerics.activations import Seen
from compressor.formats.numerics.codes import values
from compressor.formats.vq import VQ
from compressor.recipe import registry
from compressor.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OPTIONS = {o for path in RECIPES for step in load_recipe(path).passes for o in step.offers if isinstance(o, Format)}
# Norms are chosen by the pass `vptq`: the contract is of what a format fits by itself.
FITTING = {replace(o, norm="none") if isinstance(o, VQ) else o for o in OPTIONS}
FORMATS = sorted(FITTING, key=lambda o: o.label)
CALIBRATED = [o.within(1.0, Seen.nothing()) if isinstance(o, Contextual) else o for o in FORMATS]  # where a run fits them
SHAPE = (128, 256)


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.label)
def fmt(request):
    return request.param


@pytest.fixture(params=CALIBRATED, ids=lambda fmt: fmt.label)
def calibrated(request):
    return request.param


@pytest.fixture
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def test_every_format_and_every_pass_has_a_recipe():
    used = {type(step).__module__ for path in RECIPES for step in load_recipe(path).passes}
    used |= {type(fmt).__module__ for fmt in FORMATS}
    there = {module for kind in registry.PACKAGES for module in registry.modules(kind).values()}
    assert there <= used


def test_packing_loses_nothing(calibrated, weight):
    grid = calibrated.fit(weight)
    codes = grid.round(weight, 0)
    assert torch.equal(grid.pack(codes).dequantize(), grid.decode(codes, 0))


def test_a_packed_weight_is_what_its_codes_stand_for(calibrated, weight):
    grid = calibrated.fit(weight)
    packed = grid.pack(grid.round(weight, 0))
    fmt = packed.format
    assert torch.equal(values(fmt.codes(packed)), fmt.dequantize(packed))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_codes_are_stored_again_byte_for_byte(scale_dtype, calibrated, weight):
    """In whatever dtype others may have stored the scales, unless they are of 8 bits."""
    grid = calibrated.fit(weight)
    packed = grid.pack(grid.round(weight, 0))
    fmt = packed.format
    free = {n for n, part in packed.parts.items() if part.dtype in (torch.bfloat16, torch.float16)}
    parts = {n: part.to(scale_dtype) if n in free else part for n, part in packed.parts.items()}
    again = fmt.stored(fmt.codes(QuantizedTensor(fmt, SHAPE, parts)), SHAPE)
    assert (again.format, again.shape, again.parts.keys()) == (fmt, SHAPE, parts.keys())
    assert all(again.parts[n].dtype == part.dtype for n, part in parts.items())
    assert all(torch.equal(again.parts[n].view(torch.uint8), part.view(torch.uint8)) for n, part in parts.items())


def test_the_names_of_its_parts_are_known(fmt):
    assert set(fmt.checkpoint_parts(SHAPE)) <= set(fmt.part_names)


def test_columns_one_at_a_time_give_the_same_codes_as_all_at_once(calibrated, weight):
    grid = calibrated.fit(weight)
    single = [grid.round(weight[:, c : c + grid.step], c) for c in range(0, SHAPE[1], grid.step)]
    assert torch.equal(torch.cat(single, 1), grid.round(weight, 0))


def test_values_on_the_grid_round_to_themselves(calibrated, weight):
    if getattr(calibrated, "residual_bits", 0):
        pytest.skip("of sums of two entries only those with the nearest few first ones are tried")
    grid = calibrated.fit(weight)
    values = grid.decode(grid.round(weight, 0), 0)
    assert torch.equal(grid.decode(grid.round(values, 0), 0), values)


def test_stored_bits_are_the_bits_of_the_parts(calibrated, weight):
    grid = calibrated.fit(weight)
    packed = grid.pack(grid.round(weight, 0))
    fmt = packed.format
    assert sum(8 * part.nbytes for part in packed.parts.values()) == fmt.stored_bits(SHAPE)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in packed.parts.items()} == dict(fmt.checkpoint_parts(SHAPE))


def test_fitting_leaves_the_weight_alone_and_repeats_itself(calibrated, weight):
    before = weight.clone()
    first, second = (calibrated.fit(weight).pack(calibrated.fit(weight).round(weight, 0)) for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first.parts[n], second.parts[n]) for n in first.parts)


def test_a_group_that_is_fitted_anew_is_fitted_as_with_the_others_and_leaves_them_alone(calibrated, weight):
    importance = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(1)) + 0.1
    grid = calibrated.fit(weight, importance)
    now = slice(0, grid.width) if grid.width == SHAPE[1] else slice(grid.width, 2 * grid.width)
    changed = weight.clone()
    changed[:, now] *= 0.3
    again = grid.refit(changed[:, now], now.start, importance[now], search=True)
    whole = calibrated.fit(changed, importance)
    values, fitted = (one.decode(one.round(changed, 0), 0) for one in (again, whole))
    before = grid.decode(grid.round(changed, 0), 0)
    others = torch.ones(SHAPE[1], dtype=torch.bool)
    others[now] = False
    assert torch.equal(values[:, now], fitted[:, now])
    assert torch.equal(values[:, others], before[:, others])


def test_the_recipe_entry_rebuilds_the_format(fmt):
    assert registry.build("format", registry.describe(fmt)) == fmt
