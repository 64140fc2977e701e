"""SAM, MGPO and GGPO: what a step perturbs, by how much, what gradient it takes there, and that
nothing stays perturbed.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.core.adapter import LowRank
from lora_book.core.adapting import record_of
from lora_book.core.hosts import adapted_blocks, adapters, sites
from lora_book.core.laws import randomise
from lora_book.core.products import count_flops, low_rank_linear, nudged_linear
from lora_book.present import mgpo as chapter
from lora_book.present import sharpness
from lora_book.present.mgpo import Ggpo, Mgpo, gradients, momenta, row_norms, square
from lora_book.present.sharpness import Sam
from lora_book.registry import STEPS

STEP_IDS = ["sam", "mgpo", "ggpo"]
UNMOVED = {"linear_probe", "bitfit"}


def network(seed=0, dtype=torch.float64, n=6, m=5):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(m, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return model.to(dtype)


def adapted(
    method="lora", seed=0, dtype=torch.float64, targets=("0", "2"), r=2, moved=True, **options
):
    model = lb.adapt(
        network(seed, dtype), method, list(targets), r=r, alpha=2.0 * r, seed=seed, **options
    )
    return randomise(model, seed, 0.3) if moved else model


def problem(model, seed=0, rows=8):
    g = torch.Generator().manual_seed(seed + 7)
    first = next(p for p in model.parameters() if p.dim() == 2)
    x = torch.randn(rows, 5, generator=g, dtype=torch.float64).to(first.dtype)
    y = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    return lambda: F.mse_loss(model(x).double(), y)


def adam(model, lr=1e-2, **options):
    return torch.optim.Adam(lb.param_groups(model, lr), **options)


def counted(loss, calls):
    "The same loss; each call leaves a mark."
    return lambda: calls.append(1) or loss()


def stored(model):
    own = {id(p) for a in adapters(model).values() for p in a.parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in own}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def dense_gradients(model, epsilons, loss):
    """Gradients of the adapters' parameters with W0 replaced by W0 + ε for the base product: a
    constant added to each layer's output.
    """
    hooks = []
    for name, site in sites(model):
        e = epsilons.get(name)
        if e is not None:
            hooks.append(
                site.register_forward_hook(
                    lambda module, inputs, out, e=e: out + inputs[0] @ e.to(inputs[0]).T
                )
            )
    value = loss()
    extra = record_of(model).method.penalty(adapters(model))
    value = value if extra is None else value + extra
    ps = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, ps, allow_unused=True)
    for hook in hooks:
        hook.remove()
    return grads


def seen(model, optimizer, loss):
    """One train_step; returns each adapter's nudge as a matrix (or None) by name, and under `grads`
    what the optimizer got.
    """
    caught = {}

    def watching():
        for key, block in adapted_blocks(model).items():
            nudge = block.adapter.nudge
            caught[key] = (
                None
                if nudge is None
                else sum(B if A is None else B @ A for A, B in nudge.pieces(block))
            )
        return loss()

    original = optimizer.step

    def stepping(*args, **kwargs):
        caught["grads"] = [
            None if p.grad is None else p.grad.clone()
            for p in model.parameters()
            if p.requires_grad
        ]
        return original(*args, **kwargs)

    optimizer.step = stepping
    lb.train_step(model, optimizer, watching)
    del optimizer.step
    return caught


# How large the perturbation is


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rho=st.floats(1e-3, 1.0),
    ema=st.sampled_from([0.0, 0.5, 0.9]),
    sign=st.sampled_from([-1, 1]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_norm_is_rho_over_the_smoothed_gradient_norm_capped(seed, rho, ema, sign, scale):
    model = adapted(seed=seed, step="mgpo", rho=rho, ema=ema, sign=sign)
    optimizer, loss, level = adam(model), problem(model, seed), {}
    for _ in range(4):
        v = {
            name: b.adapter.tangent(M, b.W0).detach()
            for name, b in adapted_blocks(model).items()
            if (M := momenta(b.adapter, optimizer))
        }
        caught = seen(model, optimizer, lambda: scale * loss())
        for name in adapters(model):
            if level:
                assert torch.allclose(
                    caught[name],
                    sign * rho * v[name] / v[name].norm() * min(1 / level[name], 10),
                    rtol=1e-9,
                    atol=1e-15,
                )
                assert caught[name].norm().item() == pytest.approx(
                    rho * min(1 / level[name], 10), rel=1e-9
                )
            else:
                assert caught[name] is None, "the first step has no momentum and must be plain"
        level = {name: record_of(model).step.memory[name].item() for name in adapters(model)}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), ema=st.sampled_from([0.0, 0.3, 0.9]))
def test_smoothed_norm_starts_at_the_first_and_follows_the_average(seed, ema):
    model, want = adapted(seed=seed, step="mgpo", ema=ema), {}
    optimizer, loss = adam(model), problem(model, seed)
    for _ in range(4):
        before = {
            name: (a.A.detach().clone(), a.B.detach().clone(), a.scaling)
            for name, a in adapters(model).items()
        }
        grads = iter(seen(model, optimizer, loss)["grads"])
        for name, (A, B, s) in before.items():
            gA, gB = next(grads), next(grads)
            norm = (s * (gB @ A + B @ gA)).norm().item()
            want[name] = ema * want[name] + (1 - ema) * norm if name in want else norm
            assert record_of(model).step.memory[name].item() == pytest.approx(want[name], rel=1e-9)


def test_global_scope_shares_one_norm():
    model = adapted(step="mgpo", rho=0.3, scope="global")
    optimizer, loss = adam(model), problem(model)
    seen(model, optimizer, loss)
    level = record_of(model).step.memory["all"].item()
    caught = seen(model, optimizer, loss)
    total = sum(caught[name].norm() ** 2 for name in adapters(model)) ** 0.5
    assert total.item() == pytest.approx(0.3 * min(1 / level, 10), rel=1e-9) and set(
        record_of(model).step.memory
    ) == {"all"}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), R=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_norms_from_gram_matrices_are_those_of_the_dense_sum(n, m, R, seed):
    g = torch.Generator().manual_seed(seed)
    pieces = [
        (
            torch.randn(R, m, generator=g, dtype=torch.float64),
            torch.randn(n, R, generator=g, dtype=torch.float64),
            s,
        )
        for s in (1.0, -0.7)
    ]
    dense = sum(s * B @ A for A, B, s in pieces)
    assert torch.allclose(square(pieces), dense.square().sum(), rtol=1e-11)
    assert torch.allclose(row_norms(pieces), dense.norm(dim=1), rtol=1e-7, atol=1e-7)
    assert torch.allclose(square([(None, dense, 2.0)]), 4 * square(pieces), rtol=1e-11)


# Which gradient is taken


def tangent(block, M, h=1e-3):
    "d/dt delta(θ + tM) by differences of fourth order, whatever the method says."
    a = copy.deepcopy(block.adapter)
    start = {name: p.detach().clone() for name, p in a.named_parameters()}

    @torch.no_grad()
    def at(t):
        for name, p in a.named_parameters():
            p.copy_(start[name] + t * M.get(name, torch.zeros_like(p)))
        return a.delta(block.W0).detach()

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def dense(block, M):
    "The direction as one matrix."
    return sum(s * (B if A is None else B @ A) for A, B, s in block.adapter.direction(M, block.W0))


def moved_by_hand(model, optimizer, rho, sign):
    "ε of the next step by the dense definition, for each adapter."
    found = {}
    for name, block in adapted_blocks(model).items():
        v, level = (
            dense(block, momenta(block.adapter, optimizer)),
            record_of(model).step.memory[name].item(),
        )
        found[name] = sign * rho * v / v.norm() * min(1 / level, 10) if v.norm() > 0 else None
    return found


@pytest.mark.parametrize("method", [m for m in lb.methods() if m not in UNMOVED])
def test_every_method_gets_the_dense_definitions_gradient(method):
    @settings(max_examples=4, deadline=None)
    @given(seed=st.integers(0, 10**6), sign=st.sampled_from([-1, 1]))
    def run(seed, sign):
        model = adapted(method, seed, step="mgpo", rho=0.2, sign=sign)
        optimizer, loss = adam(model), problem(model, seed)
        base = stored(model)
        for block in adapted_blocks(model).values():
            a = block.adapter
            M = {
                name: torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype
                )
                for name, p in a.named_parameters()
            }
            assert torch.allclose(dense(block, M), tangent(block, M), rtol=1e-6, atol=1e-8), (
                "the direction isn't the derivative"
            )
        seen(model, optimizer, loss)
        want = dense_gradients(model, moved_by_hand(model, optimizer, 0.2, sign), loss)
        caught = seen(model, optimizer, loss)
        for got, exact in zip(caught["grads"], want, strict=True):
            assert (got is None and exact is None) or torch.allclose(
                got, exact, rtol=1e-10, atol=1e-12
            )
        assert same(base, stored(model)) and all(
            "nudge" not in vars(a) for a in adapters(model).values()
        )

    run()


@settings(max_examples=15, deadline=None)
@given(T=st.integers(1, 6), n=st.integers(2, 7), m=st.integers(2, 7), seed=st.integers(0, 10**6))
def test_the_fused_product_is_the_dense_sum_with_a_constant(T, n, m, seed):
    g = torch.Generator().manual_seed(seed)
    x, W, A, B, EA, EB, target = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in [(T, m), (n, m), (2, m), (n, 2), (2, m), (n, 2), (T, n)]
    )
    leaves = [t.requires_grad_() for t in (x, A, B, EA, EB)]
    y = nudged_linear(x, W, None, [(None, A, B, 0.7, EA, EB)])
    dense = x @ (W + 0.7 * (B @ A) + 0.7 * (EB @ A + B @ EA).detach()).T
    got, want = (
        torch.autograd.grad((out * target).sum(), leaves, allow_unused=True) for out in (y, dense)
    )
    assert torch.allclose(y, dense, rtol=0, atol=1e-12) and got[3] is got[4] is None
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(got[:3], want[:3]))
    undetached = x @ (W + 0.7 * (B @ A + EB @ A + B @ EA)).T
    mutant = torch.autograd.grad((undetached * target).sum(), leaves[:3])
    assert not all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(mutant, want)), (
        "an ε that isn't detached must be noticed"
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0.01, 0.5))
def test_momentum_along_the_gradient_with_sign_plus_is_sam(seed, rho):
    """One layer, ΔW linear in its parameters with unit scale (columns): then weight space is
    parameter space. The first moment of SGD is the gradient itself after one step of no length.
    """

    def build(step, size):
        model = randomise(
            lb.adapt(
                network(seed),
                "paca",
                ["2"],
                r=2,
                seed=seed,
                step=step,
                rho=size,
                **({"sign": 1} if step == "mgpo" else {}),
            ),
            seed,
        )
        return (
            model,
            torch.optim.SGD(lb.param_groups(model, 1e-300), momentum=0.9),
            problem(model, seed),
        )

    model, optimizer, loss = build("mgpo", rho)
    seen(model, optimizer, loss)
    level = record_of(model).step.memory["2"].item()
    along = seen(model, optimizer, loss)["grads"]
    other, optimizer, loss = build("sam", rho * min(1 / level, 10))
    ascent = seen(other, optimizer, loss)["grads"]
    assert all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(along, ascent, strict=True)
    )
    plain = torch.autograd.grad(loss(), [p for p in other.parameters() if p.requires_grad])
    assert not all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ascent, plain, strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0.01, 0.5))
def test_with_two_weights_only_one_norm_for_all_is_sam(seed, rho):
    """The same on two layers of columns: with a norm for each weight the move isn't a multiple of
    the gradient, in whatever ball SAM is given.
    """

    def build(step, size, **options):
        model = lb.adapt(
            network(seed), "paca", ["0", "2"], r=2, seed=seed, step=step, rho=size, **options
        )
        model = randomise(model, seed)
        optimizer = torch.optim.SGD(lb.param_groups(model, 1e-300), momentum=0.9)
        return model, optimizer, problem(model, seed)

    off = {}
    for scope in ("global", "layer"):
        model, optimizer, loss = build("mgpo", rho, sign=1, scope=scope)
        seen(model, optimizer, loss)
        levels = record_of(model).step.memory.values()
        ball = sum((rho * min(1 / level.item(), 10)) ** 2 for level in levels) ** 0.5
        ours = seen(model, optimizer, loss)["grads"]
        theirs = seen(*build("sam", ball))["grads"]
        off[scope] = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)
        )
    assert off["global"] < 1e-9 < 1e-6 < off["layer"]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0.01, 0.5))
def test_sam_is_the_gradient_at_the_end_of_the_ascent(seed, rho):
    model = adapted(seed=seed, step="sam", rho=rho)
    loss = problem(model, seed)
    ps = [p for p in model.parameters() if p.requires_grad]
    twin = copy.deepcopy(model)
    qs, again = [p for p in twin.parameters() if p.requires_grad], problem(twin, seed)
    g = torch.autograd.grad(again(), qs)
    norm = torch.cat([t.flatten() for t in g]).norm()
    with torch.no_grad():
        for q, d in zip(qs, g):
            q.add_(rho * d / norm)
    want = torch.autograd.grad(again(), qs)
    calls = []
    got = seen(model, torch.optim.SGD(ps, 1e-300), lambda: calls.append(1) or loss())["grads"]
    assert len(calls) == 2 and all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(got, want, strict=True)
    )


# Nothing stays moved


class Failed(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEP_IDS)
def test_base_weights_keep_their_bits(step, dtype):
    model = adapted(dtype=dtype, step=step, rho=0.3)
    optimizer, loss, base = adam(model), problem(model), stored(model)
    for _ in range(5):
        lb.train_step(model, optimizer, loss)
        assert same(base, stored(model))
    lb.train_step(model, optimizer, lambda: loss() * torch.nan)
    assert same(base, stored(model))


@settings(max_examples=20, deadline=None)
@given(
    step=st.sampled_from(STEP_IDS),
    call=st.integers(1, 2),
    in_backward=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_step_that_raises_leaves_everything_as_it_was(step, call, in_backward, seed):
    model = adapted(seed=seed, step=step, rho=0.3)
    optimizer, loss, calls = adam(model), problem(model, seed), []
    lb.train_step(model, optimizer, loss)
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, loss().item()
    memory, attributes = (
        record_of(model).step.state(model),
        [sorted(vars(m)) for m in model.modules()],
    )

    def failing():
        calls.append(1)
        if len(calls) == (call if step == "sam" else 1) and not in_backward:
            raise Failed
        return loss()

    def backward(value):
        if len(calls) == (call if step == "sam" else 1) and in_backward:
            raise Failed
        value.backward()

    with pytest.raises(Failed):
        lb.train_step(model, optimizer, failing, backward=backward)
    assert same(before, model.state_dict()) and loss().item() == out
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert same(memory, record_of(model).step.state(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("step", STEP_IDS)
def test_evaluation_saving_and_merging_see_no_perturbation(step, tmp_path):
    model = adapted(step=step, rho=0.5)
    optimizer, loss = adam(model), problem(model)
    for _ in range(3):
        lb.train_step(model, optimizer, loss)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base, out = network(), model(x)
    with torch.no_grad():
        for name in ("0", "2"):
            base.get_submodule(name).weight += lb.delta(model)[name]
    assert torch.allclose(out, base(x), rtol=0, atol=1e-12)
    lb.save(model, tmp_path)
    assert torch.allclose(lb.load(network(), tmp_path)(x), out, rtol=0, atol=1e-12)
    lb.merge(model)
    assert torch.allclose(model(x), out, rtol=0, atol=1e-12)


class LeftOn(Mgpo):
    "A mutant: the perturbation isn't taken off."

    def gradient(self, model, optimizer, run):
        for name, nudge in self.nudges(model, optimizer).items():
            adapters(model)[name].nudge = nudge
        loss = run()
        self.fresh = {name: n.detach() for name, n in self.learn(model).items()}
        return loss


def test_a_perturbation_left_on_is_noticed():
    model = adapted(step="mgpo", rho=0.5)
    optimizer, loss = adam(model), problem(model)
    record_of(model).step = LeftOn(rho=0.5)
    for _ in range(3):
        lb.train_step(model, optimizer, loss)
    base, x = network(), torch.ones(1, 5, dtype=torch.float64)
    with torch.no_grad():
        for name in ("0", "2"):
            base.get_submodule(name).weight += lb.delta(model)[name]
    assert not torch.allclose(model(x), base(x), rtol=0, atol=1e-6)


# How steps live with the rest


def test_loss_is_called_once_a_gradient_and_the_first_loss_returned():
    for step, times in (("plain", 1), ("mgpo", 1), ("ggpo", 1), ("sam", 2)):
        model = adapted(step=step)
        optimizer, loss, calls = adam(model), problem(model), []
        want = loss().item()
        got = lb.train_step(model, optimizer, counted(loss, calls))
        assert len(calls) == times and not got.requires_grad
        if step != "ggpo":
            assert got.item() == want
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["cola", "rac", "c3la", "random_c3la"])
def test_a_new_link_starts_without_momentum_and_without_memory(method):
    model = adapted(method, step="mgpo", rho=0.3)
    optimizer, loss = adam(model), problem(model)
    for _ in range(3):
        lb.train_step(model, optimizer, loss)
    lb.advance(model, optimizer)
    found = {
        name: dense(b, {key: p.new_zeros(p.shape) for key, p in b.adapter.named_parameters()}).shape
        for name, b in adapted_blocks(model).items()
    }
    before = copy.deepcopy(model)
    caught = seen(model, optimizer, loss)
    assert all(caught[name] is None for name in found)
    for p, g in zip(
        [p for p in before.parameters() if p.requires_grad], caught["grads"], strict=True
    ):
        p.grad = g
    for name, b in adapted_blocks(before).items():
        first = dense(b, gradients(b.adapter)).norm().item()
        assert record_of(model).step.memory[name].item() == pytest.approx(first, rel=1e-9), (
            "the average starts anew"
        )
        assert b.adapter.done == 1
    assert all(seen(model, optimizer, loss)[name] is not None for name in found)


def test_gradients_collected_over_several_calls_keep_one_perturbation():
    """An optimizer whose step does nothing between accumulation's ends, as Accelerate's."""
    model = adapted(step="mgpo", rho=0.3)
    optimizer, loss = adam(model), problem(model)
    lb.train_step(model, optimizer, loss)
    memory = record_of(model).step.state(model)
    real = optimizer.step, optimizer.zero_grad
    optimizer.step = optimizer.zero_grad = lambda *a, **k: None
    lb.train_step(model, optimizer, lambda: loss() / 2)
    assert same(memory, record_of(model).step.state(model)), (
        "no step was taken, so nothing is remembered"
    )
    optimizer.step, optimizer.zero_grad = real
    nudged = {
        name: b.adapter.direction(momenta(b.adapter, optimizer), b.W0)
        for name, b in adapted_blocks(model).items()
    }
    assert all(square(pieces) > 0 for pieces in nudged.values())
    lb.train_step(model, optimizer, lambda: loss() / 2)
    assert not same(memory, record_of(model).step.state(model))


def test_clipping_bounds_the_gradient_and_not_the_memory():
    one, other = adapted(step="mgpo"), adapted(step="mgpo")
    for model, bound in ((one, None), (other, 1e-3)):
        lb.train_step(model, adam(model), problem(model), max_grad_norm=bound)
    assert same(record_of(one).step.state(one), record_of(other).step.state(other))


@pytest.mark.parametrize("step", STEP_IDS)
def test_a_restored_step_goes_on_with_the_same_bits(step):
    first = adapted(step=step, rho=0.2)
    a = adam(first)
    for _ in range(3):
        lb.train_step(first, a, problem(first))
    second = adapted(step=step, rho=0.2)
    second.load_state_dict(first.state_dict())
    b = adam(second)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    record_of(second).step.restore(second, record_of(first).step.state(first))
    record_of(second).steps = record_of(first).steps
    for model, optimizer in ((first, a), (second, b)):
        lb.train_step(model, optimizer, problem(model))
    assert same(first.state_dict(), second.state_dict())


def test_ggpo_draws_by_seed_and_leaves_the_global_state_alone():
    drawn = []
    for seed in (0, 0, 1):
        model = lb.adapt(network(), "ggpo", ["0"], r=2, seed=seed, rho=0.5)
        optimizer, state = adam(model), torch.random.get_rng_state()
        drawn.append([seen(model, optimizer, problem(model))["0"] for _ in range(2)])
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.allclose(drawn[0][0], drawn[2][0]) and not torch.allclose(
        drawn[0][0], drawn[0][1]
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), mix=st.floats(0, 1))
def test_ggpo_scales_its_rows_by_weight_and_gradient_norms(seed, mix):
    model = lb.adapt(network(seed, n=6, m=5), "ggpo", ["0"], r=2, seed=seed, rho=0.1, mix=mix)
    optimizer, loss = adam(model), problem(model, seed)
    seen(model, optimizer, loss)
    rows, W = record_of(model).step.memory["0"], model[0].weight + lb.delta(model)["0"]
    want = 0.1 * (mix * W.norm(dim=1) + (1 - mix) * rows)
    from lora_book.core.adapter import generator

    noise = torch.randn(6, 5, generator=generator(seed, "ggpo", "0", 1)).double() / 5**0.5
    assert torch.allclose(
        seen(model, optimizer, loss)["0"], want[:, None] * noise, rtol=1e-9, atol=1e-15
    )


def test_ratio_of_rates_and_heads_combine_with_every_step():
    for step in STEP_IDS:
        model = lb.adapt(network(), "lora", ["0"], r=2, step=step, lr_ratio=4.0, head="4")
        optimizer = adam(model)
        for _ in range(3):
            lb.train_step(model, optimizer, problem(model))
        assert sorted(g["lr"] for g in optimizer.param_groups) == [1e-2, 4e-2]


def test_a_fused_weight_is_moved_in_its_own_rows():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9)).double()
    lb.adapt(model, "lora", ["0[q,v]"], r=2, step="mgpo", rho=0.3)
    x, y = (
        torch.randn(4, 5, generator=g, dtype=torch.float64),
        torch.randn(4, 9, generator=g, dtype=torch.float64),
    )
    optimizer, outs = adam(model), []

    def loss():
        outs.append(model(x))
        return F.mse_loss(outs[-1], y)

    for _ in range(3):
        lb.train_step(model, optimizer, loss)
        assert torch.equal(outs[-1][:, 3:6], outs[0][:, 3:6])


def flops_of_a_step(step, x, n, r):
    model = lb.adapt(nn.Sequential(nn.Linear(x.shape[1], n)), "lora", ["0"], r=r, step=step)
    optimizer = adam(model)
    lb.train_step(model, optimizer, lambda: model(x).square().mean())
    return count_flops(lambda: lb.train_step(model, optimizer, lambda: model(x).square().mean()))


def test_flops_of_a_moved_step_and_of_sam():
    T, n, m, r = 64, 32, 48, 4
    g = torch.Generator().manual_seed(0)
    x, W, A, B, EA, EB = (
        torch.randn(s, generator=g) for s in [(T, m), (n, m), (r, m), (n, r), (r, m), (n, r)]
    )
    for t in (x, A, B):
        t.requires_grad_()
    plain = count_flops(lambda: low_rank_linear(x, W, None, [(None, A, B, 1.0)]).sum().backward())
    moved = count_flops(
        lambda: nudged_linear(x, W, None, [(None, A, B, 1.0, EA, EB)]).sum().backward()
    )
    assert plain == 4 * T * m * n + 6 * T * r * (m + n) and moved == plain + 4 * T * r * (m + n)
    spent = {}
    for step in ("plain", "sam", "mgpo"):
        spent[step] = flops_of_a_step(step, x, n, r)
    R, s = 2 * r, 2 * (2 * r) ** 2 * (n + m)
    assert (
        spent["sam"] == 2 * spent["plain"]
        and spent["mgpo"] == spent["plain"] + 4 * T * r * (m + n) + 2 * s
        and R == 8
    )


# Optimizers


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum, as Chen et al. 2023 have it; `counted` writes so that
    torch counts the writes, else to .data.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), counted=True, key="exp_avg"):
        super().__init__(params, {"lr": lr, "betas": betas})
        self.counted, self.key = counted, key

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault(self.key, torch.zeros_like(p))
                move = group["lr"] * m.lerp(p.grad, 1 - group["betas"][0]).sign()
                (p if self.counted else p.data).sub_(move)
                m.lerp_(p.grad, 1 - group["betas"][1])


O = torch.optim
WITH_MOMENTUM = {
    "adamw": O.AdamW,
    "amsgrad": lambda ps: O.AdamW(ps, amsgrad=True),
    "adam": O.Adam,
    "nadam": O.NAdam,
    "radam": O.RAdam,
    "adamax": O.Adamax,
    "sgd": lambda ps: O.SGD(ps, 0.01, momentum=0.9),
    "nesterov": lambda ps: O.SGD(ps, 0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda ps: O.RMSprop(ps, momentum=0.9),
    "lion": Lion,
    "lion writing to .data": lambda ps: Lion(ps, counted=False),
}


@pytest.mark.parametrize("make", WITH_MOMENTUM.values(), ids=WITH_MOMENTUM.keys())
@pytest.mark.parametrize("method", ["lora", "asymmetric", "cla", "dora", "loldu", "full"])
def test_every_optimizer_with_a_first_moment_will_do(method, make):
    model = adapted(method, step="mgpo", rho=0.2, sign=1)
    optimizer, loss, base = make(lb.param_groups(model, 1e-3)), problem(model), stored(model)
    first = seen(model, optimizer, loss)
    assert all(first[name] is None for name in adapted_blocks(model)), "the first step is plain"
    for _ in range(2):
        want, caught = moved_by_hand(model, optimizer, 0.2, 1), seen(model, optimizer, loss)
        for name in adapted_blocks(model):
            assert want[name] is not None and torch.allclose(
                caught[name], want[name], rtol=1e-9, atol=1e-14
            )
            assert 0 < caught[name].norm() <= 2 * (1 + 1e-9), (
                "the length is rho / level, at most 10 rho"
            )
    assert same(base, stored(model))


def test_a_momentum_under_an_unknown_name_is_refused_and_not_skipped():
    model = adapted(step="mgpo")
    optimizer, loss = Lion(lb.param_groups(model, 1e-3), key="m"), problem(model)
    lb.train_step(model, optimizer, loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lb.LoraBookError, match="Lion keeps"):
        lb.train_step(model, optimizer, loss)
    assert same(before, model.state_dict())


def test_one_group_without_momentum_is_refused_only_where_adapters_are():
    model = adapted(step="mgpo", head="4")
    ps, heads = list(adapters(model)["0"].parameters()), list(model[4].parameters())
    rest = [p for p in adapters(model)["2"].parameters()]
    fine = torch.optim.SGD([{"params": [*ps, *rest], "momentum": 0.9}, {"params": heads}], lr=0.01)
    for _ in range(2):
        lb.train_step(model, fine, problem(model))
    with pytest.raises(lb.LoraBookError, match="momentum"):
        lb.train_step(
            model,
            torch.optim.SGD(
                [{"params": [*ps, *heads], "momentum": 0.9}, {"params": rest}], lr=0.01
            ),
            problem(model),
        )


# Accelerate, mixed precision, clipping


@pytest.fixture
def accelerate():
    "A way to make accelerators whose process-wide state is forgotten afterwards."

    def make(**settings):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def rows_of_problem(model, rows):
    g = torch.Generator().manual_seed(7)
    x, y = (
        torch.randn(8, 5, generator=g, dtype=torch.float64),
        torch.randn(8, 3, generator=g, dtype=torch.float64),
    )
    first = next(p for p in model.parameters() if p.dim() == 2)
    return lambda: F.mse_loss(model(x[rows].to(first.dtype)).double(), y[rows])


@pytest.mark.parametrize("bound", [None, 1e-3])
@pytest.mark.parametrize("step", ["mgpo", "ggpo"])
def test_two_half_batches_of_accelerate_are_one_step(step, bound, accelerate):
    """Clipping comes with the last half, when the gradient is whole."""
    accelerator = accelerate(gradient_accumulation_steps=2)
    one, two = adapted(step=step, rho=0.2), adapted(step=step, rho=0.2)
    alone = adam(one)
    prepared, theirs = accelerator.prepare(two, adam(two))
    for _ in range(4):
        record_of(two).steps = record_of(one).steps
        lb.train_step(one, alone, rows_of_problem(one, slice(0, 8)), max_grad_norm=bound)
        for rows in (slice(0, 4), slice(4, 8)):
            record_of(two).steps = record_of(one).steps - 1
            with accelerator.accumulate(prepared):
                lb.train_step(
                    prepared,
                    theirs,
                    rows_of_problem(prepared, rows),
                    backward=accelerator.backward,
                    max_grad_norm=bound if accelerator.sync_gradients else None,
                )
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
    a, b = record_of(one).step.state(one), record_of(two).step.state(two)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-9) for k in a)


@pytest.mark.parametrize("method", ["lora", "asymmetric", "cla", "dora"])
@pytest.mark.parametrize("step", STEP_IDS)
def test_bf16_by_accelerate_keeps_the_base_and_the_length(step, method, accelerate):
    accelerator, model = (
        accelerate(mixed_precision="bf16"),
        adapted(method, dtype=torch.float32, step=step, rho=0.05),
    )
    prepared, optimizer = accelerator.prepare(model, adam(model))
    base, losses, loss = stored(model), [], rows_of_problem(prepared, slice(0, 8))
    for _ in range(6):
        losses.append(
            lb.train_step(
                prepared, optimizer, loss, backward=accelerator.backward, max_grad_norm=1.0
            ).item()
        )
        assert same(base, stored(model)) and all(torch.isfinite(torch.tensor(losses)))
    if step == "mgpo":
        level = record_of(model).step.memory
        for name, nudge in record_of(model).step.nudges(model, optimizer).items():
            block = adapted_blocks(model)[name]
            length = sum(B if A is None else B @ A for A, B in nudge.pieces(block)).norm().item()
            assert length == pytest.approx(0.05 * min(1 / level[name].item(), 10), rel=1e-4)
    assert losses[-1] < losses[0]


# Each law fails on a mutant


def in_place(self, model, optimizer, run):
    "The released program: ε is added to the stored weight, and subtracted afterwards."
    blocks = adapted_blocks(model)
    with torch.no_grad():
        moves = {
            name: (
                sum(B if A is None else B @ A for A, B in nudge.pieces(blocks[name])).to(
                    blocks[name].W0
                )
            )
            for name, nudge in self.nudges(model, optimizer).items()
        }
        for name, e in moves.items():
            blocks[name].W0.add_(e)
    loss = run()
    with torch.no_grad():
        for name, e in moves.items():
            blocks[name].W0.sub_(e)
        self.fresh = self.learn(model)
    return loss


class Careless:
    "A context that takes no nudge off when its body raises."

    def __init__(self, found, nudges):
        self.found = found
        for name, nudge in nudges.items():
            found[name].nudge = nudge

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        for adapter in self.found.values():
            vars(adapter).pop("nudge", None) if kind is None else None


def bare(test):
    "The test's own function, without Hypothesis around it."
    return test.hypothesis.inner_test


def norm_law():
    bare(test_norm_is_rho_over_the_smoothed_gradient_norm_capped)(
        seed=1, rho=0.3, ema=0.5, sign=1, scale=1e-3
    )
    bare(test_norm_is_rho_over_the_smoothed_gradient_norm_capped)(
        seed=1, rho=0.3, ema=0.5, sign=-1, scale=30.0
    )


def raising_law(step, call):
    bare(test_a_step_that_raises_leaves_everything_as_it_was)(
        step=step, call=call, in_backward=True, seed=3
    )


def unscaled(self, M, W0):
    return [(self.A.detach(), M["B"].detach(), 1.0), (M["A"].detach(), self.B.detach(), 1.0)]


real_size, real_climb = Mgpo.size, sharpness.climb
MUTANTS = {
    "no cap": (chapter, "CAP", 1e9, norm_law),
    "the other sign": (
        Mgpo,
        "size",
        lambda self, norm, level: -real_size(self, norm, level),
        norm_law,
    ),
    "not divided by the gradient's norm": (
        Mgpo,
        "size",
        lambda self, norm, level: self.sign * self.rho / norm,
        norm_law,
    ),
    "no average": (
        Mgpo,
        "smoothed",
        lambda self, key, norm: norm,
        lambda: bare(test_smoothed_norm_starts_at_the_first_and_follows_the_average)(
            seed=1, ema=0.9
        ),
    ),
    "an average from zero": (
        Mgpo,
        "smoothed",
        lambda self, key, norm: self.ema * self.memory.get(key, 0.0) + (1 - self.ema) * norm,
        lambda: bare(test_smoothed_norm_starts_at_the_first_and_follows_the_average)(
            seed=1, ema=0.9
        ),
    ),
    "the norm without the scale": (
        LowRank,
        "direction",
        unscaled,
        lambda: bare(test_smoothed_norm_starts_at_the_first_and_follows_the_average)(
            seed=1, ema=0.9
        ),
    ),
    "in place": (
        Mgpo,
        "gradient",
        in_place,
        lambda: test_base_weights_keep_their_bits("mgpo", torch.float32),
    ),
    "left on after an error": (chapter, "moved_by", Careless, lambda: raising_law("mgpo", 1)),
    "SAM that doesn't return": (
        sharpness,
        "put_back",
        lambda ps, kept: None,
        lambda: raising_law("sam", 2),
    ),
    "SAM downhill": (
        sharpness,
        "climb",
        lambda ps, grads, rho: real_climb(ps, grads, -rho),
        lambda: bare(test_sam_is_the_gradient_at_the_end_of_the_ascent)(seed=1, rho=0.2),
    ),
    "MGPO downhill is not SAM": (
        Mgpo,
        "size",
        lambda self, norm, level: -real_size(self, norm, level),
        lambda: bare(test_momentum_along_the_gradient_with_sign_plus_is_sam)(seed=1, rho=0.2),
    ),
    "memory of the old link": (
        Mgpo,
        "smoothed",
        lambda self, key, norm: kept_forever(self, key, norm),
        lambda: test_a_new_link_starts_without_momentum_and_without_memory("cola"),
    ),
    "every call counts as a step": (
        chapter,
        "changed",
        lambda before, after: True,
        lambda: test_gradients_collected_over_several_calls_keep_one_perturbation(),
    ),
    "only counted writes": (
        chapter,
        "marks",
        lambda model, optimizer: [
            (p, p._version) for a in adapters(model).values() for p in a.parameters()
        ],
        lambda: test_every_optimizer_with_a_first_moment_will_do(
            "lora", WITH_MOMENTUM["lion writing to .data"]
        ),
    ),
    "a direction that isn't the derivative": (
        LowRank,
        "direction",
        lambda self, M, W0: [(self.A.detach(), M["B"].detach(), self.scaling)],
        lambda: test_every_method_gets_the_dense_definitions_gradient("lora"),
    ),
}


def kept_forever(self, key, norm):
    "What `smoothed` would give if the memory of a finished link were kept."
    self.hoard = getattr(self, "hoard", {})
    old = self.hoard.get(key, norm)
    self.hoard[key] = self.ema * old + (1 - self.ema) * norm
    return self.hoard[key]


@pytest.mark.parametrize("place, name, wrong, law", MUTANTS.values(), ids=MUTANTS.keys())
def test_each_law_holds_and_fails_on_a_mutant(place, name, wrong, law, monkeypatch):
    law()
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises((AssertionError, KeyError)):
        law()


# What is refused


@pytest.mark.parametrize(
    "step, options",
    [
        ("mgpo", {"rho": 0}),
        ("mgpo", {"rho": -1.0}),
        ("mgpo", {"rho": float("nan")}),
        ("mgpo", {"ema": 1.0}),
        ("mgpo", {"ema": -0.1}),
        ("mgpo", {"sign": 0}),
        ("mgpo", {"sign": 2}),
        ("mgpo", {"scope": "row"}),
        ("sam", {"rho": 0}),
        ("sam", {"rho": -0.1}),
        ("ggpo", {"rho": 0}),
        ("ggpo", {"mix": 1.5}),
        ("mgpo", {"rho": "a"}),
        ("mgpo", {"beta": 0.9}),
        ("sam", {"ema": 0.9}),
    ],
)
def test_bad_options_are_refused_before_the_model_changes(step, options):
    model = network()
    before, kinds = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [type(m) for m in model.modules()],
    )
    for method, extra in (("lora", {"step": step}), (step, {})):
        with pytest.raises(lb.LoraBookError) as caught:
            lb.adapt(model, method, ["0"], r=2, **extra, **options)
        assert isinstance(caught.value, (ValueError, TypeError, KeyError)) and next(
            iter(options)
        ) in str(caught.value)
    assert same(before, model.state_dict()) and [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, 0.1),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        lambda ps: object(),
    ],
    ids=["sgd", "adagrad", "rmsprop", "none"],
)
def test_an_optimizer_without_momentum_is_refused(make):
    model = adapted(step="mgpo")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lb.LoraBookError, match="optimizer"):
        lb.train_step(model, make(lb.param_groups(model, 0.1)), problem(model))
    assert same(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("step", ["mgpo", "ggpo"])
@pytest.mark.parametrize("method", sorted(UNMOVED))
def test_methods_that_move_no_weight_are_refused(method, step):
    model = lb.adapt(network(), method, ["0"], step=step, head="4")
    with pytest.raises(lb.LoraBookError):
        lb.train_step(model, adam(model), problem(model))


def test_options_have_the_papers_defaults():
    assert (Mgpo().rho, Mgpo().ema, Mgpo().sign) == (0.05, 0.9, -1) and set(STEPS) >= {
        "plain",
        *STEP_IDS,
    }
    assert (
        STEPS["sam"] is Sam
        and STEPS["ggpo"] is Ggpo
        and STEPS["mgpo"] is Mgpo
        and gradients(adapters(adapted())["0"]) == {}
    )
