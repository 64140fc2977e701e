"""Export to Hugging Face PEFT's format and back, against the real PEFT: equal outputs, honest
refusals, models untouched by errors.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lora_book as lb
from lora_book.core import peft as core_peft
from lora_book.core.adapter import LowRank
from lora_book.core.adapting import Method, commit, plan
from lora_book.core.hosts import sites
from lora_book.core.laws import Case, randomise
from lora_book.core.peft import (
    CONFIG,
    TAME,
    WEIGHTS,
    LoraForm,
    compressed,
    exact_names,
    fitting,
    layer_form,
    named_by,
    pattern,
    targeted,
    values_by,
)
from lora_book.core.steps import PlainStep
from lora_book.lab import settings as core_settings
from lora_book.lab.models import load_model
from lora_book.registry import METHODS

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
peft_other = pytest.importorskip("peft.utils.other")
MODELS = ("tiny_bert", "tiny_gpt2", "tiny_vit", "tiny_llama")
REFUSED = ("full", "linear_probe", "bitfit")
EXPORTED = [method for method in METHODS if method not in REFUSED]
CHAINS = ("cola", "rac", "c3la", "random_c3la")
IDS = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def output(model, name):
    with torch.no_grad():
        if name == "tiny_vit":
            return model(
                torch.linspace(0, 1, 2 * 784)
                .reshape(2, 1, 28, 28)
                .to(next(model.parameters()).dtype)
            )
        return model(input_ids=IDS)[0]


def adapted(name, method, n_classes=None, size=0.1, **options):
    model = lb.adapt(load_model(name, n_classes=n_classes), method, **options)
    return randomise(model, 1, size)


def in_peft(name, path, n_classes=None):
    "The base with the adapter that PEFT loads; any warning is an error."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(
            load_model(name, n_classes=n_classes), str(path)
        ).eval()


def off_by(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def config(path):
    return json.loads((path / CONFIG).read_text())


def state(model):
    "Everything that an error must leave alone."
    modules = {
        name: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return (
        modules,
        {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        {k: t.clone() for k, t in model.state_dict().items()},
    )


def same_state(one, other):
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(one[2][k], other[2][k]) for k in one[2])
    )


# Writing


@pytest.mark.parametrize("method", EXPORTED)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_was_exported_and_so_does_from_peft(name, method, tmp_path):
    model = adapted(name, method, r=3, alpha=7)
    if method in CHAINS:
        randomise(lb.advance(model), 2, 0.1)
    want = output(model, name)
    assert off_by(output(load_model(name), name), want) > 1e-3
    assert lb.to_peft(model, tmp_path) == tmp_path
    assert off_by(output(in_peft(name, tmp_path), name), want) < 2e-6
    assert off_by(output(lb.from_peft(load_model(name), tmp_path), name), want) < 2e-6


@pytest.mark.parametrize("method", EXPORTED)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_host_shape_and_rank_in_float64(method, data, tmp_path_factory):
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    host = data.draw(st.sampled_from(["linear", "fused", "conv1d", "fused_conv1d"]))
    case = Case(
        METHODS[method],
        host,
        n,
        m,
        data.draw(st.integers(1, min(n, m))),
        torch.float64,
        data.draw(st.integers(0, 10**6)),
    )
    path = tmp_path_factory.mktemp("peft")
    model = randomise(case.adapt(case.base()), case.seed)
    for _ in range(data.draw(st.integers(0, 3)) if method in CHAINS else 0):
        randomise(lb.advance(model), case.seed + 1)
    lb.to_peft(model, path)
    loaded = peft.PeftModel.from_pretrained(case.base(), str(path)).eval()
    want, eps = model(case.inputs()).detach(), 1e-6 if config(path)["peft_type"] == "VERA" else 1e-8
    assert torch.allclose(
        loaded(case.inputs()), want, rtol=eps, atol=eps * max(1, want.abs().max().item())
    ), "PEFT holds VeRA's A and B in float32"


def test_rank_and_alpha_are_kept_and_rslora_stays_rslora(tmp_path):
    lb.to_peft(adapted("tiny_bert", "lora", r=3, alpha=7), tmp_path / "a")
    lb.to_peft(adapted("tiny_bert", "rslora", r=3, alpha=7), tmp_path / "b")
    a, b = config(tmp_path / "a"), config(tmp_path / "b")
    assert (a["r"], a["lora_alpha"], a["use_rslora"]) == (3, 7, False) and (
        b["r"],
        b["lora_alpha"],
        b["use_rslora"],
    ) == (3, 7, True)
    assert a["rank_pattern"] == a["alpha_pattern"] == {}


@pytest.mark.parametrize(
    "name, target, kind",
    [
        ("tiny_bert", None, "VERA"),
        ("tiny_llama", ["q_proj", "o_proj"], "VERA"),
        ("tiny_gpt2", ["c_fc"], "VERA"),
        ("tiny_gpt2", None, "LORA"),
        ("tiny_bert", ["query", "intermediate.dense"], "VERA"),
        ("tiny_bert", ["intermediate.dense", "output.dense"], "VERA"),
    ],
)
def test_vera_stays_vera_where_layers_share_their_projections(name, target, kind, tmp_path):
    model = randomise(lb.adapt(load_model(name), "vera", target, r=5, alpha=3), 1, 0.1)
    lb.to_peft(model, tmp_path / "own")
    lb.to_peft(model, tmp_path / "lora", as_lora=True)
    assert (config(tmp_path / "own")["peft_type"], config(tmp_path / "lora")["peft_type"]) == (
        kind,
        "LORA",
    )
    for path in ("own", "lora"):
        assert off_by(output(in_peft(name, tmp_path / path), name), output(model, name)) < 2e-6


def test_pissa_doubles_its_rank_and_adalora_drops_pruned_triplets(tmp_path):
    lb.to_peft(adapted("tiny_bert", "pissa", r=3), tmp_path / "pissa")
    model = adapted("tiny_bert", "adalora", r=4, total_steps=4, warmup=0, final=1, budget=8)
    optimizer = torch.optim.SGD(lb.param_groups(model, 1e-3))
    for _ in range(4):
        lb.train_step(
            model, optimizer, lambda: (model(input_ids=IDS)[0] * torch.linspace(-1, 1, 32)).sum()
        )
    lb.to_peft(model, tmp_path / "adalora")
    ranks = {
        key: len(t)
        for key, t in load_file(tmp_path / "adalora" / WEIGHTS).items()
        if "lora_A" in key
    }
    assert config(tmp_path / "pissa")["r"] == 6 and sum(ranks.values()) < 16
    assert (
        off_by(
            output(in_peft("tiny_bert", tmp_path / "adalora"), "tiny_bert"),
            output(model, "tiny_bert"),
        )
        < 2e-6
    )


@pytest.mark.parametrize(
    "name, fused", [("tiny_bert", False), ("tiny_vit", True), ("tiny_gpt2", True)]
)
def test_rows_of_other_blocks_are_zero_and_the_ranks_add(name, fused, tmp_path):
    lb.to_peft(adapted(name, "lora", r=2, alpha=4), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert config(tmp_path)["r"] == (4 if fused else 2) and config(tmp_path)["lora_alpha"] == (
        8 if fused else 4
    )
    for key, B in tensors.items():
        if fused and key.endswith("lora_B.weight"):
            q, k, v = B.chunk(3)
            assert (
                not k.any()
                and not q[:, 2:].any()
                and not v[:, :2].any()
                and q[:, :2].any()
                and v[:, 2:].any()
            )


def test_a_chain_gets_its_true_rank(tmp_path):
    model = adapted("tiny_bert", "cola", r=2)
    lb.advance(model)
    lb.to_peft(model, tmp_path / "fresh")
    assert config(tmp_path / "fresh")["r"] == 2, "the fresh link's B is 0 and adds no rank"
    randomise(model, 3, 0.1)
    lb.to_peft(model, tmp_path / "two")
    assert config(tmp_path / "two")["r"] == 4
    lapped = adapted("tiny_bert", "c3la", r=20)
    for seed in range(3):
        randomise(lb.advance(lapped), seed, 0.1)
    lb.to_peft(lapped, tmp_path / "lapped")
    assert config(tmp_path / "lapped")["r"] == 32, "80 columns of 32 inputs"
    assert (
        off_by(
            output(in_peft("tiny_bert", tmp_path / "lapped"), "tiny_bert"),
            output(lapped, "tiny_bert"),
        )
        < 2e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    R=st.integers(1, 12),
    k=st.integers(0, 8),
    seed=st.integers(0, 10**6),
)
def test_compressing_keeps_the_product_and_finds_the_rank(n, m, R, k, seed):
    g = torch.Generator().manual_seed(seed)
    k = min(k, n, m, R)
    B = torch.randn(n, k, generator=g, dtype=torch.float64) @ torch.randn(
        k, R, generator=g, dtype=torch.float64
    )
    A = torch.randn(R, m, generator=g, dtype=torch.float64)
    form = LoraForm(A, B, 0.5)
    small, zero = compressed(form), torch.zeros(n, m)
    assert len(small.A) <= max(1, k) or small is form
    assert torch.allclose(small.change(zero), form.change(zero), atol=1e-10, rtol=1e-10)


def test_ranks_that_differ_become_patterns_that_fit_one_layer_each(tmp_path):
    model = adapted(
        "tiny_gpt2",
        "lora",
        target_modules=["attn.c_attn[q,v]", "mlp.c_fc", "attn.c_proj[0:8]"],
        r=3,
        alpha=2,
    )
    lb.to_peft(model, tmp_path)
    said = config(tmp_path)
    assert len(said["rank_pattern"]) == 2 and said["fan_in_fan_out"]
    assert (
        off_by(output(in_peft("tiny_gpt2", tmp_path), "tiny_gpt2"), output(model, "tiny_gpt2"))
        < 2e-6
    )
    loaded = lb.from_peft(load_model("tiny_gpt2"), tmp_path)
    lb.save(loaded, tmp_path / "own")
    again = lb.load(load_model("tiny_gpt2"), tmp_path / "own")
    assert torch.equal(output(again, "tiny_gpt2"), output(loaded, "tiny_gpt2")) and {
        a.r for a in lb.adapters(again).values()
    } == {3, 6}


@settings(max_examples=40, deadline=None)
@given(
    values=st.dictionaries(
        st.from_regex(r"[ab](\.[ab1]){0,3}", fullmatch=True),
        st.integers(1, 3),
        min_size=1,
        max_size=6,
    )
)
def test_patterns_give_each_layer_its_own_value(values):
    usual, patterns = pattern(values)
    assert {name: fitting(patterns, name, usual) for name in values} == values


def test_a_name_that_ends_another_becomes_an_expression():
    nested = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ModuleDict({"a": nn.Linear(3, 3)})})
    assert exact_names(nested, ["b.a"]) == ["b.a"] and exact_names(nested, ["a"]) == "a"


@pytest.mark.parametrize("name, head", [("tiny_bert", ["classifier"]), ("tiny_llama", ["score"])])
def test_heads_go_along(name, head, tmp_path):
    model = adapted(name, "lora", n_classes=4, head=head, r=2)
    with torch.no_grad():
        model.get_submodule(head[0]).weight.mul_(2)
    lb.to_peft(model, tmp_path)
    assert config(tmp_path)["modules_to_save"] == head
    want = output(model, name)
    assert off_by(output(in_peft(name, tmp_path, n_classes=4), name), want) < 2e-6
    again = lb.from_peft(load_model(name, n_classes=4), tmp_path)
    assert off_by(output(again, name), want) < 2e-6 and lb.n_trainable(
        again, heads=True
    ) == lb.n_trainable(model, heads=True)
    with lb.disabled(again):
        assert torch.equal(output(again, name), output(load_model(name, n_classes=4), name))


def test_a_merged_model_writes_the_same_bytes(tmp_path):
    model = adapted("tiny_vit", "lora", head=["head"])
    lb.to_peft(model, tmp_path / "apart")
    lb.merge(model)
    lb.to_peft(model, tmp_path / "merged")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_bfloat16_models_export_their_float32_factors(tmp_path):
    model = randomise(lb.adapt(load_model("tiny_bert", dtype="bfloat16"), "lora", r=2), 1, 0.1)
    lb.to_peft(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    loaded = peft.PeftModel.from_pretrained(
        load_model("tiny_bert", dtype="bfloat16"), str(tmp_path)
    ).eval()
    assert off_by(output(loaded, "tiny_bert").float(), output(model, "tiny_bert").float()) < 0.05


def test_writing_needs_no_peft_and_leaves_it_unimported(tmp_path):
    code = (
        "import sys; sys.modules['peft'] = None\nimport torch, lora_book as lb\nfrom torch import"
        " nn\ndef base():\n    torch.manual_seed(0); return nn.Sequential(nn.Linear(4, 4))\nm ="
        " lb.adapt(base(), 'lora', ['0'], r=2)\nwith torch.no_grad():"
        f" m[0].adapters['all'].B.fill_(1)\nlb.to_peft(m, {str(tmp_path)!r}); x = torch.ones(1,"
        f" 4)\nassert torch.equal(lb.from_peft(base(), {str(tmp_path)!r})(x), m(x))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    lb.to_peft(adapted("tiny_bert", "lora", r=2), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(
        core_settings.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        lb.to_peft(adapted("tiny_bert", "lora", r=4), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def assert_refused(model, path, error, match, **options):
    "to_peft raises, writes nothing and changes nothing."
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        lb.to_peft(model, path, **options)
    assert isinstance(caught.value, lb.LoraBookError)
    assert same_state(state(model), before) and not path.exists()


def test_what_is_no_small_product_is_refused(tmp_path):
    path = tmp_path / "x"
    assert_refused(load_model("tiny_bert"), path, ValueError, "isn't adapted")
    assert_refused(adapted("tiny_bert", "full"), path, TypeError, "in place")
    assert_refused(adapted("tiny_bert", "full", target_modules=["query"]), path, TypeError, "merge")
    assert_refused(
        adapted("tiny_bert", "bitfit", target_modules=["query"]), path, TypeError, "bias"
    )
    assert_refused(
        adapted("tiny_bert", "linear_probe", n_classes=2, head=["classifier"]),
        path,
        TypeError,
        "no layer",
    )
    assert_refused(
        adapted("tiny_bert", "linear_probe", target_modules=["query"]), path, TypeError, "query"
    )
    assert_refused(lb.adapt(nn.Linear(4, 4), "lora", ".*", r=2), path, TypeError, "no layer")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = adapted("tiny_bert", "lora")
    with torch.no_grad():
        next(iter(lb.adapters(model).values())).A[0, 0] = float("nan")
    before = [p.isnan().sum() for p in model.parameters()]
    with pytest.raises(lb.LoraBookError):
        lb.to_peft(model, tmp_path / "x")
    assert before == [p.isnan().sum() for p in model.parameters()] and not (tmp_path / "x").exists()


def test_heads_that_peft_would_misread_are_refused(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.my_fc, self.fc, self.tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    assert_refused(
        lb.adapt(Two(), "lora", ["my_fc"], r=2, head=["fc"]), tmp_path / "x", ValueError, "my_fc"
    )
    tied = Two()
    tied.tied.weight = tied.fc.weight
    assert_refused(
        lb.adapt(tied, "lora", ["my_fc"], r=2, head=["tied"]),
        tmp_path / "x",
        ValueError,
        "one tensor",
    )


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc, self.head = (
            nn.BatchNorm1d(4),
            nn.Linear(4, 4),
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)),
        )

    def forward(self, x):
        return self.head(self.fc(self.norm(x)))


def test_buffers_of_a_head_go_along_and_other_moved_buffers_are_refused(tmp_path):
    model, x = lb.adapt(Normed(), "lora", ["fc"], r=2, head=["head"]), torch.randn(5, 4)
    model.head.train()(x)
    model.eval()
    lb.to_peft(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(Normed(), str(tmp_path / "a")).eval()
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert torch.allclose(lb.from_peft(Normed(), tmp_path / "a").eval()(x), model(x), atol=1e-6)
    model.norm.train()(x)
    assert_refused(model, tmp_path / "x", TypeError, "norm.running_mean")
    listed = nn.ModuleDict({"fc": nn.Linear(4, 4), "heads": nn.ModuleList([nn.Linear(4, 2)])})
    assert_refused(
        lb.adapt(listed, "lora", ["fc"], r=2, head=["heads"]),
        tmp_path / "x",
        TypeError,
        "ModuleList",
    )


def test_a_disabled_model_is_refused(tmp_path):
    model = adapted("tiny_bert", "lora")
    with lb.disabled(model):
        assert_refused(model, tmp_path / "x", ValueError, "disabled")
    with pytest.raises(TypeError, match="path"):
        lb.to_peft(model, 3)


class Liar(LowRank):
    "A method whose change isn't the product of its factors."

    def init(self, W0, r, generator):
        return torch.ones(r, W0.shape[1]), torch.ones(W0.shape[0], r)

    def delta(self, W0):
        return 1.01 * super().delta(W0)


class Rows(LowRank):
    "DoRA in short: W = g ⊙ (W0 + s·B A) / row lengths; it exports through its own form."

    def __init__(self, W0, bias=None, **settings):
        super().__init__(W0, bias, **settings)
        self.g = nn.Parameter(W0.float().norm(dim=1) * 1.5)

    def init(self, W0, r, generator):
        return torch.randn(r, W0.shape[1], generator=generator), torch.randn(
            W0.shape[0], r, generator=generator
        )

    def peft(self, W0):
        return LoraForm(self.A, self.B, self.scaling, self.g)

    def delta(self, W0):
        return self.peft(W0).change(W0).to(self.g)

    def forward(self, x, W0):
        return x @ self.delta(W0).T.to(x)


def with_method(make, name, targets=None):
    model = load_model(name)
    return commit(
        model,
        plan(
            model,
            "own",
            Method(make, "Own", "a test"),
            targets,
            r=2,
            alpha=3.0,
            step=PlainStep(),
            step_options={},
        ),
    )


def test_factors_that_do_not_make_the_change_are_refused(tmp_path):
    assert_refused(with_method(Liar, "tiny_bert"), tmp_path / "x", TypeError, "don't multiply")


@pytest.mark.parametrize("name", MODELS)
def test_row_lengths_are_exported_as_dora(name, tmp_path):
    model = with_method(Rows, name)
    model_out = output(with_deltas(load_model(name), lb.delta(model)), name)
    lb.to_peft(model, tmp_path)
    assert config(tmp_path)["use_dora"]
    assert off_by(output(in_peft(name, tmp_path), name), model_out) < 2e-6
    assert_refused(model, tmp_path / "x", TypeError, "don't multiply", as_lora=True)


@torch.no_grad()
def with_deltas(model, deltas):
    "The plain model with each ΔW added to its weight."
    for name, change in deltas.items():
        module, _, rows = name.partition("[")
        weight = model.get_submodule(module).weight
        weight = weight if weight.shape[1] == change.shape[1] else weight.t()
        third = weight.shape[0] // 3
        start = {"": 0, "q]": 0, "k]": third, "v]": 2 * third}[rows]
        weight[start : start + change.shape[0]] += change
    return model


# Reading


def written(path, name="tiny_bert", n_classes=None, size=0.1, **settings):
    "An adapter that PEFT itself wrote, and its output."
    kind = peft.VeraConfig if "d_initial" in settings else peft.LoraConfig
    model = peft.get_peft_model(load_model(name, n_classes=n_classes), kind(**settings)).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    model.save_pretrained(str(path))
    return output(model, name)


QV = ["query", "value"]
READABLE = [
    ("tiny_bert", {"target_modules": QV, "r": 4, "lora_alpha": 6}),
    (
        "tiny_bert",
        {"target_modules": QV, "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1},
    ),
    (
        "tiny_bert",
        {
            "target_modules": r".*\.(query|dense)",
            "r": 4,
            "rank_pattern": {"query": 2, r"0\.output\.dense": 3},
            "alpha_pattern": {"query": 5},
        },
    ),
    ("tiny_bert", {"target_modules": QV, "r": 2, "layers_to_transform": [1]}),
    (
        "tiny_bert",
        {
            "target_modules": "all-linear",
            "r": 2,
            "exclude_modules": ["value"],
            "init_lora_weights": "gaussian",
        },
    ),
    ("tiny_gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    ("tiny_vit", {"target_modules": ["qkv"], "r": 3}),
    (
        "tiny_llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "r": 3,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
        },
    ),
]
READABLE += [
    (
        name,
        {
            "target_modules": targets,
            "r": 3,
            "use_dora": True,
            "use_rslora": rs,
            "fan_in_fan_out": name == "tiny_gpt2",
        },
    )
    for name, targets, rs in [
        ("tiny_bert", QV, False),
        ("tiny_gpt2", ["c_attn"], True),
        ("tiny_vit", ["qkv"], False),
    ]
]
READABLE += [
    (
        name,
        {
            "target_modules": targets,
            "r": 3,
            "d_initial": 0.1,
            "fan_in_fan_out": name == "tiny_gpt2",
        },
    )
    for name, targets in [
        ("tiny_bert", QV),
        ("tiny_gpt2", ["c_attn", "c_fc"]),
        ("tiny_vit", ["qkv", "fc1"]),
    ]
]


@pytest.mark.parametrize("name, settings", READABLE)
def test_reads_what_peft_wrote(name, settings, tmp_path):
    want = written(tmp_path, name, **settings)
    model = lb.from_peft(load_model(name), tmp_path)
    assert off_by(output(model, name), want) < 2e-6
    assert lb.n_trainable(model) > 0 and all(torch.isfinite(p).all() for p in model.parameters())
    lb.to_peft(model, tmp_path / "back")
    assert off_by(output(in_peft(name, tmp_path / "back"), name), want) < 2e-6
    lb.save(model, tmp_path / "own")
    assert torch.equal(
        output(lb.load(load_model(name), tmp_path / "own"), name), output(model, name)
    )
    with lb.disabled(model):
        assert torch.equal(output(model, name), output(load_model(name), name))


def test_reads_a_classifiers_head_and_ignores_a_name_the_model_lacks(tmp_path):
    want = written(tmp_path, n_classes=3, target_modules=QV, r=2, task_type="SEQ_CLS")
    assert set(config(tmp_path)["modules_to_save"]) == {"classifier", "score"}
    model = lb.from_peft(load_model("tiny_bert", n_classes=3), tmp_path)
    assert off_by(output(model, "tiny_bert"), want) < 2e-6
    assert lb.n_trainable(model, heads=True) - lb.n_trainable(model) == 3 * 32 + 3


def test_settings_of_methods_that_are_not_here_yet_are_unknown_names(tmp_path, monkeypatch):
    written(tmp_path, target_modules=QV, r=2, use_dora=True)
    monkeypatch.delitem(METHODS, "dora", raising=False)
    assert_not_read(tmp_path, KeyError, "dora", load_model("tiny_bert"))


def assert_not_read(path, error, match, model=None):
    "from_peft raises and leaves the model bit for bit as it was."
    model = load_model("tiny_bert", n_classes=3) if model is None else model
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        lb.from_peft(model, path)
    assert isinstance(caught.value, lb.LoraBookError) and same_state(state(model), before)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    written(path, n_classes=3, target_modules=QV, r=2, modules_to_save=["classifier"])
    return path


def edited(good, path, settings=None, tensors=None):
    "A copy of a good adapter with changed settings, and tensors changed by a function."
    path.mkdir(parents=True, exist_ok=True)
    content = load_file(good / WEIGHTS)
    if tensors:
        tensors(content)
    save_file(content, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config(good) | (settings or {})))
    return path


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"peft_type": "LOHA"}, ValueError, "LOHA"),
        ({"peft_type": None}, ValueError, "peft_type"),
        ({"bias": "all"}, ValueError, "bias"),
        ({"lora_bias": True}, ValueError, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, ValueError, "layer_replication"),
        ({"use_qalora": True}, ValueError, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, ValueError, "alora"),
        ({"target_parameters": ["w"]}, ValueError, "target_parameters"),
        ({"trainable_token_indices": [3]}, ValueError, "trainable_token"),
        ({"init_lora_weights": "pissa"}, ValueError, "pissa"),
        ({"a_setting_of_tomorrow": 1}, ValueError, "tomorrow"),
        ({"r": 3}, ValueError, "don't fit"),
        ({"r": "2"}, TypeError, "r must be"),
        ({"r": 0}, ValueError, "r must be"),
        ({"r": 99}, ValueError, "99"),
        ({"lora_alpha": 0}, ValueError, "alpha"),
        ({"lora_alpha": None}, TypeError, "alpha"),
        ({"lora_alpha": float("nan")}, ValueError, "alpha"),
        ({"rank_pattern": [1]}, ValueError, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, ValueError, "expression"),
        ({"target_modules": "("}, ValueError, "expression"),
        ({"target_modules": ["key"]}, ValueError, "query"),
        ({"target_modules": ["query", "value", "key"]}, ValueError, "no numbers for .*key"),
        ({"modules_to_save": None}, ValueError, "classifier"),
        ({"modules_to_save": ["classifier", "pooler"]}, ValueError, "pooler"),
        ({"use_dora": True}, (KeyError, ValueError), "dora|fit"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, error, match, good, tmp_path):
    assert_not_read(edited(good, tmp_path, settings), error, match)


FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(FIRST), "fit"),
        (lambda t: t.update({FIRST: t[FIRST][:, 1:].contiguous()}), "fit"),
        (lambda t: t[FIRST].fill_(float("nan")), "NaN"),
        (lambda t: t[FIRST][0].fill_(float("inf")), "NaN"),
        (
            lambda t: t.update({"base_model.model.bert.nowhere.lora_A.weight": t[FIRST].clone()}),
            "nowhere",
        ),
        (lambda t: t.update({"base_model.model.bert[q].lora_A.weight": t[FIRST].clone()}), "bert"),
        (
            lambda t: t.update({"base_model.model.bert.encoder.lora_A.weight": t[FIRST].clone()}),
            "inear",
        ),
        (lambda t: t.update({"strange": t[FIRST].clone()}), "strange"),
        (lambda t: t.pop("base_model.model.classifier.bias"), "classifier.bias"),
        (lambda t: t.update({"base_model.model.classifier.weight": torch.ones(2, 32)}), "fit"),
        (lambda t: t["base_model.model.classifier.weight"].fill_(float("nan")), "NaN"),
        (lambda t: [t.pop(k) for k in list(t) if "lora" in k], "no adapted layer"),
        (
            lambda t: t.update(
                {FIRST.replace("lora_A.weight", "lora_embedding_A"): t[FIRST].clone()}
            ),
            "embedding",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, match, good, tmp_path):
    assert_not_read(
        edited(good, tmp_path, tensors=change), (ValueError, TypeError, KeyError), match
    )


def test_missing_and_damaged_files_are_refused(good, tmp_path):
    assert_not_read(tmp_path / "nothing", FileNotFoundError, CONFIG)
    path = edited(good, tmp_path / "a")
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(b"a pickle")
    assert_not_read(path, FileNotFoundError, "pickle")
    whole = (good / WEIGHTS).read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        (path / WEIGHTS).write_bytes(whole[:cut])
        assert_not_read(path, ValueError, "damaged")
    path = edited(good, tmp_path / "b")
    for text in ("", "{", "[1]", '"x"', "null"):
        (path / CONFIG).write_text(text)
        assert_not_read(path, ValueError, "damaged|settings")


def test_models_that_cannot_take_it_are_refused(good):
    assert_not_read(
        good,
        ValueError,
        "adapted already",
        lb.adapt(load_model("tiny_bert", n_classes=3), "lora", r=2),
    )
    assert_not_read(good, KeyError, "nearest", load_model("tiny_gpt2"))
    assert_not_read(good, ValueError, "fit", load_model("tiny_bert", n_classes=4))
    broken = load_model("tiny_bert", n_classes=3)
    broken.bert.encoder.layer[0].attention.self.query.weight.data[0, 0] = float("inf")
    assert_not_read(good, ValueError, "NaN or infinite", broken)


def test_training_goes_on_where_peft_stopped(tmp_path):
    """The gradients after reading are PEFT's own, for LoRA with ranks and scales that differ by
    layer.
    """
    written(tmp_path, target_modules=QV, r=4, lora_alpha=6, rank_pattern={"query": 2})
    theirs = peft.PeftModel.from_pretrained(
        load_model("tiny_bert"), str(tmp_path), is_trainable=True
    )
    ours = lb.from_peft(load_model("tiny_bert"), tmp_path)
    for model in (theirs, ours):
        (model(input_ids=IDS)[0] * torch.linspace(-1, 1, 32)).sum().backward()
    for name, adapter in lb.adapters(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        for own, other in (
            (adapter.A, layer.lora_A["default"].weight),
            (adapter.B, layer.lora_B["default"].weight),
        ):
            assert off_by(own.grad, other.grad) < 1e-5


def test_the_exported_scale_is_exact():
    for alpha, r in ((7, 3), (1, 3), (0.1, 7), (16, 12)):
        model = adapted("tiny_bert", "lora", r=r, alpha=alpha)
        name, site = next(iter(sites(model)))
        assert math.isclose(layer_form(name, site, False).scale, alpha / r, rel_tol=1e-15)


# One commit point


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))


def made(alpha, seed, r=2):
    return randomise(lb.adapt(plain_net(), "lora", ["0"], r=r, alpha=alpha), seed)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def is_one_of(got, *wanted):
    return any(torch.allclose(got, want, atol=1e-5) for want in wanted)


def in_real_peft(path):
    return peft.PeftModel.from_pretrained(plain_net(), str(path)).eval()


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("old_is_pefts", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_stopped_export_leaves_the_old_adapter_or_the_new_one(
    at, old_is_pefts, again, tmp_path, monkeypatch
):
    """Stopped at each of its renames, once or from then on: from_peft loads one of the two, and
    PEFT loads one of them or finds no settings.
    """
    old, new = made(2, 1), made(32, 2)
    lb.to_peft(old, tmp_path)
    if old_is_pefts:
        in_real_peft(tmp_path).save_pretrained(str(tmp_path))
    real, calls = os.replace, []

    def stops(source, target):
        calls.append(target)
        if len(calls) == at or (again and len(calls) > at):
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", stops)
    try:
        lb.to_peft(new, tmp_path)
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(os, "replace", real)
    wanted = old(X).detach(), new(X).detach()
    assert is_one_of(lb.from_peft(plain_net(), tmp_path)(X), *wanted)
    if (tmp_path / CONFIG).exists():
        assert is_one_of(in_real_peft(tmp_path)(X), *wanted)
    last = made(8, 3, r=3)
    lb.to_peft(last, tmp_path)
    assert is_one_of(in_real_peft(tmp_path)(X), last(X))
    assert {CONFIG, WEIGHTS} == {p.name for p in tmp_path.iterdir()} - {"README.md"}


WRITER = """
import sys, torch, lora_book as lb
from torch import nn
from lora_book.core.laws import randomise
path, alpha, seed, times = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
model = randomise(lb.adapt(model, "lora", ["0"], r=2, alpha=alpha), seed)
print("ready", flush=True)
for _ in range(times):
    lb.to_peft(model, path)
"""


def writer(path, alpha, seed, times):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(alpha), str(seed), str(times)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_writers_a_reader_and_a_kill(tmp_path):
    wanted = [made(2, 1)(X).detach(), made(32, 2)(X).detach()]
    lb.to_peft(made(2, 1), tmp_path)
    writers = [writer(tmp_path, 2, 1, 10**6), writer(tmp_path, 32, 2, 10**6)]
    try:
        assert [process.stdout.readline() for process in writers] == ["ready\n"] * 2
        for _ in range(100):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert is_one_of(lb.from_peft(plain_net(), tmp_path)(X), *wanted)
        writers[0].kill()
        assert is_one_of(lb.from_peft(plain_net(), tmp_path)(X), *wanted)
    finally:
        for process in writers:
            process.kill()
            process.wait()
            process.stdout.close()
    assert is_one_of(lb.from_peft(plain_net(), tmp_path)(X), *wanted)
    if (tmp_path / CONFIG).exists():
        assert is_one_of(in_real_peft(tmp_path)(X), *wanted)


def test_settings_changed_by_hand_are_read_as_peft_reads_them_with_a_warning(tmp_path):
    lb.to_peft(made(2, 1), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config(tmp_path) | {"base_model_name_or_path": "b"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lb.from_peft(plain_net(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config(tmp_path) | {"lora_alpha": 6}))
    with pytest.warns(UserWarning, match="lora_alpha=6, not 2"):
        model = lb.from_peft(plain_net(), tmp_path)
    assert is_one_of(model(X), in_real_peft(tmp_path)(X))


def test_links_in_the_folder_are_replaced_and_not_followed(tmp_path):
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(outside)
    lb.to_peft(made(2, 1), folder)
    assert outside.read_text() == "mine"
    assert not any((folder / name).is_symlink() for name in (CONFIG, WEIGHTS))
    assert is_one_of(lb.from_peft(plain_net(), folder)(X), made(2, 1)(X))


@pytest.mark.parametrize("path", ["/dev/null/x", "x" * 5000, "a\0b"])
def test_paths_that_cannot_be_are_refused(path):
    for run in (lambda: lb.to_peft(made(2, 1), path), lambda: lb.from_peft(plain_net(), path)):
        with pytest.raises(lb.LoraBookError, match="can't|no file"):
            run()


# As PEFT reads its settings


NAMES = [
    f"{top}{layers}.{i}.{rest}"
    for top in ("", "model.")
    for layers in ("layers", "h")
    for i in (0, 1, 11)
    for rest in ("attn.q_proj", "attn.v_proj", "mlp.experts.1.up_proj", "q_proj_2")
] + ["q_proj", "lm_head", "model.q_proj"]
ENDINGS = st.sampled_from(["q_proj", "v_proj", "1.up_proj", "up_proj", "0.attn.q_proj", "lm_head"])
EXPRESSIONS = st.sampled_from(
    [r".*\.(q_proj|v_proj)", r"model\.layers\.(0|1)\.attn.q_proj", "q_proj|lm_head", r".*up_proj"]
)


@settings(max_examples=150, deadline=None)
@given(
    wanted=st.one_of(st.lists(ENDINGS | st.sampled_from(NAMES), min_size=1), EXPRESSIONS),
    chosen=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 11), max_size=2)),
    pattern=st.sampled_from([None, "", [], "layers", ["h"], ["layers", "h"], ["h", "experts"]]),
    excluded=st.one_of(st.none(), st.lists(ENDINGS, max_size=2), EXPRESSIONS),
    saved=st.one_of(st.none(), st.lists(st.sampled_from(["lm_head", "mlp", "attn"]), max_size=2)),
)
def test_targets_are_those_that_peft_finds(wanted, chosen, pattern, excluded, saved):
    if isinstance(wanted, str):
        chosen = None
    said = {
        "target_modules": wanted,
        "layers_to_transform": chosen,
        "layers_pattern": None if chosen is None else pattern,
        "exclude_modules": excluded,
        "modules_to_save": saved,
    }
    theirs = peft.LoraConfig(**said)
    found = {n for n in NAMES if tuners_utils.check_target_module_exists(theirs, n)}
    assert targeted(said, NAMES) == found


@settings(max_examples=80, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from(["q_proj", r"^q_proj", r"layers\.1\.attn\.q_proj", "attn.*", r".*\.1\..*"])
        | st.sampled_from(NAMES),
        unique=True,
        max_size=4,
    )
)
def test_patterns_fit_the_names_that_peft_fits(keys):
    patterns = {key: i for i, key in enumerate(keys)}
    theirs = {n: patterns.get(peft_other.get_pattern_key(keys, n), -1) for n in NAMES}
    assert values_by(patterns, NAMES, -1) == theirs


@pytest.mark.parametrize(
    "part",
    [
        r"(?:.*?(?:language|model).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\blm_head)",
        r"^(?!.*attn).*(?:up_proj|q_proj)$",
        r"(?i).*Q_PROJ",
        r"[a-z.]+\d{1,2}\.attn\.\w+",
    ],
)
def test_other_expressions_are_matched_in_a_process_of_their_own(part, monkeypatch):
    assert TAME.fullmatch(part) is None
    found = named_by(part, NAMES)
    assert found == {n for n in NAMES if re.fullmatch(part, n)} and found


HOSTILE = [
    r"(\w+\.?)+!",
    r"(a|a)*(.*)*x!",
    "(a?){30}a{30}x",
    "(.*a?)" * 12 + "!",
    "(" * 5000,
    "a" * 40 + "*" * 3,
]


@pytest.mark.parametrize("expression", HOSTILE)
@pytest.mark.parametrize(
    "key",
    ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_pattern"],
)
def test_expressions_that_backtrack_are_refused_in_time(
    key, expression, good, tmp_path, monkeypatch
):
    monkeypatch.setattr(core_peft, "PATIENCE", 0.5)
    value = {"rank_pattern": {expression: 2}, "modules_to_save": ["classifier", expression]}
    said = {key: value.get(key, expression)}
    if key == "layers_pattern":
        said["layers_to_transform"] = 0
    started = time.monotonic()
    model = load_model("tiny_bert", n_classes=3)
    before = state(model)
    try:
        lb.from_peft(model, edited(good, tmp_path, said))
    except lb.LoraBookError:
        assert same_state(state(model), before)
    assert time.monotonic() - started < 20


@settings(max_examples=60, deadline=None)
@given(part=st.from_regex(r"(?:[ab.|]|\\\.|\(|\)|\*|\?|\+|\^|\$|\.\*){0,24}", fullmatch=True))
def test_what_is_matched_here_is_matched_fast(part):
    if TAME.fullmatch(part):
        started = time.monotonic()
        for frame in (r"(.*\.)?(%s)$", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."):
            re.compile(frame % part).match("ab.aab." * 30 + "!")
        assert time.monotonic() - started < 1


def written_llama(path, keep="auto", **said):
    model = peft.get_peft_model(load_model("tiny_llama"), peft.LoraConfig(**said)).eval()
    randomise_trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(path), save_embedding_layers=keep)
    return model


@torch.no_grad()
def randomise_trained(model):
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("layers", [0, [0], 1, [0, 1], []])
def test_layers_to_transform(layers, tmp_path):
    theirs = written_llama(tmp_path, target_modules=["q_proj"], r=2, layers_to_transform=layers)
    ours = lb.from_peft(load_model("tiny_llama"), tmp_path)
    assert len(lb.adapters(ours)) == (1 if layers in (0, [0], 1) else 2)
    assert off_by(output(ours, "tiny_llama"), output(theirs, "tiny_llama")) < 2e-6


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}, {"d_initial": 0.1}])
def test_ranks_above_a_weights_size_keep_factors_outputs_and_gradients(kind, tmp_path):
    make = peft.VeraConfig if "d_initial" in kind else peft.LoraConfig
    theirs = peft.get_peft_model(plain_net(), make(r=12, target_modules=["0", "1"], **kind))
    randomise_trained(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = lb.from_peft(plain_net(), tmp_path)
    assert all(a.r == 12 for a in lb.adapters(ours).values())
    assert torch.allclose(ours(X), theirs(X), atol=1e-5)
    own = [p for a in lb.adapters(ours).values() for p in a.parameters() if p.requires_grad]
    other = [p for p in theirs.parameters() if p.requires_grad]
    for model in (ours, theirs):
        (model(X) * torch.linspace(-1, 1, 3)).sum().backward()
    assert len(own) == len(other)
    assert sorted(round(p.grad.norm().item(), 4) for p in own) == sorted(
        round(p.grad.norm().item(), 4) for p in other
    )
    lb.save(ours, tmp_path / "own")
    assert torch.equal(lb.load(plain_net(), tmp_path / "own")(X), ours(X))
    lb.to_peft(ours, tmp_path / "back")
    assert config(tmp_path / "back")["r"] == 12
    assert torch.allclose(in_real_peft(tmp_path / "back")(X), ours(X), atol=1e-5)
    lb.merge(ours)
    assert torch.allclose(ours(X), theirs(X), atol=1e-5)


def test_a_rank_that_does_not_fit_names_the_module(tmp_path):
    model = plain_net()
    before = state(model)
    with pytest.raises(ValueError, match="'1'.*above min"):
        lb.adapt(model, "lora", "all-linear", r=4)
    assert same_state(state(model), before)


@pytest.mark.parametrize("targets, keep", [(["q_proj", "lm_head"], "auto"), (["q_proj"], True)])
def test_the_bases_own_tensors_beside_an_adapter(targets, keep, tmp_path):
    theirs = written_llama(tmp_path, keep, target_modules=targets, r=2)
    key = next(k for k in load_file(tmp_path / WEIGHTS) if "lm_head" in k and "lora" not in k)
    ours = lb.from_peft(load_model("tiny_llama"), tmp_path)
    assert off_by(output(ours, "tiny_llama"), output(theirs, "tiny_llama")) < 2e-6
    lb.to_peft(ours, tmp_path / "back")
    assert (
        off_by(
            output(in_peft("tiny_llama", tmp_path / "back"), "tiny_llama"),
            output(theirs, "tiny_llama"),
        )
        < 2e-6
    )
    tensors = load_file(tmp_path / WEIGHTS)
    for changed in (tensors[key] * 2, tensors[key][1:].contiguous()):
        save_file(tensors | {key: changed}, tmp_path / WEIGHTS)
        match = re.escape(key.removeprefix("base_model.model."))
        assert_not_read(tmp_path, ValueError, match, load_model("tiny_llama"))


# Who finds the export again


def test_autopeft_classes_find_the_base(tmp_path):
    load_model("tiny_llama").save_pretrained(str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = randomise(lb.adapt(base, "lora", r=2), 1, 0.1).eval()
    lb.to_peft(model, tmp_path / "a")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "a")).eval()
    assert off_by(output(found, "tiny_llama"), output(model, "tiny_llama")) < 2e-6
    load_model("tiny_bert", n_classes=3).save_pretrained(str(tmp_path / "bert"))
    kind = transformers.AutoModelForSequenceClassification
    for head, said, auto in (
        (["classifier"], "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
        (None, None, peft.AutoPeftModel),
    ):
        base = kind.from_pretrained(str(tmp_path / "bert"), num_labels=3)
        model = randomise(lb.adapt(base, "lora", r=2, head=head), 1, 0.1).eval()
        lb.to_peft(model, tmp_path / "b")
        assert config(tmp_path / "b")["task_type"] == said
        found = auto.from_pretrained(str(tmp_path / "b"), num_labels=3).eval()
        assert off_by(output(found, "tiny_bert"), output(model, "tiny_bert")) < 2e-6


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return self.scale * self.inner(x)


def test_names_are_those_of_the_model_that_is_exported(tmp_path):
    model = made(2, 1)
    around = Around(model)
    lb.to_peft(around, tmp_path / "around")
    assert config(tmp_path / "around")["target_modules"] == ["inner.0"]
    loaded = peft.PeftModel.from_pretrained(Around(plain_net()), str(tmp_path / "around"))
    assert torch.allclose(loaded(X), model(X), atol=1e-6)
    again = lb.from_peft(Around(plain_net()), tmp_path / "around")
    assert torch.allclose(again(X), model(X), atol=1e-6)
    lb.to_peft(nn.DataParallel(model), tmp_path / "parallel")
    assert config(tmp_path / "parallel")["target_modules"] == ["0"]
    headed = lb.adapt(plain_net(), "lora", ["0"], r=2, head=["1"])
    lb.to_peft(Around(headed), tmp_path / "headed")
    assert config(tmp_path / "headed")["modules_to_save"] == ["inner.1"]
    assert torch.allclose(
        lb.from_peft(Around(plain_net()), tmp_path / "headed")(X), headed(X), atol=1e-6
    )
    whole = lb.adapt(Around(plain_net()), "lora", ["0"], r=2)
    assert_refused(whole.inner, tmp_path / "x", ValueError, "part of an adapted model")


def test_what_trains_beside_the_adapters_is_refused_by_name(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    model = lb.adapt(Net(), "lora", ["fc"], r=2)
    model.norm.weight.requires_grad_(True)
    assert_refused(model, tmp_path / "x", TypeError, "'norm.weight' trains")
    model.norm.weight.requires_grad_(False)
    around = Around(model)
    around.scale.requires_grad_(True)
    assert_refused(around, tmp_path / "x", TypeError, "'scale' trains")
    lb.to_peft(model, tmp_path / "a")
    lb.to_peft(lb.adapt(Net(), "lora", ["fc"], r=2, head=["norm"]), tmp_path / "b")
    assert config(tmp_path / "b")["modules_to_save"] == ["norm"]


HALF = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda t: t.update({FIRST: t[FIRST].double() * 1e300}),
            "range of torch.float32|NaN or infinite",
        ),
        (
            lambda t: t.update({HALF: t[HALF].double() * 1e300}),
            "range of torch.float32|NaN or infinite",
        ),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)}), "float8"),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.complex64)}), "complex"),
    ],
)
def test_numbers_out_of_range_are_refused(change, match, good, tmp_path):
    assert_not_read(edited(good, tmp_path, tensors=change), ValueError, match)


@pytest.mark.parametrize(
    "said",
    [
        {"target_modules": [5]},
        {"target_modules": 5},
        {"exclude_modules": [None]},
        {"modules_to_save": [5]},
        {"layers_to_transform": "0"},
        {"layers_to_transform": [True]},
        {"layers_pattern": [0], "layers_to_transform": 0},
        {"layers_pattern": "layer"},
        {"target_modules": ".*(query|value)", "layers_to_transform": 0},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e39},
        {"r": 10**9},
        {"rank_pattern": {"query": 10**9}},
    ],
)
def test_settings_of_wrong_types_or_sizes_are_refused(said, good, tmp_path):
    assert_not_read(edited(good, tmp_path, said), (ValueError, TypeError), "[a-z]")


def test_deep_json_is_refused(good, tmp_path):
    path = edited(good, tmp_path)
    (path / CONFIG).write_text('{"a":' + "[" * 200000 + "]" * 200000 + "}")
    assert_not_read(path, ValueError, "damaged")


@pytest.mark.parametrize("method", ["paca", "c3la", "random_cla"])
def test_columns_that_the_weight_does_not_have_are_refused(method):
    adapter = lb.adapters(lb.adapt(plain_net(), method, ["0"], r=2))["0"]
    assert "idx" in adapter.state_dict()
    for wrong in ([0, 8], [-1, 0], [0, 10**6]):
        given = adapter.state_dict() | {"idx": torch.tensor(wrong)}
        with pytest.raises(RuntimeError, match="columns outside 0:8"):
            adapter.load_state_dict(given)
