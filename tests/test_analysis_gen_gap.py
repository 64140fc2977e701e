"""Generalisation gap: estimates against closed forms, coverage, orders by brute force, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.analysis import gen_gap as gg
from lora_book.core.adapter import generator
from lora_book.lab.data import Split
from lora_book.theory.generalization import rank_correlation

NUMBERS = st.lists(st.integers(-50, 50), min_size=2, max_size=9)


def drawn(size, seed, mean=1.0):
    return mean * torch.empty(size, dtype=torch.float64).exponential_(
        generator=generator(seed, "losses", size)
    )


@given(st.integers(2, 200), st.integers(2, 200), st.integers(0, 10**6), st.floats(0.5, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_gap_is_a_difference_of_means_inside_its_interval(train, test, seed, level):
    a, b = drawn(train, seed), drawn(test, seed + 1)
    got = gg.gen_gap(a, b, level)
    error = math.sqrt(float(a.var()) / train + float(b.var()) / test)
    assert (
        math.isclose(got.mean, float(b.mean() - a.mean()), abs_tol=1e-12)
        and got.low <= got.mean <= got.high
    )
    assert math.isclose(
        got.high - got.low,
        2 * math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64)) * error,
        rel_tol=1e-6,
    )
    other = gg.gen_gap(b, a, level)
    assert math.isclose(other.low, -got.high, abs_tol=1e-12) and math.isclose(
        other.high, -got.low, abs_tol=1e-12
    )


@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_intervals_follow_shift_and_scale(seed, shift, scale):
    x = drawn(20, seed)
    for kind in ("student", "bootstrap"):
        one, two = (
            gg.mean_interval(x, kind=kind, draws=50),
            gg.mean_interval(scale * x + shift, kind=kind, draws=50),
        )
        for a, b in ((one.mean, two.mean), (one.low, two.low), (one.high, two.high)):
            assert math.isclose(scale * a + shift, b, abs_tol=1e-8)


def test_bootstrap_and_normal_intervals_agree_for_many_examples_and_the_seed_decides():
    a, b = drawn(2000, 0), drawn(2000, 1)
    normal, boot = gg.gen_gap(a, b), gg.gen_gap(a, b, kind="bootstrap", draws=1000)
    assert abs(normal.low - boot.low) < 0.02 and abs(normal.high - boot.high) < 0.02
    assert gg.gen_gap(a, b, kind="bootstrap", draws=50, seed=3) == gg.gen_gap(
        a, b, kind="bootstrap", draws=50, seed=3
    )
    assert gg.gen_gap(a, b, kind="bootstrap", draws=50, seed=3) != gg.gen_gap(
        a, b, kind="bootstrap", draws=50, seed=4
    )


def test_a_planted_gap_is_seen_and_a_gap_of_zero_seldom():
    assert (
        gg.gen_gap(drawn(200, 0), drawn(200, 1, 2.0)).verdict == "larger"
        and gg.gen_gap(drawn(200, 0, 2.0), drawn(200, 1)).verdict == "smaller"
    )
    alarms = sum(
        gg.gen_gap(drawn(100, 2 * i), drawn(120, 2 * i + 1)).verdict != "no difference"
        for i in range(200)
    )
    assert 1 <= alarms <= 24


def test_students_interval_of_three_runs_by_hand():
    got = gg.mean_interval([1.0, 2.0, 3.0])
    assert math.isclose(got.high - 2, 4.302652729911275 / 3**0.5, rel_tol=1e-9) and got.count == 3
    assert (
        gg.compare([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]).verdict == "larger"
        and gg.compare([1, 2, 3], [3, 1, 2]).verdict == "no difference"
    )
    assert got.as_dict() == {
        "mean": 2.0,
        "low": got.low,
        "high": got.high,
        "level": 0.95,
        "count": 3,
    }


@given(st.data(), NUMBERS)
@settings(max_examples=40, deadline=None)
def test_the_order_is_counted_pair_by_pair(data, a):
    b = data.draw(st.lists(st.integers(-50, 50), min_size=len(a), max_size=len(a)))
    if len(set(a)) < 2 or len(set(b)) < 2:
        with pytest.raises(lb.LoraBookError):
            gg.rank_agreement(a, b)
        return
    sign = lambda x: (x > 0) - (x < 0)  # noqa: E731
    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    brute = sum(p * q for p, q in pairs) / math.sqrt(
        sum(p * p for p, _ in pairs) * sum(q * q for _, q in pairs)
    )
    got = gg.rank_agreement(a, b)
    assert (
        math.isclose(got.tau, brute, abs_tol=1e-12)
        and got.count == len(pairs)
        and 0 <= got.p_value <= 1
    )
    assert math.isclose(got.tau, rank_correlation(a, b), abs_tol=1e-12)
    assert math.isclose(gg.rank_agreement(a, [-x for x in b]).tau, -got.tau, abs_tol=1e-12)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 3)

    def forward(self, pixel_values):
        return self.map(pixel_values)


def nine():
    return Split(
        {"pixel_values": torch.randn(9, 4, generator=generator(0)), "labels": torch.arange(9) % 3}
    )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_example_losses_are_each_rows_own_in_order(batch_size):
    model = Scores().eval()
    x, y = torch.randn(9, 4, generator=generator(0)), torch.arange(9) % 3
    got = gg.example_losses(model, Split({"pixel_values": x, "labels": y}), batch_size)
    want = [-model(x[i : i + 1]).log_softmax(-1)[0, y[i]].item() for i in range(9)]
    assert (
        torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-6)
        and got.dtype is torch.float64
    )
    assert torch.equal(
        gg.row_losses(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0])),
        torch.tensor([1.0, 4.0]),
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gg.gen_gap([1.0], [1.0, 2.0]), "train"),
        (lambda: gg.gen_gap([1.0, 2.0], [1.0, math.nan]), "1 numbers that are NaN"),
        (lambda: gg.gen_gap([1.0, 2.0], "ab"), "'ab'"),
        (lambda: gg.gen_gap([1.0, 2.0], [1.0, 2.0], 1.0), "level"),
        (lambda: gg.gen_gap([1.0, 2.0], [1.0, 2.0], kind="exact"), "exact"),
        (lambda: gg.mean_interval([1.0, 2.0], draws=0), "draws"),
        (lambda: gg.compare([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3"),
        (lambda: gg.rank_agreement([1, 2], [1, 2, 3]), "2 and 3"),
        (lambda: gg.rank_agreement([1, 1], [1, 2]), "order"),
        (lambda: gg.gen_gap([None, 1.0], [1.0, 2.0]), "None"),
        (lambda: gg.gen_gap(3, [1.0, 2.0]), "3"),
        (lambda: gg.rank_interval([[1, 2]], [[1, 2]]), "2 or more runs"),
        (lambda: gg.rank_interval([[1, 2], [1, 2, 3]], [[1, 2], [1, 2]]), "one length"),
        (lambda: gg.rank_interval([[1, 2]] * 2, [[1, 2]] * 3), "2 and 3"),
        (lambda: gg.rank_interval(3, [[1, 2]] * 3), "3"),
        (lambda: gg.rank_interval([[1, 2]] * 2, [[1, 1]] * 2), "order"),
        (lambda: gg.rank_interval([[1, 2]] * 2, [[1, math.nan]] * 2), "NaN"),
        (lambda: gg.example_losses(Scores().eval(), nine(), loss=lambda s, y: s.sum()), "9 rows"),
        (lambda: gg.example_losses(Scores().eval(), "data"), "str"),
        (lambda: gg.gen_gap(torch.ones(2, 2), [1.0, 2.0]), r"\(2, 2\)"),
        (
            lambda: gg.example_losses(
                Scores(), Split({"pixel_values": torch.ones(1, 4), "labels": torch.zeros(1).long()})
            ),
            "training mode",
        ),
        (
            lambda: gg.example_losses(
                Scores().eval(),
                Split({"pixel_values": torch.ones(0, 4), "labels": torch.zeros(0).long()}),
            ),
            "without rows",
        ),
    ],
)
def test_bad_input_is_refused_and_named(call, words):
    with pytest.raises(lb.LoraBookError, match=words):
        call()


def test_an_interval_that_forgets_the_training_set_raises_false_alarms():
    def mutant(train, test):
        return gg.mean_interval(test - train.mean()).verdict

    alarms = sum(
        mutant(drawn(20, 2 * i), drawn(400, 2 * i + 1)) != "no difference" for i in range(100)
    )
    assert alarms > 25


class Fixed(nn.Module):
    def forward(self, pixel_values):
        return pixel_values[:, :3]


def test_a_model_without_parameters_has_losses_and_arrays_are_numbers_too():
    assert gg.example_losses(Fixed().eval(), nine()).shape == (9,)
    a, b = drawn(9, 0), drawn(7, 1)
    assert (
        gg.gen_gap(a.numpy(), b.numpy()) == gg.gen_gap(a, b)
        and gg.rank_agreement(np.array([1, 2, 3]), [1, 3, 2]).tau
        == gg.rank_agreement([1, 2, 3], [1, 3, 2]).tau
    )


@given(st.integers(2, 3), st.integers(3, 6), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_the_interval_of_an_order_is_that_of_all_resampled_runs(runs, k, seed):
    a, b = (
        torch.randn(runs, k, generator=generator(seed, which), dtype=torch.float64)
        for which in "ab"
    )
    got = gg.rank_interval(a, b, 0.8)
    brute = [
        rank_correlation(a[list(at)].mean(0), b[list(at)].mean(0))
        for at in itertools.product(range(runs), repeat=runs)
    ]
    assert (
        math.isclose(got.mean, rank_correlation(a.mean(0), b.mean(0)), abs_tol=1e-12)
        and got.count == runs
    )
    assert np.allclose([got.low, got.high], np.quantile(brute, [0.1, 0.9]))
    flipped = gg.rank_interval(-a, b, 0.8)
    assert (
        np.allclose([flipped.low, flipped.high], [-got.high, -got.low])
        and gg.rank_interval(a.numpy(), b.tolist(), 0.8) == got
    )


def test_many_runs_are_sampled_from_the_seed_and_runs_that_agree_have_no_spread():
    a, b = (torch.randn(9, 6, generator=generator(which), dtype=torch.float64) for which in "ab")
    one, same, other = (gg.rank_interval(a, b, draws=40, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    steady = gg.rank_interval(
        torch.arange(5.0).expand(3, -1), torch.arange(5.0).square().expand(3, -1)
    )
    assert all(math.isclose(value, 1) for value in (steady.low, steady.mean, steady.high))
    assert gg.resamples(3, 27, 0).shape == (27, 3) and gg.resamples(3, 26, 0).shape == (26, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_type_have_losses(dtype):
    torch.manual_seed(0)
    model = Scores().eval()
    want = gg.example_losses(model, nine())
    got = gg.example_losses(model.to(dtype), nine())
    assert torch.allclose(got, want, atol=0.05) and got.dtype is torch.float64
