"""VeRA and AdaLoRA: shared draws, budgets, scores and pruning, checked against definitions and
Hugging Face PEFT.
"""

import copy
import math
from fractions import Fraction

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

import lora_book as lb
from lora_book.core.adapter import Block, effective_product
from lora_book.core.adapting import Method
from lora_book.core.laws import BrokenLaw, Case, check
from lora_book.core.products import saved_bytes
from lora_book.lab.data import load_data
from lora_book.lab.models import load_model
from lora_book.lab.training import fit
from lora_book.present.adalora import (
    AdaLoRA,
    allocate,
    budget_at,
    gap,
    orthogonality,
    prune,
    scores,
    watch,
)
from lora_book.present.vera import VeRA

WIDE = torch.float64


def draw(seed, *shape, dtype=WIDE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def move(model, size=0.1):
    "Every trained number of the adapters moved from its start; returns the model."
    with torch.no_grad():
        for i, adapter in enumerate(lb.adapters(model).values()):
            for j, p in enumerate(adapter.parameters()):
                p.add_(size * draw(100 * i + j, *p.shape).to(p))
    return model


def net(*widths, dtype=torch.float32):
    "Linear layers of these widths, the same numbers each time."
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in zip(widths, widths[1:], strict=False))).to(
        dtype
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(draw(i, *p.shape) / 3)
    return model


def close(got, want, tolerance):
    return (got - want).abs().max().item() <= tolerance * max(1.0, want.abs().max().item())


# VeRA


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    r=st.integers(1, 3),
    widths=st.lists(st.integers(3, 6), min_size=3, max_size=5),
)
def test_layers_share_their_random_factors(seed, r, widths):
    model = lb.adapt(net(*widths), "vera", "all-linear", r=r, seed=seed)
    found = list(lb.adapters(model).values())
    for one in found:
        for two in found:
            if one.A.shape == two.A.shape:
                assert one.A.data_ptr() == two.A.data_ptr()
            if one.B.shape == two.B.shape:
                assert one.B.data_ptr() == two.B.data_ptr()
    assert lb.n_trainable(model) == sum(r + n for n in widths[1:])
    again = lb.adapt(net(*widths[:2]), "vera", "all-linear", r=r, seed=seed)
    assert torch.equal(again[0].adapters["all"].A, found[0].A)
    other = lb.adapt(net(*widths), "vera", "all-linear", r=r, seed=seed + 1)
    assert not torch.equal(other[0].adapters["all"].A, found[0].A)


def test_narrow_layers_use_a_part_of_wide_layers_draws():
    wide, narrow = VeRA(draw(0, 9, 12), r=3, seed=5), VeRA(draw(0, 4, 7), r=3, seed=5)
    assert close(narrow.A * (7 / 12) ** 0.5, wide.A[:, :7], 1e-6) and torch.equal(
        narrow.B, wide.B[:4]
    )


def test_only_the_two_vectors_are_saved_and_copies_still_share():
    model = lb.adapt(net(4, 4, 4), "vera", "all-linear", r=2)
    assert [name.split(".")[-1] for name in model.state_dict() if "adapters" in name] == [
        "_extra_state",
        "d",
        "b",
    ] * 2
    twin = copy.deepcopy(model)
    assert (
        twin[0].adapters["all"].A.data_ptr()
        == twin[1].adapters["all"].A.data_ptr()
        != model[0].adapters["all"].A.data_ptr()
    )


def test_vera_draws_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    VeRA(draw(0, 5, 6), r=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 8))
def test_vera_product_and_gradients_are_those_of_the_definition(seed, tokens):
    W0 = draw(seed, 5, 6)
    adapter, g, found = VeRA(W0, r=3, alpha=1.5, seed=seed), draw(seed + 1, tokens, 5), []
    with torch.no_grad():
        adapter.b.copy_(draw(seed + 2, 5)), adapter.d.copy_(draw(seed + 3, 3))
    want = adapter.scaling * torch.diag(adapter.b) @ adapter.B @ torch.diag(adapter.d) @ adapter.A
    assert torch.allclose(adapter.delta(W0), want, atol=1e-12)
    for product in (VeRA.product, effective_product):
        x = draw(seed + 4, tokens, 6).requires_grad_()
        y = product(x, W0, None, [Block(None, adapter, W0)])
        found.append((y, *torch.autograd.grad(y, [x, adapter.b, adapter.d], g)))
    assert all(close(got, want, 1e-11) for got, want in zip(*found, strict=True))


def test_vera_keeps_r_numbers_a_token():
    W0 = draw(0, 32, 64, dtype=torch.float32)
    adapter, x = VeRA(W0, r=4), draw(1, 256, 64, dtype=torch.float32).requires_grad_()
    kept = saved_bytes(
        lambda: VeRA.product(x, W0, None, [Block(None, adapter, W0)]),
        exclude=[W0, *adapter.parameters(), *adapter.buffers()],
    )
    assert kept <= 4 * (256 * 4 + 3 * 32 * 4)


def test_loading_other_projections_changes_no_other_model(tmp_path):
    one, two = (lb.adapt(net(5, 5), "vera", ["0"], r=2, seed=3) for _ in range(2))
    assert one[0].adapters["all"].A.data_ptr() == two[0].adapters["all"].A.data_ptr()
    kept, state = two[0].adapters["all"].A.clone(), one[0].adapters["all"].state_dict()
    one[0].adapters["all"].load_state_dict({**state, "A": torch.ones(2, 5), "B": torch.ones(5, 2)})
    assert torch.equal(two[0].adapters["all"].A, kept) and one[0].adapters["all"].A.eq(1).all()
    lb.save(move(one), tmp_path)
    x = draw(1, 3, 5, dtype=torch.float32)
    assert torch.equal(lb.load(net(5, 5), tmp_path)(x), one(x))
    with pytest.raises(RuntimeError):
        one[0].adapters["all"].load_state_dict(
            {**state, "A": torch.ones(3, 5), "B": torch.ones(5, 2)}
        )


def test_a_draw_by_site_is_noticed():
    own = lb.adapt(net(4, 4, 4), "vera", "all-linear", r=2)
    by_site = [VeRA(draw(0, 4, 4), r=2, seed=seed) for seed in (1, 2)]
    assert not torch.equal(by_site[0].A, by_site[1].A) and torch.equal(
        own[0].adapters["all"].A, own[1].adapters["all"].A
    )


# AdaLoRA


class Recorder:
    "What PEFT's allocator wants of a configuration."

    def __init__(self, **values):
        self.__dict__.update(values)


def allocator(pairs, **settings):
    "PEFT's allocator for a model with the triplets (P, lam, Q) under PEFT's names."
    model = nn.Module()
    for i, (P, lam, Q) in enumerate(pairs):
        part = nn.Module()
        for name, p in (("lora_A", Q), ("lora_E", lam[:, None]), ("lora_B", P)):
            setattr(part, name, nn.ParameterDict({"default": nn.Parameter(p.detach().clone())}))
        model.add_module(f"layer{i}", part)
    return model, RankAllocator(
        model, Recorder(**{"beta1": 0.85, "beta2": 0.85, **settings}), "default"
    )


@settings(max_examples=40, deadline=None)
@given(
    first=st.integers(2, 60),
    begin=st.integers(0, 20),
    width=st.integers(1, 40),
    final=st.integers(0, 9),
    data=st.data(),
)
def test_the_budget_is_pefts_and_never_rises(first, begin, width, final, data):
    last = data.draw(st.integers(1, first))
    _, theirs = allocator(
        [], target_r=1, tinit=begin, tfinal=final, total_step=begin + width + final, deltaT=1
    )
    theirs.init_bgt, theirs.target_bgt = first, last
    got = [
        budget_at(step, first, last, begin, begin + width)
        for step in range(begin + width + final + 3)
    ]
    assert got == [theirs.budget_schedule(step)[0] for step in range(len(got))]
    assert (
        got[: begin + 1] == [first] * (begin + 1)
        and got[begin + width :] == [last] * (final + 3)
        and got == sorted(got, reverse=True)
    )


@settings(max_examples=60, deadline=None)
@example(first=28, last=1, width=9, step=3)  # in floating point 27·(6/9)³ is less than 8
@given(
    first=st.integers(1, 5000),
    last=st.integers(1, 5000),
    width=st.integers(1, 5000),
    step=st.integers(0, 5000),
)
def test_the_budget_is_the_cubic_rounded_down_exactly(first, last, width, step):
    last, step = min(first, last), min(step, width)
    assert budget_at(step, first, last, 0, width) == math.floor(
        last + (first - last) * Fraction(width - step, width) ** 3
    )


def with_gradients(seed, sizes=((4, 5, 3), (6, 2, 2), (3, 7, 3)), **options):
    "Adapters whose triplets and gradients are random."
    found = {}
    for i, (n, m, r) in enumerate(sizes):
        found[f"{i}"] = adapter = AdaLoRA(draw(seed + i, n, m), r=r, seed=seed, **options)
        for j, p in enumerate(adapter.parameters()):
            p.data.copy_(draw(seed + 10 * i + j, *p.shape))
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**5), kept=st.integers(1, 7))
def test_scores_and_masks_are_pefts(seed, kept):
    found = with_gradients(seed, budget=kept, total_steps=8)
    model, theirs = allocator(
        [(a.P, a.lam, a.Q) for a in found.values()],
        target_r=1,
        tinit=0,
        tfinal=0,
        total_step=8,
        deltaT=1,
    )
    for step in range(3):
        for i, adapter in enumerate(found.values()):
            own = dict(model.get_submodule(f"layer{i}").named_parameters())
            for j, (name, other) in enumerate(
                (("P", "lora_B.default"), ("lam", "lora_E.default"), ("Q", "lora_A.default"))
            ):
                p = getattr(adapter, name)
                p.grad = draw(seed + 100 * step + 10 * i + j, *p.shape)
                own[other].grad = p.grad.reshape(own[other].shape).clone()
            with torch.no_grad():
                watch(adapter)
        theirs.update_ipt(model)
    theirs.mask_to_budget(model, kept)
    with torch.no_grad():
        allocate(list(found.values()), kept)
    for i, adapter in enumerate(found.values()):
        left = (
            dict(model.get_submodule(f"layer{i}").named_parameters())["lora_E.default"][:, 0] != 0
        )
        assert torch.equal(adapter.mask, left)
    assert sum(int(adapter.mask.sum()) for adapter in found.values()) == kept


def train(model, optimizer, steps, start=0, **options):
    for step in range(start, start + steps):
        x = draw(step, 8, model[0].weight.shape[1], dtype=torch.float32)
        lb.train_step(
            model,
            optimizer,
            lambda x=x: (model(x) - x.sin().sum(1, keepdim=True)).square().mean(),
            **options,
        )


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**5),
    every=st.integers(1, 3),
    target=st.sampled_from([{"budget": 3}, {"target_rank": 1.5}, {}]),
)
def test_every_step_keeps_to_the_budget_and_pruned_triplets_are_zero(seed, every, target):
    model = lb.adapt(
        net(6, 8, 5),
        "adalora",
        "all-linear",
        r=3,
        seed=seed,
        total_steps=12,
        warmup=2,
        final=3,
        prune_every=every,
        **target,
    )
    found = list(lb.adapters(model).values())
    optimizer, last = (
        torch.optim.Adam(lb.param_groups(model, 0.05)),
        {
            "budget": 3,
            "target_rank": 3,
        }.get(next(iter(target), ""), 4),
    )
    left = []
    for step in range(14):
        train(model, optimizer, 1, step)
        left.append(sum(int(a.mask.sum()) for a in found))
        assert all(not a.lam[~a.mask].any() for a in found)
        assert (
            sum(int(torch.linalg.matrix_rank(change)) for change in lb.delta(model).values())
            <= left[-1]
        )
    assert left[:2] == [6, 6] and left[8:] == [last] * 6
    if every == 1:
        assert left == [budget_at(step, 6, last, 2, 9) for step in range(1, 15)]


def test_the_budget_goes_where_the_loss_wants_it():
    "Of two layers in a row only the first is asked for; it gets the triplets."
    model = lb.adapt(
        net(6, 6, 6),
        "adalora",
        "all-linear",
        r=4,
        budget=4,
        total_steps=60,
        warmup=10,
        final=10,
        orthogonality=0.0,
    )
    optimizer = torch.optim.Adam(lb.param_groups(model, 0.02))
    goal = draw(9, 6, 6, dtype=torch.float32)
    for step in range(60):
        x = draw(step, 16, 6, dtype=torch.float32)
        lb.train_step(
            model,
            optimizer,
            lambda x=x: (
                (model[0](x) - x @ goal.T).square().mean() + 1e-3 * model(x).square().mean()
            ),
        )
    first, second = (int(a.mask.sum()) for a in lb.adapters(model).values())
    assert (first, second) == (4, 0)


def test_a_pruned_triplet_can_come_back():
    found = with_gradients(0, sizes=((4, 4, 2),), budget=1, total_steps=100, warmup=0, final=0)
    adapter = found["0"]

    def step(number, favoured):
        adapter.lam.data.fill_(0.5)
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        adapter.lam.grad[favoured] = 10.0 + number
        prune(found, number)

    for number in range(80, 84):
        step(number, 0)
    assert adapter.mask.tolist() == [True, False] and adapter.lam.tolist() == [0.5, 0]
    for number in range(84, 99):
        step(number, 1)
    assert adapter.mask.tolist() == [False, True] and adapter.lam.tolist() == [0, 0.5]


def test_scores_follow_their_definition():
    adapter = with_gradients(3, sizes=((3, 4, 2),), total_steps=9)["0"]
    mean, spread = {}, {}
    for step in range(3):
        for name, p in adapter.named_parameters():
            p.grad = draw(50 + step, *p.shape)
            seen = (p * p.grad).abs().detach()
            mean[name] = 0.85 * mean.get(name, 0) + 0.15 * seen
            spread[name] = 0.85 * spread.get(name, 0) + 0.15 * (seen - mean[name]).abs()
        with torch.no_grad():
            watch(adapter)
    entry = {name: mean[name] * spread[name] for name in mean}
    want = [entry["lam"][i] + sum(entry["P"][:, i]) / 3 + sum(entry["Q"][i]) / 4 for i in range(2)]
    assert torch.allclose(scores(adapter), torch.stack(want), atol=1e-12)


def test_the_penalty_is_added_to_the_loss_and_only_pulls_p_and_q():
    found = with_gradients(1, orthogonality=0.3)
    want = sum(
        0.3
        * ((a.P.T @ a.P - torch.eye(a.r)).norm() ** 2 + (a.Q @ a.Q.T - torch.eye(a.r)).norm() ** 2)
        for a in found.values()
    )
    assert torch.allclose(orthogonality(found), want)
    assert orthogonality(with_gradients(1, orthogonality=0)) is None
    model = lb.adapt(net(6, 6), "adalora", ["0"], r=3, orthogonality=1.0)
    adapter, optimizer = lb.adapters(model)["0"], torch.optim.Adam(lb.param_groups(model, 0.02))
    before = gap(adapter.P.T @ adapter.P).item()
    loss = lb.train_step(model, optimizer, lambda: 0 * model(torch.zeros(1, 6)).sum())
    assert loss.item() == 0
    for _ in range(200):
        lb.train_step(model, optimizer, lambda: 0 * model(torch.zeros(1, 6)).sum())
    assert gap(adapter.P.T @ adapter.P).item() < 1e-3 * before and not adapter.lam.any()


def test_saving_in_the_middle_of_the_schedule_goes_on_as_if_uninterrupted(tmp_path):
    def adapted():
        return lb.adapt(
            net(6, 8, 5), "adalora", "all-linear", r=3, budget=2, total_steps=14, warmup=1, final=2
        )

    whole = adapted()
    train(whole, torch.optim.SGD(lb.param_groups(whole, 0.05)), 12)
    part = adapted()
    train(part, torch.optim.SGD(lb.param_groups(part, 0.05)), 6)
    lb.save(part, tmp_path)
    again = lb.load(net(6, 8, 5), tmp_path)
    train(again, torch.optim.SGD(lb.param_groups(again, 0.05)), 6, 6)
    assert all(
        torch.equal(one, two)
        for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert sum(int(a.mask.sum()) for a in lb.adapters(again).values()) == 2


def test_a_checkpoint_resumes_to_the_same_bits(tmp_path):
    data = load_data("digits", limit=64)

    def run(epochs_first=None):
        model = lb.adapt(
            load_model("tiny_vit", n_classes=10),
            "adalora",
            r=2,
            head=["head"],
            budget=3,
            total_steps=6,
            warmup=1,
            final=1,
        )
        stop = KeyboardInterrupt if epochs_first else None
        count = iter(range(99))

        def backward(loss):
            if stop and next(count) == epochs_first:
                raise stop
            loss.backward()

        fit(
            model,
            data,
            epochs=3,
            lr=1e-2,
            batch_size=32,
            checkpoint=tmp_path / "run" if epochs_first is not None else None,
            save_every=1,
            backward=backward,
        )
        return model

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(3)
    resumed = run(0)
    assert all(
        torch.equal(one, two)
        for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_pruned_adapters_export_only_what_is_left(tmp_path):
    name = "tiny_bert"
    model = lb.adapt(
        load_model(name), "adalora", r=4, alpha=6.0, budget=5, total_steps=4, warmup=0, final=1
    )
    batch = torch.arange(12).reshape(2, 6)
    optimizer = torch.optim.Adam(lb.param_groups(model, 0.05))
    for _ in range(4):
        lb.train_step(model, optimizer, lambda: model(batch)[0].square().mean())
    lb.to_peft(model, tmp_path)
    again = peft.PeftModel.from_pretrained(load_model(name), str(tmp_path))
    ranks = [p.shape[0] for key, p in again.named_parameters() if "lora_A" in key]
    left = [int(a.mask.sum()) for a in lb.adapters(model).values()]
    assert sum(left) == 5 and ranks == [max(1, k) for k in left]
    with torch.no_grad():
        assert close(again(batch)[0], model(batch)[0], 2e-6)


@pytest.mark.parametrize("as_lora", [False, True])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_vit"])
def test_vera_exports_as_vera_and_as_lora(name, as_lora, tmp_path):
    targets = {"tiny_bert": "all-linear", "tiny_gpt2": None, "tiny_vit": ["qkv", "fc1"]}[name]
    model = move(lb.adapt(load_model(name), "vera", targets, r=3, alpha=1.5))
    lb.to_peft(model, tmp_path, as_lora=as_lora)
    again = peft.PeftModel.from_pretrained(load_model(name), str(tmp_path))
    fused = name == "tiny_gpt2"
    assert again.peft_config["default"].peft_type == ("LORA" if as_lora or fused else "VERA")
    batch = (
        draw(5, 2, 1, 28, 28, dtype=torch.float32)
        if name == "tiny_vit"
        else torch.arange(12).reshape(2, 6)
    )
    with torch.no_grad():
        got, want = (
            out if isinstance(out, torch.Tensor) else out[0] for out in (again(batch), model(batch))
        )
    assert close(got, want, 2e-6)


@pytest.mark.parametrize("make", [VeRA, AdaLoRA])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tangent_is_the_derivative(make, seed):
    W0 = draw(seed, 4, 5)
    adapter = make(W0, r=2, seed=seed, alpha=3.0)
    for i, p in enumerate(adapter.parameters()):
        p.data.copy_(draw(seed + i, *p.shape))
    M = {
        name: draw(seed + 9 + i, *p.shape) for i, (name, p) in enumerate(adapter.named_parameters())
    }

    def at(t):
        other = copy.deepcopy(adapter)
        for name, p in other.named_parameters():
            p.data.add_(t * M[name])
        return other.delta(W0).detach()

    assert close(adapter.tangent(M, W0), (at(1e-5) - at(-1e-5)) / 2e-5, 1e-7)
    assert not adapter.tangent({}, W0).any()


def test_a_scale_in_one_place_is_noticed():
    class Twice(AdaLoRA):
        def forward(self, x, W0):
            return 2 * super().forward(x, W0)

    with pytest.raises(BrokenLaw, match="law 2"):
        check(Case(Method(Twice, "", "")))


BAD = [
    {"budget": 0, "total_steps": 9},
    {"budget": -3, "total_steps": 9},
    {"budget": 1.5, "total_steps": 9},
    {"target_rank": 0, "total_steps": 9},
    {"target_rank": 0.5, "total_steps": 9},
    {"target_rank": 4, "total_steps": 9},
    {"target_rank": 1, "budget": 2, "total_steps": 9},
    {"target_rank": 1},
    {"budget": 2},
    {"budget": 0},
    {"warmup": 1},
    {"total_steps": 0},
    {"total_steps": 9, "warmup": 5, "final": 4},
    {"total_steps": 9, "warmup": -1},
    {"prune_every": 0},
    {"beta1": 1.0},
    {"beta2": -0.1},
    {"orthogonality": -1},
    {"orthogonality": float("nan")},
    {"target": 2},
    {"alpha": -1.0},
    {"lr_ratio": 4.0},
]


@pytest.mark.parametrize(
    "method, options",
    [("adalora", o) for o in BAD]
    + [
        ("vera", {"d_initial": "x"}),
        ("vera", {"d_initial": float("inf")}),
        ("vera", {"r": 9}),
        ("vera", {"lr_ratio": 2.0}),
        ("vera", {"alpha": 0}),
    ],
)
def test_bad_options_are_refused_and_nothing_changes(method, options):
    model = net(4, 4, 4)
    before, flags = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(lb.LoraBookError) as caught:
        lb.adapt(model, method, "all-linear", **{"r": 3, **options})
    assert isinstance(caught.value, (ValueError, TypeError, KeyError)) and str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert flags == [p.requires_grad for p in model.parameters()] and all(
        type(layer) is nn.Linear for layer in model
    )
