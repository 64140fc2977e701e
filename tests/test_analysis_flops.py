"""Operations: closed forms against counting for every method of the registry that has one, steps,
epochs, memory.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.analysis import flops as fl
from lora_book.core import method as forms
from lora_book.core.adapter import generator
from lora_book.core.products import count_flops
from lora_book.registry import method as method_of

FORMS = {
    **dict.fromkeys(
        ("lora", "rslora", "lora_plus", "cola", "pissa", "adalora", "sam", "mgpo", "ggpo"),
        forms.low_rank_flops,
    ),
    **dict.fromkeys(("asymmetric", "rac", "vera"), forms.frozen_factor_flops),
    "full": forms.dense_flops,
    "dora": forms.row_scaled_flops,
    **dict.fromkeys(("cla", "random_cla", "c3la", "random_c3la", "paca"), forms.column_flops),
    "loldu": forms.two_sided_flops,
    **dict.fromkeys(("bitfit", "linear_probe"), forms.no_flops),
}
SIZES = st.tuples(st.integers(1, 40), st.integers(2, 12), st.integers(2, 12), st.integers(1, 2))


def layer(method, n, m, r, **options):
    model = nn.Sequential(nn.Linear(m, n)).requires_grad_(False)
    return model if method is None else lb.adapt(model, method, ["0"], r=r, **options)


def counted(model, T, m):
    "The second step's operations; a first one may form what the later ones rest on."
    x = torch.ones(T, m, requires_grad=True)
    model(x).sum().backward()
    return count_flops(lambda: model(x).sum().backward())


@pytest.mark.parametrize("method", lb.methods())
def test_counting_gives_the_closed_form(method):
    @settings(max_examples=6, deadline=None)
    @given(SIZES)
    def run(sizes):
        T, n, m, r = sizes
        assume(method != "loldu" or r < min(n, m))
        assert counted(layer(None, n, m, r), T, m) == forms.floor_flops(T, n, m)
        assert counted(layer(method, n, m, r), T, m) - forms.floor_flops(T, n, m) == FORMS[method](
            T, n, m, r
        )
        own = method_of(method).flops
        assert own is None or own(T, n, m, r) == FORMS[method](T, n, m, r)

    run()


@given(SIZES)
@settings(max_examples=10, deadline=None)
def test_loldu_stays_below_its_dense_form(sizes):
    T, n, m, r = sizes
    assert (
        0
        < counted(layer("loldu", n, m, r), T, m) - forms.floor_flops(T, n, m)
        <= forms.two_sided_flops(T, n, m, r)
    )


def test_a_later_link_costs_what_the_first_did():
    for method in ("cola", "rac", "c3la"):
        model = layer(method, 12, 12, 2)
        first = counted(model, 16, 12)
        lb.advance(model)
        lb.advance(model)
        assert counted(model, 16, 12) == first


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_forms_are_in_their_order_and_linear_in_tokens(sizes):
    T, n, m, r = sizes
    assert (
        forms.column_flops(max(T, m), n, m, r)
        < forms.frozen_factor_flops(max(T, m), n, m, r)
        < forms.low_rank_flops(max(T, m), n, m, r)
    )
    assert forms.low_rank_flops(2 * m + T, n, m, r) <= 6 * (2 * m + T) * r * (m + n)
    for form in (forms.dense_flops, forms.two_sided_flops):
        assert form(3 * T, n, m, r) == 3 * form(T, n, m, r)


def test_a_step_is_forward_and_backward_and_leaves_gradients_alone():
    model = layer("lora", 6, 8, 2)
    x = torch.randn(5, 8, generator=generator(0))
    model(x).sum().backward()
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    got = fl.step_flops(model, lambda m: m(x).sum())
    assert got["total"] == got["forward"] + got["backward"] and got[
        "forward"
    ] == 2 * 5 * 6 * 8 + 2 * 5 * 2 * (6 + 8)
    assert all(
        p.grad is None if g is None else torch.equal(p.grad, g)
        for p, g in zip(model.parameters(), kept, strict=True)
    )


@given(st.integers(1, 64), st.integers(1, 10**6))
@settings(max_examples=20, deadline=None)
def test_an_epoch_doesnt_depend_on_how_it_is_cut(batch, examples):
    assert math.isclose(fl.epoch_flops(100 * batch, batch, examples), 100 * examples, rel_tol=1e-12)


def test_memory_is_counted_in_bytes():
    model = layer("asymmetric", 6, 8, 2)
    x = torch.randn(5, 8, generator=generator(0))
    got = fl.memory_account(model, lambda m: m(x).sum())
    assert (
        got["weights"] == 4 * (48 + 6 + 16 + 12)
        and got["trained"] == got["gradients"] == 4 * 12
        and got["moments"] == 8 * 12
    )
    assert got["saved"] == 4 * 5 * 2 and got["base copies"] == 0
    full = lb.adapt(nn.Sequential(nn.Linear(8, 6)), "linear_probe", head="0")
    assert fl.memory_account(full, lambda m: m(x).sum(), moments=1)["base copies"] == 4 * 54


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: forms.low_rank_flops(1, 4, 4, 5), "r must"),
        (lambda: forms.floor_flops(0, 1, 1), "T must"),
        (lambda: forms.column_flops(1, 2, 2.0, 1), "m must"),
        (lambda: fl.epoch_flops(0, 1, 1), "flops"),
        (
            lambda: fl.memory_account(
                layer("lora", 4, 4, 1), lambda m: m(torch.ones(1, 4)), moments=-1
            ),
            "moments",
        ),
        (
            lambda: fl.step_flops(layer(None, 4, 4, 1), lambda m: m(torch.ones(1, 4)).sum()),
            "trained",
        ),
        (lambda: fl.step_flops("model", lambda m: 1.0), "str"),
        (lambda: fl.step_flops(layer("lora", 4, 4, 1), lambda m: 1.0), "1.0"),
        (lambda: fl.step_flops(layer("lora", 4, 4, 1), lambda m: m(torch.ones(2, 4))), r"\(2, 4\)"),
        (lambda: fl.memory_account("model", lambda m: 1.0), "str"),
    ],
)
def test_bad_input_is_refused_and_named(call, words):
    with pytest.raises(lb.LoraBookError, match=words):
        call()


def test_a_wrong_form_is_told_apart():
    got = counted(layer("lora", 8, 8, 2), 16, 8) - forms.floor_flops(16, 8, 8)
    assert got != forms.frozen_factor_flops(16, 8, 8, 2) and got != forms.two_sided_flops(
        16, 8, 8, 2
    )
