"""Theorem 2 and its amendments on random smooth losses: exact expectations by walking every
history, and their mutants.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, UnknownName
from lora_book.theory.convergence import (
    chained_gd,
    circulant_record,
    cycle_bound,
    projected_gd,
    smooth_minimum,
    theorem2_bound,
)
from lora_book.theory.projections import LAWS, STARTS, draw, lambda_min, projector, selector, starts
from lora_book.theory.smoothness import factor_gradients

FEW = settings(max_examples=20, deadline=None)
SELECTING = tuple(STARTS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def square(M):
    return M.pow(2).sum(dim=(-2, -1))


@st.composite
def problems(draw, most=6):
    """A smooth nonconvex loss of W (n, m) with minimum 0: W0, the loss, its gradient and its
    constant.
    """
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, most))
    generator = seeded(draw(st.integers(0, 2**31)))
    W0, goal = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    X = torch.randn(m, m + 1, generator=generator, dtype=torch.float64) / m**0.5

    def loss(W):
        z = (W - goal) @ X
        return (z**2 / (1 + z**2)).sum(dim=(-2, -1))

    def grad(W):
        z = (W - goal) @ X
        return 2 * z / (1 + z**2) ** 2 @ X.mT

    return W0, loss, grad, 2 * torch.linalg.matrix_norm(X, 2).item() ** 2


def histories(grad, W0, projectors, step, links, inner=1):
    """The exact E‖∇L(W^t)‖² for every t, and all end points, each link drawing one of `projectors`
    evenly.
    """
    W, H, squares = W0[None], torch.stack(projectors), []
    for _ in range(links):
        W, chosen = W.repeat_interleave(len(H), 0), H.repeat(len(W), 1, 1)
        for _ in range(inner):
            squares.append(square(grad(W)).mean().item())
            W = W - step * grad(W) @ chosen
    return torch.tensor(squares, dtype=torch.float64), W


def choices(law, m, r):
    return [projector(selector(m, r, start)) for start in starts(law, m, r)]


@FEW
@given(problems(), st.sampled_from(LAWS), st.data())
def test_a_step_is_the_gradient_through_the_projector(problem, law, data):
    W0, _, grad, L_G = problem
    r, seed = data.draw(st.integers(1, W0.shape[1])), data.draw(st.integers(0, 2**31))
    path = projected_gd(grad, W0, law, r, 0.5 / L_G, 4, seeded(seed))
    assert path.shape == (5, *W0.shape) and torch.equal(path[0], W0)
    generator = seeded(seed)
    for t in range(4):
        H = projector(draw(law, W0.shape[1], r, generator, t))
        torch.testing.assert_close(path[t + 1], path[t] - 0.5 / L_G * grad(path[t]) @ H)
    assert torch.equal(path, projected_gd(grad, W0, law, r, 0.5 / L_G, 4, seeded(seed)))


@FEW
@given(problems(), st.sampled_from(LAWS), st.floats(0.05, 1.0), st.data())
def test_each_step_pays_for_itself(problem, law, share, data):
    "Steps (a) to (c): the loss falls by at least γ/2 ‖GH‖² when γ <= 1/L_G."
    W0, loss, grad, L_G = problem
    r = data.draw(st.integers(1, W0.shape[1]))
    path = projected_gd(grad, W0, law, r, share / L_G, 8, seeded(data.draw(st.integers(0, 2**31))))
    spent = square(path[1:] - path[:-1]) / (2 * share / L_G)
    assert (loss(path[:-1]) - loss(path[1:]) >= spent - 1e-10).all()


@settings(max_examples=25, deadline=None)
@given(problems(4), st.sampled_from(("block", "window", "literal")), st.floats(0.2, 1.0), st.data())
def test_theorem_2_exactly(problem, law, share, data):
    W0, loss, grad, L_G = problem
    m = W0.shape[1]
    r = data.draw(st.integers(1, m))
    assume(lambda_min(law, m, r) > 0)
    T = data.draw(st.integers(1, 5))
    squares, ends = histories(grad, W0, choices(law, m, r), share / L_G, T)
    bound = theorem2_bound(loss(W0).item(), lambda_min(law, m, r), share / L_G, T)
    assert squares.mean() <= bound * (1 + 1e-12)
    assert (
        squares.sum()
        <= 2 * (loss(W0) - loss(ends).mean()) / (lambda_min(law, m, r) * share / L_G) + 1e-10
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.floats(0.3, 0.99), st.integers(1, 60))
def test_theorem_2_is_nearly_sharp_and_needs_the_right_dimension(m, step, T):
    """½‖w‖², one output, rank 1: the exact mean is a geometric sum, below the bound with r/m; with
    r/n it passes it.
    """
    shrink = 1 - step * (2 - step) / m
    exact = sum(shrink**t for t in range(T)) / T
    assert exact <= theorem2_bound(0.5, lambda_min("gaussian", m, 1), step, T)
    many = 200 * m
    exact = sum(shrink**t for t in range(many)) / many
    assert exact > 0.5 * theorem2_bound(0.5, 1 / m, step, many)
    assert exact > theorem2_bound(0.5, 1.0, step, many)


@FEW
@given(st.integers(2, 6), st.floats(0.1, 0.99), st.data())
def test_a_frozen_draw_breaks_the_bound(m, step, data):
    """Mutant of the hypothesis: one projector for all steps. What A cannot see never moves; what it
    sees obeys Theorem frozen.
    """
    r = data.draw(st.integers(1, m - 1))
    goal = torch.ones(1, m, dtype=torch.float64)
    path = projected_gd(lambda W: W - goal, torch.zeros_like(goal), "fixed", r, step, 400)
    G, H = path - goal, projector(selector(m, r, 0))
    assert not path[:, :, r:].any()
    assert square(G[:-1]).mean() > theorem2_bound(m / 2, r / m, step, 400)
    assert square(G[:-1] @ H).mean() <= 2 * (r / 2) / (step * 400) * (1 + 1e-12)


def test_the_smallest_frozen_counterexample():
    path = projected_gd(
        lambda W: W - torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), "fixed", 1, 0.99, 100
    )
    assert not path.any()
    assert theorem2_bound(0.5, 0.5, 0.99, 100) < 1.0 < theorem2_bound(0.5, 0.5, 0.99, 1)


@FEW
@given(problems(), st.integers(1, 4), st.floats(0.2, 1.0), st.data())
def test_cycles(problem, inner, share, data):
    W0, loss, grad, L_G = problem
    r, cycles = data.draw(st.integers(1, W0.shape[1])), data.draw(st.integers(1, 4))
    blocks = len(starts("cyclic", W0.shape[1], r))
    path = chained_gd(grad, W0, "cyclic", r, share / L_G, cycles * blocks, inner)
    begins = path[: -1 : inner * blocks]
    assert len(begins) == cycles
    assert square(grad(begins)).mean() <= cycle_bound(
        loss(W0).item(), L_G, share / L_G, cycles, blocks, inner
    ) * (1 + 1e-12)


@pytest.mark.parametrize("inner", [1, 2, 3, 10])
def test_theorem_2_is_false_for_a_cycle_of_several_steps(inner):
    path = chained_gd(lambda w: w, torch.tensor([[0.0, 1.0]]).double(), "cyclic", 1, 0.99, 2, inner)
    assert (square(path[:-1]).mean() > theorem2_bound(0.5, 0.5, 0.99, 2 * inner)) == (inner > 1)


@settings(max_examples=20, deadline=None)
@given(problems(4), st.integers(1, 5), st.floats(0.2, 1.0), st.data())
def test_chains_counted_in_links(problem, inner, share, data):
    W0, loss, grad, L_G = problem
    m = W0.shape[1]
    r = data.draw(st.sampled_from([r for r in range(1, m + 1) if m % r == 0]))
    squares, _ = histories(grad, W0, choices("block", m, r), share / L_G, 4, inner)
    assert squares[::inner].mean() <= theorem2_bound(loss(W0).item(), r / m, share / L_G, 4) * (
        1 + 1e-12
    )


@pytest.mark.parametrize("inner", [1, 2, 4, 20])
def test_chains_counted_in_steps_break_the_bound(inner):
    "The mutant counts every step of a link; exact over all 64 histories of two coordinates."
    squares, _ = histories(
        lambda w: w, torch.tensor([[0.0, 1.0]]).double(), choices("block", 2, 1), 0.99, 6, inner
    )
    assert squares[::inner].mean() <= theorem2_bound(0.5, 0.5, 0.99, 6)
    assert (squares.mean() > theorem2_bound(0.5, 0.5, 0.99, 6 * inner)) == (inner > 1)


@FEW
@given(
    problems(),
    st.floats(0.2, 3.0),
    st.integers(1, 3),
    st.sampled_from((*SELECTING, "orthonormal", "gaussian")),
    st.data(),
)
def test_descent_on_B_is_the_projected_descent_when_rows_are_orthonormal(
    problem, scale, inner, law, data
):
    W0, _, grad, L_G = problem
    m = W0.shape[1]
    r, generator = data.draw(st.integers(1, m)), seeded(data.draw(st.integers(0, 2**31)))
    A = draw("gaussian" if law == "orthonormal" else law, m, r, generator)
    A = torch.linalg.qr(A.mT)[0].mT if law == "orthonormal" else A
    assume(law != "gaussian" or (A @ A.mT - torch.eye(r)).norm() > 0.5)
    B, W, step = torch.zeros(W0.shape[0], r, dtype=torch.float64), W0, 0.1 / L_G / scale**2
    for _ in range(inner):
        B = B - step * factor_gradients(grad(W0 + scale * B @ A), B, A, scale)[0]
        W = W - step * scale**2 * grad(W) @ projector(A)
    gap, moved = (W0 + scale * B @ A - W).norm(), (W - W0).norm()
    assume(moved > 1e-6)
    assert (gap < 1e-9 * (1 + moved)) == (law != "gaussian")


def test_bounds_are_their_formulas():
    assert theorem2_bound(3.0, 0.25, 0.5, 12) == pytest.approx(2 * 3 / (0.25 * 0.5 * 12))
    assert theorem2_bound(0, 1, 1, 1) == 0.0
    assert cycle_bound(3.0, 2.0, 0.5, 7, 5, 4) == pytest.approx(2 * (1 + 4) ** 2 * 3 / (0.5 * 7))
    assert cycle_bound(1.0, 1.0, 1.0, 2, 1, 9) == pytest.approx(theorem2_bound(1.0, 1.0, 1.0, 2))
    assert theorem2_bound(torch.tensor(1.0), torch.tensor(0.5), 1, 2) == 2.0


W = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: projected_gd(torch.sin, W, "block", 4, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 0, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, 0.0, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, -1.0, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, math.nan, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, 0.1, -1, seeded(0)),
        lambda: projected_gd(torch.sin, W * math.nan, "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W[0], "block", 1, 0.1, 3),
        lambda: projected_gd(lambda W: W.mT, W, "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(lambda W: W / 0, W, "block", 1, 0.1, 3, seeded(0)),
        lambda: chained_gd(torch.sin, W, "block", 1, 0.1, 3, 0, seeded(0)),
        lambda: chained_gd(torch.sin, W, "block", 1, 0.1, -3, 1, seeded(0)),
        lambda: theorem2_bound(-1.0, 0.5, 0.1, 3),
        lambda: theorem2_bound(1.0, 0.0, 0.1, 3),
        lambda: theorem2_bound(1.0, -0.5, 0.1, 3),
        lambda: theorem2_bound(1.0, 1.5, 0.1, 3),
        lambda: theorem2_bound(1.0, 0.5, 0.0, 3),
        lambda: theorem2_bound(1.0, 0.5, 0.1, 0),
        lambda: theorem2_bound(math.inf, 0.5, 0.1, 3),
        lambda: theorem2_bound(1.0, math.nan, 0.1, 3),
        lambda: theorem2_bound(1.0, 0.5, 0.1, -3),
        lambda: cycle_bound(1.0, 2.0, 0.6, 3, 2),
        lambda: cycle_bound(1.0, 2.0, 0.1, 0, 2),
        lambda: cycle_bound(1.0, 0.0, 0.1, 3, 2),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(BadValue):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: projected_gd(None, W, "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, [[0.0]], "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W.long(), "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, 3, 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, "0.1", 3, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, 0.1, 3.0, seeded(0)),
        lambda: projected_gd(torch.sin, W, "block", 1, 0.1, 3, 0),
        lambda: projected_gd(torch.sin, W, "gaussian", 1, 0.1, 3, None),
        lambda: projected_gd(lambda W: 1.0, W, "block", 1, 0.1, 3, seeded(0)),
        lambda: projected_gd(lambda W: None, W, "fixed", 1, 0.1, 3),
        lambda: theorem2_bound("1", 0.5, 0.1, 3),
        lambda: theorem2_bound(1.0, 0.5, 0.1, 3.0),
        lambda: theorem2_bound(1.0, None, 0.1, 3),
    ],
)
def test_bad_types_are_refused(call):
    with pytest.raises(BadType):
        call()


def test_unknown_laws_name_the_nearest():
    with pytest.raises(UnknownName, match="'blok'.*'block'"):
        projected_gd(torch.sin, W, "blok", 1, 0.1, 3, seeded(0))


def test_nothing_outside_is_touched():
    """No change of W0, of the global random state, or of an earlier iterate by a gradient that
    writes into its argument.
    """
    start, before = torch.ones(1, 4, dtype=torch.float64, requires_grad=True), torch.get_rng_state()
    path = projected_gd(lambda W: W.mul_(1.0), start, "gaussian", 2, 0.5, 5, seeded(3))
    vandal = projected_gd(
        lambda W: W.clone() + 0 * W.zero_(), start, "gaussian", 2, 0.5, 5, seeded(3)
    )
    assert torch.equal(path, vandal) and torch.equal(
        start.detach(), torch.ones(1, 4, dtype=torch.float64)
    )
    assert torch.equal(before, torch.get_rng_state()) and not path.requires_grad
    assert len(projected_gd(lambda W: W, start, "cyclic", 2, 0.5, 0)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_of_the_weight_is_kept(dtype):
    path = projected_gd(lambda W: W, torch.ones(2, 4, dtype=dtype), "cyclic", 2, 0.5, 4)
    assert path.dtype == dtype and torch.equal(path[2], 0.5 * path[0])


# The smooth minimum of paraboloids, and the circulant chain that it breaks


@st.composite
def paraboloids(draw):
    "Centres (N, d), heights (N,) and points (7, d); some centres repeat or lie on a line."
    N, d = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = seeded(draw(st.integers(0, 2**31)))
    z, q, w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(N, d), (N,), (7, d)]
    )
    if draw(st.booleans()):
        z[-1] = z[0]
        z[N // 2] = (z[0] + z[-1]) / 2
    return z, q, w * 2


@FEW
@given(paraboloids())
def test_smooth_minimum_is_the_least_over_the_simplex(case):
    z, q, w = case
    value, gradient = smooth_minimum(w, z, q)
    weights = -torch.rand(400, len(z), generator=seeded(0), dtype=torch.float64).log()
    weights = torch.cat([weights / weights.sum(1, keepdim=True), torch.eye(len(z)).double()])
    mean = weights @ z
    bracket = (
        (w[:, None] - mean).pow(2).sum(-1) / 2
        - mean.pow(2).sum(-1) / 4
        + weights @ (q + z.pow(2).sum(1) / 4)
    )
    assert (value[:, None] <= bracket + 1e-10).all()
    pieces = (w[:, None] - z).pow(2).sum(-1) / 2 + q
    assert (value <= pieces.min(1).values + 1e-10).all()
    assert (value >= q.min() - 1e-10).all()
    bottom, flat = smooth_minimum(z[q.argmin()], z, q)
    assert bottom.item() == pytest.approx(q.min().item(), abs=1e-10)
    assert flat.norm() < 1e-6


@FEW
@given(paraboloids())
def test_gradient_of_the_smooth_minimum(case):
    z, q, w = case
    w.requires_grad_()
    value, gradient = smooth_minimum(w, z, q)
    (auto,) = torch.autograd.grad(value.sum(), w)
    assert torch.allclose(auto, gradient, atol=1e-8)
    w = w.detach()
    for axis in torch.eye(w.shape[1], dtype=torch.float64):
        ahead, behind = (smooth_minimum(w + t * axis, z, q)[0] for t in (1e-5, -1e-5))
        assert torch.allclose((ahead - behind) / 2e-5, gradient @ axis, atol=1e-4)


def most_curved(value, gradient, w):
    "The worst violation of 1-smoothness between any two of the points: at most 0 if there is none."
    apart = w - w[:, None]
    stretch = (gradient - gradient[:, None]).norm(dim=-1) - apart.norm(dim=-1)
    first = value - value[:, None] - (gradient[:, None] * apart).sum(-1)
    return max(stretch.max().item(), (first.abs() - apart.pow(2).sum(-1) / 2).max().item())


@FEW
@given(paraboloids())
def test_the_smooth_minimum_is_1_smooth(case):
    z, q, w = case
    assert most_curved(*smooth_minimum(w, z, q), w) < 1e-7


def test_a_plain_minimum_of_paraboloids_is_not_smooth():
    "The twin that fails: without the rounding of the creases the gradient jumps."
    z, q = torch.tensor([[-1.0], [1.0]]).double(), torch.zeros(2).double()
    w = torch.tensor([[-1e-3], [1e-3]]).double()
    pieces = (w[:, None] - z).pow(2).sum(-1) / 2 + q
    value, best = pieces.min(1)
    assert most_curved(value, w - z[best], w) > 1
    assert most_curved(*smooth_minimum(w, z, q), w) < 1e-12


def circulant_ratio(k, centres, heights, cycles=3):
    def slope(W):
        inner = smooth_minimum(W[:, -2:], centres, heights)[1]
        return torch.nn.functional.pad(inner, (k - 2, 0))

    W0 = torch.zeros(1, k, dtype=torch.float64)
    path = chained_gd(slope, W0, "cyclic", 1, 0.99, k * cycles)[:-1, 0, -2:]
    value, gradient = smooth_minimum(path, centres, heights)
    gap = value[0].item() - heights.min().item()
    return square(gradient[:, None]).mean().item() / theorem2_bound(gap, 1 / k, 0.99, len(path))


def test_one_step_a_block_breaks_theorem_2_from_three_blocks_on():
    record = circulant_record()
    loss = record["centres"], record["heights"]
    ratios = [circulant_ratio(k, *loss) for k in (2, 3, 4, 8)]
    assert ratios[0] < 1 < ratios[1] and ratios[2] > 1.08 and ratios == sorted(ratios)
    assert circulant_ratio(4, loss[0][1:], loss[1][1:]) < 1
    assert circulant_ratio(4, loss[0][:1], loss[1][:1]) < 1


def test_the_searches_agree_with_what_the_loss_shows():
    "A value of the search bounds every loss from above, this one too; (ii) is about convex ones."
    record = circulant_record()
    found = {(row["losses"], row["k"], row["T"]): row["ratio"] for row in record["searched"]}
    ours = circulant_ratio(4, record["centres"], record["heights"])
    assert 1 < ours <= found["smooth", 4, 12]
    assert found["smooth", 2, 14] == found["convex", 5, None] == 1


@pytest.mark.parametrize(
    "w, z, q, error",
    [
        (torch.zeros(1, 2), torch.zeros(3, 3), torch.zeros(3), BadValue),
        (torch.zeros(1, 3), torch.zeros(3, 3), torch.zeros(2), BadValue),
        (torch.zeros(1, 3), torch.zeros(3), torch.zeros(3), BadValue),
        (torch.zeros(1, 3), torch.full((2, 3), math.nan), torch.zeros(2), BadValue),
        (torch.zeros(1, 3), torch.zeros(2, 3), torch.tensor([0.0, math.inf]), BadValue),
        (torch.zeros(1, 3).long(), torch.zeros(2, 3), torch.zeros(2), BadType),
        ([0.0, 0.0, 0.0], torch.zeros(2, 3), torch.zeros(2), BadType),
        (torch.zeros(1, 3), torch.zeros(2, 3), [0.0, 0.0], BadType),
    ],
)
def test_smooth_minimum_refuses(w, z, q, error):
    with pytest.raises(error):
        smooth_minimum(w, z, q)
