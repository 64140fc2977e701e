"""Taking adapters off, what trains in place in 16 bits, and refusals that say the reason."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import (
    CHAINS,
    TARGETS,
    adapted,
    bits,
    inputs,
    move,
    moved,
    net,
    numbers,
    snapshot,
    trained,
)
from test_interface_errors import assert_refused
from torch import nn
from torch.nn.utils import prune

import lora_book as lb
from lora_book.core.targets import choose

every_method = pytest.mark.parametrize("method", lb.methods())
NARROW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def assert_same(model: nn.Module, base: nn.Module) -> None:
    "Classes, attributes, hooks, flags, keys and bits are the base's."
    for one, other in zip(model.modules(), base.modules(), strict=True):
        assert type(one) is type(other) and set(vars(one)) == set(vars(other))
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(one._load_state_dict_pre_hooks) == len(other._load_state_dict_pre_hooks)
    assert numbers(model) == numbers(base)
    flags = [(n, p.requires_grad, p.dtype) for n, p in base.named_parameters()]
    assert [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()] == flags


# remove


@every_method
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_remove_gives_the_base_back(method, merged, dtype):
    base = net(dtype)
    base.norm.requires_grad_(False)
    base.first.register_forward_hook(lambda *args: None)
    model = move(adapted(method, base=copy.deepcopy(base)))
    if method in CHAINS:
        move(lb.advance(model), seed=4)
    if merged:
        lb.merge(model)
    assert lb.remove(model) is model
    assert_same(model, base)
    assert torch.equal(model(inputs(dtype)), base(inputs(dtype)))
    assert lb.adapters(lb.adapt(model, "lora", ["first"], r=1)).keys() == {"first"}


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_remove_without_targets(method):
    model = move(lb.adapt(net(), method))
    assert_same(lb.remove(model), net())


def test_remove_inside_a_wrapper_and_from_torch_s_encoders():
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
    model = move(lb.adapt(copy.deepcopy(base), "lora", ["linear1"], r=2))
    lb.remove(nn.ModuleDict({"inside": model}))
    assert_same(model, base)


def test_running_statistics_come_back():
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = lb.adapt(copy.deepcopy(base), "lora", ["0"], r=2)
    model.train()(inputs())
    assert numbers(model)["1.running_mean"] != numbers(base)["1.running_mean"]
    assert_same(lb.remove(model), base)


@every_method
def test_remove_refuses_a_plain_and_a_disabled_model(method):
    plain = net()
    assert_refused(lambda: lb.remove(plain), "adapted", model=plain)
    model = moved(method)
    with lb.disabled(model):
        assert_refused(lambda: lb.remove(model), "disabled", model=model)
    assert "remove" in lb.__all__


def test_the_advice_leads_to_the_second_adapter_alone():
    base, want = net(), moved("lora", seed=2)
    model = moved("lora", seed=1)
    error = assert_refused(lambda: lb.adapt(model, "lora", TARGETS, r=2), "remove", model=model)
    assert "unload" not in str(error)
    lb.remove(model)
    again = move(adapted("lora", seed=2, base=model))
    assert torch.equal(again(inputs()), want(inputs()))
    assert not torch.equal(again(inputs()), base(inputs()))


# What trains in place


@every_method
@NARROW
def test_what_trains_is_stored_in_32_bits_and_seen_in_the_model_s_type(method, dtype):
    model, x = adapted(method, dtype), inputs(dtype)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert model.head.weight.dtype is dtype and model(x).dtype is dtype
    assert model.state_dict().keys() >= net().state_dict().keys()
    assert torch.equal(model.head(x), net(dtype).head(x))
    move(model)
    with lb.disabled(model):
        assert numbers(net(dtype)).items() <= numbers(model).items()
        assert torch.equal(model(x), net(dtype)(x))


@NARROW
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("lora", {"target_modules": TARGETS, "head": "head"}),
        ("full", {}),
        ("bitfit", {"head": ["head", "norm"]}),
        ("paca", {"target_modules": TARGETS, "head": "head"}),
    ],
)
def test_no_step_of_adamw_gives_nan(method, given, dtype):
    for seed in range(15):
        model, x = lb.adapt(net(dtype, seed=seed), method, r=2, **given), inputs(dtype, seed=seed)
        optimizer = torch.optim.AdamW(lb.param_groups(model, 1e-3))
        for _ in range(2):
            lb.train_step(model, optimizer, lambda: (model(x).float() - 1).pow(2).mean())  # noqa: B023
        assert model(x).isfinite().all(), seed


def test_small_steps_add_up_in_bfloat16():
    model, x = adapted("lora", torch.bfloat16), inputs(torch.bfloat16)
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.SGD(trained(model), 1.0)
    for _ in range(100):
        for p in trained(model):
            p.grad = torch.full_like(p, 2e-5)
        optimizer.step()
    assert (model.head.weight != before).double().mean() > 0.5
    assert model(x).dtype is torch.bfloat16


@NARROW
@pytest.mark.parametrize("method", ["lora", "full"])
def test_32_bits_survive_saving_copying_pickling_and_conversions(method, dtype, tmp_path):
    given = {} if method == "full" else {"target_modules": TARGETS, "r": 2, "head": "head"}
    model, x = move(lb.adapt(net(dtype), method, **given)), inputs(dtype)
    lb.save(model, tmp_path)
    loaded = lb.load(net(dtype), tmp_path)
    assert numbers(loaded) == numbers(model) and torch.equal(loaded(x), model(x))
    twin = copy.deepcopy(model)
    assert numbers(twin) == numbers(model) and torch.equal(twin(x), model(x))
    head = pickle.loads(pickle.dumps(model.head if method == "lora" else model.norm))
    assert bits(dict(head.named_parameters())["bias"]) and head.bias.dtype is dtype
    want = model(x).detach()
    before = {n: bits(p) for n, p in model.named_parameters() if p.requires_grad}
    model.to(dtype).half().to(dtype)
    assert {n: bits(p) for n, p in model.named_parameters() if p.requires_grad} == before
    assert torch.equal(model(x), want)
    lb.merge(model, unload=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_a_float32_model_converted_later_keeps_its_head_wide():
    model, x = adapted("lora").half(), inputs(torch.float16)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert model(x).dtype is torch.float16 and model.head.weight.dtype is torch.float16
    assert model.double().head.weight.dtype is torch.float64


def test_a_tied_head_in_16_bits():
    model = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    base = copy.deepcopy(model.half())
    lb.adapt(model, "lora", ["c"], r=2, head="b")
    assert model["a"]._parameters["weight"] is model["b"]._parameters["weight"]
    assert model["a"](torch.arange(3)).dtype is torch.float16
    assert_same(lb.remove(move(model)), base)


def test_recurrent_layers_can_t_be_kept_in_32_bits():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4)}).half()
    assert_refused(
        lambda: lb.adapt(model, "lora", ["a"], r=2, head="rnn"),
        "rnn.weight",
        "float32",
        "model.float()",
        model=model,
    )
    lb.adapt(model.float(), "lora", ["a"], r=2, head="rnn")
    assert model["rnn"](torch.ones(2, 4))[0].sum().backward() is None


# Reasons


class Int8(torch.Tensor):
    "The least of a quantised weight: a linear map works, most other operators don't."

    @staticmethod
    def __new__(cls, q, s):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=s.dtype)

    def __init__(self, q, s):
        self.q, self.s = q, s

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kw=None):
        if f is torch.ops.aten.detach.default:
            return cls(args[0].q, args[0].s)
        raise NotImplementedError(f)


def quantised(layer: nn.Module) -> None:
    q, s = torch.ones(8, 8, dtype=torch.int8), torch.tensor(1.0)
    layer.weight = nn.Parameter(Int8(q, s), requires_grad=False)


def of_8_bits(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


REASONS = {
    "quantised": (quantised, "Int8"),
    "float8": (of_8_bits, "float8_e4m3fn"),
    "weight_norm": (nn.utils.parametrizations.weight_norm, "WeightNorm"),
    "weight_norm of a bias": (
        lambda layer: nn.utils.parametrizations.weight_norm(layer, "bias", dim=None),
        "WeightNorm",
    ),
    "old weight_norm": (nn.utils.weight_norm, "WeightNorm"),
    "spectral_norm": (nn.utils.spectral_norm, "SpectralNorm"),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        "L1Unstructured",
    ),
    "forward": (lambda layer: setattr(layer, "forward", layer.forward), "forward was replaced"),
    "meta": (lambda layer: layer.to("meta"), "load its weights"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize("method", ["lora", "full", "loldu"])
def test_a_refused_layer_is_told_why(name, method):
    change, word = REASONS[name]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[0])
    before = [(id(m), type(m), set(vars(m))) for m in model.modules()]
    flags = [(id(p), p.requires_grad) for p in model.parameters()]
    error = assert_refused(lambda: lb.adapt(model, method, ["0"], r=2), "'0", word)
    assert "not a linear map" not in str(error)
    assert [(id(m), type(m), set(vars(m))) for m in model.modules()] == before
    assert [(id(p), p.requires_grad) for p in model.parameters()] == flags


def test_nothing_found_says_what_is_almost_a_linear_map():
    model = nn.Sequential(nn.Linear(8, 8))
    quantised(model[0])
    for targets in ("all-linear", None):
        assert_refused(lambda t=targets: lb.adapt(model, "lora", t, r=2), "'0'", "Int8")


def test_a_subclass_without_an_arithmetic_of_its_own_is_a_weight():
    class Mine(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = Mine(model[0].weight.detach())
    assert lb.adapters(lb.adapt(model, "lora", ["0"], r=2)).keys() == {"0"}


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["1"], ["lora_A.default"]])
def test_peft_s_own_factors_are_no_targets(targets):
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    for call in (
        lambda: lb.adapt(model, "lora", targets, r=2),
        lambda: lb.adapt(base, "full"),
    ):
        assert_refused(call, "peft", "lora_A", "unload", model=model)
    assert lb.adapt(model.unload(), "lora", "all-linear", r=2)


def test_other_libraries_layers_are_known_by_their_factors():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].lora_A, model[0].lora_B = (
        nn.Parameter(torch.ones(2, 8)),
        nn.Parameter(torch.ones(8, 2)),
    )
    assert_refused(lambda: lb.adapt(model, "lora", ["1"], r=2), "'0'", "adapters", model=model)


@every_method
@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"alpha": 10**400}, "alpha"),
        ({"alpha": 10**5000}, "bits"),
        ({"alpha": 1e39}, "1e+39"),
        ({"alpha": 1e-50}, "1e-50"),
        ({"lr_ratio": 10**400}, "lr_ratio"),
        ({"r": 10**5000}, "r"),
        ({"seed": 10**5000}, "seed"),
    ],
)
def test_numbers_beyond_a_float(method, given, word):
    if "r" in given and method in ("full", "linear_probe", "bitfit"):
        return
    model = net()
    assert_refused(
        lambda: lb.adapt(model, method, TARGETS, head="head", **({"r": 2} | given)),
        word,
        model=model,
    )


# Names


@every_method
def test_advance_names_the_methods_that_have_links(method):
    model = moved(method)
    if method in CHAINS:
        assert lb.advance(model) is model
    else:
        assert_refused(lambda: lb.advance(model), method, *map(repr, CHAINS), model=model)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("sam", {"rh": 0.1}, ["'rho'"]),
        ("mgpo", {"sig": 1}, ["'sign'"]),
        ("lora", {"step": "mgpo", "emma": 0.1}, ["'ema'"]),
        ("cola", {"step": "sam", "chain_lenght": 2}, ["'chain_length'"]),
        ("cola", {"step": "sam", "rhoo": 2}, ["'rho'"]),
        ("lora", {"rho": 0.1}, ["rho", "'sam'", "'mgpo'", "step="]),
    ],
)
def test_an_unknown_option_names_the_nearest_of_all(method, given, words):
    model = net()
    assert_refused(lambda: lb.adapt(model, method, TARGETS, r=2, **given), *words, model=model)


def nested() -> nn.Module:
    inner = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    return nn.ModuleDict({"body": inner, "head": nn.Linear(4, 2), "overhead": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("head", "want"),
    [
        ("head", ["body.head", "head"]),
        ("body.head", ["body.head"]),
        (["overhead"], ["overhead"]),
        (["head", "body.head"], ["body.head", "head"]),
    ],
)
def test_heads_are_named_by_endings(head, want, tmp_path):
    model = lb.adapt(nested(), "lora", ["fc"], r=2, head=head)
    free = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert free - {"body.fc.adapters.all"} == set(want)
    with torch.random.fork_rng(devices=[]):
        base = nested()
    model = lb.adapt(copy.deepcopy(base), "lora", ["fc"], r=2, head=head)
    lb.save(move(model), tmp_path)
    assert numbers(lb.load(base, tmp_path)) == numbers(model)


def test_a_head_ending_that_matches_nothing():
    model = nested()
    for head in ("ead", "hea", "body.hed"):
        assert_refused(
            lambda h=head: lb.adapt(model, "lora", ["fc"], r=2, head=h), head, "head", model=model
        )
    assert_refused(
        lambda: lb.adapt(model, "lora", ["body.head"], r=2, head="head"), "target", model=model
    )


SPANS = st.tuples(st.integers(0, 23), st.integers(1, 24)).filter(lambda s: s[0] < s[1])


@given(st.lists(st.one_of(st.sampled_from(["", "[q]", "[k]", "[v]"]), SPANS), min_size=1))
@settings(max_examples=60, deadline=None)
def test_the_same_rows_are_one_target_and_shared_rows_an_error(parts):
    fused = {"": (0, 24), "[q]": (0, 8), "[k]": (8, 16), "[v]": (16, 24)}
    rows = [fused.get(part, part) for part in parts]
    entries = [f"qkv{p}" if isinstance(p, str) else f"qkv[{p[0]}:{p[1]}]" for p in parts]
    used = [0] * 24
    for start, stop in set(rows):
        for i in range(start, stop):
            used[i] += 1
    model = net()
    if math.prod(n < 2 for n in used):
        (target,) = choose(model, entries)
        assert sorted(view.rows or (0, 24) for view in target.views.values()) == sorted(set(rows))
    else:
        assert_refused(lambda: lb.adapt(model, "lora", entries, r=1), "share rows", model=model)


def test_the_first_name_of_the_same_rows_stays():
    for targets, want in (
        (["qkv[q]", "qkv[0:8]"], ["qkv[q]"]),
        (["qkv[0:8,q]"], ["qkv[0:8]"]),
        (["qkv", "qkv[0:24]", "qkv"], ["qkv"]),
    ):
        assert list(lb.adapters(lb.adapt(net(), "lora", targets, r=2))) == want


def test_a_refusal_leaves_what_trains_in_place_alone():
    model = net(torch.float16)
    before = snapshot(model)
    with pytest.raises(lb.LoraBookError):
        lb.adapt(model, "lora", TARGETS, r=2, head="head", alpha=-1)
    assert snapshot(model) == before
