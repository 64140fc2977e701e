"""The public interface from outside, for every method: what design.md promises, called by exactly
those names.
"""

import copy
import random
import re

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import (
    CHAINS,
    DRAWING,
    SITES,
    TARGETS,
    Net,
    adapted,
    bits,
    gradients,
    inputs,
    largest,
    move,
    moved,
    net,
    numbers,
    snapshot,
    trained,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_book as lb
from lora_book.lab.models import load_model

METHODS = lb.methods()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 2e-2}
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# Names


def test_the_contract_s_names_are_there():
    names = (
        "methods adapt adapters delta n_trainable param_groups train_step advance merge unmerge"
        " disabled save load to_peft from_peft LoraBookError"
    )
    assert all(callable(getattr(lb, name)) for name in names.split())
    assert (
        isinstance(METHODS, tuple)
        and METHODS[:4] == ("full", "linear_probe", "bitfit", "lora")
        and len(set(METHODS)) == len(METHODS)
    )


@every_method
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (40, 8)], ids=str)
def test_what_follows_a_layer_may_change_its_output_in_place(method, shape):
    def results(inplace):
        torch.manual_seed(0)
        model = lb.adapt(nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace)), method, ["0"], r=2)
        g = torch.Generator().manual_seed(1)
        leaves = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in leaves:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        x = torch.randn(shape, generator=g).requires_grad_()
        y = model(x)
        return [y.detach().clone(), *torch.autograd.grad(y.square().sum(), [x, *leaves])]

    assert all(torch.equal(a, b) for a, b in zip(results(False), results(True), strict=True))


@every_method
def test_adapt_works_in_place_and_names_its_sites(method):
    base = net()
    model = lb.adapt(base, method, TARGETS, r=2, head="head")
    assert model is base
    assert list(lb.adapters(model)) == SITES == list(lb.delta(model))
    shapes = {name: tuple(change.shape) for name, change in lb.delta(model).items()}
    assert shapes == dict.fromkeys(SITES, (8, 8))
    assert all(
        not change.requires_grad and change.dtype in (torch.float32, torch.float64)
        for change in lb.delta(model).values()
    )
    assert lb.adapters(net()) == {}


@every_method
@every_dtype
def test_the_start_is_the_base(method, dtype):
    x = inputs(dtype)
    model = adapted(method, dtype)
    assert largest(model(x), net(dtype)(x)) <= TOLERANCE[dtype]
    assert all(change.abs().max() <= TOLERANCE[dtype] for change in lb.delta(model).values())


@every_method
@every_dtype
def test_numbers_are_wide_and_outputs_keep_their_type(method, dtype):
    model, x = moved(method, dtype), inputs(dtype)
    assert model(x).dtype is dtype
    for adapter in lb.adapters(model).values():
        assert all(
            torch.finfo(p.dtype).bits >= 32 for p in adapter.parameters() if p.is_floating_point()
        )
    assert all(torch.finfo(change.dtype).bits >= 32 for change in lb.delta(model).values())
    assert all(
        p.grad is None or torch.isfinite(p.grad).all()
        for p in trained(model)
        if gradients(model, x)
    )


@every_method
@every_dtype
def test_every_trained_number_gets_a_gradient_and_nothing_else_does(method, dtype):
    model = moved(method, dtype)
    wanted = {id(p) for p in trained(model)}
    gradients(model, inputs(dtype))
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in wanted), name


# Choosing


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (["first"], ["first"]),
        (["qkv"], ["qkv"]),
        ("first|proj", ["first", "proj"]),
        (r".*o.*j", ["proj"]),
        ("all-linear", ["first", "qkv", "proj"]),
        (["qkv[q,v]"], ["qkv[q]", "qkv[v]"]),
        (["qkv[k]", "qkv[0:3]"], ["qkv[k]", "qkv[0:3]"]),
        (("proj", "first"), ["first", "proj"]),
        (["qkv[0:24]"], ["qkv[0:24]"]),
        (["first", "first"], ["first"]),
        ({"proj"}, ["proj"]),
    ],
)
def test_the_language_of_targets(targets, want):
    model = lb.adapt(net(), "lora", targets, r=2)
    assert sorted(lb.adapters(model)) == sorted(want)
    rows = {"qkv": 24, "qkv[0:3]": 3, "qkv[0:24]": 24}
    assert {name: change.shape[0] for name, change in lb.delta(model).items()} == {
        name: rows.get(name, 8) for name in want
    }


def test_endings_match_whole_parts():
    model = nn.ModuleDict(
        {
            "fc1": nn.Linear(4, 4),
            "c1": nn.Linear(4, 4),
            "deep": nn.ModuleDict({"c1": nn.Linear(4, 4)}),
        }
    )
    assert list(lb.adapters(lb.adapt(model, "lora", ["c1"], r=1))) == ["c1", "deep.c1"]


def test_the_usual_targets_of_real_architectures():
    bert = lb.adapt(load_model("tiny_bert"), "lora", r=2)
    assert [n for n in lb.adapters(bert)][:2] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.value",
    ]
    vit = lb.adapt(load_model("tiny_vit"), "lora", r=2)
    assert list(lb.adapters(vit))[:2] == ["blocks.0.attn.qkv[q]", "blocks.0.attn.qkv[v]"]
    gpt = lb.adapt(load_model("tiny_gpt2"), "lora", r=2)
    assert list(lb.adapters(gpt))[:2] == [
        "transformer.h.0.attn.c_attn[q]",
        "transformer.h.0.attn.c_attn[v]",
    ]
    assert all(change.shape == (32, 32) for change in lb.delta(gpt).values())


@pytest.mark.parametrize(
    ("name", "classes", "head"),
    [
        ("tiny_bert", 3, "classifier"),
        ("tiny_vit", 4, "head"),
        ("tiny_gpt2", None, "lm_head"),
        ("tiny_llama", None, "lm_head"),
        ("tiny_t5", None, "lm_head"),
    ],
)
def test_all_linear_leaves_the_head_out(name, classes, head):
    model = load_model(name, classes)
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    names = list(lb.adapters(lb.adapt(model, "lora", "all-linear", r=2)))
    assert names == [n for n in linear if n.split(".")[0] != head]


def test_all_linear_leaves_a_wrapped_model_s_head_out():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert list(lb.adapters(lb.adapt(Wrapper(net()), "lora", "all-linear", r=2))) == [
        "module.first",
        "module.qkv",
        "module.proj",
    ]


def test_a_root_that_is_a_linear_map():
    model, x = nn.Linear(6, 4), inputs(shape=(3, 6))
    base = copy.deepcopy(model)
    move(lb.adapt(model, "lora", "all-linear", r=2))
    ((name, change),) = lb.delta(model).items()
    assert largest(model(x), base(x) + x @ change.T) < 1e-5
    assert name == "" and lb.merge(model).keys() == {""}
    assert (
        type(lb.unmerge(model)) is not nn.Linear
        and lb.merge(model, unload=True) is not None
        and type(model) is nn.Linear
    )


@every_method
def test_a_sequential_and_its_numbered_names(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    lb.adapt(model, method, ["0"], r=2, head="2")
    assert list(lb.adapters(model)) == ["0"] and model(inputs()).shape == (5, 3)


def test_modules_with_two_names_are_adapted_once_and_merge():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 2)})
    model["b"] = model["a"]
    lb.adapt(model, "lora", ["b"], r=2)
    assert list(lb.adapters(model)) == ["a"] and model["a"] is model["b"]
    move(model)
    x = inputs(shape=(3, 4))
    want = model["b"](x)
    lb.merge(model)
    assert largest(model["b"](x), want) < 1e-5


# What each method changes


@every_method
def test_outputs_are_the_base_s_plus_x_delta(method):
    base, x = nn.Sequential(nn.Linear(8, 9, bias=False, dtype=torch.float64)), inputs(torch.float64)
    if method == "bitfit":
        pytest.skip("it changes biases alone")
    model = lb.adapt(copy.deepcopy(base), method, ["0"], r=3, alpha=5.0)
    if lb.n_trainable(model):
        move(model)
    want = x @ (base[0].weight + lb.delta(model)["0"]).T
    assert largest(model(x), want) < 1e-10
    assert largest(lb.adapters(model)["0"](x, base[0].weight), x @ lb.delta(model)["0"].T) < 1e-10


@every_method
def test_double_computes_in_float64(method):
    model = moved(method, torch.float32)
    before = {name: change.double() for name, change in lb.delta(model).items()}
    model.double()
    merged = copy.deepcopy(model)
    lb.merge(merged)
    x = inputs(torch.float64)
    assert model(x).dtype is torch.float64 and largest(model(x), merged(x)) < 1e-9
    assert all(
        change.dtype is torch.float64 and largest(change, before[name]) < 1e-5
        for name, change in lb.delta(model).items()
    )


def test_alpha_over_r_scales_every_method():
    for method in METHODS:
        one, two = (adapted(method, torch.float64, alpha=a, targets=["first"]) for a in (2.0, 4.0))
        if not {"A", "B"} & {name for name, _ in lb.adapters(one)["first"].named_parameters()}:
            continue
        with torch.no_grad():
            for model in (one, two):
                for p in lb.adapters(model)["first"].parameters():
                    p.fill_(0.25)
        a, b = (lb.delta(model)["first"] for model in (one, two))
        if method not in ("pissa", "dora", "lora_sb", "oft", "mora"):
            assert a.abs().max() > 0 and largest(2 * a, b) < 1e-12, method


def test_full_bitfit_and_probe_train_what_they_say():
    model = lb.adapt(net(), "full")
    assert lb.n_trainable(model) == sum(p.numel() for p in net().parameters())
    model = lb.adapt(net(), "bitfit")
    assert lb.n_trainable(model) == sum(
        m.bias.numel() for m in net().modules() if isinstance(m, nn.Linear)
    )
    model = lb.adapt(net(), "linear_probe", head="head")
    assert lb.n_trainable(model) == 0 and lb.n_trainable(model, heads=True) == 8 * 3 + 3
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]


@every_method
def test_heads_are_counted_only_when_asked_for(method):
    model = adapted(method)
    assert lb.n_trainable(model, heads=True) - lb.n_trainable(model) == 27
    assert (
        lb.n_trainable(model, heads=True)
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        == sum(p.numel() for p in trained(model))
    )


# Parameter groups


@every_method
def test_every_trained_parameter_is_in_one_group(method):
    model = adapted(method)
    ids = [id(p) for p in trained(model)]
    assert len(ids) == len(set(ids)) and set(ids) == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    torch.optim.AdamW(lb.param_groups(model, 1e-3))
    torch.optim.SGD(lb.param_groups(model, 1e-3), momentum=0.9)


@given(lr=st.floats(1e-6, 1.0), ratio=st.floats(1.0, 64.0))
@settings(max_examples=20, deadline=None)
def test_lora_plus_gives_b_a_rate_of_its_own(lr, ratio):
    for model in (
        adapted("lora_plus", lr_ratio=ratio),
        adapted("lora", lr_ratio=ratio),
        adapted("cola", lr_ratio=ratio),
    ):
        rates = {
            id(p): group["lr"] for group in lb.param_groups(model, lr) for p in group["params"]
        }
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert rates[id(p)] == pytest.approx(lr * ratio if name.endswith(".B") else lr)


# Off and on again


@every_method
@every_dtype
def test_disabled_is_the_base_bit_for_bit(method, dtype):
    base, model, x = net(dtype), moved(method, dtype), inputs(dtype)
    out, before = model(x).detach(), numbers(model)
    for merged in (False, True):
        if merged:
            lb.merge(model)
        with lb.disabled(model) as same, lb.disabled(model):
            assert same is model and torch.equal(model(x), base(x))
        with pytest.raises(RuntimeError, match="mine"), lb.disabled(model):
            assert torch.equal(model(x), base(x))
            raise RuntimeError("mine")
        assert largest(model(x), out) <= (TOLERANCE[dtype] if merged else 0)
    lb.unmerge(model)
    assert torch.equal(model(x), out) and numbers(model) == before


def test_disabled_full_and_bitfit_without_targets_are_the_base():
    x = inputs()
    for method in ("full", "bitfit"):
        model = move(lb.adapt(net(), method))
        want = model(x).detach()
        with lb.disabled(model):
            assert torch.equal(model(x), net()(x))
        assert torch.equal(model(x), want) and not torch.equal(want, net()(x))


def test_running_statistics_belong_to_the_base():
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "body": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
                "head": nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)),
            }
        )

    def run(model, x):
        return model["head"](model["body"](x))

    with torch.random.fork_rng(devices=[]):
        base = make()
        model = make()
    lb.adapt(model, "lora", ["body.0"], r=2, head="head")
    x = inputs() * 3 + 1
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.1))
    model.train()
    for _ in range(3):
        lb.train_step(model, optimizer, lambda: run(model, x).pow(2).mean())
    model.eval(), base.eval()
    want, before = run(model, x), numbers(model)
    assert not torch.equal(want, run(base, x))
    with lb.disabled(model):
        assert torch.equal(run(model, x), run(base, x))
        model.train()
        run(model, x)
        model.eval()
    assert torch.equal(run(model, x), want) and numbers(model) == before


@every_method
@every_dtype
def test_merge_folds_the_weights_in_and_unmerge_brings_every_bit_back(method, dtype):
    model, x, base = moved(method, dtype), inputs(dtype), net(dtype)
    before, want = numbers(model), model(x).detach()
    changes = lb.delta(model)
    report = lb.merge(model)
    assert list(report) == SITES and all(
        isinstance(error, float) and 0 <= error < 0.1 for error in report.values()
    )
    assert largest(model(x), want) <= TOLERANCE[dtype]
    exact = base.qkv.weight.detach().double()
    exact[:8] += changes["qkv[q]"].double()
    exact[16:] += changes["qkv[v]"].double()
    error = (model.qkv.weight.double() - exact).abs()
    assert error[:8].max().item() == pytest.approx(report["qkv[q]"], abs=1e-15) and error[
        16:
    ].max().item() == pytest.approx(report["qkv[v]"], abs=1e-15)
    assert bits(model.qkv.weight[8:16]) == bits(base.qkv.weight[8:16])
    assert all(torch.equal(lb.delta(model)[name], change) for name, change in changes.items())
    assert lb.unmerge(model) is model
    assert numbers(model) == before and torch.equal(model(x), want)


@every_method
def test_merging_twice_changes_nothing(method):
    model = moved(method)
    lb.merge(model)
    state = snapshot(model)
    with pytest.raises(lb.LoraBookError):
        lb.merge(model)
    assert snapshot(model) == state
    lb.unmerge(model)
    with pytest.raises(lb.LoraBookError):
        lb.unmerge(model)


@every_method
def test_unload_gives_back_plain_modules(method):
    base, model, x = net(), net(), inputs()
    model.norm.requires_grad_(False)
    move(lb.adapt(model, method, TARGETS, r=2, head="head"))
    want = model(x).detach()
    lb.merge(model, unload=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys() and largest(model(x), want) < 2e-5
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "norm.weight",
        "norm.bias",
    }
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in base.modules()]
    assert lb.adapters(model) == {} and list(
        lb.adapters(lb.adapt(model, "lora", ["first"], r=1))
    ) == ["first"]


def test_gpt2_s_tied_output_is_not_merged():
    model = lb.adapt(load_model("tiny_gpt2"), "lora", ["lm_head"], r=2)
    move(model)
    state = snapshot(model)
    with pytest.raises(ValueError, match="lm_head"):
        lb.merge(model)
    assert snapshot(model) == state


# Seeds


@every_method
def test_the_same_seed_gives_the_same_bits_and_the_global_state_rests(method):
    states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    one, two = adapted(method, seed=5), adapted(method, seed=5)
    assert numbers(one) == numbers(two)
    if method in CHAINS:
        lb.advance(one), lb.advance(two)
        assert numbers(one) == numbers(two)
    again = [adapted(method, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert numbers(again[0]) == numbers(again[1])
    assert (
        torch.equal(states[0], torch.get_rng_state())
        and states[1] == numpy.random.get_state()[1].tolist()
        and states[2] == random.getstate()
    )


@pytest.mark.parametrize("method", [m for m in DRAWING if m in METHODS])
def test_other_seeds_draw_other_numbers(method):
    def change(**source):
        return [bits(d) for d in lb.delta(moved(method, **source)).values()]

    assert change(seed=5) == change(seed=5) != change(seed=6)
    generator = torch.Generator().manual_seed(9)
    assert change(generator=generator) != change(generator=generator)
    model = adapted(method)
    first, second = (dict(lb.adapters(model)[name].state_dict()) for name in ("first", "proj"))
    if method != "vera":
        assert any(not torch.equal(first[key], second[key]) for key in first)


# Surviving what PyTorch does to models


@every_method
def test_a_deep_copy_is_a_model_of_its_own(method):
    model, x = moved(method), inputs()
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x)) and numbers(other) == numbers(model)
    want = model(x).detach()
    move(other, seed=11)
    assert torch.equal(model(x), want) and not torch.equal(other(x), want)
    lb.merge(other)
    assert torch.equal(model(x), want)


@every_method
def test_a_state_dict_fits_a_model_adapted_the_same_way(method, tmp_path):
    model, x = moved(method), inputs()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = adapted(method)
    fresh(x)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), model(x)) and all(
        torch.equal(a, b)
        for a, b in zip(lb.delta(fresh).values(), lb.delta(model).values(), strict=True)
    )


@pytest.mark.parametrize("method", CHAINS)
def test_a_state_dict_carries_a_chain_s_links(method):
    model, x = moved(method), inputs()
    for seed in (1, 2):
        lb.advance(model)
        move(model, seed)
    fresh = adapted(method)
    fresh(x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    lb.advance(model), lb.advance(fresh)
    assert numbers(fresh) == numbers(model)


@every_method
def test_an_adapter_s_own_calls_reach_its_layer(method):
    model, other, x = moved(method), move(adapted(method), 9), inputs()
    model(x), other(x)
    if method in CHAINS:
        want = model(x).detach()
        for adapter in lb.adapters(model).values():
            adapter.advance()
        assert largest(model(x), want) < 1e-5
        lb.advance(other)
        other(x)
    for name, adapter in lb.adapters(other).items():
        adapter.load_state_dict(lb.adapters(model)[name].state_dict())
    other.head.load_state_dict(model.head.state_dict())
    assert torch.equal(other(x), model(x))


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_on_their_layer_s_mode(method, training, tmp_path):
    base = net().train(training)
    base.norm.train(not training)
    before = [module.training for module in base.modules()]
    model = move(lb.adapt(copy.deepcopy(base), method, TARGETS, r=2, head="head"))
    lb.save(model, tmp_path)
    for one in (model, lb.load(copy.deepcopy(base), tmp_path)):
        assert {a.training for a in lb.adapters(one).values()} == {training}
        lb.merge(one, unload=True)
        assert [module.training for module in one.modules()] == before


@every_method
def test_moving_between_types_keeps_the_function(method):
    model, x = moved(method), inputs()
    want = model(x).detach()
    model.double()
    assert largest(model(x.double()), want) < 1e-4
    model.float()
    assert largest(model(x), want) < 1e-4
    model.bfloat16()
    assert model(x.bfloat16()).dtype is torch.bfloat16 and largest(model(x.bfloat16()), want) < 0.2


@every_method
def test_inputs_of_every_shape(method):
    model = moved(method)
    flat = inputs(shape=(24, 8))
    want = model(flat)
    assert largest(model(flat.view(2, 3, 4, 8)), want.view(2, 3, 4, 3)) < 1e-5
    assert largest(model(flat[0]), want[0]) < 1e-5 and model(flat[0]).shape == (3,)
    assert model(flat[:0]).shape == (0, 3) and model(flat[:0].view(0, 4, 8)).shape == (0, 4, 3)
    turned = flat.t().contiguous().t()
    assert not turned.is_contiguous() and largest(model(turned), want) < 1e-5
    assert largest(model(flat[::3]), want[::3]) < 1e-5
    model(flat[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.abs().max() > 0 for p in trained(model))


@every_method
def test_a_layer_used_twice_in_one_graph(method):
    model, x = moved(method, torch.float64), inputs(torch.float64)
    both = gradients_of(model, lambda: model(x).pow(2).sum() + model(2 * x).sin().sum())
    one, two = (
        gradients_of(model, lambda: model(x).pow(2).sum()),
        gradients_of(model, lambda: model(2 * x).sin().sum()),
    )
    assert all(largest(b, a + c) < 1e-10 for b, a, c in zip(both, one, two, strict=True))


def gradients_of(model, loss) -> list:
    return torch.autograd.grad(loss(), trained(model))


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method, reentrant):
    model, x = moved(method, torch.float64), inputs(torch.float64).requires_grad_()
    params = [x, *trained(model)]
    want = torch.autograd.grad(model(x).pow(2).sum(), params)
    loss = checkpoint(model, x, use_reentrant=reentrant).pow(2).sum()
    loss.backward()
    assert all(largest(p.grad, g) < 1e-12 for p, g in zip(params, want, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_llama"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_checkpointing_gives_the_same_gradients(name, reentrant):
    ids = torch.arange(12).reshape(2, 6) + 3
    found = []
    for on in (False, True):
        model = load_model(name)
        if on:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        move(lb.adapt(model, "lora", r=2))
        model.train()
        model(input_ids=ids)[0].pow(2).sum().backward()
        found.append([p.grad for p in trained(model)])
    assert all(
        g is not None and h is not None and largest(g, h) <= 1e-4 * (1 + g.abs().max())
        for g, h in zip(*found, strict=True)
    )


@every_method
def test_autocast(method):
    model, x = moved(method), inputs(shape=(16, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        loss = out.float().pow(2).mean()
    loss.backward()
    assert out.dtype is torch.bfloat16 and largest(out, model(x)) < 0.1
    assert all(
        p.grad is not None and p.grad.dtype is p.dtype and torch.isfinite(p.grad).all()
        for p in trained(model)
    )


@every_method
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_training_after_quiet_evaluation(method, quiet):
    model, x = moved(method), inputs()
    if method in CHAINS:
        with quiet():
            lb.advance(model)
        move(model)
    model.double().float()
    with quiet():
        want = model(x).clone()
    optimizer = torch.optim.AdamW(lb.param_groups(model, 1e-3))
    lb.train_step(model, optimizer, lambda: model(x).pow(2).sum())
    assert not torch.equal(model(x), want)


@every_method
def test_adapting_and_merging_in_inference_mode_leaves_a_model_that_trains(method):
    base = net()
    with torch.inference_mode():
        model = adapted(method, base=base)
        model(inputs())
        lb.merge(model)
        lb.unmerge(model)
    assert all(g.abs().sum() >= 0 for g in gradients(model, inputs()))


def test_compiled_models_compute_and_learn_the_same():
    x = inputs(shape=(4, 8))
    for method in ("full", "bitfit", "lora", "paca", "c3la", "loldu"):
        model = moved(method)
        run = torch.compile(model, backend="aot_eager")
        want = gradients(model, x)
        out = run(x)
        assert largest(out, model(x)) < 1e-5
        model.zero_grad()
        out.pow(2).sum().backward()
        assert all(largest(p.grad, g) < 1e-4 for p, g in zip(trained(model), want, strict=True)), (
            method
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["full", "lora", "cola"])
def test_a_compiled_model_is_adapted_with_its_head(method):
    base, x = torch.compile(net(), backend="eager"), inputs()
    model = move(lb.adapt(base, method, TARGETS, r=2, head="_orig_mod.head"))
    assert list(lb.adapters(model)) == [f"_orig_mod.{name}" for name in SITES]
    want = model(x).detach()
    with lb.disabled(model):
        assert torch.equal(model(x), net()(x))
    lb.merge(model, unload=True)
    assert largest(model(x), want) < 1e-5 and lb.adapters(model) == {}


def test_accelerate_prepares_and_trains():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, x = adapted("cola", reset_every=2), inputs()
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.1))
    ready, optimizer = accelerator.prepare(model, optimizer)
    losses = [
        lb.train_step(
            ready, optimizer, lambda: ready(x).pow(2).mean(), backward=accelerator.backward
        ).item()
        for _ in range(4)
    ]
    assert losses[-1] < losses[0] and lb.adapters(model)["first"].done == 2
    lb.merge(ready)
    lb.unmerge(ready)


class Outer(nn.Module):
    "A wrapper as DataParallel's, with a layer of its own."

    def __init__(self, module):
        super().__init__()
        self.module, self.own = module, nn.Linear(3, 3)

    def forward(self, x):
        return self.own(self.module(x))


@every_method
def test_a_wrapped_model_answers_like_the_model_inside(method, tmp_path):
    inner, x = moved(method), inputs()
    outer = Outer(inner)
    assert list(lb.adapters(outer)) == list(lb.delta(outer)) == [f"module.{name}" for name in SITES]
    assert lb.n_trainable(outer) == lb.n_trainable(inner)
    assert [id(p) for p in trained(outer)] == [id(p) for p in trained(inner)]
    with lb.disabled(outer):
        assert torch.equal(inner(x), net()(x))
    want = inner(x).detach()
    assert list(lb.merge(outer)) == list(lb.adapters(outer))
    lb.unmerge(outer)
    lb.save(outer, tmp_path)
    assert torch.equal(lb.load(net(), tmp_path)(x), want)
    own = snapshot(outer)["tensors"]["own.weight"]
    lb.train_step(
        outer, torch.optim.AdamW(lb.param_groups(outer, 0.1)), lambda: inner(x).pow(2).mean()
    )
    assert snapshot(outer)["tensors"]["own.weight"] == own
    lb.merge(outer, unload=True)
    assert type(inner.first) is nn.Linear and lb.adapters(outer) == {}


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_vit", "tiny_bert"])
@every_method
def test_real_architectures_merge_and_disable(method, name):
    x = inputs(shape=(2, 1, 28, 28)) if name == "tiny_vit" else torch.arange(12).reshape(2, 6) + 3
    head = (
        {"head": "head"}
        if name == "tiny_vit"
        else {"head": "pooler"}
        if name == "tiny_bert"
        else {"head": "transformer.ln_f"}
    )
    model = lb.adapt(
        load_model(name),
        method,
        None if method not in ("full", "bitfit") else "all-linear",
        r=2,
        **head,
    )

    def run(m):
        out = m(x)
        return out if isinstance(out, torch.Tensor) else out[0]

    move(model, size=0.05)
    want = run(model).detach()
    with lb.disabled(model), torch.no_grad():
        assert torch.equal(run(model), run(load_model(name)))
    if lb.adapters(model):
        lb.merge(model)
        assert largest(run(model), want) <= 2e-4 * (1 + want.abs().max())
        lb.unmerge(model)
        assert torch.equal(run(model).detach(), want)


def test_torch_s_encoder_layers_call_their_linear_maps():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
        ).eval()
    model, x = copy.deepcopy(base), inputs(shape=(2, 4, 8))
    hidden = torch.tensor([[False, False, False, True], [False, False, True, True]])
    before = snapshot(model)
    move(lb.adapt(model, "lora", "all-linear", r=2))
    assert sorted({name.split(".")[-1] for name in lb.adapters(model)}) == ["linear1", "linear2"]
    trained_out = model(x, src_key_padding_mask=hidden)
    trained_out.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model))
    with torch.no_grad():
        assert largest(model(x, src_key_padding_mask=hidden)[~hidden], trained_out[~hidden]) < 1e-5
        with lb.disabled(model):
            assert torch.equal(model(x), base(x)) and torch.equal(
                model(x, src_key_padding_mask=hidden), base(x, src_key_padding_mask=hidden)
            )
        assert not torch.allclose(model(x), base(x))
    lb.merge(model, unload=True)
    after = snapshot(model)
    assert [m[:4] for m in after["modules"].values() if m[3]["_forward_pre_hooks"]] == []
    assert {n: m[2] for n, m in before["modules"].items()} == {
        n: m[2] for n, m in after["modules"].items()
    }
    with torch.no_grad():
        assert largest(model(x), trained_out.detach()) < 10


def test_layers_are_called_by_keyword_too():
    model = lb.adapt(nn.Sequential(nn.Linear(4, 4)), "lora", ["0"], r=2)
    x = inputs(shape=(2, 4))
    assert torch.equal(model[0](input=x), model[0](x))


def test_hooks_and_subclasses_of_the_user_stay():
    class Mine(nn.Linear):
        extra = "kept"

    model, calls = nn.Sequential(Mine(4, 4)), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    model[0].note = "mine"
    lb.adapt(model, "lora", ["0"], r=2)
    model(inputs(shape=(1, 4)))
    assert (
        calls == [1]
        and isinstance(model[0], Mine)
        and model[0].extra == "kept"
        and model[0].note == "mine"
    )
    lb.merge(model, unload=True)
    assert type(model[0]) is Mine and model[0].note == "mine" and len(model[0]._forward_hooks) == 1


def test_narrow_adapters_when_told_so_still_give_wide_changes():
    model = lb.adapt(net(), "lora", ["first"], r=2, dtype=torch.float64)
    assert (
        lb.delta(model)["first"].dtype is torch.float64 and model(inputs()).dtype is torch.float32
    )
    narrow = lb.adapt(net(), "lora", ["first"], r=2, dtype=torch.bfloat16)
    assert lb.delta(narrow)["first"].dtype is torch.float32


# LoRA is PEFT's LoRA


@given(r=st.integers(1, 8), alpha=st.floats(0.1, 16), seed=st.integers(0, 99), rslora=st.booleans())
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_lora_equals_peft(r, alpha, seed, rslora):
    from peft import LoraConfig, get_peft_model

    x, weights = inputs(seed=seed), inputs(shape=(5, 24), seed=seed + 1)
    base = nn.Sequential(net(seed=seed).qkv)
    ours = move(
        lb.adapt(
            copy.deepcopy(base), "rslora" if rslora else "lora", ["0"], r=r, alpha=alpha, seed=seed
        ),
        seed,
    )
    with torch.random.fork_rng(devices=[]):
        theirs = get_peft_model(
            base,
            LoraConfig(
                r=r, lora_alpha=alpha, target_modules=["0"], lora_dropout=0.0, use_rslora=rslora
            ),
        )
    layer, adapter = theirs.base_model.model[0], lb.adapters(ours)["0"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.A)
        layer.lora_B["default"].weight.copy_(adapter.B)
    outs = ours(x), theirs(x)
    for out in outs:
        (out * weights).mean().backward()
    pairs = [
        outs,
        (adapter.A.grad, layer.lora_A["default"].weight.grad),
        (adapter.B.grad, layer.lora_B["default"].weight.grad),
    ]
    assert all(largest(own, peft) <= 1e-6 * (1 + peft.abs().max()) for own, peft in pairs)


# Imports


def test_importing_the_package_imports_no_heavy_library():
    import subprocess
    import sys

    heavy = [
        "transformers",
        "timm",
        "datasets",
        "matplotlib",
        "sklearn",
        "pandas",
        "peft",
        "accelerate",
        "scipy",
        "torchvision",
        "IPython",
    ]
    code = f"import sys, lora_book; print([n for n in {heavy} if n in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_parts_are_attributes_of_the_package():
    assert (
        lb.theory.smoothness.smoothness_ratio and lb.core.errors.LoraBookError is lb.LoraBookError
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lb.__version__) and issubclass(Net, nn.Module)
