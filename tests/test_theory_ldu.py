"""The LDU factorisation: what holds for every finite weight, what holds only with independent
leading columns, and mutants that are caught.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, LoraBookError
from lora_book.theory.ldu import (
    eliminate,
    ldu,
    leading,
    lu_flops,
    permutation,
    reconstruct,
    unpermute,
    z_gram,
)

some = settings(max_examples=40, deadline=None)
sizes, seeds = st.integers(1, 12), st.integers(0, 2**20)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def weights(draw_from):
    """Gaussian or integer matrices of any rank, with planted zero or repeated rows and columns,
    scaled and cast.
    """
    n, m, seed = draw_from(sizes), draw_from(sizes), draw_from(seeds)
    batch = draw_from(st.sampled_from([(), (), (3,), (2, 2)]))
    r = draw_from(st.integers(0, min(n, m)))
    W = (
        draw(seed, *batch, n, r) @ draw(seed + 1, *batch, r, m)
        if draw_from(st.booleans())
        else draw(seed, *batch, n, m)
    )
    W = W.round() if draw_from(st.booleans()) else W
    for plant in draw_from(
        st.lists(
            st.sampled_from(["zero row", "zero column", "same row", "same column"]), max_size=3
        )
    ):
        i, j = draw_from(st.integers(0, 11)), draw_from(st.integers(0, 11))
        if "row" in plant:
            W[..., i % n, :] = 0 if "zero" in plant else W[..., j % n, :].clone()
        else:
            W[..., :, i % m] = 0 if "zero" in plant else W[..., :, j % m].clone()
    dtype = draw_from(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    )
    power = {torch.float64: 290, torch.float32: 30, torch.bfloat16: 30, torch.float16: 2}[dtype]
    return (W * 10.0 ** draw_from(st.integers(-power, power))).to(dtype)


def rows(X, p):
    return X.gather(-2, p.unsqueeze(-1).expand_as(X))


def tolerance(W, L, z, U):
    "Elimination's error bound, entry by entry, with room for the columns that counted as zero."
    size = (L.abs() * z.abs().unsqueeze(-2)) @ U.abs()
    return (
        8
        * L.shape[-1]
        * torch.finfo(L.dtype).eps
        * (size.amax((-2, -1), True) + W.abs().amax((-2, -1), True))
    )


def check(W, factors):
    "All that `ldu` promises for every finite W."
    p, L, z, U = factors
    W = W.to(L.dtype)
    n, m, k = *W.shape[-2:], min(W.shape[-2:])
    assert (p.shape, L.shape, z.shape, U.shape) == (
        W.shape[:-1],
        (*W.shape[:-1], k),
        (*W.shape[:-2], k),
        (*W.shape[:-2], k, m),
    )
    assert p.dtype == torch.int64 and torch.equal(
        p.sort(-1).values, torch.arange(n).expand_as(p)
    ), "not an order of the rows"
    assert all(X.isfinite().all() for X in (L, z, U)), "not finite"
    for X in (L[..., :k, :], U[..., :k].mT):
        assert torch.equal(X.triu(), torch.eye(k, dtype=X.dtype).expand_as(X)), (
            "not unit triangular"
        )
    assert (L.abs() <= 1 + 1e-6).all(), "a multiplier above one"
    gap = (rows(W, p) - (L * z.unsqueeze(-2)) @ U).abs() <= tolerance(W, L, z, U)
    exact = torch.cat([z != 0, torch.ones(*z.shape[:-1], n - k, dtype=torch.bool)], -1)
    assert (gap.all(-1) | ~exact).all(), "a row with a pivot isn't reproduced"
    assert torch.equal(U[z == 0], torch.eye(k, m, dtype=U.dtype).expand_as(U)[z == 0]), (
        "a zero pivot without a unit row"
    )


@some
@given(weights())
def test_every_finite_weight_keeps_the_promise(W):
    before = W.clone()
    factors = ldu(W)
    check(W, factors)
    assert torch.equal(W, before) and factors[1].dtype == (
        torch.float64 if W.dtype == torch.float64 else torch.float32
    )


@some
@given(sizes, sizes, seeds, st.sampled_from([torch.float64, torch.float32]), st.integers(-30, 30))
def test_independent_leading_columns_are_reproduced_in_full(n, m, seed, dtype, power):
    W = (draw(seed, n, m) * 10.0**power).to(dtype)
    p, L, z, U = ldu(W)
    assert (z != 0).all()
    assert ((W[p] - L @ torch.diag(z) @ U).abs() <= tolerance(W, L, z, U)).all()
    assert ((reconstruct(p, L, z, U) - W).abs() <= tolerance(W, L, z, U)).all()


@some
@given(sizes, sizes, st.integers(1, 12), seeds)
def test_products_of_low_rank_are_reproduced_in_full(n, m, r, seed):
    W = draw(seed, n, min(r, n, m)) @ draw(seed + 1, min(r, n, m), m)
    factors = ldu(W)
    assert ((reconstruct(*factors) - W).abs() <= tolerance(W, *factors[1:])).all()


@some
@given(weights())
def test_block_and_residual_add_up_to_the_weight(W):
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    for r in {1, min(W.shape[-2:])}:
        PL, z, U = leading(W, r)
        block = (PL * z.unsqueeze(-2)) @ U
        assert block.isfinite().all()
        assert (
            ((W - block) + block - W).abs()
            <= 4 * torch.finfo(W.dtype).eps * (W.abs() + block.abs())
        ).all()


def has_ldu(W):
    "By ranks, over all orders of the rows: whether some W[p] equals L diag(z) U."

    def same(V, j):
        return len({int(torch.linalg.matrix_rank(X)) for X in (V[:j], V[:, :j], V[:j, :j])}) == 1

    return any(
        all(same(W[list(q)], j) for j in range(1, min(W.shape) + 1))
        for q in itertools.permutations(range(len(W)))
    )


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2)])
def test_small_binary_matrices_are_exact_exactly_where_ranks_allow(shape):
    for bits in itertools.product((0.0, 1.0), repeat=shape[0] * shape[1]):
        W = torch.tensor(bits, dtype=torch.float64).reshape(shape)
        assert torch.allclose(reconstruct(*ldu(W)), W, atol=1e-12) == has_ldu(W), W


def test_the_known_counterexample_gives_up_one_row_and_the_residual_carries_it():
    W = torch.tensor([[0.0, 1], [0, 1]], dtype=torch.float64)
    p, L, z, U = ldu(W)
    assert z.tolist() == [0, 1] and torch.equal(U, torch.eye(2).double())
    block = reconstruct(p, L, z, U)
    assert torch.equal((W - block) + block, W) and torch.equal(
        (W - block).abs().sum(1).sort().values, torch.tensor([0.0, 1]).double()
    )


@some
@given(st.integers(2, 8), seeds)
def test_a_zero_column_costs_nothing_when_a_zero_row_can_be_given_up(n, seed):
    W = draw(seed, n, n)
    W[:, 0] = 0
    W[-1] = 0
    p, L, z, U = ldu(W)
    assert p[0] == n - 1 and torch.allclose(reconstruct(p, L, z, U), W, atol=1e-10)
    library = permutation(torch.linalg.lu_factor_ex(W).pivots, n)
    assert library[0] == 0 and W[0].abs().max() > 0, (
        "the library would have given up a row of numbers"
    )


@pytest.mark.parametrize("ratio, zero", [(0.5, True), (1.0, True), (2.0, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pivot_counts_as_zero_up_to_machine_epsilon_times_its_row_maximum(ratio, zero, dtype):
    W = torch.tensor([[ratio * torch.finfo(dtype).eps, -1.0], [0, 3]], dtype=dtype)
    p, L, z, U = ldu(W)
    assert p.tolist() == [0, 1] and (z[0] == 0).item() is zero
    assert (U[0, 1] == 0).item() is zero and U.abs().max() < 1 / torch.finfo(dtype).eps
    assert (
        torch.allclose(reconstruct(p, L, z, U)[1], W[1])
        and torch.allclose(reconstruct(p, L, z, U), W) is not zero
    )


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(3, 4),
        torch.zeros(4, 3),
        torch.zeros(1, 1),
        torch.eye(4)[:, :2],
        torch.full((5, 5), 2.0),
    ],
)
def test_zero_and_constant_matrices_are_exact(W):
    assert torch.equal(reconstruct(*ldu(W)), W)
    check(W, ldu(W))


@some
@given(sizes, sizes, seeds)
def test_a_batch_is_its_matrices_one_by_one(n, m, seed):
    W = draw(seed, 4, n, m)
    W[1, :, 0], W[2] = 0, 0
    for batched, alone in zip(
        ldu(W.reshape(2, 2, n, m)), zip(*map(ldu, W), strict=True), strict=True
    ):
        assert torch.allclose(
            batched.flatten(0, 1).double(), torch.stack(alone).double(), atol=1e-12
        )


@some
@given(sizes, sizes, seeds)
def test_the_loop_and_the_library_agree(n, m, seed):
    W = draw(seed, n, m)
    p, packed = eliminate(W)
    q, L, z, _ = ldu(W)
    assert torch.equal(p, q) and torch.allclose(
        packed[:, : min(n, m)].tril(-1) + torch.eye(n, min(n, m)).double(), L, atol=1e-8
    )
    assert torch.allclose(packed.diagonal(), z, atol=1e-8)


@some
@given(st.integers(1, 12), seeds, st.integers(1, 3))
def test_exchanges_replayed_are_the_library_s_permutation(n, seed, batch):
    W = draw(seed, batch, n, n)
    _, pivots = torch.linalg.lu_factor(W)
    P = torch.linalg.lu(W).P
    assert torch.equal(P.mT @ W, rows(W, permutation(pivots, n)))
    assert torch.equal(unpermute(permutation(pivots, n), rows(W, permutation(pivots, n))), W)


@some
@given(sizes, sizes, st.integers(1, 12), seeds)
def test_the_leading_block_fits_the_first_columns_and_r_rows_and_is_no_better_than_the_svd(
    n, m, r, seed
):
    r, W = min(r, n, m), draw(seed, n, m)
    PL, z, U = leading(W, r)
    R, atol = W - (PL * z) @ U, 1e-11 * float(U.abs().max())
    assert R[:, :r].abs().max() <= atol and int((R.abs().amax(1) <= atol).sum()) >= r
    assert R.norm() >= torch.linalg.svdvals(W)[r:].norm() - atol


@some
@given(sizes, sizes, st.integers(1, 12), seeds, st.floats(0.1, 3))
def test_z_gram_is_the_gram_matrix_of_the_jacobian(n, m, r, seed, sigma):
    r, W = min(r, n, m), draw(seed, n, m)
    PL, z, U = leading(W, r)
    J = torch.autograd.functional.jacobian(lambda z: (sigma * (PL * z) @ U).flatten(), z)
    K = z_gram(PL, U, sigma)
    assert torch.allclose(J.T @ J, K) and torch.allclose(z_gram(ldu(W)[1][:, :r], U, sigma), K)
    assert torch.linalg.eigvalsh(K)[-1] >= sigma**2 * (1 - 1e-9)


@pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (60, 60), (40, 90), (90, 40)])
def test_operations_counted_step_by_step_match_the_closed_form(n, m):
    counted = sum((n - j) + 2 * (n - j) * (m - j) for j in range(1, min(n, m) + 1))
    assert abs(counted - lu_flops(n, m)) <= 2 * n * m
    assert lu_flops(n, m) == lu_flops(m, n)


bad = [
    (torch.ones(2, 2).long(), BadType, "int64"),
    (torch.ones(2, 2, dtype=torch.complex64), BadType, "complex64"),
    ([[1.0]], BadType, "list"),
    (torch.ones(3), BadValue, r"\(3,\)"),
    (torch.tensor(1.0), BadValue, "shape"),
    (torch.zeros(0, 3), BadValue, r"\(0, 3\)"),
    (torch.tensor([[1.0, float("nan")]]), BadValue, "1 of its 2"),
    (torch.tensor([[float("inf")]]), BadValue, "finite"),
    (torch.tensor([[1.0, 1], [1, -1]]).double() * 1.7e308, BadValue, "overflow"),
]


@pytest.mark.parametrize("W, error, message", bad)
def test_bad_weights_are_refused_and_named(W, error, message):
    for call in (lambda: ldu(W), lambda: leading(W, 1)):
        with pytest.raises(error, match=message) as caught:
            call()
        assert isinstance(caught.value, LoraBookError)


@pytest.mark.parametrize(
    "r, error", [(0, BadValue), (4, BadValue), (1.5, BadType), (True, BadType)]
)
def test_bad_ranks_are_refused(r, error):
    with pytest.raises(error, match="r must be"):
        leading(draw(0, 3, 5), r)
    with pytest.raises((BadValue, BadType)):
        lu_flops(0, 3)


def unpivoted(W):
    S, L, U, z = (
        W.clone(),
        torch.eye(len(W)).double(),
        torch.eye(len(W)).double(),
        torch.zeros(len(W)).double(),
    )
    for j in range(len(W)):
        z[j], L[j:, j], U[j, j:] = S[j, j], S[j:, j] / S[j, j], S[j, j:] / S[j, j]
        S[j:, j:] = S[j:, j:] - z[j] * torch.outer(L[j:, j], U[j, j:])
    return torch.arange(len(W)), L, z, U


def dividing(W):
    P, L, R = torch.linalg.lu(W)
    return P.argmax(0), L, R.diagonal(), R / R.diagonal()[:, None]


def transposed(W):
    p, *rest = ldu(W)
    return p.argsort(), *rest


swapped = torch.tensor([[0.0, 3, 0], [0, 1, 5], [4, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "mutant, W, message",
    [
        (unpivoted, torch.tensor([[1e-3, 1], [1, 1]], dtype=torch.float64), "multiplier"),
        (unpivoted, torch.tensor([[0.0, 1], [1, 1]], dtype=torch.float64), "finite"),
        (dividing, torch.tensor([[0.0, 1], [0, 1]], dtype=torch.float64), "finite"),
        (transposed, swapped, "reproduced"),
    ],
)
def test_mutants_are_caught(mutant, W, message):
    check(W, ldu(W))
    with pytest.raises(AssertionError, match=message):
        check(W, mutant(W))
