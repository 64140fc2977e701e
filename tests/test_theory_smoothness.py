"""Properties of lora_book.theory.smoothness over random depths, widths and ranks; each check has a
mutant that it rejects.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, LoraBookError
from lora_book.theory.smoothness import (
    factor_gradients,
    factor_norm_bound,
    frozen_smoothness,
    local_smoothness_bound,
    smoothness_ratio,
    spectral_norms,
)

FEW = settings(max_examples=25, deadline=None)
SCALES = st.floats(0.1, 4.0)


@st.composite
def layers(draw, most=3):
    """Factor lists A, B of random depth, widths and ranks, and a generator for whatever else is
    drawn.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=most))
    A = [normal(generator, r, m) for n, m, r in sizes]
    B = [normal(generator, n, r) for n, m, r in sizes]
    return A, B, generator


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def products(B, A):
    return [b @ a for b, a in zip(B, A)]


def coupled_loss(generator, like):
    "A smooth, nonconvex loss of all layers at once, and its constant 2‖Q‖₂²."
    size = flat(like).numel()
    Q, y = normal(generator, size + 1, size) / size, normal(generator, size + 1)

    def loss(W):
        z = Q @ flat(W) - y
        return (z**2 / (1 + z**2)).sum()

    return loss, 2 * torch.linalg.matrix_norm(Q, 2).item() ** 2


def hessian_norm(g, B, A):
    shapes = [p.shape for p in (*B, *A)]

    def of_vector(theta):
        parts = [p.reshape(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes)]
        return g(parts[: len(B)], parts[len(B) :])

    H = torch.autograd.functional.hessian(of_vector, flat((*B, *A)))
    return torch.linalg.eigvalsh((H + H.mT) / 2).abs().max().item()


@FEW
@given(layers(), SCALES)
def test_factor_gradients_are_autograds(model, scaling):
    A, B, generator = model
    target = [normal(generator, *p.shape) for p in products(B, A)]
    for a, b, t in zip(A, B, target):
        G = torch.tanh(scaling * b @ a - t)
        auto = torch.func.grad(
            lambda B, A, t: torch.cosh(scaling * B @ A - t).log().sum(), argnums=(0, 1)
        )(b, a, t)
        for ours, theirs in zip(factor_gradients(G, b, a, scaling), auto):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@FEW
@given(layers(), SCALES)
def test_frozen_constant_is_never_passed(model, scaling):
    A, B, generator = model
    other = [normal(generator, *b.shape) for b in B]
    loss, L_G = coupled_loss(generator, products(B, A))
    gradients = [
        torch.func.grad(lambda B: loss([scaling * p for p in products(B, A)]))(x)
        for x in (B, other)
    ]
    gap, distance = (flat(x) - flat(y) for x, y in (gradients, (B, other)))
    assert gap.norm() <= frozen_smoothness(A, L_G, scaling) * distance.norm() * (1 + 1e-9)


@FEW
@given(layers(), SCALES, st.floats(0.1, 10))
def test_frozen_constant_is_attained(model, scaling, L_G):
    """The Hessian of L_G/2 ‖W‖² in B is block diagonal with blocks s² L_G A Aᵀ ⊗ I; a constant a
    percent smaller fails.
    """
    A, _, _ = model
    exact = max(scaling**2 * L_G * torch.linalg.eigvalsh(a @ a.mT)[-1].item() for a in A)
    ours = frozen_smoothness(A, L_G, scaling)
    assert ours == pytest.approx(exact, rel=1e-10)
    assert 0.99 * ours < exact
    printed = L_G * max(a.norm().item() for a in A) ** 2 * len(A) ** 0.5
    assert ours <= scaling**2 * printed * (1 + 1e-12)


@given(st.floats(1e-6, 1e6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
@FEW
def test_ratio_is_k_squared(k, n, r, depth):
    assume(r <= n)
    assert smoothness_ratio(k, n, r, depth) == pytest.approx(k * k, rel=1e-12)


@FEW
@given(st.floats(2.0, 100.0), st.integers(1, 4))
def test_dividing_by_the_product_is_another_number(k, r):
    "The mutant divides by ‖BA‖ as the paper does; it gives √2 k."
    eye = k * torch.eye(r, dtype=torch.float64)
    mutant = flat(factor_gradients(eye @ eye, eye, eye)).norm() / (eye @ eye).norm()
    assert mutant.item() == pytest.approx(2**0.5 * k)
    assert abs(mutant.item() / smoothness_ratio(k, r, r) - 1) > 1e-3


@settings(max_examples=15, deadline=None)
@given(layers(), SCALES)
def test_local_bound_covers_the_hessian(model, scaling):
    A, B, generator = model
    loss, L_G = coupled_loss(generator, products(B, A))
    weights = [scaling * p for p in products(B, A)]
    norms = spectral_norms("G", torch.func.grad(loss)(weights))
    g = lambda B, A: loss([scaling * p for p in products(B, A)])
    measured = hessian_norm(g, B, A)
    assert measured <= local_smoothness_bound(A, B, norms, L_G, scaling) * (1 + 1e-9)
    assert local_smoothness_bound(A, B, norms, L_G, scaling) == local_smoothness_bound(
        A, B, max(norms), L_G, scaling
    )


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 20), st.integers(1, 3), SCALES)
def test_local_bound_is_attained_and_needs_each_term(k, r, scaling):
    """At A = B = kI under ½‖W‖²: curvature s²·2k² + s·sk²; without the gradient, or with one factor
    alone, too small.
    """
    eye = k * torch.eye(r, dtype=torch.float64)
    measured = hessian_norm(lambda B, A: (scaling * B[0] @ A[0]).pow(2).sum() / 2, [eye], [eye])
    bound = local_smoothness_bound([eye], [eye], scaling * k * k, 1.0, scaling)
    assert (
        bound == pytest.approx(measured, rel=1e-9) == pytest.approx(3 * scaling**2 * k**2, rel=1e-9)
    )
    assert local_smoothness_bound([eye], [eye], 0.0, 1.0, scaling) < 0.7 * measured
    assert frozen_smoothness([eye], 1.0, scaling) + scaling**2 * k * k < 0.7 * measured


@FEW
@given(layers(most=1))
def test_balance_bounds_the_factors(model):
    (A,), (B,), _ = model
    kappa, product = (torch.linalg.matrix_norm(M, 2).item() for M in (B.mT @ B - A @ A.mT, B @ A))
    bound = factor_norm_bound(kappa, product)
    assert max(spectral_norms("both", [A, B])) <= bound * (1 + 1e-9)
    if A.shape[0] == 1:
        assert max(spectral_norms("both", [A, B])) == pytest.approx(bound, rel=1e-9)


@FEW
@given(st.floats(0.01, 2.0), st.floats(0.5, 0.98), st.floats(1.02, 2.0))
def test_threshold_of_the_scalar_descent(step, below, above):
    for factor, diverges in ((below, False), (above, True)):
        b = start = factor * math.sqrt(2 / step)
        for _ in range(60):
            gradient, _ = factor_gradients(*(torch.tensor([[x]]).double() for x in (b * b, b, b)))
            b -= step * gradient.item()
            if abs(b) > 1e6 * start:
                break
        assert (abs(b) > start) == diverges


ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: smoothness_ratio(0, 2, 2),
        lambda: smoothness_ratio(-1.0, 2, 2),
        lambda: smoothness_ratio(math.nan, 2, 2),
        lambda: smoothness_ratio(math.inf, 2, 2),
        lambda: smoothness_ratio(1.0, 2, 3),
        lambda: smoothness_ratio(1.0, 2, 0),
        lambda: smoothness_ratio(1.0, 0, 1),
        lambda: smoothness_ratio(1.0, 2, 2, 0),
        lambda: smoothness_ratio(1e60, 2, 2),
        lambda: local_smoothness_bound([ONE], [ONE], -1.0),
        lambda: local_smoothness_bound([ONE], [ONE], math.nan),
        lambda: local_smoothness_bound([ONE], [ONE], 1.0, L_G=-1.0),
        lambda: local_smoothness_bound([ONE], [ONE], 1.0, scaling=0),
        lambda: local_smoothness_bound([ONE], [ONE, ONE], 1.0),
        lambda: local_smoothness_bound([ONE, ONE], [ONE, ONE], [1.0]),
        lambda: local_smoothness_bound([torch.ones(2, 3)], [torch.ones(4, 3)], 1.0),
        lambda: local_smoothness_bound([ONE * math.nan], [ONE], 1.0),
        lambda: local_smoothness_bound([torch.ones(1)], [ONE], 1.0),
        lambda: frozen_smoothness([torch.ones(0, 3)]),
        lambda: frozen_smoothness([ONE * math.inf]),
        lambda: frozen_smoothness([ONE], math.inf),
        lambda: factor_norm_bound(-1.0, 1.0),
        lambda: factor_norm_bound(1.0, -1.0),
        lambda: factor_gradients(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3)),
        lambda: factor_gradients(ONE, ONE, ONE, -1.0),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(BadValue):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: smoothness_ratio("2", 2, 2),
        lambda: smoothness_ratio(2.0, 2.5, 2),
        lambda: smoothness_ratio(2.0, 2, True),
        lambda: smoothness_ratio(2j, 2, 2),
        lambda: local_smoothness_bound(ONE, [ONE], 1.0),
        lambda: local_smoothness_bound([], [], 1.0),
        lambda: local_smoothness_bound([[1.0]], [ONE], 1.0),
        lambda: local_smoothness_bound([ONE.long()], [ONE], 1.0),
        lambda: local_smoothness_bound([ONE], [ONE], "1"),
        lambda: local_smoothness_bound([ONE], [ONE], None),
        lambda: frozen_smoothness(ONE),
        lambda: frozen_smoothness([None]),
        lambda: factor_norm_bound("1", 1.0),
        lambda: factor_gradients(ONE, ONE.double(), ONE),
        lambda: factor_gradients(1.0, ONE, ONE),
    ],
)
def test_bad_types_are_refused(call):
    with pytest.raises(BadType):
        call()


def test_the_message_names_the_value():
    with pytest.raises(LoraBookError, match="r must be an int from 1 to 2, not 3"):
        smoothness_ratio(1.0, 2, 3)
    with pytest.raises(LoraBookError, match="grad_norm must be >= 0, not -2.5"):
        local_smoothness_bound([ONE], [ONE], -2.5)


def test_inputs_are_left_alone_and_one_number_tensors_count_as_numbers():
    A, B = torch.eye(2, 3, requires_grad=True), torch.eye(4, 2)
    bound = local_smoothness_bound((A,), [B], torch.tensor(2.0), torch.tensor(1.5), 2)
    assert bound == pytest.approx(4 * 1.5 * 2 + 2 * 2) and type(bound) is float
    assert torch.equal(A, torch.eye(2, 3)) and A.grad is None
