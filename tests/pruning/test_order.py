"""Which units go and what the rest becomes, against brute force and against least squares solved otherwise."""

import itertools

import pytest
import torch
from torch import Tensor

from compressor.passes.prune.order import by_score, damped, greedy, least_squares
from compressor.passes.prune.prunable import spread

OUT, TOKENS = 6, 400


def problem(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A writer [O, I] and correlated inputs [T, I]."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, columns, generator=random, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=random, dtype=torch.float64
    )
    return torch.randn(OUT, columns, generator=random, dtype=torch.float64), mixed


def loss(w: Tensor, x: Tensor, new: Tensor, at: Tensor) -> float:
    return float((x @ w.T - x[:, at] @ new.T).square().sum())


@pytest.mark.parametrize("columns", [1, 3])
def test_the_end_is_the_least_squares_of_what_stays(columns: int) -> None:
    w, x = problem(12)
    h = x.T @ x / TOKENS
    for units, new in greedy(w, h, columns, range(1, 12 // columns + 1), damp=0.01):
        at = spread(units, columns)
        penalty = 0.01 * h.diagonal().mean().sqrt() ** 2
        rows = torch.cat([x, (TOKENS * penalty).sqrt() * torch.eye(12, dtype=torch.float64)])  # damping as more tokens
        expected = torch.linalg.lstsq(rows[:, at], rows @ w.T).solution.T
        torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(least_squares(w, h, at, 0.01), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_first_to_go_is_the_one_that_costs_least(columns: int, seed: int) -> None:
    w, x = problem(12, seed)
    h, count = x.T @ x / TOKENS, 12 // columns
    ((units, _),) = greedy(w, h, columns, [count - 1], damp=1e-9)

    def costs(gone: int) -> float:
        at = spread(torch.tensor([u for u in range(count) if u != gone]), columns)
        return loss(w, x, torch.linalg.lstsq(x[:, at], x @ w.T).solution.T, at)

    assert set(range(count)) - set(units.tolist()) == {min(range(count), key=costs)}


def test_choices_are_nested_and_lose_more_the_fewer_they_are() -> None:
    w, x = problem(40)
    h = x.T @ x / TOKENS
    found = list(greedy(w, h, 1, [40, 30, 17, 16, 3], damp=1e-6))
    kept = [set(units.tolist()) for units, _ in found]
    assert [len(units) for units in kept] == [40, 30, 17, 16, 3]
    assert all(later < earlier for earlier, later in itertools.pairwise(kept))
    losses = [loss(w, x, new, units) for units, new in found]
    assert losses == sorted(losses)
    assert losses[0] < 1e-16


def test_the_fit_loses_less_than_taking_away() -> None:
    w, x = problem(12)
    h, score = x.T @ x / TOKENS, torch.arange(12.0)
    for (units, fitted), (same, cut) in zip(
        by_score(w, h, score, [8, 4], 1e-6), by_score(w, h, score, [8, 4], refit=False), strict=True
    ):
        assert units.tolist() == same.tolist() == list(range(12 - len(units), 12))
        assert torch.equal(cut, w[:, units])
        assert loss(w, x, fitted, units) < loss(w, x, cut, units)


def test_units_that_are_never_used_go_first_and_nothing_is_lost() -> None:
    w, x = problem(12)
    x[:, [2, 5, 7]] = 0
    ((units, new),) = greedy(w, x.T @ x / TOKENS, 1, [9], damp=1e-6)
    assert units.tolist() == [0, 1, 3, 4, 6, 8, 9, 10, 11]
    torch.testing.assert_close(new, w[:, units])


def test_all_units_are_the_writer_itself() -> None:
    w, x = problem(12)
    ((units, new),) = greedy(w, x.T @ x / TOKENS, 3, [4])
    assert units.tolist() == [0, 1, 2, 3]
    assert torch.equal(new, w)


def test_what_saw_no_token_can_be_inverted() -> None:
    assert torch.equal(damped(torch.zeros(3, 3), 0.01), torch.eye(3, dtype=torch.float64))
