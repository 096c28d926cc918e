"""Evolution and successive programmes on problems whose answer is known."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from compressor.errors import RecipeError
from compressor.pipeline.search.allocate import Budget
from compressor.pipeline.search.evolve import Generation, evolve, mutated
from compressor.pipeline.search.levels import Choice
from compressor.pipeline.search.successive import losses_around, successive
from compressor.recipe.registry import validate
from compressor.recipe.schema import Evolve

SAMPLES, SEQ_LEN = 32, 64
SMALL = Evolve(generations=40, offspring=24, stages=((6, 128), (2, 512), (1, 1024)), patience=40)


class Toy:
    """Losses of units of different sizes that add up, or do not; remembers all that was asked."""

    def __init__(self, seed: int, *, interaction: float = 0.0) -> None:
        rng = random.Random(seed)
        self.sizes = [rng.choice((1, 2, 3)) for _ in range(5)]
        self.losses = [sorted((rng.random() for _ in range(4)), reverse=True) for _ in self.sizes]
        self.interaction = interaction
        limit = int(0.6 * sum(3 * size for size in self.sizes))
        self.budget = Budget({"bits": [[level * size for level in range(4)] for size in self.sizes]}, {"bits": limit})
        self.asked: list[tuple[Choice, tuple[int, ...]]] = []

    def loss(self, choice: Choice) -> float:
        found = sum(row[level] for row, level in zip(self.losses, choice, strict=True))
        return found + self.interaction * sum((3 - a) * (3 - b) for a, b in itertools.pairwise(choice))

    def __call__(self, choices: Sequence[Choice], samples: Sequence[int]) -> list[float]:
        self.asked += [(choice, tuple(samples)) for choice in choices]
        return [self.loss(choice) for choice in choices]

    def best(self) -> float:
        everything = itertools.product(range(4), repeat=len(self.sizes))
        return min(self.loss(choice) for choice in everything if self.budget.fits(choice))


def run(toy: Toy, settings: Evolve = SMALL, seed: int = 0, done: Generation | None = None) -> list[Generation]:
    start = (0,) * len(toy.sizes)
    return list(evolve(settings, start, toy.budget, toy, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed, done=done))


@pytest.mark.parametrize("interaction", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(6))
def test_evolution_reaches_what_brute_force_finds(seed: int, interaction: float) -> None:
    toy = Toy(seed, interaction=interaction)
    assert run(toy)[-1].fitness == pytest.approx(toy.best())


def test_no_choice_in_any_generation_exceeds_the_budget() -> None:
    toy = Toy(1)
    run(toy)
    assert len(toy.asked) > 500
    assert all(toy.budget.fits(choice) for choice, _ in toy.asked)


def test_fitness_on_the_same_samples_never_rises() -> None:
    fitness = [generation.fitness for generation in run(Toy(2))]
    assert fitness == sorted(fitness, reverse=True)


def test_all_of_a_stage_are_scored_on_the_same_samples_and_the_parent_in_the_last() -> None:
    asked: list[tuple[list[Choice], list[int]]] = []
    toy = Toy(3)

    def score(choices: Sequence[Choice], samples: Sequence[int]) -> list[float]:
        asked.append((list(choices), list(samples)))
        return toy(choices, samples)

    start = (0,) * len(toy.sizes)
    one = Evolve(generations=1, offspring=10, stages=((4, 128), (1, 512)), patience=5)
    list(evolve(one, start, toy.budget, score, samples=SAMPLES, seq_len=SEQ_LEN))
    (first, few), (last, more) = asked
    assert (len(first), len(few), len(more)) == (10, 128 // SEQ_LEN, 512 // SEQ_LEN)
    assert start not in first
    assert last[0] == start
    assert set(last[1:]) <= set(first)
    assert len(last) == 5


def test_one_seed_gives_one_trajectory_and_another_another() -> None:
    trails = []
    for seed in (0, 0, 1):
        toy = Toy(4)
        trails.append((run(toy, seed=seed), toy.asked))
    assert trails[0] == trails[1]
    assert trails[0][1] != trails[2][1]


def test_a_search_that_is_broken_off_goes_on_as_it_would_have() -> None:
    whole = run(Toy(5))
    assert run(Toy(5), done=whole[2]) == whole[3:]


def test_it_ends_when_nothing_has_been_found_for_long_or_there_is_nothing_to_find() -> None:
    patient = run(Toy(1), Evolve(generations=500, offspring=8, stages=((1, 64),), patience=3))
    assert patient[-1].idle == 3
    assert len(patient) < 500
    assert run(Toy(1), Evolve(generations=0)) == []
    only = Budget({"bits": [[1], [1]]}, {"bits": 2})
    assert list(evolve(SMALL, (0, 0), only, lambda choices, samples: [0.0], samples=1, seq_len=1)) == []


def test_units_of_different_sizes_trade() -> None:
    """A small unit can only go up if the large one goes down, and what that leaves over goes to the other small one."""
    budget = Budget({"bits": [[0, 10], [0, 4], [0, 5]]}, {"bits": 10})
    children = {mutated((1, 0, 0), budget, 1, random.Random(seed)) for seed in range(50)}
    assert (0, 1, 1) in children
    assert all(budget.fits(child) for child in children)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": [[2, 64]]}, "the last one leaves one survivor"),
        ({"stages": []}, "the last one leaves one survivor"),
        ({"offspring": 0}, "offspring: 0"),
        ({"generations": -1}, "generations: -1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        validate(Evolve, settings, "evolve")


@pytest.mark.parametrize("seed", range(6))
def test_successive_programmes_are_exact_where_losses_add_up(seed: int) -> None:
    toy = Toy(seed)
    rounds = list(successive((0,) * 5, toy.budget, toy, table=range(4), judge=range(4, 8), radii=(3,)))
    assert rounds[0].fitness == pytest.approx(toy.best())
    assert not rounds[-1].moved


@pytest.mark.parametrize("seed", range(6))
def test_successive_programmes_never_get_worse_and_keep_to_the_budget(seed: int) -> None:
    toy = Toy(seed, interaction=0.2)
    start = (0,) * 5
    rounds = list(successive(start, toy.budget, toy, table=range(4), judge=range(4, 8), radii=(1, 2), rounds=range(1, 9)))
    fitness = [toy.loss(start), *(turn.fitness for turn in rounds)]
    assert fitness == sorted(fitness, reverse=True)
    assert all(toy.budget.fits(turn.point) for turn in rounds)


def test_losses_around_a_point_change_one_unit_each() -> None:
    score: Callable[[Sequence[Choice]], list[float]] = lambda choices: [float(100 * a + b) for a, b in choices]  # noqa: E731
    budget = Budget({"bits": [[1, 2, 3], [1, 2, 3]]}, {"bits": 6})
    assert losses_around((0, 1), budget, score, 1) == [{0: 1.0, 1: 101.0}, {0: 0.0, 1: 1.0, 2: 2.0}]
