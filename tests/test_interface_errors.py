"""Whatever the interface refuses: the error's kinds, the name in its message, and a model that is
exactly what it was.
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import CHAINS, TARGETS, Net, adapted, inputs, move, moved, net, snapshot
from torch import nn

import lora_book as lb
from lora_book.lab.models import load_model

METHODS = lb.methods()
every_method = pytest.mark.parametrize("method", METHODS)


def assert_refused(call, *words: str, model: nn.Module | None = None):
    """The call raises a LoraBookError that is a ValueError, TypeError or KeyError, says these
    words, and leaves the model alone.
    """
    before = None if model is None else snapshot(model)
    state = torch.get_rng_state()
    with pytest.raises(lb.LoraBookError) as caught:
        call()
    assert isinstance(caught.value, (ValueError, TypeError, KeyError))
    for word in words:
        assert word in str(caught.value), f"{word!r} isn't in {caught.value}"
    assert torch.equal(state, torch.get_rng_state())
    assert model is None or snapshot(model) == before
    return caught.value


class Mixed(nn.Module):
    "A model with something of everything that isn't a plain linear map."

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.conv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)
        self.mha, self.table = nn.MultiheadAttention(8, 2), nn.Embedding(4, 8)
        self.two, self.lazy, self.norm = nn.Bilinear(8, 8, 8), nn.LazyLinear(8), nn.BatchNorm1d(8)
        self.old, self.new = (
            torch.nn.utils.weight_norm(nn.Linear(8, 8)),
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        )
        self.whole = nn.Linear(8, 8)
        self.whole.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)
        self.own = nn.Linear(8, 8)
        self.own.forward = lambda x: x
        self.fc1.weight.requires_grad_(False)
        self.fc2.register_forward_hook(lambda *args: None)
        self.head = nn.Linear(8, 2)


@pytest.fixture
def mixed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed()


# adapt


@every_method
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, ["r", "0"]),
        ({"r": -3}, ["-3"]),
        ({"r": 9}, ["9", "8"]),
        ({"r": 2.0}, ["2.0"]),
        ({"r": True}, ["True"]),
        ({"r": "8"}, ["'8'"]),
        ({"r": None}, ["None"]),
        ({"alpha": 0}, ["alpha", "0"]),
        ({"alpha": -1.5}, ["-1.5"]),
        ({"alpha": math.nan}, ["nan"]),
        ({"alpha": math.inf}, ["inf"]),
        ({"alpha": "16"}, ["'16'"]),
        ({"seed": -1}, ["-1"]),
        ({"seed": 1.5}, ["1.5"]),
        ({"alhpa": 4}, ["alhpa", "alpha"]),
        ({"rank": 4}, ["rank"]),
        ({"step": "sma"}, ["sma", "sam"]),
        ({"step": ["sam"]}, ["sam"]),
        ({"lr_ratio": 0}, ["0"]),
        ({"lr_ratio": "16"}, ["'16'"]),
        ({"dtype": "float32"}, ["'float32'"]),
        ({"dtype": torch.int64}, ["int64"]),
        ({"generator": 3}, ["3"]),
        ({"generator": np.random.default_rng(0)}, ["Generator"]),
        ({"head": "haed"}, ["haed", "head"]),
        ({"head": ["first", "nope"]}, ["nope"]),
        ({"head": 3}, ["3"]),
        ({"head": [3]}, ["3"]),
        ({"head": ""}, ["''"]),
        ({"head": "first"}, ["first"]),
        ({"target_modules": ["frist"]}, ["frist", "first"]),
        ({"target_modules": "qkvv"}, ["qkvv", "qkv"]),
        ({"target_modules": "first["}, ["first["]),
        ({"target_modules": []}, ["empty"]),
        ({"target_modules": 7}, ["7"]),
        ({"target_modules": [7]}, ["7"]),
        ({"target_modules": ["qkv[q,w]"]}, ["'w'"]),
        ({"target_modules": ["qkv[0:25]"]}, ["0:25", "24"]),
        ({"target_modules": ["qkv[5:5]"]}, ["5:5"]),
        ({"target_modules": ["qkv[q]", "qkv[0:4]"]}, ["q", "0:4"]),
        ({"target_modules": ["qkv", "qkv[v]"]}, ["qkv", "v"]),
        ({"target_modules": [""]}, ["''"]),
        ({"target_modules": ["norm"]}, ["norm", "LayerNorm"]),
        ({"target_modules": ["qkv[]"]}, ["qkv[]"]),
        ({"target_modules": ["head"]}, ["head"]),
        ({"target_modules": {"first": 1}}, ["first"]),
        ({"target_modules": ["qkv[-3:3]"]}, ["-3:3"]),
        ({"target_modules": ["qkv[q"]}, ["qkv[q"]),
    ],
)
def test_adapt_refuses_and_changes_nothing(method, settings, words):
    model = net()
    model.first.requires_grad_(False)
    model.first.register_forward_hook(lambda *args: None)
    given = {"target_modules": TARGETS, "r": 2, "head": "head"} | settings
    if method in ("full", "linear_probe", "bitfit") and settings == {"r": 9}:
        assert lb.adapt(model, method, **given) is model  # these have no rank
        return
    assert_refused(lambda: lb.adapt(model, method, **given), *words, model=model)
    assert lb.adapt(model, method, TARGETS, r=2, head="head")(inputs()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lroa", ["lroa", "lora"]),
        ("LoRA", ["LoRA", "lora"]),
        ("", ["''"]),
        (3, ["3"]),
        (["lora"], ["lora"]),
        (None, ["None"]),
        ("c3la ", ["c3la"]),
    ],
)
def test_unknown_methods(name, words):
    model = net()
    assert_refused(lambda: lb.adapt(model, name, TARGETS), *words, model=model)


@pytest.mark.parametrize("thing", [None, "model", 3, [nn.Linear(2, 2)], torch.zeros(2)])
def test_what_is_no_model(thing, tmp_path):
    for call in (
        lambda: lb.adapt(thing, "lora", ["0"]),
        lambda: lb.merge(thing),
        lambda: lb.unmerge(thing),
        lambda: lb.advance(thing),
        lambda: lb.load(thing, tmp_path),
        lambda: lb.save(thing, tmp_path),
        lambda: lb.delta(thing),
        lambda: lb.n_trainable(thing),
        lambda: lb.param_groups(thing, 0.1),
        lambda: lb.to_peft(thing, tmp_path),
        lambda: lb.from_peft(thing, tmp_path),
    ):
        assert_refused(call)


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("conv", "Conv2d"),
        ("table", "Embedding"),
        ("two", "Bilinear"),
        ("lazy", "LazyLinear"),
        ("norm", "BatchNorm1d"),
        ("old", "old"),
        ("new", "new"),
        ("whole", "whole"),
        ("own", "own"),
        ("mha", "MultiheadAttention"),
        ("out_proj", "MultiheadAttention"),
    ],
)
def test_modules_that_are_no_plain_linear_maps(mixed, target, word):
    for method in METHODS:
        assert_refused(
            lambda method=method: lb.adapt(mixed, method, ["fc1", target], r=2),
            target,
            word,
            model=mixed,
        )
    assert_refused(lambda: lb.adapt(mixed, "lora", f".*{target}", r=2), target, model=mixed)


def test_weights_without_numbers():
    with torch.device("meta"):
        model = Net()
    assert_refused(
        lambda: lb.adapt(model, "lora", ["first"], r=2), "first.weight", "load its weights"
    )


def test_all_linear_takes_the_plain_maps_only(mixed):
    assert_refused(
        lambda: lb.adapt(mixed, "lora", "all-linear", r=2), "lazy", "run the model", model=mixed
    )
    del mixed.lazy
    assert list(lb.adapters(lb.adapt(mixed, "lora", "all-linear", r=2))) == ["fc1", "fc2"]


@every_method
def test_a_model_is_adapted_once(method):
    model = adapted(method)
    for call in (
        lambda: lb.adapt(model, "lora", ["first"], r=2),
        lambda: lb.adapt(model, method, TARGETS, r=2, head="head"),
        lambda: lb.adapt(nn.Sequential(model), "lora", "all-linear", r=2),
        lambda: lb.adapt(model.first, "lora", "all-linear", r=2),
    ):
        assert_refused(call, "adapted", model=model)


def test_a_part_of_an_adapted_model_isn_t_adapted_again():
    model = nn.ModuleDict({"body": nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})})
    lb.adapt(model, "lora", ["a"], r=2)
    assert_refused(lambda: lb.adapt(model["body"], "lora", ["b"], r=2), "adapted", model=model)


def test_two_adapted_models_in_one_are_asked_one_by_one(tmp_path):
    pair = nn.ModuleDict({"text": adapted("lora"), "image": adapted("full")})
    for call in (
        lambda: lb.merge(pair),
        lambda: lb.n_trainable(pair),
        lambda: lb.param_groups(pair, 0.1),
        lambda: lb.save(pair, tmp_path),
        lambda: lb.delta(pair),
    ):
        assert_refused(call, "text", "image", model=pair)
    assert lb.n_trainable(pair["text"]) > 0


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_aren_t_finite(method, bad):
    model = net()
    with torch.no_grad():
        model.qkv.weight[20, 3] = bad
    assert_refused(
        lambda: lb.adapt(model, method, TARGETS, r=2, head="head"), "qkv[v]", "NaN", model=model
    )


@every_method
def test_nothing_to_train_is_refused(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    if method == "linear_probe":
        assert_refused(lambda: lb.adapt(model, method), "head", model=model)
        assert_refused(lambda: lb.adapt(model, method, head="1"), "nothing", model=model)
        probe = lb.adapt(model, method, ["0"])
        assert_refused(lambda: lb.param_groups(probe, 0.1), "head", model=probe)
    elif method not in ("full", "bitfit"):
        assert_refused(lambda: lb.adapt(model, method, r=2), "0", model=model)


def test_bitfit_needs_a_bias():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    assert_refused(lambda: lb.adapt(model, "bitfit", ["0"]), "bias", model=model)
    assert_refused(lambda: lb.adapt(model, "bitfit"), "bitfit", model=model)


@every_method
def test_lr_ratio_needs_two_trained_factors(method):
    model = net()
    names = {n for a in lb.adapters(adapted(method)).values() for n, _ in a.named_parameters()}
    if {"A", "B"} <= names:
        assert lb.param_groups(adapted(method, lr_ratio=4.0), 0.1)
    else:
        assert_refused(
            lambda: lb.adapt(model, method, TARGETS, r=2, head="head", lr_ratio=4.0),
            "lr_ratio",
            model=model,
        )


@given(r=st.integers(-5, 40), n=st.integers(1, 12), m=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_ranks_up_to_the_smaller_side_are_taken_and_no_others(r, n, m):
    model = nn.Sequential(nn.Linear(m, n))
    if 1 <= r <= min(n, m):
        assert lb.n_trainable(lb.adapt(model, "lora", ["0"], r=r)) == r * (n + m)
    else:
        assert_refused(lambda: lb.adapt(model, "lora", ["0"], r=r), str(r), model=model)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("cola", {"chain_length": 0}, ["chain_length", "0"]),
        ("cola", {"reset_every": -1}, ["reset_every"]),
        ("c3la", {"chain_length": 1.5}, ["1.5"]),
        ("random_cla", {"selector": "blok"}, ["blok", "block"]),
        ("random_c3la", {"selector": 3}, ["3"]),
        ("asymmetric", {"train": "C"}, ["'C'"]),
        ("loldu", {"init": "regulr"}, ["regulr", "regular"]),
        ("lora", {"init": "xavier"}, ["xavier"]),
        ("mgpo", {"rho": -1}, ["rho"]),
        ("sam", {"rho": "x"}, ["rho"]),
        ("mgpo", {"ema": 1.5}, ["ema"]),
        ("mgpo", {"sign": 2}, ["sign"]),
        ("lora_plus", {"lr_ratio": -2}, ["-2"]),
        ("lora", {"step": "mgpo", "rho": -0.1}, ["rho"]),
        ("lora", {"selector": "block"}, ["selector"]),
        ("paca", {"chain_length": 2}, ["chain_length"]),
    ],
)
def test_options_of_the_methods(method, options, words):
    model = net()
    assert_refused(lambda: lb.adapt(model, method, TARGETS, r=2, **options), *words, model=model)


# On a plain, a merged and a disabled model


def test_a_plain_model_is_refused_by_everything_that_needs_an_adapted_one(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (
        lambda: lb.merge(model),
        lambda: lb.unmerge(model),
        lambda: lb.delta(model),
        lambda: lb.n_trainable(model),
        lambda: lb.param_groups(model, 0.1),
        lambda: lb.advance(model),
        lambda: lb.save(model, tmp_path / "x"),
        lambda: lb.to_peft(model, tmp_path / "x"),
        lambda: lb.train_step(model, optimizer, lambda: model(inputs()).sum()),
        lambda: lb.disabled(model).__enter__(),
    ):
        assert_refused(call, "adapted", model=model)
    assert not (tmp_path / "x").exists()


@every_method
def test_a_merged_model_isn_t_trained_advanced_or_filled(method):
    model = moved(method)
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.1))
    state = copy.deepcopy(model.state_dict())
    lb.merge(model)
    assert_refused(
        lambda: lb.train_step(model, optimizer, lambda: model(inputs()).sum()),
        "merged",
        model=model,
    )
    assert_refused(lambda: lb.advance(model), model=model)
    before = snapshot(model)["tensors"]["first.weight"]
    with pytest.raises(RuntimeError, match="merged"):
        model.load_state_dict(state)
    assert snapshot(model)["tensors"]["first.weight"] == before


@every_method
def test_a_disabled_model_isn_t_trained_saved_or_merged(method, tmp_path):
    model = moved(method)
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.1))
    with lb.disabled(model):
        for call in (
            lambda: lb.merge(model),
            lambda: lb.save(model, tmp_path / "x"),
            lambda: lb.train_step(model, optimizer, lambda: model(inputs()).sum()),
            lambda: lb.to_peft(model, tmp_path / "x"),
            lambda: lb.advance(model),
        ):
            assert_refused(call, model=model)
    lb.merge(model)
    with lb.disabled(model):
        assert_refused(lambda: lb.unmerge(model), "disabled", model=model)
    assert not (tmp_path / "x").exists()


@every_method
def test_only_chains_advance(method):
    model = moved(method)
    if method in CHAINS:
        assert lb.advance(model) is model
    else:
        assert_refused(lambda: lb.advance(model), "links", model=model)


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_ends_and_wants_an_optimizer(method):
    model = adapted(method, chain_length=2)
    assert_refused(lambda: lb.advance(model, "adam"), "str", model=model)
    assert lb.advance(model) is model
    assert_refused(lambda: lb.advance(model), "2", model=model)


def test_merging_numbers_that_aren_t_finite_is_refused():
    model = moved("lora")
    with torch.no_grad():
        lb.adapters(model)["proj"].B[0, 0] = math.nan
    assert_refused(lambda: lb.merge(model), "proj", model=model)
    model = moved("lora", torch.float16)
    with torch.no_grad():
        lb.adapters(model)["proj"].B.mul_(1e9)
    assert_refused(lambda: lb.merge(model), "proj", "float16", model=model)


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf, "1e-3", None])
def test_learning_rates(lr):
    model = adapted("lora")
    assert_refused(lambda: lb.param_groups(model, lr), "lr", model=model)


# train_step


@every_method
@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda m: m(inputs()), "(5, 3)"),
        (lambda m: m(inputs()).detach().sum(), "depend"),
        (lambda m: 1.0, "1.0"),
        (lambda m: None, "None"),
    ],
)
def test_losses_that_are_none(method, loss, word):
    model = moved(method)
    model(inputs())
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.1))
    assert_refused(lambda: lb.train_step(model, optimizer, lambda: loss(model)), word, model=model)


@pytest.mark.parametrize("norm", [0, "1", -1.0])
def test_arguments_of_a_step(norm):
    model = moved("lora")
    model(inputs())
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.1))
    assert_refused(
        lambda: lb.train_step(model, optimizer, lambda: model(inputs()).sum(), max_grad_norm=norm),
        "max_grad_norm",
        model=model,
    )
    assert_refused(
        lambda: lb.train_step(model, None, lambda: model(inputs()).sum()), "optimizer", model=model
    )
    assert_refused(
        lambda: lb.train_step(model, optimizer, model(inputs()).sum()), "loss_fn", model=model
    )


# Errors as objects


def test_errors_read_well_and_survive_being_taken_apart():
    """As they are on their way from one process to another: class, arguments, attributes, and put
    together again.
    """
    error = assert_refused(lambda: lb.adapt(net(), "lroa"))
    assert (
        isinstance(error, KeyError)
        and not str(error).startswith(("'", '"'))
        and "\n" not in str(error)
    )
    again = copy.deepcopy(error)
    assert type(again) is type(error) and str(again) == str(error)


def test_gpt2_s_names_are_suggested():
    model = load_model("tiny_gpt2")
    assert_refused(
        lambda: lb.adapt(model, "lora", ["q_proj"], r=2), "q_proj", "c_proj", model=model
    )
    assert_refused(lambda: lb.adapt(model, "lora", ["wte"], r=2), "wte", "Embedding", model=model)
    move(lb.adapt(model, "lora", ["c_attn[k]"], r=2))
