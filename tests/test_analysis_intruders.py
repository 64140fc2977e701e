"""Intruder dimensions: the definition by brute force, invariances, what thresholds can't do, whole
models, bad input.
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.analysis import intruders as it
from lora_book.analysis.spectra import weight_pairs
from lora_book.core.adapter import generator

CASES = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
EPS = st.floats(0.05, 1.0)


def pair(n, m, seed, size=0.5, *batch):
    gen = generator(seed, "intruders")
    W0, D = (torch.randn(*batch, n, m, generator=gen, dtype=torch.float64) for _ in "WD")
    return W0, W0 + size * D


def brute(W0, W1, eps):
    "Every pair of vectors by hand, with eigenvectors of W Wᵀ in place of singular vectors."

    def vectors(W):
        values, U = torch.linalg.eigh(W @ W.T)
        return [U[:, i] for i in values.argsort(descending=True)[: min(W.shape)]]

    base, tuned = vectors(W0), vectors(W1)
    return [
        j
        for j, u in enumerate(tuned)
        if all(abs(float(u @ b)) / float(u.norm() * b.norm()) < eps for b in base)
    ]


@given(CASES, EPS, st.floats(0.01, 3))
@settings(max_examples=60, deadline=None)
def test_intruders_are_what_the_definition_says(case, eps, size):
    W0, W1 = pair(*case, size)
    got = it.intruder_dims(W0, W1, eps)
    near = (it.largest_cosines(W0, W1) - eps).abs() < 1e-6
    wanted = brute(W0, W1, eps)
    assert [j for j in got.tolist() if not near[j]] == [j for j in wanted if not near[j]]
    assert got.dtype is torch.int64 and int(it.intruder_count(W0, W1, eps)) == len(got)


@given(CASES, EPS)
@settings(max_examples=30, deadline=None)
def test_nothing_intrudes_where_nothing_changed(case, eps):
    W0, _ = pair(*case)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert it.intruder_dims(W0.to(dtype), W0.to(dtype), eps).tolist() == []


@given(CASES, st.floats(1e-4, 1e4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_scores_ignore_scale_sign_and_a_common_rotation(case, scale, flip):
    W0, W1 = pair(*case)
    Q = torch.linalg.qr(
        torch.randn(case[0], case[0], generator=generator(case[2]), dtype=torch.float64)
    ).Q
    scores = it.largest_cosines(W0, W1)
    for a, b in ((scale * W0, scale * W1), (Q @ W0, Q @ W1), (-W0 if flip else W0, W1)):
        assert torch.allclose(it.largest_cosines(a, b), scores, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_no_intruders_below_one_over_root_n_for_a_wide_weight(n, extra, seed):
    W0, W1 = pair(n, n + extra, seed, 10.0)
    assert len(it.intruder_dims(W0, W1, it.least_cosine(n) * (1 - 1e-9))) == 0
    assert (it.largest_cosines(W0, W1) >= it.least_cosine(n) - 1e-9).all()
    assert (it.random_cosines(n, 20, generator(seed)) >= it.least_cosine(n) - 1e-12).all()


def test_a_tall_weight_can_score_zero():
    W0 = torch.eye(4, 2, dtype=torch.float64)
    W1 = W0.clone()
    W1[3, 0] = 1e6
    assert 0 in it.intruder_dims(W0, W1, 0.01).tolist()


def test_a_planted_direction_is_found_at_its_place():
    U = torch.linalg.qr(torch.randn(6, 6, generator=generator(0), dtype=torch.float64)).Q
    W0 = U @ torch.diag(torch.arange(6, 0, -1, dtype=torch.float64))
    u = (U[:, 4] + U[:, 5]) / 2**0.5
    W1 = W0 + 100 * torch.outer(u, torch.eye(6, dtype=torch.float64)[5])
    assert (
        it.intruder_dims(W0, W1, 0.75, k=1).tolist() == [0]
        and it.intruder_dims(W0, W1, 0.70, k=1).tolist() == []
    )


@given(CASES, st.lists(EPS, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_curve_rises_and_agrees_with_the_counts(case, levels):
    W0, W1 = pair(*case, 0.5, 3)
    levels = sorted(levels)
    curve = it.intruder_curve(it.largest_cosines(W0, W1), levels)
    assert (curve.diff(dim=-1) >= 0).all()
    assert torch.equal(curve, torch.stack([it.intruder_count(W0, W1, eps) for eps in levels], -1))


@pytest.mark.parametrize("portion", [1, 60, 10**6])
def test_counts_of_a_model_don_t_depend_on_how_it_is_cut(portion):
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    ).double()
    lb.adapt(model, "lora", "all-linear", r=1, seed=2)
    with torch.no_grad():
        for adapter in lb.adapters(model).values():
            adapter.B.normal_(generator=generator(1))
    pairs = weight_pairs(model)
    got = it.intruder_counts(pairs, [0.3, 0.9], portion=portion)
    assert list(got) == list(pairs)
    assert all(
        got[name].tolist() == [len(it.intruder_dims(*pairs[name], eps)) for eps in (0.3, 0.9)]
        for name in pairs
    )
    assert int(it.intruder_counts(pairs, 0.9, k=1)["0"]) <= 1
    assert all(
        torch.equal(counts, got[name])
        for name, counts in it.intruder_counts(model, [0.3, 0.9]).items()
    )
    with pytest.raises(lb.LoraBookError, match="isn't adapted"):
        it.intruder_counts(nn.Linear(3, 3), 0.5)


def test_counts_of_a_model_of_peft_are_those_of_its_merged_weights():
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6)).double()
    tuned = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=1, lora_alpha=9, target_modules=["0", "1"], init_lora_weights=False),
    )
    alone, merged = it.intruder_counts(tuned, 0.9), copy.deepcopy(tuned).merge_and_unload()
    assert alone == {
        str(i): len(it.intruder_dims(base[i].weight, merged[i].weight, 0.9)) for i in range(2)
    }


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda W: it.intruder_dims(W, W, 0), "eps"),
        (lambda W: it.intruder_dims(W, W, 1.5), "1.5"),
        (lambda W: it.intruder_dims(W, W, "a"), "'a'"),
        (lambda W: it.intruder_dims(W, W, math.nan), "nan"),
        (lambda W: it.intruder_dims(W, W[:2], 0.5), r"\(2, 4\)"),
        (lambda W: it.intruder_dims(W, W * math.nan, 0.5), "NaN"),
        (lambda W: it.intruder_dims(W, W, 0.5, k=4), "k must be"),
        (lambda W: it.intruder_dims(W[None], W[None], 0.5), "stack"),
        (lambda W: it.intruder_dims(W.long(), W.long(), 0.5), "int64"),
        (lambda W: it.least_cosine(0), "n must"),
        (lambda W: it.intruder_counts({"w": (W, W)}, 0.5, portion=0), "portion"),
        (lambda W: it.intruder_curve(torch.ones(3), [2]), "eps"),
        (lambda W: it.intruder_curve(torch.ones(3), ["a"]), "'a'"),
        (lambda W: it.intruder_counts({"w": (W, W)}, "a"), "'a'"),
        (lambda W: it.intruder_counts("w"), "str"),
        (lambda W: it.intruder_curve([0.1], [0.5]), "0.1"),
        (lambda W: it.intruder_counts({"w": W}, 0.5), "Tensor"),
        (lambda W: it.random_cosines(3, 2, None), "Generator"),
    ],
)
def test_bad_input_is_refused_and_named(call, words):
    with pytest.raises(lb.LoraBookError, match=words):
        call(torch.randn(3, 4, generator=generator(0)))


def test_a_count_on_the_wrong_side_is_told_apart():
    W0, _ = pair(5, 5, 1)
    Q = torch.linalg.qr(pair(5, 5, 2)[0]).Q
    assert (
        it.intruder_dims(W0.T, (Q @ W0).T, 0.9).tolist() == []
        and len(it.intruder_dims(W0, Q @ W0, 0.9)) > 0
    )


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuned", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_two_types_are_compared_in_the_wider(base, tuned):
    W0, W1 = pair(6, 5, 1)
    got = it.largest_cosines(W0.to(base), W1.to(tuned))
    want = it.largest_cosines(W0.to(base).double(), W1.to(tuned).double())
    assert torch.allclose(got.double(), want, atol=1e-5) and got.dtype is torch.promote_types(
        torch.promote_types(base, tuned), torch.float32
    )
    W0 = torch.nn.Parameter(W0.T.contiguous().T)
    assert not W0.is_contiguous() and torch.allclose(
        it.largest_cosines(W0, W1), it.largest_cosines(W0.detach().contiguous(), W1)
    )


def test_thresholds_may_be_numbers_arrays_or_tensors():
    W0, W1 = pair(6, 6, 2)
    want = it.intruder_counts({"w": (W0, W1)}, [0.5, 0.75])["w"]
    for eps in (np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]), (0.5, 0.75)):
        assert torch.equal(it.intruder_counts({"w": (W0, W1)}, eps)["w"], want)
    for eps in (0.5, np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(it.intruder_counts({"w": (W0, W1)}, eps)["w"], want[:1])
