import itertools

import pytest
import torch

from compressor.errors import RecipeError
from compressor.formats.base import stored_bits
from compressor.formats.int_group import IntGroup
from compressor.model.block import Block
from compressor.passes.quantize.finequant import Rung, climb, spend
from compressor.recipe.registry import build

SIZES = (-1, 128, 64, 32)
LADDER = tuple({"format": "int_group", "bits": 4, "group_size": size} for size in SIZES)


class Linear:
    def weight(self, module):
        return module.weight

    def parameter(self, w_OI):
        return w_OI

    def set_weight(self, module, w_OI):
        module.weight.data = w_OI


def block(**weights):
    """A block of linear layers with these weights."""
    module = torch.nn.Module()
    for name, w in weights.items():
        module.add_module(name, torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
        module.get_submodule(name).weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return Block(0, "model.layers.0", module, dict.fromkeys(weights, Linear()), lambda shape: ((), {}))


def smooth(seed, rows=48, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def uneven(seed):
    """One run of 32 columns is larger than the rest: what fine groups are for."""
    return smooth(seed) * torch.tensor([1, 1, 8, 1, 1, 1, 1, 1]).repeat_interleave(32)


def finequant(**options):
    return build("pass", {"pass": "finequant", "options": LADDER, **options})


def sizes(step, given):
    units = step.units(given)
    outcome = step.apply(given, None, dict.fromkeys(units, step.options[-1]))
    return {name: new.format.group_size for name, new in outcome.edits.items()}


def test_layers_get_the_groups_they_need():
    given = block(o_proj=smooth(0), down_proj=uneven(1))
    assert sizes(finequant(tolerance=0.3), given) == {"o_proj": -1, "down_proj": 32}


def test_a_matrix_of_equal_values_keeps_whole_rows():
    given = block(o_proj=torch.full((16, 256), 0.3), down_proj=torch.zeros(16, 256))
    for step in (finequant(tolerance=0.0), finequant(budget_bits_per_weight=8)):
        assert set(sizes(step, given).values()) == {-1}


def test_less_tolerance_takes_as_many_bits_or_more():
    given = block(q_proj=smooth(0), o_proj=smooth(1), gate_proj=uneven(2), down_proj=uneven(3) + smooth(4))
    bits = []
    for tolerance in (10.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0):
        step = finequant(tolerance=tolerance)
        outcome = step.apply(given, None, dict.fromkeys(step.units(given), step.options[0]))
        bits.append(sum(stored_bits(new) for new in outcome.edits.values()))
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_layers_that_are_fused_when_served_get_the_same_groups():
    given = block(q_proj=smooth(0), k_proj=uneven(1), v_proj=smooth(2), gate_proj=uneven(3), up_proj=smooth(4))
    for step in (finequant(), finequant(tolerance=0.5), finequant(budget_bits_per_weight=4.3)):
        found = sizes(step, given)
        assert found["q_proj"] == found["k_proj"] == found["v_proj"]
        assert found["gate_proj"] == found["up_proj"]


@pytest.mark.parametrize("budget", [4.1, 4.2, 4.3, 4.5])
def test_a_budget_is_kept_and_leaves_no_room_for_another_step(budget):
    given = block(q_proj=smooth(0), o_proj=uneven(1), gate_proj=smooth(2, rows=96), down_proj=uneven(3))
    found = sizes(finequant(budget_bits_per_weight=budget), given)
    shapes = {name: given.shape(name) for name in found}
    allowed = budget * sum(rows * columns for rows, columns in shapes.values())

    def bits(name, size):
        return IntGroup(bits=4, group_size=size).stored_bits(shapes[name])

    spent = sum(bits(name, size) for name, size in found.items())
    finer = [bits(n, SIZES[SIZES.index(s) + 1]) - bits(n, s) for n, s in found.items() if s != SIZES[-1]]
    assert spent <= allowed
    assert all(spent + more > allowed for more in finer)


def test_a_budget_goes_where_it_saves_most():
    given = block(o_proj=smooth(0), down_proj=uneven(1))
    assert sizes(finequant(budget_bits_per_weight=4.3), given) == {"o_proj": -1, "down_proj": 32}


def test_a_share_of_the_units_is_chosen_for_as_all_of_them():
    """Ranks work on a share each, of the one budget."""
    given = block(q_proj=smooth(0), o_proj=uneven(1), gate_proj=smooth(2), down_proj=uneven(3))
    for step in (finequant(), finequant(budget_bits_per_weight=4.2)):
        whole = sizes(step, given)
        for name in whole:
            unit = next(unit for unit, layers in step.units(given).items() if name in layers)
            part = step.apply(given, None, {unit: step.options[0]})
            assert {layer: new.format.group_size for layer, new in part.edits.items()} == {name: whole[name]}


def test_a_rung_that_does_not_divide_a_row_is_left_out():
    given = block(o_proj=uneven(0)[:, :160], down_proj=uneven(1))
    assert sizes(finequant(tolerance=0.0), given) == {"o_proj": 32, "down_proj": 32}
    assert sizes(finequant(tolerance=10.0), given) == {"o_proj": -1, "down_proj": -1}


def test_a_budget_below_the_coarsest_rung_is_refused_with_the_numbers():
    step = finequant(budget_bits_per_weight=4.01)
    with pytest.raises(
        RecipeError, match=r"model\.layers\.0: budget_bits_per_weight 4\.01: the coarsest options take 50.* bits"
    ):
        sizes(step, block(o_proj=smooth(0)))


def test_ranges_of_nested_groups_never_grow():
    """Why finer groups are finer: what the ladder rests on."""
    for w in (smooth(0), uneven(1)):
        ranges = [w.unflatten(1, (-1, size)).abs().amax(-1).repeat_interleave(size, 1) for size in (256, 128, 64, 32)]
        assert all(bool((fine <= coarse).all()) for coarse, fine in itertools.pairwise(ranges))


def rung(bits, error):
    return Rung(IntGroup(bits=4, group_size=bits), bits, error)


def test_climbing_stops_at_the_first_rung_that_the_next_hardly_improves():
    ladder = [rung(10, 8.0), rung(11, 4.0), rung(12, 3.9), rung(13, 1.0)]
    assert climb(ladder, 0.1).group_size == 11
    assert climb(ladder, 0.01).group_size == 13
    assert climb(ladder, 1.0).group_size == 10


def test_spending_skips_a_rung_that_helps_little_for_one_that_helps_much():
    ladders = {"a": [rung(10, 8.0), rung(11, 7.9), rung(12, 2.0)], "b": [rung(10, 3.0), rung(11, 1.0)]}
    taken = {unit: fmt.group_size for unit, fmt in spend(ladders, 22).items()}
    assert taken == {"a": 12, "b": 10}
    assert {unit: fmt.group_size for unit, fmt in spend(ladders, 23).items()} == {"a": 12, "b": 11}


@pytest.mark.parametrize(
    ("options", "message"), [({"options": LADDER[:1]}, "two or more"), ({"tolerance": -0.1}, "-0.1 is negative")]
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        finequant(**options)
