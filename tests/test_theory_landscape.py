"""Matrix sensing, Burer-Monteiro factors, second-order points, spurious minima, kernel regime,
expressive power.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import LoraBookError
from lora_book.theory.landscape import (
    Sensing,
    balanced,
    bm_gradient,
    bm_hessian,
    bm_loss,
    certificate,
    express,
    expressive_error,
    is_second_order_point,
    kernel_rank,
    loud_threshold,
    minimise,
    nuclear_norm,
    reduce_rank,
    safe_rank,
    second_order,
    sensing_problem,
    spurious_problem,
)

seeds, side = st.integers(0, 10**6), st.integers(1, 6)


def drawer(seed):
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)


def rank(X, tol=1e-5):
    values = torch.linalg.svdvals(X)
    return int((values > tol).sum())


@settings(max_examples=20, deadline=None)
@given(seeds, side, side, st.integers(1, 12), st.data())
def test_sensing_is_its_sum_and_repeats_its_bits(seed, n, m, count, data):
    r = data.draw(st.integers(1, min(n, m)))
    (f, hidden), (again, _) = (sensing_problem(n, m, r, count, seed, noise=0.1) for _ in range(2))
    X = drawer(seed)(n, m)
    by_hand = sum(0.5 * float((M * X).sum() - y) ** 2 for M, y in zip(f.maps, f.y))
    assert math.isclose(float(f(X)), by_hand, rel_tol=1e-9) and rank(hidden) <= r
    assert torch.equal(f.maps, again.maps) and torch.equal(f.y, again.y)
    clean, hidden = sensing_problem(n, m, r, count, seed)
    assert float(clean(hidden)) < 1e-20 * (1 + float(hidden.norm()) ** 2)


@settings(max_examples=25, deadline=None)
@given(seeds, side, side, st.integers(1, 4), st.floats(0, 2), st.floats(0.1, 3))
def test_derivatives_by_their_formulas_and_not_without_the_cross_term(
    seed, n, m, r, decay, scaling
):
    rand = drawer(seed)
    f = Sensing(rand(7, n, m), rand(7))
    B, A, U, V = rand(n, r), rand(r, m), rand(n, r), rand(r, m)
    G = torch.einsum("k,kij->ij", torch.einsum("kij,ij->k", f.maps, scaling * B @ A) - f.y, f.maps)
    gB, gA = bm_gradient(f, B, A, decay, scaling)
    assert torch.allclose(gB, scaling * G @ A.T + decay * B) and torch.allclose(
        gA, scaling * B.T @ G + decay * A
    )
    direction = torch.cat([U.flatten(), V.flatten()])
    bent = (
        scaling**2 * torch.einsum("kij,ij->k", f.maps, U @ A + B @ V).square().sum()
        + decay * direction @ direction
    )
    cross = 2 * scaling * (G * (U @ V)).sum()
    measured = direction @ bm_hessian(f, B, A, decay, scaling) @ direction
    assert torch.isclose(measured, bent + cross, rtol=1e-9, atol=1e-9)
    assert abs(float(cross)) < 1e-6 or not torch.isclose(measured, bent, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds, side, side, st.data())
def test_balanced_factors_cost_the_nuclear_norm_and_no_others_less(seed, n, m, data):
    rand = drawer(seed)
    low = data.draw(st.integers(1, min(n, m)))
    r = data.draw(st.integers(low, min(n, m)))
    X = rand(n, low) @ rand(low, m)
    B, A = balanced(X, r)
    zero = Sensing(torch.zeros(1, n, m).double(), torch.zeros(1).double())
    price = float(bm_loss(zero, B, A, decay=1.0))
    assert (
        torch.allclose(B @ A, X)
        and torch.allclose(B.T @ B, A @ A.T, atol=1e-9)
        and math.isclose(price, nuclear_norm(X), rel_tol=1e-9)
    )
    gauge = rand(r, r) + 3 * torch.eye(r).double()
    assert float(bm_loss(zero, B @ gauge, torch.linalg.solve(gauge, A), decay=1.0)) >= price * (
        1 - 1e-9
    )
    if low > 1:
        with pytest.raises(ValueError, match="rank"):
            balanced(X, low - 1)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(2, 5), st.integers(3, 14), st.floats(0.05, 1))
def test_rank_deficient_second_order_points_are_global(seed, n, m, count, decay):
    rand = drawer(seed)
    f = Sensing(rand(count, n, m) / math.sqrt(count), rand(count))
    r = min(n, m)
    B, A = minimise(f, rand(n, r), rand(r, m), decay)
    excess, misaligned = certificate(f, B @ A, decay)
    if rank(B @ A, 1e-4) < r and is_second_order_point(f, B, A, decay, tol=1e-5):
        assert excess < 1e-3 and abs(misaligned) < 1e-3
    shifted = B @ A + 0.5 * rand(n, m)
    assert max(certificate(f, shifted, decay)[0], abs(certificate(f, shifted, decay)[1])) > 1e-6


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.3, 3), st.floats(0.1, 1))
def test_scale_divides_the_weight_decay(seed, scaling, decay):
    rand = drawer(seed)
    f, _ = sensing_problem(4, 3, 1, 20, seed)
    B, A = minimise(f, 0.5 * rand(4, 3), 0.5 * rand(3, 3), decay, scaling)
    excess, misaligned = certificate(f, scaling * B @ A, decay / scaling)
    assert excess < 1e-4 and abs(misaligned) < 1e-4


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.floats(0.05, 0.5))
def test_the_origin_is_stationary_and_a_second_order_point_only_under_strong_decay(seed, n, decay):
    rand = drawer(seed)
    f = Sensing(torch.eye(n * n).double().view(-1, n, n), rand(n * n))
    B, A = torch.zeros(n, 2).double(), torch.zeros(2, n).double()
    top = float(torch.linalg.matrix_norm(f.y.view(n, n), 2))
    found = second_order(f, B, A, decay)
    assert found.gradient == 0 and math.isclose(found.curvature, decay - top, abs_tol=1e-9)
    assert is_second_order_point(f, B, A, 1.01 * top) and not is_second_order_point(
        f, B, A, 0.99 * top
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.floats(0.03, 0.25), st.one_of(st.just(0.0), st.floats(1e-3, 0.02)))
def test_traps_appear_at_their_threshold_and_are_loud(r, over, decay):
    gamma = math.sqrt(r) / (1 + math.sqrt(r)) + over
    f, trap, solution = spurious_problem(r, gamma, decay)
    alpha, beta = 1 - gamma, 1 + gamma
    assert is_second_order_point(f, *balanced(trap, r), decay)
    edge = float(torch.linalg.svdvals(trap)[r - 1])
    assert (
        rank(trap) == r
        and edge >= loud_threshold(alpha, beta, 1 - decay)
        and r < safe_rank(alpha, beta, 1)
        and beta >= 2 * alpha
    )
    assert edge < 4 * loud_threshold(alpha, beta, 1 - decay) + 1
    if decay > 0:
        assert max(certificate(f, solution, decay)) < 1e-9 < certificate(f, trap, decay)[0]
    assert float(bm_loss(f, *balanced(trap, r), decay)) > float(
        bm_loss(f, *balanced(solution, r), decay)
    )
    below = spurious_problem(r, gamma - over - 0.03, 0.0)
    assert not is_second_order_point(below[0], *balanced(below[1], r))


def test_curvature_of_the_trap_problem_is_what_it_says():
    f, _, _ = spurious_problem(2, 0.7)
    H = f.maps.flatten(1).T @ f.maps.flatten(1)
    values = torch.linalg.eigvalsh(H)
    assert math.isclose(values[0], 0.3, rel_tol=1e-9) and math.isclose(
        values[-1], 1.7, rel_tol=1e-9
    )


def test_the_printed_order_of_root_n_is_refuted_by_rank_one():
    maps = torch.eye(4).double().view(4, 2, 2) * torch.tensor([1, 3, 3, 1]).double().sqrt().view(
        4, 1, 1
    )
    f = Sensing(maps, torch.tensor([1, 0, 0, 0.9]).double())
    trap, best = (
        balanced(torch.diag(torch.tensor(d)).double(), 1) for d in ([0.0, 0.9], [1.0, 0.0])
    )
    values = torch.linalg.eigvalsh(bm_hessian(f, *trap))
    assert torch.allclose(values, torch.tensor([0, 1.7, 1.8, 3.7]).double(), atol=1e-9)
    assert is_second_order_point(f, *trap) and float(
        f(trap[0] @ trap[1])
    ) == 0.5 > 0.405 + 1e-9 > float(f(best[0] @ best[1]))


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 4), st.floats(0.01, 0.3))
def test_special_regime_has_no_bad_ends(seed, r, decay):
    "All curvature within a factor below 2: whatever the start, descent ends in the solution."
    rand = drawer(seed)
    n = 4
    scale = 1 + 0.9 * torch.rand(
        n * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    basis = torch.linalg.qr(rand(n * n, n * n))[0] * scale.sqrt()[:, None]
    hidden = rand(n, 1) @ rand(1, n)
    f = Sensing(basis.view(-1, n, n), basis @ hidden.flatten())
    ends = [minimise(f, 2 * rand(n, r), 2 * rand(r, n), decay) for _ in range(3)]
    wide = minimise(f, rand(n, n), rand(n, n), decay)
    if rank(wide[0] @ wide[1], 1e-4) <= r:
        assert all(float((B @ A - wide[0] @ wide[1]).norm()) < 1e-3 for B, A in ends)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 50))
def test_kernel_rank_is_the_first_that_counts(samples, outputs):
    r = kernel_rank(samples, outputs)
    assert r * (r + 1) // 2 > samples * outputs >= r * (r - 1) // 2
    assert abs(r - math.sqrt(2 * samples * outputs)) <= 1


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 7), st.integers(2, 7), st.integers(1, 12))
def test_reduced_matrices_measure_the_same(seed, n, m, count):
    rand = drawer(seed)
    maps, X = rand(count, n, m), rand(n, m)
    Y = reduce_rank(maps, X)
    r = rank(Y, 1e-7 * float(Y.norm()))
    assert r * (r + 1) // 2 <= count or r == 0
    assert float((maps * (X - Y)).sum((1, 2)).abs().max()) < 1e-6 * (1 + float(X.norm()))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 8), st.integers(0, 9))
def test_reduction_keeps_a_minimal_nuclear_norm(seed, n, more):
    rand = drawer(seed)
    maps = torch.stack([torch.eye(n).double()] + [torch.diag(rand(n)) for _ in range(more)])
    Y = reduce_rank(maps, maps[0] / n)
    assert math.isclose(nuclear_norm(Y), 1.0, rel_tol=1e-6) and rank(Y, 1e-6) < kernel_rank(
        more + 1
    )


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(3, 6))
def test_chains_attain_the_eckart_young_error_and_no_update_beats_it(seed, depth, r, n):
    rand = drawer(seed)
    layers, target = [rand(n, n) + 3 * torch.eye(n).double() for _ in range(depth)], 3 * rand(n, n)
    least = expressive_error(layers, target, r)
    updates = express(layers, target, r)

    def error(changes):
        product = torch.eye(n).double()
        for W, D in zip(layers, changes):
            product = (W + D) @ product
        return float(torch.linalg.matrix_norm(target - product, 2))

    size = max(float(D.norm()) for D in updates)
    assert all(rank(D, 1e-9 * max(size, 1)) <= r for D in updates)
    assert math.isclose(error(updates), least, rel_tol=1e-5, abs_tol=1e-6 * (1 + size))
    assert error([rand(n, r) @ rand(r, n) for _ in layers]) >= least * (1 - 1e-9)


def test_singular_chains_are_refused():
    zeros = [torch.zeros(2, 2).double()] * 2
    assert expressive_error(zeros, torch.eye(2).double(), 1) == 0
    with pytest.raises(ValueError, match="singular"):
        express(zeros, torch.eye(2).double(), 1)


X, B, A = torch.ones(3, 2).double(), torch.ones(3, 1).double(), torch.ones(1, 2).double()
F = Sensing(torch.ones(2, 3, 2).double(), torch.ones(2).double())


@pytest.mark.parametrize(
    "call",
    [
        lambda: Sensing(torch.ones(2, 3, 2), torch.ones(3)),
        lambda: Sensing([1], torch.ones(1)),
        lambda: Sensing(torch.ones(2, 3), torch.ones(2)),
        lambda: Sensing(torch.full((1, 2, 2), math.nan), torch.ones(1)),
        lambda: sensing_problem(3, 2, 3, 5, seed=0),
        lambda: sensing_problem(3, 2, 1, 0, seed=0),
        lambda: sensing_problem(3, 2, 1, 5, seed=0, noise=-1),
        lambda: bm_loss(F, B, A.T),
        lambda: bm_loss(F, B, A, -1.0),
        lambda: bm_gradient(F, B, A, scaling=0.0),
        lambda: bm_hessian(F, B * math.inf, A),
        lambda: bm_loss(F, B.int(), A),
        lambda: second_order(F, "B", A),
        lambda: is_second_order_point(F, B, A, tol=0),
        lambda: minimise(F, B, A, steps=0),
        lambda: nuclear_norm(torch.ones(3)),
        lambda: balanced(X, 3),
        lambda: balanced(X, 0),
        lambda: certificate(F, X, 0.0),
        lambda: loud_threshold(2.0, 1.0, 1.0),
        lambda: loud_threshold(0.0, 1.0, 1.0),
        lambda: loud_threshold(1.0, 1.0, -1.0),
        lambda: safe_rank(1.0, 2.0, 0),
        lambda: spurious_problem(0, 0.5),
        lambda: spurious_problem(1, 1.0),
        lambda: spurious_problem(1, 0.5, 0.5),
        lambda: kernel_rank(0),
        lambda: kernel_rank(1.5),
        lambda: reduce_rank(torch.ones(2, 2, 2), X),
        lambda: reduce_rank(F.maps, X, tol=0),
        lambda: expressive_error([], X, 1),
        lambda: expressive_error([X], X.T, 1),
        lambda: expressive_error([X, X], X, 1),
        lambda: express([X], X, 1),
        lambda: express([X], X, 0),
    ],
)
def test_bad_input_is_refused_by_name(call):
    with pytest.raises(LoraBookError) as caught:
        call()
    assert isinstance(caught.value, (ValueError, TypeError)) and str(caught.value)
