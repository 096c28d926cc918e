import pytest
import torch

from compressor.formats.int_group import IntGroup
from compressor.model.architecture import LinearKind
from compressor.model.block import Block
from compressor.passes.quantize.gptq import GPTQ, MAX_DAMP, SingularHessianError, correction, factorise, gptq, output_energy
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.calibration.stream import BlockStats
from compressor.pipeline.ranks import Ranks


def problem(rows=32, columns=64, tokens=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / tokens


def damped(h, damp=0.01):
    return h.double() + damp * h.diagonal().double().mean() * torch.eye(len(h), dtype=torch.float64)


def loss(w, grid, codes, h):
    missed = (w - grid.pack(codes).dequantize()).double()
    return float(((missed @ h) * missed).sum())


def optimal_brain_surgeon(w, h, grid, order):
    """The textbook update: round one weight of each row, move the others by the inverse Hessian, remove it, repeat."""
    work, codes = w.double().clone(), torch.zeros(w.shape, dtype=torch.uint8)
    left = list(range(w.shape[1]))
    for c in order:
        inverse = h[left][:, left].inverse()
        at = left.index(c)
        codes[:, c] = grid.round(work[:, c : c + 1].float(), c)[:, 0]
        missed = work[:, c] - grid.decode(codes[:, c : c + 1], c)[:, 0]
        work[:, left] -= torch.outer(missed / inverse[at, at], inverse[at])
        left.remove(c)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_explicit_optimal_brain_surgeon_updates(bits, act_order):
    w, h = problem(rows=8, columns=32)
    grid = IntGroup(bits=bits, group_size=16).fit(w, h.diagonal())
    factor = factorise(h, act_order=act_order)
    codes, _, _ = gptq(w, factor, grid)
    assert torch.equal(codes, optimal_brain_surgeon(w, damped(h), grid, factor.order_I.tolist()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_returned_loss_is_the_exact_damped_loss(bits):
    w, h = problem()
    grid = IntGroup(bits=bits, group_size=32).fit(w, h.diagonal())
    codes, found, _ = gptq(w, factorise(h), grid)
    assert found == pytest.approx(loss(w, grid, codes, damped(h)), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_rounding_on_the_calibrated_objective(bits):
    w, h = problem()
    grid = IntGroup(bits=bits, group_size=32).fit(w, h.diagonal())
    codes, _, _ = gptq(w, factorise(h), grid)
    assert loss(w, grid, codes, h.double()) < 0.7 * loss(w, grid, grid.round(w, 0), h.double())


def test_the_size_of_lazy_batches_changes_nothing():
    w, h = problem(columns=192)
    grid = IntGroup(bits=3, group_size=32).fit(w)
    factor = factorise(h)
    assert torch.equal(gptq(w, factor, grid, lazy=16)[0], gptq(w, factor, grid, lazy=192)[0])


def test_uncorrelated_inputs_leave_nothing_but_rounding():
    w, _ = problem()
    grid = IntGroup(bits=3, group_size=32).fit(w)
    codes, _, _ = gptq(w, factorise(torch.diag(torch.rand(64) + 0.1)), grid)
    assert torch.equal(codes, grid.round(w, 0))


def test_scaling_the_hessian_changes_nothing():
    w, h = problem()
    grid = IntGroup(bits=3, group_size=32).fit(w)
    assert torch.equal(gptq(w, factorise(h), grid)[0], gptq(w, factorise(1024 * h), grid)[0])


def test_the_order_follows_the_second_moment():
    _, h = problem()
    moments = h.diagonal()[factorise(h, act_order=True).order_I]
    assert torch.equal(moments, moments.sort(descending=True).values)
    assert torch.equal(factorise(h, act_order=False).order_I, torch.arange(64))


def test_groups_stay_whole_in_the_order_of_their_second_moments():
    _, h = problem()
    runs = factorise(h, group=16).order_I.view(4, 16)
    assert torch.equal(runs.sort(1).values, runs.amin(1, keepdim=True) + torch.arange(16))
    moments = h.diagonal()[runs]
    assert torch.equal(moments, moments.sort(1, descending=True).values)
    assert torch.equal(moments.sum(1), moments.sum(1).sort(descending=True).values)


def test_scales_that_are_chosen_late_fit_what_has_become_of_their_group():
    """By explicit optimal-brain-surgeon updates, whose pivots tell how much the error of each column will count."""
    w, h = problem(rows=8, columns=16)
    fmt, factor = IntGroup(bits=3, group_size=4), factorise(h, group=4)
    codes, found, final = gptq(w, factor, fmt.fit(w), static_groups=False)
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(16, dtype=torch.float64)
    work, left, order, expected = w.double().clone(), list(range(16)), factor.order_I.tolist(), 0.0
    for start in range(0, 16, 4):
        group = order[start : start + 4]
        after = {c: sorted(set(left) - set(group[:i])) for i, c in enumerate(group)}
        pivots = torch.stack([damped[after[c]][:, after[c]].inverse()[after[c].index(c)][after[c].index(c)] for c in group])
        own = sorted(group)
        importance = torch.stack([1 / pivots[group.index(c)] for c in own])
        grid = fmt.fit(work[:, own].float(), importance.float())
        for c in group:
            value = grid.decode(grid.round(work[:, c : c + 1].float(), c - own[0]), c - own[0])[:, 0]
            assert torch.equal(final.decode(codes[:, c : c + 1], c)[:, 0], value)
            inverse, at = damped[left][:, left].inverse(), left.index(c)
            expected += float((work[:, c] - value).square().sum() / inverse[at, at])
            work[:, left] -= torch.outer((work[:, c] - value) / inverse[at, at], inverse[at])
            left.remove(c)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("group_size", [16, 96, -1])
def test_the_size_of_lazy_batches_changes_nothing_where_scales_are_chosen_late(group_size):
    w, h = problem(columns=192)
    grid = IntGroup(bits=3, group_size=group_size).fit(w)
    factor = factorise(h, group=grid.width)
    each = [gptq(w, factor, grid, static_groups=False, lazy=lazy)[0] for lazy in (8, 64, 192)]
    assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])


def test_a_channel_without_tokens_is_rounded_and_disturbs_no_other():
    w, h = problem()
    h[5], h[:, 5] = 0, 0
    grid = IntGroup(bits=3, group_size=32).fit(w)
    codes, _, _ = gptq(w, factorise(h), grid)
    changed = w.clone()
    changed[:, 5] = grid.decode(grid.round(-w, 0), 0)[:, 5]
    again, _, _ = gptq(changed, factorise(h), grid)
    keep = torch.arange(64) != 5
    assert torch.equal(codes[:, 5], grid.round(w, 0)[:, 5])
    assert torch.equal(codes[:, keep], again[:, keep])


def test_all_channels_without_tokens_are_rounded():
    w, h = problem()
    grid = IntGroup(bits=3, group_size=32).fit(w)
    assert torch.equal(gptq(w, factorise(torch.zeros_like(h)), grid)[0], grid.round(w, 0))


def test_damping_is_raised_until_the_hessian_can_be_factorised():
    h = torch.eye(16) - 0.2 * torch.ones(16, 16)  # one negative eigenvalue, 1 - 3.2 = -2.2
    factor = factorise(0.4 * h + 0.6 * torch.eye(16), damp=1e-3)
    assert 1e-3 < factor.damp <= MAX_DAMP


def test_a_hopeless_hessian_is_refused():
    with pytest.raises(SingularHessianError):
        factorise(torch.full((4, 4), float("nan")).fill_diagonal_(1.0))


def test_an_ill_conditioned_hessian_gets_double_precision():
    """Two inputs that differ by one part in 10^4: fp32 alone loses the difference."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, dtype=torch.float64, generator=g)
    x[:, 1] = x[:, 0] + 1e-4 * x[:, 1]
    h = (x.T @ x / 512).float()
    factor = factorise(h, damp=1e-7, act_order=False)
    exact = torch.linalg.cholesky(damped(h, 1e-7).inverse(), upper=True)
    torch.testing.assert_close(factor.u_II.double(), exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max()))


def test_inputs_are_not_modified():
    w, h = problem()
    before = w.clone(), h.clone()
    gptq(w, factorise(h), IntGroup(bits=3, group_size=32).fit(w))
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


def test_output_energy_is_the_mean_square_of_outputs():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(100, 8, generator=g), torch.randn(4, 8, generator=g)
    assert output_energy(w, x.T @ x / 100) == pytest.approx(float((x @ w.T).square().sum() / 100), rel=1e-5)


def two_inputs(rows=8, columns=24, tokens=96, seed=0):
    """A weight, a layer's input in the compressed model and in the dense one, and the statistics of the two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    dense = x + 0.05 * x @ torch.randn(columns, columns, generator=g) + 0.1 * torch.randn(tokens, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x, dense, x.T @ x / tokens, (dense - x).T @ x / tokens


@pytest.mark.parametrize("act_order", [False, True])
def test_the_correction_is_that_of_damped_least_squares(act_order):
    w, x, dense, h, mismatch = two_inputs()
    damping = (0.01 * h.diagonal().double().mean() * len(x)).sqrt() * torch.eye(len(h), dtype=torch.float64)
    inputs = torch.cat([x.double(), damping])
    outputs = torch.cat([dense.double() @ w.T.double(), damping @ w.T.double()])  # damping pulls towards the weight itself
    best = torch.linalg.lstsq(inputs, outputs).solution.T
    found = w + correction(w, mismatch, factorise(h, act_order=act_order))
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)


def test_without_a_mismatch_nothing_is_corrected():
    w, _, _, h, mismatch = two_inputs()
    assert not correction(w, torch.zeros_like(mismatch), factorise(h)).any()


def test_the_corrected_weight_rounded_is_nearer_to_the_dense_output():
    w, x, dense, h, mismatch = two_inputs()
    factor, fmt = factorise(h), IntGroup(bits=4, group_size=24)

    def missed(target):
        codes, _, grid = gptq(target, factor, fmt.fit(target, h.diagonal()))
        return float((x @ grid.decode(codes, 0).T - dense @ w.T).square().sum())

    assert missed(w + correction(w, mismatch, factor)) < 0.5 * missed(w)


def test_the_rest_of_the_loss_against_dense_activations_does_not_depend_on_the_rounding():
    """So the walk on the corrected weight, whose loss is exact, minimises that against dense activations as well."""
    w, x, dense, h, mismatch = two_inputs()
    factor = factorise(h)
    target = w + correction(w, mismatch, factor)
    damping = 0.01 * float(h.diagonal().mean())
    rests = []
    for bits in (2, 4):
        codes, found, grid = gptq(target, factor, IntGroup(bits=bits, group_size=24).fit(target))
        q = grid.decode(codes, 0).double()
        against_dense = (x.double() @ q.T - dense.double() @ w.T.double()).square().sum() / len(x)
        rests.append(float(against_dense + damping * (q - w).square().sum()) - found)
    assert rests[0] == pytest.approx(rests[1], rel=1e-3)


def test_of_several_dampings_the_one_with_the_least_loss_is_taken():
    w, h = problem()
    fmt, damps = IntGroup(bits=3, group_size=32), (0.001, 0.1, 1.0)
    found = outcome(w, h, GPTQ(options=(fmt,), damp=damps)).errors["layer"]
    alone = [outcome(w, h, GPTQ(options=(fmt,), damp=damp)).errors["layer"] for damp in damps]
    assert found == min(alone) < max(alone)


@pytest.mark.parametrize("refine", [0, 2])
def test_the_reported_error_is_that_of_the_output(refine):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(100, 32, generator=g), torch.randn(8, 32, generator=g)
    found = outcome(w, x.T @ x / 100, GPTQ(options=(IntGroup(bits=3, group_size=32),), refine=refine))
    missed = x @ (found.edits["layer"].dequantize() - w).T
    assert found.errors["layer"] == pytest.approx(float(missed.square().sum() / (x @ w.T).square().sum()), rel=1e-3)


def outcome(w, h, step):
    """What a pass makes of a block of one layer."""
    rows, columns = w.shape
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(columns, rows, bias=False)})
    module["layer"].weight = torch.nn.Parameter(w, requires_grad=False)
    block = Block(index=0, prefix="block", module=module, layers={"layer": LinearKind()}, arguments=lambda shape: ((), {}))
    hessian = Hessian(columns, h.device)
    hessian.total, hessian.tokens = h.double(), torch.ones((), dtype=torch.float64)
    stats = BlockStats({"layer": {Hessian: hessian}}, {"layer": "layer"}, Ranks(), (), (), None, lambda done, total: None)
    return step.apply(block, stats, {"layer": step.options[0]})
