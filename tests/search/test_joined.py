"""Attentions and MLPs as units of a search, against all combinations of what is inside."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.formats.base import GONE
from compressor.formats.int_group import IntGroup
from compressor.pipeline.search.allocate import Budget, milp
from compressor.pipeline.search.importance import errors, uniform
from compressor.pipeline.search.joined import Joined
from compressor.pipeline.search.levels import Level, LevelDB, Unit

BITS = (2, 3, 4, 8)
OPTIONS = [IntGroup(bits=bits, group_size=32) for bits in BITS]
CPU = torch.device("cpu")


def unit(name: str, size: int, losses: Sequence[float]) -> Unit:
    levels = tuple(Level(o, o.bits * size, loss, loss) for o, loss in zip(OPTIONS, losses, strict=True))
    return Unit(name, 0, (name.partition(".")[2],), size, 0.1, 0.2, 0.3, levels)


def gone(name: str, size: int, loss: float) -> Unit:
    return Unit(name, 0, (), size, 0.1, 0.0, 0.0, (Level(GONE, 0, loss, loss),))


@pytest.fixture
def levels(tmp_path: Path) -> LevelDB:
    made = LevelDB(tmp_path, {})
    weights: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(0)
    with made.open():
        for one in (
            unit("b.self_attn.qkv", 300, (0.5, 0.2, 0.1, 0.01)),
            unit("b.self_attn.o", 100, (0.4, 0.35, 0.05, 0.02)),
            unit("b.mlp.up", 600, (0.6, 0.3, 0.2, 0.03)),
            unit("b.other", 50, (0.3, 0.2, 0.1, 0.0)),
        ):
            weights[one.name] = torch.randn(32, 64, generator=random)
            made.add(one, [{one.layers[0]: o.fit(weights[one.name]).pack(_codes(o, weights[one.name]))} for o in OPTIONS])
        made.add(gone("b.self_attn", 400, 0.7), [{}])
        made.add(gone("b.mlp", 600, 0.8), [{}])
        yield made


def _codes(option: IntGroup, w_OI: Tensor) -> Tensor:
    return option.fit(w_OI).round(w_OI, 0)


def brute(limit: int, levels: LevelDB) -> float:
    """The least loss over every choice there is, those that drop a sub-layer included."""
    units = {one.name: one for one in levels.units}

    def ways(names: Sequence[str], part: str | None) -> list[tuple[int, float]]:
        found = [
            (sum(level.bits for level in some), sum(level.error for level in some))
            for some in itertools.product(*(units[name].levels for name in names))
        ]
        loss = next((one.levels[0].error for one in levels.parts if one.name == part), None)
        return found if loss is None else [*found, (0, loss)]

    groups = [ways(["b.self_attn.qkv", "b.self_attn.o"], "b.self_attn"), ways(["b.mlp.up"], "b.mlp"), ways(["b.other"], None)]
    return min(sum(loss for _, loss in some) for some in itertools.product(*groups) if sum(bits for bits, _ in some) <= limit)


@pytest.mark.parametrize("limit", [200, 900, 1500, 2300, 3100, 5000, 9000])
def test_the_best_of_what_is_joined_is_the_best_there_is(limit: int, levels: LevelDB) -> None:
    joined = Joined(levels)
    budget = Budget({"bits": [[level.bits for level in u.levels] for u in joined.units]}, {"bits": limit})
    choice = milp(errors(joined.units), budget)
    found = sum(u.levels[at].error for u, at in zip(joined.units, choice, strict=True))
    assert found == pytest.approx(brute(limit, levels))


def test_levels_go_up_in_size_and_the_smallest_is_that_it_goes(levels: LevelDB) -> None:
    for one in Joined(levels).units:
        sizes = [level.bits for level in one.levels]
        assert sizes == sorted(sizes)
        assert (one.levels[0].option == GONE) == (one.name != "b.other")


def test_a_level_says_what_each_unit_inside_gets_and_tries_just_that(levels: LevelDB) -> None:
    joined = Joined(levels)
    attention = next(one for one in joined.units if one.name == "b.self_attn")
    assert attention.chosen(0) == {"b.self_attn": GONE}
    assert joined.trial("b.self_attn", 0, CPU, torch.float32).skips == ("self_attn",)
    for at in range(1, len(attention.levels)):
        said = attention.chosen(at)
        assert said.keys() == {"b.self_attn.qkv", "b.self_attn.o"}
        trial = joined.trial("b.self_attn", at, CPU, torch.float32)
        for name, option in said.items():
            alone = levels.trial(name, BITS.index(option.bits), CPU, torch.float32)  # type: ignore[attr-defined]
            ((layer, weight),) = alone.weights.items()
            assert torch.equal(trial.weights[layer], weight)


def test_what_a_plan_says_stays_though_others_are_better(levels: LevelDB) -> None:
    plan = {"b.self_attn.qkv": OPTIONS[3], "b.self_attn.o": OPTIONS[0]}  # larger, and worse than others of that size
    attention = {kept: Joined(levels, plan if kept else {}).units for kept in (True, False)}
    said = {kept: [u.chosen(at) for u in units for at in range(len(u.levels))] for kept, units in attention.items()}
    assert plan in said[True]
    assert plan not in said[False]


def test_uniform_is_one_option_for_all_though_units_are_joined(levels: LevelDB) -> None:
    joined = Joined(levels)
    limit = 3 * sum(one.weights for one in levels.units)
    budget = Budget({"bits": [[level.bits for level in u.levels] for u in joined.units]}, {"bits": limit})
    said = [u.chosen(at) for u, at in zip(joined.units, uniform(joined.units, budget), strict=True)]
    assert {option for one in said for option in one.values()} == {OPTIONS[1]}
