"""Allocation under a budget, against brute force."""

import ctypes
import itertools
import random
from typing import Any

import pytest

from compressor.pipeline.search import allocate
from compressor.pipeline.search.allocate import Budget, BudgetError, Table, by_order, greedy, milp
from compressor.pipeline.search.levels import Choice


def instance(seed: int, resources: int = 1) -> tuple[Table, Budget]:
    """Up to five units of up to four levels, any scores, a limit that something fits."""
    rng = random.Random(seed)
    counts = [rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
    scores = [{level: rng.uniform(-1, 1) for level in range(count)} for count in counts]
    costs = {f"r{n}": [[rng.randint(0, 50) for _ in range(count)] for count in counts] for n in range(resources)}
    within = [rng.randrange(count) for count in counts]  # fits, at least
    limits = {name: sum(row[j] for row, j in zip(c, within, strict=True)) + rng.randint(0, 20) for name, c in costs.items()}
    return scores, Budget(costs, limits)


def loss(scores: Table, choice: Choice) -> float:
    return sum(row[level] for row, level in zip(scores, choice, strict=True))


def best(scores: Table, budget: Budget) -> float:
    return min(loss(scores, choice) for choice in itertools.product(*scores) if budget.fits(choice))


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_programme_finds_what_brute_force_finds(seed: int, resources: int) -> None:
    scores, budget = instance(seed, resources)
    choice = milp(scores, budget)
    assert budget.fits(choice)
    assert loss(scores, choice) == pytest.approx(best(scores, budget))


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_best_where_every_step_costs_the_same_and_gains_shrink(seed: int) -> None:
    rng = random.Random(seed)
    gains = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(4)]
    scores = [dict(enumerate(itertools.accumulate([0, *(-gain for gain in row)]))) for row in gains]
    budget = Budget({"bits": [[0, 1, 2, 3]] * 4}, {"bits": rng.randint(0, 12)})
    choice = greedy(scores, budget)
    assert budget.fits(choice)
    assert loss(scores, choice) == pytest.approx(best(scores, budget))


@pytest.mark.parametrize("seed", range(20))
def test_greedy_keeps_to_all_limits(seed: int) -> None:
    scores, budget = instance(seed, 2)
    try:
        choice = greedy(scores, budget)
    except BudgetError:
        return  # its starting point is the smallest of one resource, which another may rule out
    assert budget.fits(choice)
    assert loss(scores, choice) >= best(scores, budget) - 1e-12


def test_a_solver_that_runs_out_of_time_is_not_worse_than_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, budget = instance(7)
    monkeypatch.setattr("compressor.pipeline.search.allocate.TIMED_OUT", 0)  # what it says when it is done
    assert loss(scores, milp(scores, budget)) <= loss(scores, greedy(scores, budget))


def test_a_wider_limit_never_costs_anything() -> None:
    scores, budget = instance(3)
    found = [loss(scores, milp(scores, Budget(budget.costs, {"r0": limit}))) for limit in range(budget.limits["r0"], 250, 10)]
    assert found == sorted(found, reverse=True)


def test_a_limit_for_everything_gives_everything() -> None:
    scores = [{level: 1 / (1 + level) for level in range(4)}] * 6
    budget = Budget({"bits": [[2, 3, 4, 8]] * 6}, {"bits": 48})
    assert milp(scores, budget) == greedy(scores, budget) == (3,) * 6


def test_sizes_of_models_do_not_let_the_solver_exceed_the_limit() -> None:
    """Limits are far larger than what its tolerance lets pass."""
    rng = random.Random(0)
    sizes = [[bits * 16_777_216 + rng.randint(0, 999) for bits in (2, 3, 4, 8)] for _ in range(64)]
    scores = [{level: rng.random() / 4**level for level in range(4)} for _ in range(64)]
    for limit in range(64 * 3 * 16_777_216, 64 * 3 * 16_777_216 + 50_000, 7_001):
        assert Budget({"bits": sizes}, {"bits": limit}).fits(milp(scores, Budget({"bits": sizes}, {"bits": limit})))


def test_levels_that_may_not_be_chosen_are_not() -> None:
    budget = Budget({"bits": [[1, 2, 3]] * 2}, {"bits": 6})
    assert milp([{0: 1.0, 1: 0.5}, {2: 0.0}], budget) == (1, 2)


def test_an_impossible_budget_says_what_the_smallest_choice_takes() -> None:
    budget = Budget({"bits": [[3, 4], [5, 9]]}, {"bits": 7})
    for way in (milp, greedy):
        with pytest.raises(BudgetError, match="bits: 7 allowed, the smallest choice takes 8"):
            way([{0: 1.0, 1: 0.0}] * 2, budget)


def test_by_order_lowers_the_first_units_and_no_more_than_needed() -> None:
    ladder = [[0, 0, 0], [1, 1, None], [2, 2, 1]]
    budget = Budget({"bits": [[2, 3, 4], [2, 3, 4], [2, 4]]}, {"bits": 10})
    assert by_order([0, 1, 2], ladder, budget) == (1, 1, 1)
    assert by_order([2, 1, 0], ladder, budget) == (2, 2, 0)
    with pytest.raises(BudgetError):
        by_order([0, 1, 2], ladder, Budget(budget.costs, {"bits": 5}))


def test_what_the_solver_says_is_no_result(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS writes to standard output itself now and then."""
    solve = allocate.solve

    def talking(*args: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
        return solve(*args, **options)

    monkeypatch.setattr(allocate, "solve", talking)
    scores, budget = instance(0)
    print("before")
    milp(scores, budget)
    print("after")
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    assert "HighsMipSolverData" in err
