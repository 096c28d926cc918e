"""Single weights that go: which, how many, and what the others become."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.sparse_bitmask import SparseBitmask
from compressor.passes.prune.masks import SCORES, damped, least_squares
from compressor.passes.prune.prune_weights import PruneWeights, Seen
from compressor.passes.quantize.gptq import factors_of
from compressor.recipe.registry import build

AMOUNTS: list[dict[str, Any]] = [{"sparsity": 0.4}, {"pattern": "2:4"}]


def problem(rows: int = 6, columns: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that are correlated, of channels of different size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x_TI = torch.randn(tokens, columns, generator=generator) @ mix * torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=generator), x_TI


def zeroed(step: PruneWeights, w_OI: Tensor, x_TI: Tensor, dtype: str = "float32") -> Tensor:
    """What the pass makes of a weight whose input it has seen."""
    h_II = x_TI.T @ x_TI / len(x_TI)
    fmt = next(fmt for fmt in step.formats if fmt.dtype == dtype)
    return step.zeroed(w_OI, fmt, Seen(h_II, factors_of("here", len(x_TI), [], h_II, act_order=False))).dequantize()


def losses(w_OI: Tensor, v_OI: Tensor, h_II: Tensor) -> Tensor:
    """Of each row."""
    missed_OI = (w_OI - v_OI).double()
    return (missed_OI @ h_II.double() * missed_OI).sum(1)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "ria", "magnitude"])
def test_if_nothing_is_to_go_nothing_changes(score: str, refit: bool) -> None:
    w_OI, x_TI = problem(columns=300)
    w_OI = w_OI.bfloat16().float()
    assert torch.equal(zeroed(build("pass", _spec(score, refit, sparsity=0.0)), w_OI, x_TI, "bfloat16"), w_OI)


def _spec(score: str, refit: bool, **amount: Any) -> dict[str, Any]:
    return {"pass": "prune_weights", "score": score, "refit": refit, **amount}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "ria", "magnitude"])
def test_as_many_go_as_are_asked_for(score: str, refit: bool) -> None:
    w_OI, x_TI = problem(columns=152)
    gone = zeroed(build("pass", _spec(score, refit, sparsity=0.37)), w_OI, x_TI) == 0
    assert int(gone.sum()) == 6 * round(0.37 * 152)
    gone = zeroed(build("pass", _spec(score, refit, pattern="3:8")), w_OI, x_TI) == 0
    assert (gone.unflatten(1, (-1, 8)).sum(2) == 5).all()


@pytest.mark.parametrize("amount", [{"sparsity": 0.4}, {"pattern": "2:4"}, {"pattern": "1:8"}])
def test_sparsegpt_is_the_surgeon_who_removes_weights_one_by_one(amount: dict[str, Any]) -> None:
    """Columns are settled from the left; of a settled one no weight changes any more, and the inverse is of the others alone.
    Which go is told when a run begins, of 128 columns or of a group: by w² / [H⁻¹]_00, H from there on."""
    w_OI, x_TI = problem(rows=4, columns=160, tokens=400)
    found = zeroed(PruneWeights(score="sparsegpt", refit=False, **amount), w_OI, x_TI)
    h_II = damped(x_TI.T @ x_TI / len(x_TI), 0.01).double()
    rows, columns = w_OI.shape
    v_OI = w_OI.double().clone()
    width = 128 if "sparsity" in amount else int(amount["pattern"][2:])
    inverses = [torch.linalg.inv(h_II[c:, c:]) for c in range(columns)]
    for start in range(0, columns, width):
        run = range(start, min(start + width, columns))
        costs = {(o, c): float(v_OI[o, c] ** 2 / inverses[c][0, 0]) for o in range(rows) for c in run}
        going = set()
        if "sparsity" in amount:
            count = rows * 64 * run.stop // columns - rows * 64 * run.start // columns
            going |= set(sorted(costs, key=costs.__getitem__)[:count])
        else:
            for o in range(rows):
                going |= set(sorted(((o, c) for c in run), key=costs.__getitem__)[: width - int(amount["pattern"][0])])
        for c, o in itertools.product(run, range(rows)):
            if (o, c) in going:
                v_OI[o, c:] -= v_OI[o, c] / inverses[c][0, 0] * inverses[c][0]
                v_OI[o, c] = 0
    assert torch.equal(found == 0, v_OI == 0)
    torch.testing.assert_close(found.double(), v_OI, rtol=1e-3, atol=1e-3)


class TestLeastSquares:
    def test_each_row_is_that_of_its_own_columns_after_as_many_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        w_OI, x_TI = problem()
        monkeypatch.setattr("compressor.passes.prune.masks.MOST_STEPS", w_OI.shape[1])
        stays_OI = torch.rand(w_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        stays_OI[0], stays_OI[1] = False, True
        found = least_squares(w_OI, torch.where(stays_OI, w_OI, 0), stays_OI, x_TI.T @ x_TI / len(x_TI))
        x, w = x_TI.double().numpy(), w_OI.double().numpy()
        for row, stays in enumerate(stays_OI.numpy()):
            best = np.zeros(len(stays))
            best[stays] = np.linalg.lstsq(x[:, stays], x @ w[row], rcond=None)[0]
            np.testing.assert_allclose(found[row].numpy(), best, atol=1e-3)

    def test_it_is_the_same_from_wherever_it_starts(self) -> None:
        w_OI, x_TI = problem()
        stays_OI = w_OI > 0
        h_II = damped(x_TI.T @ x_TI / len(x_TI), 0.01)
        starts = torch.zeros_like(w_OI), torch.where(stays_OI, w_OI, 0), torch.where(stays_OI, -3.0, 0)
        first, *others = (least_squares(w_OI, start, stays_OI, h_II) for start in starts)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("steps", [1, 2, 5, 300])
    def test_no_row_loses_by_it_however_early_it_ends(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("compressor.passes.prune.masks.MOST_STEPS", steps)
        w_OI, x_TI = problem()
        h_II = damped(x_TI.T @ x_TI / len(x_TI), 0.01)
        for score, amount in itertools.product(["sparsegpt", "wanda", "ria", "magnitude"], AMOUNTS):
            before = zeroed(PruneWeights(score=score, refit=False, **amount), w_OI, x_TI)
            after = least_squares(w_OI, before, before != 0, h_II)
            assert (losses(w_OI, after, h_II) < losses(w_OI, before, h_II)).all()
            assert torch.equal(after == 0, before == 0)

    def test_an_input_that_was_never_there_leaves_weights_as_they_are(self) -> None:
        w_OI, x_TI = problem()
        x_TI[:, 7] = 0
        step = PruneWeights(score="magnitude", sparsity=0.5)
        found = zeroed(step, w_OI, x_TI)
        stays = found[:, 7] != 0
        assert stays.any()
        torch.testing.assert_close(found[stays, 7], w_OI[stays, 7])


class TestScores:
    def test_wanda_is_of_each_row_and_knows_the_size_of_inputs(self) -> None:
        w_OI, x_TI = problem()
        gone = zeroed(PruneWeights(score="wanda", sparsity=0.5, refit=False), w_OI, x_TI) == 0
        cost = w_OI.abs() * x_TI.square().sum(0).sqrt()
        assert torch.equal(gone, cost < cost.median(1, keepdim=True).values.nextafter(torch.tensor(torch.inf)))

    def test_magnitude_is_of_the_whole_layer_and_needs_no_text(self) -> None:
        w_OI, _ = problem()
        w_OI *= torch.linspace(1, 3, 6)[:, None]
        step = PruneWeights(score="magnitude", sparsity=0.5, refit=False)
        assert step.needs == ()
        found = step.zeroed(w_OI, step.formats[2], None).dequantize()
        assert w_OI[found == 0].abs().max() < found[found != 0].abs().min()

    def test_ria_is_what_a_weight_is_of_its_row_and_column(self) -> None:
        w_OI, square_I = torch.tensor([[1.0, -3.0], [2.0, 6.0]]), torch.tensor([1.0, 16.0])
        expected = torch.tensor([[1 / 3 + 1 / 4, 2 * (3 / 9 + 3 / 4)], [2 / 3 + 2 / 8, 2 * (6 / 9 + 6 / 8)]])
        torch.testing.assert_close(SCORES["ria"](w_OI, square_I), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sparsity": 1.0}, "sparsity: 1 is not from 0"),
        ({}, "sparsity: neither is given"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "name either a share, or a pattern"),
        ({"pattern": "4:2"}, "pattern: 4:2 keeps 4 of 2 weights; N:M has 1 <= N < M"),
        ({"pattern": 124}, "pattern: 124 is not two numbers such as '2:4', in quotes"),
        ({"sparsity": 0.5, "damp": 2}, "damp: 2.0 is not in 0"),
        ({"sparsity": 0.5, "score": "wandaa"}, "score"),
        ({"sparsity": 0.5, "ignore": ["re:("]}, "re:("),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build("pass", {"pass": "prune_weights", **given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_says_how_many_stay_where_zeros_are_stored() -> None:
    steps = [PruneWeights(stored="dense", **amount) for amount in ({"sparsity": 0.7}, {"pattern": "2:4"})]
    assert [step.offers[0].label for step in steps] == ["keep3of10", "keep2of4"]
    assert isinstance(PruneWeights(sparsity=0.7).offers[0], SparseBitmask)
