"""Theorem 1, the PAC-Bayes and Hoeffding forms, the counts of Table 1 and rank correlation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from lora_book.core.errors import LoraBookError, UnknownName
from lora_book.theory.generalization import (
    correction_sum,
    correction_term,
    hoeffding_bound,
    mi_bound,
    numbers_stored,
    offset_term,
    pac_bayes_bound,
    path_term,
    perturbation_bound,
    rank_correlation,
    samples_needed,
)

size = st.floats(0, 4)
METHODS = (
    "full",
    "lora",
    "lora_plus",
    "cola",
    "asymmetric",
    "rac",
    "cla",
    "c3la",
    "random_cla",
    "random_c3la",
)


@st.composite
def chains(draw, most=8):
    "w, d, lipschitz, sigma0 of equal length, and C."
    L = draw(st.integers(1, most))
    return *(draw(st.lists(size, min_size=L, max_size=L)) for _ in range(4)), draw(size)


def bounded_by(left, right, slack=1e-9):
    return left <= right * (1 + slack) + 1e-12


def printed_bound(w, d, slopes, offsets, C):
    "P2's main text, letter by letter: P without j, H with the two letters exchanged."
    L = len(w)
    paths = sum(
        math.prod((w if (i - 1) // 2 ** (L - 1) % 2 else d)[L - j] for j in range(1, L + 1))
        for i in range(1, 2**L)
    )
    return C * math.prod(slopes) * paths + sum(
        offset_term(i, d, w, slopes, offsets) for i in range(1, 2**L) if i & (i + 1)
    )


def scalar_displacement(w, d, slopes, offsets, C):
    new = old = C
    for wl, dl, slope, offset in zip(w, d, slopes, offsets):
        new, old = slope * (wl + dl) * new + offset, slope * wl * old + offset
    return new - old


@settings(max_examples=40, deadline=None)
@given(chains(12), st.floats(0, 3))
def test_recurrence_equals_the_corrected_sum(chain, slope):
    assert math.isclose(
        correction_term(*chain, slope), correction_sum(*chain, slope), rel_tol=1e-12, abs_tol=1e-300
    )


@settings(max_examples=40, deadline=None)
@given(chains())
def test_scalar_affine_networks_attain_the_bound(chain):
    true = scalar_displacement(*chain)
    assert math.isclose(
        true,
        perturbation_bound(*chain),
        rel_tol=1e-9,
        abs_tol=1e-9 * max(1, abs(true)) + 1e-6 * chain[-1],
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))
def test_random_networks_never_move_further(seed, depth, width, rank):
    gen = torch.Generator().manual_seed(seed)
    acts = [(torch.relu, 1.0), (torch.cos, 1.0), (torch.sigmoid, 0.25), (lambda z: 2 * z - 1, 2.0)]
    picks = [acts[i] for i in torch.randint(4, (depth,), generator=gen).tolist()]
    base = [torch.randn(width, width, generator=gen, dtype=torch.float64) for _ in range(depth)]
    draw = lambda n, m: torch.randn(n, m, generator=gen, dtype=torch.float64)
    update = [draw(width, rank) @ draw(rank, width) for _ in base]
    x = draw(width, 1)
    new = old = x
    for W, D, (act, _) in zip(base, update, picks):
        new, old = act((W + D) @ new), act(W @ old)
    norm = lambda M: torch.linalg.matrix_norm(M, 2)
    lists = (
        [norm(W) for W in base],
        [norm(D) for D in update],
        [a[1] for a in picks],
        [a[0](0 * x).norm() for a in picks],
    )
    bound, sharper = (
        perturbation_bound(*lists, x.norm(), total=t)
        for t in (None, [norm(W + D) for W, D in zip(base, update)])
    )
    assert bounded_by(float((new - old).norm()), sharper) and bounded_by(sharper, bound)
    assert bounded_by(bound, correction_term(*lists, x.norm(), 0.5)) and bounded_by(
        correction_term(*lists, x.norm(), 0.5), bound
    )


def test_mutant_printed_theorem_is_violated():
    gen = torch.Generator().manual_seed(1)
    draws = [
        [torch.rand(1 + t % 5, generator=gen).double().tolist() for _ in range(4)]
        for t in range(200)
    ]
    missed = sum(
        scalar_displacement(*lists, 1.0) > printed_bound(*lists, 1.0) + 1e-9 for lists in draws
    )
    assert missed > 20 and not any(
        scalar_displacement(*lists, 1.0) > perturbation_bound(*lists, 1.0) + 1e-9 for lists in draws
    )
    assert (
        printed_bound([1, 1], [0, 0], [1, 1], [1, 0], 0) == 1
        and perturbation_bound([1, 1], [0, 0], 1, [1, 0], 0) == 0
    )


@settings(max_examples=20, deadline=None)
@given(chains(7))
def test_words_sum_to_the_product_of_sums(chain):
    w, d = chain[:2]
    L = len(w)
    total = math.fsum(path_term(i, w, d) for i in range(1, 2**L + 1))
    assert math.isclose(
        total, math.prod(a + b for a, b in zip(w, d)), rel_tol=1e-12, abs_tol=1e-300
    )
    assert path_term(1, w, d) == math.prod(d[::-1]) and path_term(2**L, w, d) == math.prod(w[::-1])
    assert sum(1 for i in range(2, 2**L - 1) if i & (i + 1)) == max(0, 2**L - (L + 1))


@settings(max_examples=30, deadline=None)
@given(chains(), st.floats(0, 2), st.data())
def test_grows_with_every_norm_and_vanishes_without_an_update(chain, more, data):
    w, d, slopes, offsets, C = chain
    l = data.draw(st.integers(0, len(w) - 1))
    larger = [x + more * (i == l) for i, x in enumerate(d)]
    assert bounded_by(perturbation_bound(*chain), perturbation_bound(w, larger, slopes, offsets, C))
    assert correction_term(w, [0.0] * len(w), slopes, offsets, C, 1.0) == 0


def test_ten_thousand_layers_stay_exact_or_become_inf():
    L = 10_000
    flat = correction_term(
        torch.ones(L), torch.full((L,), 1e-4, dtype=torch.float64), [1.0] * L, [0.0] * L, 1.0, 0.5
    )
    assert math.isclose(flat, math.expm1(L * math.log1p(1e-4)), rel_tol=1e-9)
    bump = correction_term(
        [2.0] * 5000 + [0.5] * 5000, [0.0] * 5000 + [0.5] + [0.0] * 4999, 1.0, 0.0, 1.0, 0.5
    )
    assert math.isclose(bump, 1.0, rel_tol=1e-12)
    assert correction_term([2.0] * L, [0.0] * L, 1.0, 1.0, 1.0, 1.0) == 0.0
    assert correction_term([2.0] * L, [1.0] * L, 1.0, 0.0, 1.0, 1.0) == math.inf
    assert correction_term([2.0] * L, [1.0] * L, 1.0, 0.0, 1.0, 0.0) == 0.0


def test_small_updates_lose_no_digits():
    w, d = [1.1] * 12, [1e-13] * 12
    assert math.isclose(perturbation_bound(w, d, 1, 0, 1), 12 * 1e-13 * 1.1**11, rel_tol=1e-11)
    cancelled = math.prod(a + b for a, b in zip(w, d)) - math.prod(w)
    assert not math.isclose(cancelled, 12 * 1e-13 * 1.1**11, rel_tol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"w": [-1.0, 1.0]},
        {"d": [1.0]},
        {"d": [math.nan, 1.0]},
        {"w": []},
        {"lipschitz": [1.0]},
        {"sigma0": [math.inf, 0]},
        {"C": -1.0},
        {"C": math.inf},
        {"loss_lipschitz": -0.1},
        {"w": "ab"},
        {"w": 3.0},
        {"w": torch.ones(2, 2)},
        {"d": [True, 1.0]},
        {"C": "1"},
        {"w": None},
    ],
)
@pytest.mark.parametrize("function", [correction_term, correction_sum])
def test_bad_norms_raise(function, change):
    good = {
        "w": [1.0, 2.0],
        "d": [0.1, 0.2],
        "lipschitz": [1.0, 1.0],
        "sigma0": [0.0, 0.0],
        "C": 1.0,
        "loss_lipschitz": 1.0,
    }
    assert function(**good) > 0
    with pytest.raises(LoraBookError) as caught:
        function(**{**good, **change})
    assert isinstance(caught.value, (ValueError, TypeError))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**7), st.floats(1e-6, 0.49), st.floats(0, 9), st.floats(0, 5))
def test_hoeffding_beats_theorem_four_at_equal_confidence(samples, delta, loss_bound, correction):
    assert bounded_by(
        hoeffding_bound(samples, 2 * delta, loss_bound, correction),
        pac_bayes_bound(samples, delta, loss_bound, correction=correction),
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(1, 3), min_size=1, max_size=5),
    st.floats(0.01, 2),
    st.floats(0.01, 1),
    st.integers(1, 999),
)
def test_theorem_three_by_its_formula(a, q, epsilon, width):
    L, N, delta, C, C2 = len(a), 500, 0.1, 1.5, 2.0
    inner = (
        sum(math.prod(a[j] + q for j in range(L)) / (a[i] + q) for i in range(L)) ** 2 * L * q * q
    )
    inside = (
        36 / epsilon**2 * C**2 * width * math.log(4 * L * width * C2) * inner
        + 3 * math.log(N / delta)
        + 8
    )
    mine = pac_bayes_bound(
        N, delta, C2, epsilon=epsilon, base_norms=a, distances=q, C=C, width=width
    )
    assert math.isclose(mine, epsilon + C2 * math.sqrt(inside / N), rel_tol=1e-9)
    steeper = pac_bayes_bound(
        N, delta, C2, epsilon=epsilon, base_norms=a, distances=q, C=C, width=width, lipschitz=2.0
    )
    doubled = pac_bayes_bound(
        N,
        delta,
        C2,
        epsilon=epsilon,
        base_norms=[2 * x for x in a],
        distances=2 * q,
        C=C,
        width=width,
    )
    assert mine < steeper == doubled


def test_hoeffding_covers_and_a_third_of_it_does_not():
    gen = torch.Generator().manual_seed(3)
    gaps = (
        0.5 - torch.binomial(torch.full((20_000,), 100.0), torch.tensor(0.5), generator=gen) / 100
    )
    bound = hoeffding_bound(100, 0.05, 1.0)
    assert (gaps > bound).double().mean() <= 0.05 < (gaps > bound / 3).double().mean()


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 0.1, 1.0),
        (10, 0.0, 1.0),
        (10, 1.0, 1.0),
        (10, 0.1, -1.0),
        (10, math.nan, 1.0),
        (2.5, 0.1, 1.0),
    ],
)
@pytest.mark.parametrize("function", [hoeffding_bound, pac_bayes_bound])
def test_bad_samples_raise(function, arguments):
    with pytest.raises((ValueError, TypeError)):
        function(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"distances": 1.0},
        {"C": 0.5},
        {"distances": [1.0, 2.0]},
        {"epsilon": -1.0},
        {"width": 0},
        {"correction": math.inf},
        {"base_norms": [-1.0]},
    ],
)
def test_bad_pac_bayes_options_raise(options):
    with pytest.raises(LoraBookError):
        pac_bayes_bound(10, 0.1, 1.0, **options)


shape = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=40, deadline=None)
@given(st.lists(shape, min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_counts_follow_table_one(shapes, k, data):
    r = data.draw(st.integers(1, min(min(s) for s in shapes)))
    out, both, whole = (
        sum(n for n, _ in shapes),
        sum(n + m for n, m in shapes),
        sum(n * m for n, m in shapes),
    )
    count = {name: numbers_stored(name, shapes, r, k) for name in METHODS}
    assert count["full"] == whole and count["lora"] == count["lora_plus"] == r * both
    assert count["asymmetric"] == count["cla"] == count["random_cla"] == r * out
    assert (
        count["rac"]
        == count["c3la"]
        == count["random_c3la"]
        == sum(n * min(k * r, m) for n, m in shapes)
    )
    assert count["cola"] == sum(min(k * r * (n + m), n * m) for n, m in shapes)
    if all(k * r * (n + m) <= n * m for n, m in shapes):
        assert count["cola"] == k * count["lora"] and count["rac"] == k * count["asymmetric"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.lists(shape, min_size=1, max_size=3),
    st.integers(1, 5),
    st.floats(0.1, 64),
    st.floats(0, 3),
    st.integers(1, 10**8),
)
def test_information_term_by_its_formula(method, shapes, k, q, sigma, samples):
    p = numbers_stored(method, shapes, 1, k)
    assert math.isclose(
        mi_bound(method, shapes, 1, k, q, sigma, samples) ** 2,
        2 * sigma**2 * q * p * math.log(2) / samples,
        abs_tol=1e-12,
    )
    needed = samples_needed(method, shapes, 1, k, q, sigma, 0.3)
    assert mi_bound(method, shapes, 1, k, q, sigma, needed) <= 0.3 * (1 + 1e-12)
    assert needed == 1 or mi_bound(method, shapes, 1, k, q, sigma, needed - 1) > 0.3 * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.integers(0, 999)
)
def test_frozen_chains_are_counted_by_the_rank_of_their_map(n, m, r, k, seed):
    r = min(r, n, m)
    stacked = torch.randn(
        k * r, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert numbers_stored("rac", [(n, m)], r, k) == n * int(torch.linalg.matrix_rank(stacked))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5))
def test_information_bounds_the_expected_gap_of_random_algorithms(seed, samples, hypotheses):
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=gen, dtype=torch.float64)
    data = torch.tensor([[s >> i & 1 for i in range(samples)] for s in range(2**samples)])
    table = rand(hypotheses, 2)
    gaps = table.mean(1)[None] - table[:, data].mean(2).T
    joint = torch.softmax(30 * rand(1) * gaps + 5 * rand(len(data), hypotheses), 1) / len(data)
    information = float(
        (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))).log()).sum()
    )
    assert (
        abs(float((joint * gaps).sum()))
        <= math.sqrt(2 * 0.25 * max(information, 0) / samples) + 1e-9
    )


def test_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="c3la"):
        mi_bound("c3-la", [(8, 8)], 2, 1, 8, 0.5, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 9},
        {"r": 0},
        {"k": 0},
        {"q": 0},
        {"q": math.inf},
        {"sigma": -1},
        {"sigma": math.nan},
        {"n_samples": 0},
        {"n_samples": 1.5},
        {"shapes": []},
        {"shapes": [(8,)]},
        {"shapes": [(0, 8)]},
        {"shapes": [8]},
        {"shapes": 3},
        {"method": "bitfit"},
        {"method": None},
        {"r": 2.0},
        {"shapes": [(8.0, 8)]},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_information_arguments_raise(method, change):
    good = {
        "method": method,
        "shapes": [(8, 8), (9, 8)],
        "r": 2,
        "k": 3,
        "q": 8,
        "sigma": 0.5,
        "n_samples": 100,
    }
    assert mi_bound(**good) > 0
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        mi_bound(**{**good, **change})
    assert isinstance(caught.value, LoraBookError)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=2, max_size=12))
def test_rank_correlation_is_kendalls(pairs):
    bounds, gaps = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(bounds)) == 1 or len(set(gaps)) == 1:
        with pytest.raises(ValueError, match="equal"):
            rank_correlation(bounds, gaps)
    else:
        assert math.isclose(
            rank_correlation(bounds, torch.tensor(gaps)),
            kendalltau(bounds, gaps).statistic,
            abs_tol=1e-12,
        )


@pytest.mark.parametrize(
    "bounds, gaps",
    [
        ([1.0], [1.0]),
        ([1.0, 2.0], [1.0]),
        ([1.0, math.nan], [1.0, 2.0]),
        (["a", "b"], [1.0, 2.0]),
        ([1, 1], [1, 2]),
    ],
)
def test_bad_rank_correlation_raises(bounds, gaps):
    with pytest.raises(LoraBookError):
        rank_correlation(bounds, gaps)
