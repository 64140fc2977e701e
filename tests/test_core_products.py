"""The fused products against their definitions: values, gradients of both orders, bytes kept and
operations, exactly.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_book as lb
from lora_book.core.products import (
    LowRankProduct,
    column_linear,
    count_flops,
    low_rank_linear,
    product,
    saved_bytes,
)

WIDE = {torch.float64: 1e-12, torch.float32: 1e-5}


@st.composite
def layers(draw):
    "Shapes of x, W, and one or two blocks of rows with their ranks."
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), m)
    cut = draw(st.integers(0, n))
    rows = draw(st.sampled_from([[None], [slice(0, cut), slice(cut, n)], [slice(cut, n)]]))
    rows = [r for r in rows if r is None or r.start < r.stop] or [None]
    ranks = [draw(st.integers(1, m)) for _ in rows]
    return (
        n,
        m,
        shape,
        rows,
        ranks,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 10**6)),
    )


def numbers(case, dtype):
    n, m, shape, rows, ranks, with_bias, strided, seed = case
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    x = draw(*shape)
    if strided and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    heights = [n if r is None else r.stop - r.start for r in rows]
    A, B = (
        [draw(r, m).requires_grad_() for r in ranks],
        [draw(k, r).requires_grad_() for k, r in zip(heights, ranks, strict=True)],
    )
    idx = [torch.randperm(m, generator=g)[:r] for r in ranks]
    return (
        x.requires_grad_(),
        draw(n, m),
        draw(n) if with_bias else None,
        A,
        B,
        idx,
        [0.5 + i for i in range(len(rows))],
    )


def changed(W, rows, changes):
    for r, change in zip(rows, changes, strict=True):
        part = torch.zeros_like(W)
        part[r if r is not None else slice(None)] = change
        W = W + part
    return W


def assert_agree(ours, theirs, leaves, tolerance):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    G = (
        torch.arange(ours.numel()).sin().view(ours.shape).to(ours.dtype)
    )  # the same for both: y.sin() would pass an error in a large y on to G
    pairs = [
        (ours, theirs),
        *zip(*(torch.autograd.grad(y, leaves, G) for y in (ours, theirs)), strict=True),
    ]
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().sum() <= tolerance * (1 + b.abs().sum())


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@given(case=layers())
@settings(max_examples=40, deadline=None)
def test_low_rank_linear_is_its_definition(dtype, case):
    x, W, bias, A, B, _, scales = numbers(case, dtype)
    rows = case[3]
    ours = low_rank_linear(x, W, bias, list(zip(rows, A, B, scales, strict=True)))
    theirs = F.linear(
        x, changed(W, rows, [s * b @ a for a, b, s in zip(A, B, scales, strict=True)]), bias
    )
    assert_agree(ours, theirs, [x, *A, *B], WIDE[dtype])


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@given(case=layers())
@settings(max_examples=40, deadline=None)
def test_column_linear_is_its_definition(dtype, case):
    x, W, bias, _, B, idx, scales = numbers(case, dtype)
    rows, m = case[3], case[1]
    ours = column_linear(x, W, bias, list(zip(rows, idx, B, scales, strict=True)))
    theirs = F.linear(
        x,
        changed(
            W,
            rows,
            [s * b @ F.one_hot(i, m).to(dtype) for i, b, s in zip(idx, B, scales, strict=True)],
        ),
        bias,
    )
    assert_agree(ours, theirs, [x, *B], WIDE[dtype])


@given(case=layers())
@settings(max_examples=6, deadline=None)
def test_second_derivatives(case):
    n, m, _, rows, ranks, with_bias, strided, seed = case
    x, W, bias, A, B, idx, scales = numbers(
        (n, m, (2, m), rows, ranks, with_bias, strided, seed), torch.float64
    )
    k = len(rows)

    def low(x, *factors):
        return low_rank_linear(
            x, W, bias, list(zip(rows, factors[:k], factors[k:], scales, strict=True))
        )

    def columns(x, *Bs):
        return column_linear(x, W, bias, list(zip(rows, idx, Bs, scales, strict=True)))

    assert torch.autograd.gradcheck(low, (x, *A, *B)) and torch.autograd.gradgradcheck(
        low, (x, *A, *B)
    )
    assert torch.autograd.gradcheck(columns, (x, *B)) and torch.autograd.gradgradcheck(
        columns, (x, *B)
    )


@given(seed=st.integers(0, 99), part=st.sampled_from(["x", "A", "B", "W", "bias"]))
@settings(max_examples=20, deadline=None)
def test_any_one_input_may_be_the_only_one_that_learns(seed, part):
    x, W, bias, A, B, idx, scales = numbers(
        (5, 4, (3, 4), [None], [2], True, False, seed), torch.float64
    )
    named = {"x": x, "A": A[0], "B": B[0], "W": W, "bias": bias}
    for name, t in named.items():
        t.requires_grad_(name == part)
    pairs = [
        (
            low_rank_linear(x, W, bias, [(None, A[0], B[0], 0.5)]),
            F.linear(x, W + 0.5 * B[0] @ A[0], bias),
        )
    ]
    if part != "A":
        pairs.append(
            (
                column_linear(x, W, bias, [(None, idx[0], B[0], 0.5)]),
                F.linear(x, W + 0.5 * B[0] @ F.one_hot(idx[0], 4).double(), bias),
            )
        )
    for ours, theirs in pairs:
        assert_agree(ours, theirs, [named[part]], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_take_wide_factors(dtype):
    x, W, bias, A, B, idx, _ = numbers((6, 5, (7, 5), [None], [2], True, False, 0), torch.float32)
    exact = F.linear(x, W + B[0] @ A[0], bias)
    out = low_rank_linear(x.to(dtype), W.to(dtype), bias.to(dtype), [(None, A[0], B[0], 1.0)])
    out.float().sum().backward()
    assert (
        out.dtype is dtype
        and (out.float() - exact).abs().max() < 0.1
        and A[0].grad.dtype is torch.float32
    )


def test_a_small_column_change_isn_t_lost_in_16_bits():
    W, B, idx = torch.ones(4, 4, dtype=torch.bfloat16), torch.full((4, 1), 1e-3), torch.tensor([2])
    x = torch.zeros(64, 4, dtype=torch.bfloat16)
    x[:, 2] = 1
    x[:, 0] = -1
    out = column_linear(x, W, None, [(None, idx, B, 1.0)])
    assert (out.float() - 1e-3).abs().max() < 1e-5


@given(T=st.integers(1, 40), n=st.integers(1, 12), m=st.integers(1, 12), data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_kept_and_what_is_computed(T, n, m, data):
    r = data.draw(st.integers(1, min(n, m)))
    x, W, _, (A,), (B,), (idx,), _ = numbers(
        (n, m, (T, m), [None], [r], False, False, 0), torch.float32
    )

    def full():
        return low_rank_linear(x, W, None, [(None, A, B, 1.0)])

    def columns():
        return column_linear(x, W, None, [(None, idx, B, 1.0)])

    assert saved_bytes(full, exclude=(W, A, B)) == 4 * T * (m + r)
    assert (
        saved_bytes(
            lambda: low_rank_linear(x, W, None, [(None, A.detach(), B, 1.0)]), exclude=(W, A, B)
        )
        == 4 * T * r
    )
    assert saved_bytes(columns, exclude=(W, B, idx)) == 4 * T * r
    added = m * n if T >= 2 * m else T * n
    assert count_flops(full) == 2 * (T * n * m + r * T * m + r * added)
    assert count_flops(lambda: full().sum().backward()) == 2 * (
        2 * T * n * m + r * T * (3 * m + 2 * n) + r * added
    )


@given(T=st.integers(1, 40), n=st.integers(1, 12), m=st.integers(1, 12), data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_a_frozen_factor_spares(T, n, m, data):
    r = data.draw(st.integers(1, min(n, m)))
    x, W, _, (A,), (B,), _, _ = numbers((n, m, (T, m), [None], [r], False, False, 0), torch.float32)
    copy = T >= m
    frozen_a = count_flops(
        lambda: low_rank_linear(x, W, None, [(None, A.detach(), B, 1.0)]).sum().backward()
    )
    assert frozen_a == 4 * T * n * m + 2 * r * (
        T * m + T * n + (2 * m * n if copy else T * (2 * n + m))
    )
    frozen_b = count_flops(
        lambda: low_rank_linear(x, W, None, [(None, A, B.detach(), 1.0)]).sum().backward()
    )
    changed_out = r * (m * n if T >= 2 * m else T * (m + n))
    assert frozen_b == 4 * T * n * m + 2 * r * T * (n + 2 * m) + 2 * changed_out
    trained = (
        low_rank_linear(x, W, None, [(None, A, B, 1.0)]).detach(),
        low_rank_linear(x, W, None, [(None, A.detach(), B, 1.0)]).detach(),
    )
    with torch.no_grad():
        assert count_flops(lambda: low_rank_linear(x, W, None, [(None, A, B, 1.0)])) == 2 * (
            T * n * m + changed_out
        )
        assert count_flops(
            lambda: low_rank_linear(x, W, None, [(None, A.detach(), B, 1.0)])
        ) == 2 * (T * n * m + r * (m * n if copy else T * (m + n)))
        assert torch.equal(low_rank_linear(x, W, None, [(None, A, B, 1.0)]), trained[0])
        assert torch.equal(low_rank_linear(x, W, None, [(None, A.detach(), B, 1.0)]), trained[1])


def test_no_gradient_keeps_nothing():
    x, W, _, (A,), (B,), (idx,), _ = numbers(
        (6, 5, (7, 5), [None], [2], False, False, 0), torch.float32
    )
    with torch.no_grad():
        assert saved_bytes(lambda: low_rank_linear(x, W, None, [(None, A, B, 1.0)])) == 0
        assert not column_linear(x, W, None, [(None, idx, B, 1.0)]).requires_grad


def test_a_mutant_with_its_scale_forgotten_is_caught():
    x, W, bias, A, B, _, _ = numbers((6, 5, (7, 5), [None], [2], True, False, 0), torch.float64)
    with pytest.raises(AssertionError):
        assert_agree(
            low_rank_linear(x, W, bias, [(None, A[0], B[0], 1.0)]),
            F.linear(x, W + 0.5 * B[0] @ A[0], bias),
            [x, A[0], B[0]],
            1e-12,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(
    T=st.integers(0, 6),
    n=st.integers(1, 6),
    r=st.integers(0, 4),
    scale=st.floats(-3, 3, width=16, allow_subnormal=False),
)
@settings(max_examples=30, deadline=None)
def test_a_scaled_product_reads_no_new_memory(dtype, T, n, r, scale):
    g = torch.Generator().manual_seed(T + 7 * n + 49 * r)
    U, M = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((T, r), (r, n))
    )
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert T == 0 or torch.empty(T, n, dtype=dtype).isnan().all()
        found = product(U, M, scale)
    finally:
        torch.use_deterministic_algorithms(False)
    size = (U.double().abs() @ M.double().abs()).max().item() if T else 0.0
    assert found.shape == (T, n) and found.dtype == dtype
    assert (
        T == 0
        or (found.double() - scale * (U.double() @ M.double())).abs().max()
        <= 8 * torch.finfo(dtype).eps * abs(scale) * size
    )


@given(st.lists(st.one_of(st.none(), st.integers(), st.text()), max_size=6))
def test_arguments_are_bound_as_they_were_given(inputs):
    bound = inspect.signature(LowRankProduct.forward).bind(*inputs)
    bound.apply_defaults()
    assert bound.args == tuple(inputs) and bound.kwargs == {}


@pytest.mark.parametrize("merged", [False, True])
def test_a_site_looks_its_weight_up_where_it_lies_and_only_when_asked(merged):
    fused = torch.nn.Linear(4, 9)
    W, b = fused.weight.detach().clone(), fused.bias.detach().clone()
    model = lb.adapt(torch.nn.ModuleDict({"qkv": fused}), "lora", ["qkv[q,v]"], r=2)
    for adapter in lb.adapters(model).values():
        torch.nn.init.ones_(adapter.B)
    if merged:
        lb.merge(model)
    q, v = model["qkv"].blocks()
    assert not {"W0", "b0"} & vars(q).keys()
    for block, rows in ((q, slice(0, 3)), (v, slice(6, 9))):
        assert (
            block.rows == rows and torch.equal(block.W0, W[rows]) and torch.equal(block.b0, b[rows])
        )
        assert block.W0.data_ptr() == model["qkv"].base_weight()[rows].data_ptr()
