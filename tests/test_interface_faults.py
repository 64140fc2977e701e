"""Steps that break in the middle: weights, adapters, outputs and gradients are as they were before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import CHAINS, adapted, inputs, largest, moved, net, numbers, snapshot, trained

import lora_book as lb

METHODS = lb.methods()
every_method = pytest.mark.parametrize("method", METHODS)


def optimizer_of(model, lr=1e-2):
    return torch.optim.AdamW(lb.param_groups(model, lr))


class Broken(Exception):
    pass


@every_method
@pytest.mark.parametrize("when", ["before", "after", "backward"])
def test_a_step_that_raises_leaves_everything(method, when):
    model, x = moved(method), inputs().requires_grad_()
    optimizer = optimizer_of(model)
    for _ in range(3):
        lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    before, out = numbers(model), model(x).detach()

    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            raise Broken

    def loss():
        if when == "before":
            raise Broken
        hidden = model.first(x)
        value = (
            model(x).pow(2).mean() + (Bomb.apply(hidden) if when == "backward" else hidden).sum()
        )
        if when == "after":
            raise Broken
        return value

    state = snapshot(model)
    with pytest.raises(Broken):
        lb.train_step(model, optimizer, loss)
    assert snapshot(model) == state and numbers(model) == before
    assert torch.equal(model(x), out) and all(p.grad is None for p in trained(model))
    with lb.disabled(model):
        assert torch.equal(model(x), net()(x))
    lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())


@every_method
def test_an_interrupted_step_isn_t_counted(method):
    one, two, x = moved(method), moved(method), inputs()
    for model, broken in ((one, False), (two, True)):
        optimizer = optimizer_of(model)
        for i in range(4):
            if broken and i == 2:
                with pytest.raises(KeyboardInterrupt):
                    lb.train_step(model, optimizer, stop)
            lb.train_step(model, optimizer, lambda model=model: model(x).pow(2).mean())
    assert numbers(one) == numbers(two)


def stop():
    raise KeyboardInterrupt


@every_method
def test_a_loss_is_called_once_per_gradient_and_gradients_are_zeroed(method):
    model, x, calls = moved(method), inputs(), []
    optimizer = optimizer_of(model)

    def loss():
        calls.append(1)
        return model(x).pow(2).mean()

    for _ in range(3):
        value = lb.train_step(model, optimizer, loss)
        assert value.dim() == 0 and not value.requires_grad
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert len(calls) == (6 if method == "sam" else 3)


@every_method
def test_a_step_returns_the_loss_before_it_and_moves_only_what_trains(method):
    model, x = moved(method), inputs()
    optimizer = optimizer_of(model)
    frozen = {
        n: v for n, v in snapshot(model)["tensors"].items() if not v[3] and ".adapters." not in n
    }
    want = model(x).pow(2).mean().item()
    assert lb.train_step(model, optimizer, lambda: model(x).pow(2).mean()).item() == pytest.approx(
        want, rel=1e-2 if method == "ggpo" else 1e-5
    )
    after = snapshot(model)["tensors"]
    assert all(after[n] == v for n, v in frozen.items())
    assert model(x).pow(2).mean().item() < want


@every_method
def test_backward_is_let_in_and_norms_are_clipped(method):
    model, x, seen = moved(method), inputs(), []

    def backward(loss):
        seen.append(loss.item())
        (1000 * loss).backward()

    optimizer = torch.optim.SGD(lb.param_groups(model, 1.0), momentum=0.9)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    before = [p.detach().clone() for p in trained(model)]
    lb.train_step(
        model, optimizer, lambda: model(x).pow(2).mean(), backward=backward, max_grad_norm=0.01
    )
    moved_by = (
        sum(
            ((p - b) / rates[id(p)]).pow(2).sum().item()
            for p, b in zip(trained(model), before, strict=True)
        )
        ** 0.5
    )
    assert len(seen) == (2 if method == "sam" else 1)
    if method != "adalora":
        assert moved_by == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("method", CHAINS)
def test_advance_keeps_outputs_parameters_and_the_rest_of_the_optimizer(method):
    model, x = moved(method), inputs()
    optimizer = optimizer_of(model)
    for _ in range(2):
        lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    want, ids = model(x).detach(), [id(p) for p in trained(model)]
    assert lb.advance(model, optimizer) is model
    assert largest(model(x), want) < 1e-5 and [id(p) for p in trained(model)] == ids
    links = {id(p) for a in lb.adapters(model).values() for p in a.parameters()}
    assert {id(p) for p in optimizer.state} == set(ids) - links and len(optimizer.state) == 2
    changes = {name: d.clone() for name, d in lb.delta(model).items()}
    lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    assert any(not torch.equal(d, changes[name]) for name, d in lb.delta(model).items())


@pytest.mark.parametrize("method", CHAINS)
@given(steps=st.integers(1, 9), every=st.integers(1, 4), length=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_reset_every_advances_by_itself_up_to_the_chain_s_length(method, steps, every, length):
    model, x = adapted(method, reset_every=every, chain_length=length), inputs()
    optimizer = optimizer_of(model)
    for _ in range(steps):
        lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    assert {a.done for a in lb.adapters(model).values()} == {min(steps // every, length - 1)}


@every_method
@pytest.mark.parametrize("step", ["sam", "mgpo", "ggpo"])
def test_every_step_goes_with_every_adapter(method, step):
    if (
        not any(
            p.requires_grad for a in lb.adapters(adapted(method)).values() for p in a.parameters()
        )
        or method == "bitfit"
    ):
        pytest.skip("it moves no weight")
    model, x = adapted(method, step=step), inputs()
    optimizer = optimizer_of(model)
    first = lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    for _ in range(5):
        last = lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    assert last < first
    with lb.disabled(model):
        assert torch.equal(model(x), net()(x))


@every_method
def test_merging_after_training_many_times_never_drifts(method):
    model, x = moved(method, torch.bfloat16), inputs(torch.bfloat16)
    optimizer, base = optimizer_of(model), net(torch.bfloat16)
    for _ in range(5):
        lb.merge(model)
        lb.unmerge(model)
        lb.train_step(model, optimizer, lambda: model(x).float().pow(2).mean())
    with lb.disabled(model):
        assert numbers(base).items() <= numbers(model).items() and torch.equal(model(x), base(x))
