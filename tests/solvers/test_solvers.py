"""Weight solvers against known facts: bounds, special cases, and brute force."""

import itertools

import pytest
import torch

from loopq_compile.errors import LoopQError
from loopq_compile.solvers import Curvature, Grid, Moments, Options, Split, gptq, refine_codes, refine_scales, solve
from loopq_compile.solvers.loaq import choose, corrections
from loopq_compile.solvers.rtn import searched


def problem(outputs=8, width=24, tokens=200, size=8, bits=4, seed=0):
    """A weight, a grid, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) + torch.randn(width, 1, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    weight = torch.randn(outputs, width, generator=generator)
    q_max = 2 ** (bits - 1) - 1
    scale = weight.unflatten(1, (-1, size)).abs().amax(-1) / q_max
    return x, weight, Grid(scale, size, -q_max - 1, q_max)


def error(x, weight, grid, codes):
    return (x @ (grid.values(codes) - weight).t()).square().sum().item()


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(act_order):
    x, weight, grid = problem()
    codes = gptq(weight, Curvature(x.t() @ x, 0.01, act_order), grid)
    assert error(x, weight, grid, codes) < 0.75 * error(x, weight, grid, grid.nearest(weight))
    assert codes.min() >= grid.q_min and codes.max() <= grid.q_max and torch.equal(codes, codes.round())


def test_gptq_rounds_to_nearest_where_inputs_are_uncorrelated():
    _, weight, grid = problem()
    curvature = Curvature(torch.diag(torch.rand(24) + 0.1), 0.01)
    assert torch.equal(gptq(weight, curvature, grid), grid.nearest(weight))
    assert torch.equal(refine_codes(grid.nearest(weight), weight, curvature, grid), grid.nearest(weight))


def test_width_beyond_one_block_gives_what_column_by_column_gives():
    x, weight, grid = problem(width=160, tokens=400)
    curvature = Curvature(x.t() @ x, 0.01)
    inverse = torch.linalg.inv(curvature.matrix.double())
    upper = torch.linalg.cholesky(inverse, upper=True)
    rows, steps, expected = weight.double().clone(), grid.steps.double(), []
    for j in range(160):
        expected.append((rows[:, j] / steps[:, j]).round().clamp(grid.q_min, grid.q_max))
        miss = (rows[:, j] - expected[-1] * steps[:, j]) / upper[j, j]
        rows[:, j:] -= miss.unsqueeze(1) * upper[j, j:]
    same = (gptq(weight, curvature, grid) == torch.stack(expected, 1)).double().mean()
    assert same > 0.99  # the rest are ties up to single precision, and their consequences


def test_brute_force_bounds_every_solver_and_refinement_closes_in():
    x, weight, grid = problem(outputs=3, width=4, size=4, bits=2, seed=3)
    curvature = Curvature(x.t() @ x, 1e-6)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float32)
    best = sum(
        min(error(x, weight[i : i + 1], Grid(grid.scale[i : i + 1], 4, -2, 1), codes.unsqueeze(0)) for codes in every)
        for i in range(3)
    )
    codes = gptq(weight, curvature, grid)
    refined = refine_codes(codes, weight, curvature, grid)
    nearest, rough, fine = (error(x, weight, grid, c) for c in (grid.nearest(weight), codes, refined))
    assert best <= fine * (1 + 1e-5) and fine <= rough * (1 + 1e-5) and best < nearest


def test_refinement_never_raises_the_error():
    x, weight, grid = problem(width=96, tokens=300)
    curvature = Curvature(x.t() @ x, 0.01)
    codes, errors = gptq(weight, curvature, grid), []
    for _ in range(3):
        errors.append(curvature.error(grid.values(codes) - weight))
        grid = refine_scales(codes, weight, curvature, grid)
        errors.append(curvature.error(grid.values(codes) - weight))
        codes = refine_codes(codes, weight, curvature, grid)
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_scales_are_the_least_squares_solution_when_one_group_is_left():
    x, weight, grid = problem(width=8)
    codes = grid.nearest(weight)
    found = refine_scales(codes, weight, Curvature(x.t() @ x, 1e-7), grid)
    outputs, wanted = codes @ x.t(), weight @ x.t()
    expected = (outputs * wanted).sum(1) / outputs.square().sum(1)
    torch.testing.assert_close(found.scale[:, 0], expected, rtol=1e-3, atol=1e-5)


def test_range_search_minds_what_inputs_matter():
    weight = torch.tensor([[4.0, 1.1, 0.9, 0.4]])
    grid = Grid(torch.tensor([[4.0]]), 4, -2, 1)
    assert searched(weight, torch.tensor([1e-6, 1.0, 1.0, 1.0]), grid).scale.item() < 4.0


def test_moments_of_loops_add_up_to_those_of_all_data():
    x, _, _ = problem(tokens=90)
    y, residual = x + 0.1, torch.randn(90, 5)
    parts = [Split.of((x[i : i + 30], y[i : i + 30], residual[i : i + 30]), held=10) for i in (0, 30, 60)]
    total = parts[0].add(parts[1]).add(parts[2]).whole()
    torch.testing.assert_close(total.hessian, x.t() @ x)
    torch.testing.assert_close(total.cross, x.t() @ y)
    torch.testing.assert_close(total.residual, x.t() @ residual, rtol=1e-4, atol=1e-4)
    assert total.tokens == 90
    once, twice = Moments.of((x, None, None)), Moments.of((x, None, None))
    torch.testing.assert_close(once.add(twice, 0.5).hessian, 1.5 * x.t() @ x, rtol=1e-4, atol=1e-3)


def test_loaq_without_corrections_is_gptq():
    x, weight, grid = problem()
    split = Split.of((x, x + torch.randn_like(x), None), held=50)
    plain = solve(weight, weight, grid, split, Options("gptq"), "site")
    loaq = solve(weight, weight, grid, split, Options("loaq", alpha=0.0, beta=0.0), "site")
    assert torch.equal(plain.codes, loaq.codes) and torch.equal(plain.grid.scale, loaq.grid.scale)


def test_loaq_finds_the_weight_that_undoes_a_change_of_inputs():
    x, weight, _ = problem()
    change = torch.eye(24) + 0.05 * torch.randn(24, 24)
    moments = Moments.of((x @ change, x, None))
    found = corrections(moments, Curvature(moments.hessian, 1e-7), weight, weight)
    torch.testing.assert_close(x @ change @ found.applied(weight, 1.0, 0.0).t(), x @ weight.t(), rtol=1e-2, atol=0.05)


def test_loaq_mends_the_residual_stream():
    x, weight, _ = problem()
    missing = torch.randn(8, 24)
    moments = Moments.of((x, x, x @ missing.t()))
    found = corrections(moments, Curvature(moments.hessian, 1e-7), weight, weight)
    torch.testing.assert_close(found.applied(weight, 1.0, 1.0), weight + missing, rtol=1e-2, atol=0.01)


def test_shares_are_those_that_are_best_on_tokens_held_back():
    x, weight, _ = problem(tokens=400)
    change, missing = torch.eye(24) + 0.05 * torch.randn(24, 24), torch.randn(8, 24)
    inputs, stream = x @ change, x @ missing.t()
    fit, held = (Moments.of((inputs, x, stream), part) for part in (slice(300), slice(300, None)))
    found = corrections(fit, Curvature(fit.hessian, 0.1), weight, weight)
    grid = torch.linspace(0, 1, 5)
    best = min(
        itertools.product(grid.tolist(), grid.tolist()),
        key=lambda share: (inputs @ found.applied(weight, *share).t() - x @ weight.t() - stream)[300:].square().sum(),
    )
    assert choose(found, held, weight, weight, grid, grid) == pytest.approx(best)


def test_dead_inputs_keep_their_nearest_codes():
    x, weight, grid = problem()
    x[:, 3] = 0
    codes = gptq(weight, Curvature(x.t() @ x, 0.01), grid)
    assert torch.equal(codes[:, 3], grid.nearest(weight)[:, 3])
    dead = solve(weight, weight, grid, Split(Moments.of((0 * x, None, None))), Options(refit_scales=False), "site")
    assert torch.equal(dead.codes, grid.nearest(weight))


def test_damping_does_not_depend_on_the_scale_of_inputs():
    x, weight, grid = problem(size=1)
    factors = torch.logspace(-3, 3, 24)
    scaled = Grid(grid.scale / factors, 1, grid.q_min, grid.q_max)
    hessian, rescaled = x.t() @ x, (x * factors).t() @ (x * factors)
    codes = gptq(weight, Curvature(hessian, 0.01), grid)
    assert (gptq(weight / factors, Curvature(rescaled, 0.01), scaled) == codes).float().mean() > 0.98


def test_statistics_that_are_not_finite_are_an_error_that_names_the_site():
    hessian = torch.eye(4)
    hessian[1, 2] = torch.nan
    with pytest.raises(LoopQError, match=r"layers\.0\.q"):
        Curvature(hessian, 0.01, where="layers.0.q")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"solver": "gtpq"}, "gptq"), ({"alpha": 2.0}, "alpha"), ({"damping": 0.0}, "damping"), ({"form": 4}, "forms")],
)
def test_unknown_options_are_errors(options, message):
    with pytest.raises(LoopQError, match=message):
        Options(**options)
