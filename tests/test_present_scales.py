"""rsLoRA's scale, LoRA+'s two rates and asymmetric LoRA's frozen factor, on random shapes, ranks
and hosts.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.core.adapter import LowRank
from lora_book.core.adapting import Method
from lora_book.core.laws import HOSTS, NUMBERED, BrokenLaw, Case, check, moved
from lora_book.core.products import saved_bytes
from lora_book.past.lora import LoRA
from lora_book.present.asymmetric import Asymmetric, asymmetric, frozen_law, orthonormal
from lora_book.present.lora_plus import lora_plus
from lora_book.present.rslora import RsLoRA, rslora

FEW = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda nm: st.tuples(st.just(nm[0]), st.just(nm[1]), st.integers(1, min(nm)))
)
seeds = st.integers(0, 10**6)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def layer(n, m, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(m, n, dtype=dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model


def adapter_of(model):
    return next(iter(lb.adapters(model).values()))


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# rsLoRA


@FEW
@given(shapes, st.floats(0.01, 100), seeds)
def test_rslora_is_lora_times_the_root_of_the_rank(shape, alpha, seed):
    n, m, r = shape
    W0 = torch.zeros(n, m, dtype=torch.float64)
    one, two = LoRA(W0, r=r, alpha=alpha, seed=seed), RsLoRA(W0, r=r, alpha=alpha, seed=seed)
    assert torch.equal(one.A, two.A)
    one.B.data, two.B.data = numbers(seed, n, r), numbers(seed, n, r)
    assert math.isclose(two.scaling, alpha / math.sqrt(r))
    assert torch.allclose(two.delta(W0), math.sqrt(r) * one.delta(W0), rtol=1e-12, atol=1e-12)


@FEW
@given(shapes, seeds, st.sampled_from([(LoRA, 1.0), (RsLoRA, 0.5)]))
def test_first_step_of_descent_moves_the_output_as_the_theorem_says(shape, seed, kind):
    (n, m, r), (make, p) = shape, kind
    method = "lora" if make is LoRA else "rslora"
    model, x, v = (
        lb.adapt(layer(n, m, seed), method, ["0"], r=r, alpha=3.0, seed=seed),
        numbers(seed, m),
        numbers(seed + 1, n),
    )
    A, before = adapter_of(model).A.detach().clone(), model(x).detach()
    lb.train_step(model, torch.optim.SGD(lb.param_groups(model, 0.1)), lambda: model(x) @ v)
    want = -0.1 * (3.0 * r**-p) ** 2 * (A @ x).square().sum() * v
    assert torch.allclose(model(x) - before, want, rtol=1e-9, atol=1e-12)


def test_a_scale_changed_in_one_place_breaks_law_2():
    class OnePlace(LoRA):
        def delta(self, W0):
            return super().delta(W0) * math.sqrt(self.r)

    assert check(Case(rslora), rslora.count) == len(NUMBERED) + 1
    with pytest.raises(BrokenLaw, match="law 2"):
        check(Case(Method(OnePlace, "mutant", "none")))


# LoRA+


@FEW
@given(
    shapes,
    st.floats(1e-5, 1.0),
    st.floats(0.5, 64),
    st.sampled_from(["lora", "lora_plus", "rslora", "cola"]),
    st.sampled_from(list(HOSTS)),
)
def test_every_parameter_is_in_one_group_and_b_has_the_ratio(shape, lr, ratio, method, host):
    n, m, r = shape
    case = Case(lb.registry.method(method), host, n, m, r, options={"lr_ratio": ratio})
    model = case.adapt(case.base())
    groups = lb.param_groups(model, lr)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert (
        len(found) == sum(len(group["params"]) for group in groups) == 2 * len(lb.adapters(model))
    )
    for adapter in lb.adapters(model).values():
        assert math.isclose(found[id(adapter.A)], lr) and math.isclose(
            found[id(adapter.B)], lr * ratio
        )


def test_the_default_ratio_is_lora_pluss_own_and_loras_is_one():
    rates = {}
    for method in ("lora", "lora_plus"):
        model = lb.adapt(layer(4, 5), method, ["0"], r=2)
        rates[method] = [
            {id(p): g["lr"] for g in lb.param_groups(model, 1.0) for p in g["params"]}[id(p)]
            for p in (adapter_of(model).A, adapter_of(model).B)
        ]
    assert (
        rates == {"lora": [1, 1], "lora_plus": [1, lora_plus.lr_ratio]}
        and 2 <= lora_plus.lr_ratio <= 16
    )


def path(method, shape, seed, rate, factor, make, ratio=None):
    n, m, r = shape
    model, x, y = (
        lb.adapt(layer(n, m, seed), method, ["0"], r=r, seed=seed, lr_ratio=ratio),
        numbers(seed, 12, m),
        numbers(seed + 1, 12, n),
    )
    adapter_of(model).A.data *= factor
    optimizer = make(lb.param_groups(model, rate))
    for _ in range(6):
        lb.train_step(model, optimizer, lambda: (model(x) - y).square().mean())
    return lb.delta(model)["0"]


OPTIMIZERS = {
    "descent": (torch.optim.SGD, 0.25),
    "adam": (lambda groups: torch.optim.Adam(groups, eps=1e-30), 0.5),
}


@FEW
@given(shapes, seeds, st.floats(1.5, 30), st.sampled_from(list(OPTIMIZERS)))
def test_lora_plus_is_lora_with_a_larger_start_and_rate(shape, seed, ratio, name):
    make, power = OPTIMIZERS[name]
    plus = path("lora_plus", shape, seed, 0.001, 1.0, make, ratio)
    plain = path("lora", shape, seed, 0.001 * ratio**0.5, ratio**power, make)
    assert torch.allclose(plus, plain, rtol=1e-6, atol=1e-9 * plus.abs().max().item() + 1e-15)


def test_the_disguise_sees_a_ratio_that_is_given_to_the_wrong_factor():
    shape, make = (4, 5, 2), OPTIMIZERS["descent"][0]
    right = path("lora_plus", shape, 3, 0.001, 1.0, make, 8.0)
    wrong = path("lora_plus", shape, 3, 0.008, 1.0, make, 1 / 8)
    assert (right - wrong).abs().max() > 1e-3 * right.abs().max()


@pytest.mark.parametrize("method", ["asymmetric", "rac", "full", "bitfit", "linear_probe"])
def test_a_ratio_without_two_trained_factors_is_refused_before_anything_changes(method):
    model = layer(4, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(lb.LoraBookError, match="lr_ratio=4"):
        lb.adapt(
            model,
            method,
            ["0"],
            lr_ratio=4,
            **({"r": 2} if method in ("asymmetric", "rac") else {}),
        )
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "ratio, error",
    [
        (0, ValueError),
        (-1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("16", TypeError),
        (True, TypeError),
    ],
)
def test_an_impossible_ratio_is_refused(ratio, error):
    with pytest.raises(error, match="lr_ratio") as caught:
        lb.adapt(layer(4, 5), "lora_plus", ["0"], r=2, lr_ratio=ratio)
    assert isinstance(caught.value, lb.LoraBookError)


# Asymmetric LoRA


@FEW
@given(
    shapes,
    seeds,
    st.sampled_from(["B", "A"]),
    st.sampled_from(["normal", "kaiming", "orthonormal"]),
    st.sampled_from(list(HOSTS)),
    dtypes,
)
def test_laws_hold_for_both_mirrors(shape, seed, train, init, host, dtype):
    n, m, r = shape
    case = Case(asymmetric, host, n, m, r, dtype, seed, {"train": train, "init": init})
    assert check(case, lambda n, m, r: r * (n if train == "B" else m)) == len(NUMBERED) + 1


@FEW
@given(shapes, seeds, st.sampled_from(["B", "A"]))
def test_the_frozen_factor_is_a_buffer_and_no_step_moves_it(shape, seed, train):
    n, m, r = shape
    model, x = (
        lb.adapt(layer(n, m, seed), "asymmetric", ["0"], r=r, seed=seed, train=train),
        numbers(seed, 7, m),
    )
    adapter = adapter_of(model)
    frozen = {"A": "B", "B": "A"}[train]
    before, optimizer = (
        getattr(adapter, frozen).clone(),
        torch.optim.Adam(lb.param_groups(model, 0.1)),
    )
    for _ in range(2):
        lb.train_step(model, optimizer, lambda: model(x).square().mean())
    assert [name for name, _ in adapter.named_parameters()] == [train] and [
        name for name, _ in adapter.named_buffers()
    ] == [frozen]
    assert torch.equal(getattr(adapter, frozen), before) and getattr(adapter, train).any()


@FEW
@given(shapes, seeds, st.sampled_from(["B", "A"]), st.floats(0.1, 10))
def test_gradient_and_induced_step_are_the_chapters(shape, seed, train, alpha):
    n, m, r = shape
    adapter, G = (
        Asymmetric(
            torch.zeros(n, m, dtype=torch.float64),
            r=r,
            alpha=alpha,
            seed=seed,
            train=train,
            sigma=1.0,
        ),
        numbers(seed, n, m),
    )
    (adapter.delta(None) * G).sum().backward()
    A, B, s = adapter.A.detach(), adapter.B.detach(), adapter.scaling
    trained = dict(adapter.named_parameters())[train]
    assert torch.allclose(
        trained.grad, s * (G @ A.T if train == "B" else B.T @ G), rtol=1e-10, atol=1e-12
    )
    trained.data -= 0.3 * trained.grad
    want = -0.3 * s**2 * (G @ A.T @ A if train == "B" else B @ B.T @ G)
    assert torch.allclose(adapter.delta(None), want, rtol=1e-9, atol=1e-10)


@FEW
@given(st.integers(1, 40), st.integers(2, 24), st.integers(2, 24), st.data())
def test_what_is_kept_for_the_backward_pass(T, n, m, data):
    r = data.draw(st.integers(1, min(n, m)))
    x = torch.randn(T, m, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for options, want in (({"train": "B"}, T * r), ({"train": "A"}, T * m)):
        model = lb.adapt(layer(n, m, dtype=torch.float32), "asymmetric", ["0"], r=r, **options)
        assert saved_bytes(lambda: model(x), exclude=list(model.state_dict().values())) == 4 * want  # noqa: B023


@FEW
@given(shapes, seeds)
def test_orthonormal_rows_are_orthonormal_and_repeatable(shape, seed):
    _, m, r = shape
    A = orthonormal(r, m, torch.Generator().manual_seed(seed))
    assert A.shape == (r, m) and torch.allclose(
        A @ A.T, torch.eye(r, dtype=torch.float64), atol=1e-12
    )
    assert torch.equal(A, orthonormal(r, m, torch.Generator().manual_seed(seed)))


def test_orthonormal_frames_favour_no_direction():
    frames = torch.stack(
        [orthonormal(1, 3, torch.Generator().manual_seed(seed))[0] for seed in range(600)]
    )
    assert (
        frames.mean(0).abs().max() < 0.1
        and (frames.T @ frames / 600 - torch.eye(3) / 3).abs().max() < 0.07
    )
    unsigned = torch.stack([torch.linalg.qr(row[:, None]).Q[:, 0] for row in frames])
    assert unsigned.mean(0).abs().max() > 0.2, "without the sign of R the frames aren't uniform"


def test_sigma_is_the_spread_of_the_normal_law():
    for sigma in (0.02, 1.5):
        A = frozen_law("normal", sigma)(40, 200, torch.Generator().manual_seed(0))
        assert abs(A.std().item() / sigma - 1) < 0.05
    W0 = torch.zeros(6, 8)
    assert torch.equal(Asymmetric(W0, r=2, seed=5).A, LoRA(W0, r=2, seed=5).A), (
        "the default is LoRA's own start"
    )


@pytest.mark.parametrize(
    "options, error",
    [
        ({"train": "AB"}, ValueError),
        ({"train": None}, ValueError),
        ({"init": "orthogonal"}, ValueError),
        ({"sigma": 0}, ValueError),
        ({"sigma": "1"}, TypeError),
        ({"init": "orthonormal", "sigma": 1.0}, ValueError),
        ({"trian": "B"}, KeyError),
        ({"r": 9}, ValueError),
        ({"alpha": 0}, ValueError),
    ],
)
def test_impossible_options_are_refused_by_name_and_leave_the_model(options, error):
    model = layer(4, 5)
    with pytest.raises(error) as caught:
        lb.adapt(model, "asymmetric", ["0"], **{"r": 2, **options})
    assert isinstance(caught.value, lb.LoraBookError) and next(iter(options)) in str(caught.value)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


class TrainsBoth(Asymmetric):
    def place(self, name, M):
        setattr(self, name, nn.Parameter(M.contiguous()))


class StartsLoud(Asymmetric):
    def init(self, W0, r, generator):
        law = frozen_law(self.options.init, self.options.sigma)
        return law(r, W0.shape[1], generator), law(r, W0.shape[0], generator).t()


class Forgets(Asymmetric):
    def place(self, name, M):
        if name in self.trainable:
            LowRank.place(self, name, M)
        else:
            self.register_buffer(name, torch.randn(M.shape, dtype=M.dtype), persistent=False)


@pytest.mark.parametrize(
    "make, law", [(TrainsBoth, "law 4"), (StartsLoud, "law 1"), (Forgets, "law 9")]
)
def test_planted_mutants_are_caught(make, law):
    case = Case(Method(make, "mutant", "none"))
    with pytest.raises(BrokenLaw, match=law):
        check(case, asymmetric.count)
    assert check(replace(case, method=asymmetric), asymmetric.count) == len(NUMBERED) + 1


def test_a_mutant_that_freezes_the_wrong_factor_is_seen_by_the_shape_of_its_gradient():
    case = Case(asymmetric, n=6, m=8, options={"train": "A"})
    model = moved(case)
    with pytest.raises(BrokenLaw, match="law 4"):
        check(case, asymmetric.count)
    assert lb.n_trainable(model) == case.r * case.m
