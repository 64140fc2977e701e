"""PiSSA and DoRA: their starts, DoRA's product and gradients, equality with Hugging Face PEFT."""

import peft
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.core.adapter import Block, effective_product
from lora_book.core.adapting import Method
from lora_book.core.hosts import sites
from lora_book.core.laws import BrokenLaw, Case, check, conv1d
from lora_book.core.products import saved_bytes
from lora_book.lab.models import load_model
from lora_book.present.dora import DoRA, row_lengths, scaled_linear
from lora_book.present.pissa import PiSSA, principal

WIDE = torch.float64
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def draw(seed, *shape, dtype=WIDE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def moved(make, W0, seed=0, **options):
    "An adapter with every trained number moved from its start."
    adapter = make(W0, seed=seed, **options)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.3 * draw(seed + i, *p.shape).to(p))
    return adapter


def close(got, want, tolerance):
    return (got - want).abs().max().item() <= tolerance * max(1.0, want.abs().max().item())


# DoRA


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    tokens=st.integers(1, 12),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_dora_product_and_all_gradients_are_those_of_the_definition(
    shape, tokens, bias, seed, data
):
    (n, m), r = shape, data.draw(st.integers(1, min(shape)))
    dtype, tolerance = data.draw(st.sampled_from([(WIDE, 1e-12), (torch.float32, 2e-5)]))
    W0, b = draw(seed, n, m, dtype=dtype), draw(seed + 1, n, dtype=dtype) if bias else None
    adapter, g = moved(DoRA, W0, seed, r=r, alpha=1.7), draw(seed + 3, tokens, 2, n, dtype=dtype)
    found = []
    for product in (DoRA.product, effective_product):
        x = draw(seed + 2, 2, tokens, m, dtype=dtype).transpose(0, 1).requires_grad_()
        y = product(x, W0, b, [Block(None, adapter, W0)])
        found.append((y, *torch.autograd.grad(y, [x, *adapter.parameters()], g)))
    scale = 1 / min(1.0, (W0 + adapter.scaling * adapter.B @ adapter.A).norm(dim=1).min().item())
    assert all(close(got, want, tolerance * scale) for got, want in zip(*found, strict=True))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([3, 20]))
def test_blocks_of_a_fused_layer_scale_their_own_rows_only(seed, tokens):
    W = draw(seed, 9, 5)
    blocks = [
        Block(rows, moved(DoRA, W[rows], seed + 1, r=2), W[rows])
        for rows in (slice(6, 9), slice(0, 3))
    ]
    x, g = draw(seed + 2, tokens, 5).requires_grad_(), draw(seed + 3, tokens, 9)
    inputs = [x, *(p for block in blocks for p in block.adapter.parameters())]
    found = [
        (y := product(x, W, W[:, 0], blocks), *torch.autograd.grad(y, inputs, g))
        for product in (DoRA.product, effective_product)
    ]
    assert all(close(got, want, 1e-11) for got, want in zip(*found, strict=True))
    assert torch.equal(found[0][0][:, 3:6], x @ W[3:6].T + W[3:6, 0]) or close(
        found[0][0][:, 3:6], x @ W[3:6].T + W[3:6, 0], 1e-13
    )


def test_a_product_that_forgets_the_lengths_is_noticed():
    class Forgets(DoRA):
        @classmethod
        def product(cls, x, W, bias, blocks):
            d = blocks[0].adapter.ratio(blocks[0].W0)
            return scaled_linear(
                x,
                W,
                bias,
                torch.ones_like(d),
                [(b.rows, b.adapter.A, b.adapter.B, b.adapter.scaling) for b in blocks],
            )

    with pytest.raises(BrokenLaw, match="law 2"):
        check(Case(Method(Forgets, "", "")))


@pytest.mark.parametrize("tokens", [2, 6])
def test_dora_differentiates_twice(tokens):
    W0, bias = draw(0, 3, 4), draw(1, 3)
    A, B, d, x = (
        M.requires_grad_() for M in (draw(2, 2, 4), draw(3, 3, 2), draw(4, 3), draw(5, tokens, 4))
    )
    run = lambda x, d, A, B: scaled_linear(x, W0, bias, d, [(None, A, B, 0.7)])  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, d, A, B)) and torch.autograd.gradgradcheck(
        run, (x, d, A, B)
    )


def in_peft(base, adapter, kind):
    "The same factors in PEFT's DoRA or LoRA, and its trained tensors in our order."
    model = nn.Sequential(base)
    config = peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.scaling * adapter.r,
        target_modules=["0"],
        use_dora=kind == "dora",
    )
    wrapped = peft.get_peft_model(model, config).to(adapter.A.dtype)
    layer = wrapped.base_model.model[0]
    own = {
        "magnitude": layer.lora_magnitude_vector["default"].weight,
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
    }
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(getattr(adapter, name))
    return wrapped, own


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (WIDE, 1e-13)])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_pefts_dora(dtype, tolerance, bias):
    base = nn.Linear(10, 7, bias=bias, dtype=dtype)
    model = lb.adapt(
        nn.Sequential(nn.Linear(10, 7, bias=bias, dtype=dtype)), "dora", ["0"], r=3, alpha=5.0
    )
    with torch.no_grad():
        for ours, theirs in zip(
            sorted(n for n, _ in base.named_parameters()),
            sorted(n for n, _ in base.named_parameters()),
            strict=True,
        ):
            getattr(base, theirs).copy_(draw(len(ours), *getattr(base, theirs).shape) / 3)
            getattr(model[0], ours).copy_(getattr(base, theirs))
    adapter = moved(DoRA, base.weight.detach(), 4, r=3, alpha=5.0)
    model[0].adapters["all"] = adapter
    theirs, own = in_peft(base, adapter, "dora")
    x, g = draw(7, 4, 3, 10, dtype=dtype), draw(8, 4, 3, 7, dtype=dtype)
    found = []
    for run, parameters in ((model, {name: getattr(adapter, name) for name in own}), (theirs, own)):
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        found.append((y, *torch.autograd.grad(y, [inputs, *parameters.values()], g)))
    assert all(
        close(got, want, 10 * tolerance if i else tolerance)
        for i, (got, want) in enumerate(zip(*found, strict=True))
    )


def test_dora_keeps_at_most_seven_tenths_of_what_peft_keeps():
    base = nn.Linear(64, 64)
    adapter = moved(DoRA, base.weight.detach(), 1, r=4)
    theirs, _ = in_peft(nn.Linear(64, 64), adapter, "dora")
    x = draw(2, 1024, 64, dtype=torch.float32).requires_grad_()
    ours = lambda: DoRA.product(
        x, base.weight.detach(), None, [Block(None, adapter, base.weight.detach())]
    )  # noqa: E731
    kept = (
        saved_bytes(ours, exclude=[x, base.weight, *adapter.parameters()]),
        saved_bytes(lambda: theirs(x), exclude=[x, *theirs.parameters()]),
    )
    assert kept[0] == 4 * 1024 * (64 + 4) + 2 * 4 * 64 and kept[0] + x.nbytes <= 0.7 * (
        kept[1] + x.nbytes
    )


@pytest.mark.parametrize("tokens", [3, 20])
def test_autocast_and_checkpointing_leave_lengths_and_gradients_alone(tokens):
    model = lb.adapt(nn.Sequential(nn.Linear(16, 12)), "dora", ["0"], r=2)
    adapter, x = model[0].adapters["all"], draw(0, tokens, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            adapter.ratio(model[0].weight.detach()).eq(1).all() and model(x).dtype is torch.bfloat16
        )
        with lb.disabled(model):
            base = model(x)
        assert close(model(x).float(), base.float(), 1e-2)
    with torch.no_grad():
        adapter.B.add_(0.3), adapter.magnitude.mul_(1.2)
    grads = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_rows_of_the_weight_have_the_length_g(shape, seed):
    W0 = draw(seed, *shape)
    adapter = moved(DoRA, W0, seed, r=1)
    assert torch.allclose((W0 + adapter.delta(W0)).norm(dim=1), adapter.magnitude.abs(), atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 9])
def test_zero_rows_stay_zero_without_nan(tokens):
    W0 = draw(0, 5, 6)
    W0[[1, 3]] = 0
    adapter = DoRA(W0, r=2)
    assert torch.equal(adapter.delta(W0), torch.zeros(5, 6, dtype=WIDE))
    y = DoRA.product(draw(1, tokens, 6), W0, None, [Block(None, adapter, W0)])
    y.square().sum().backward()
    assert (
        all(torch.isfinite(p.grad).all() for p in adapter.parameters()) and not y[:, [1, 3]].any()
    )
    (adapter.delta(W0).sum() + 0 * sum(p.sum() for p in adapter.parameters())).backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([2, 9]), rows=st.integers(1, 80))
def test_the_whole_gradient_is_that_of_the_written_out_definition(seed, tokens, rows):
    W0 = draw(seed, rows, 6)
    adapter, g, found = (
        moved(DoRA, W0, seed, r=1, alpha=1.3, detach_norm=False),
        draw(seed + 3, tokens, rows),
        [],
    )
    for written_out in (False, True):
        x = draw(seed + 2, tokens, 6).requires_grad_()
        V = W0 + adapter.scaling * adapter.B @ adapter.A
        y = (
            x @ ((adapter.magnitude / V.norm(dim=1))[:, None] * V).T
            if written_out
            else DoRA.product(x, W0, None, [Block(None, adapter, W0)])
        )
        found.append((y, *torch.autograd.grad(y, [x, *adapter.parameters()], g)))
    scale = 1 / min(1.0, V.norm(dim=1).min().item())
    assert all(close(got, want, 1e-11 * scale**2) for got, want in zip(*found, strict=True))


def test_lengths_differentiate_twice():
    W0, A, B = draw(0, 5, 4), draw(1, 2, 4).requires_grad_(), draw(2, 5, 2).requires_grad_()
    lengths = lambda A, B: row_lengths(W0, A, B, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(lengths, (A, B)) and torch.autograd.gradgradcheck(
        lengths, (A, B)
    )


def test_the_whole_gradient_is_the_detached_one_less_its_part_along_the_rows():
    W0, G, grads = draw(0, 6, 4), draw(2, 6, 4), {}
    for detached in (True, False):
        adapter = moved(DoRA, W0, 1, r=4, detach_norm=detached)
        with torch.no_grad():
            adapter.A.copy_(torch.eye(4))
        (adapter.delta(W0) * G).sum().backward()
        grads[detached], V = adapter.B.grad, adapter.moved(W0).detach()
    unit = V / V.norm(dim=1, keepdim=True)
    assert torch.allclose(
        grads[True] - grads[False], (grads[True] * unit).sum(1, keepdim=True) * unit, atol=1e-12
    )
    assert not torch.allclose(grads[True], grads[False], atol=1e-3)


@pytest.mark.parametrize("make", [DoRA, PiSSA])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tangent_is_the_derivative(make, seed):
    W0 = draw(seed, 4, 5)
    adapter = moved(make, W0, seed, r=2)
    M = {
        name: draw(seed + 9 + i, *p.shape) for i, (name, p) in enumerate(adapter.named_parameters())
    }

    def at(t):
        other = make(W0, r=2, seed=seed)
        other.load_state_dict(
            {**adapter.state_dict(), **{name: getattr(adapter, name) + t * M[name] for name in M}}
        )
        return other.delta(W0).detach()

    h = 1e-6
    want, got = (at(h) - at(-h)) / (2 * h), adapter.tangent(M, W0)
    assert close(got, want, 1e-5 / min(1, (W0 + adapter.delta(W0)).norm(dim=1).min().item()))


def test_dora_has_no_factors():
    W0 = draw(0, 3, 4)
    with pytest.raises(lb.LoraBookError, match="DoRA"):
        DoRA(W0, r=1).factors(W0)


# PiSSA


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), alpha=st.floats(0.1, 30), data=st.data())
def test_pissa_starts_with_the_best_product_of_its_rank_and_at_no_change(shape, seed, alpha, data):
    r, W0 = data.draw(st.integers(1, min(shape))), draw(seed, *shape)
    adapter = PiSSA(W0, r=r, alpha=alpha)
    part = adapter.scaling * (adapter.B @ adapter.A)
    rest = torch.linalg.svdvals(W0)[r:].square().sum().sqrt().item()
    assert abs((W0 - part).norm().item() - rest) < 1e-10 and torch.linalg.matrix_rank(part) == r
    assert not adapter.delta(W0).any()
    assert torch.allclose(adapter.A.norm(dim=1), adapter.B.norm(dim=0), atol=1e-10)


@pytest.mark.parametrize(
    "W0",
    [
        torch.zeros(4, 5),
        torch.ones(6, 3),
        torch.diag(torch.tensor([2.0, 0, 0, 1])),
        torch.tensor([[3.0]]),
    ],
)
def test_pissa_of_a_deficient_weight_is_finite_and_learns(W0):
    adapter = PiSSA(W0, r=min(W0.shape))
    adapter.delta(W0).sum().backward()
    assert all(
        torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in adapter.parameters()
    )
    assert close(adapter.scaling * adapter.B @ adapter.A, W0, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make, names",
    [(nn.Linear, ["0"]), (nn.Linear, ["0[q,v]"]), (conv1d, ["0"]), (conv1d, ["0[q,v]"])],
)
def test_pissa_factorises_the_logical_weight_of_each_host(make, names, dtype):
    model = nn.Sequential(make(5, 12)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(draw(1, *model[0].weight.shape))
    before = model[0].weight.clone()
    lb.adapt(model, "pissa", names, r=2)
    for _, site in sites(model):
        for block in site.blocks():
            W0 = block.W0.to(torch.promote_types(dtype, torch.float32))
            A, B = principal(W0, 2)
            assert close(block.adapter.B @ block.adapter.A, B @ A, 1e-5)
            assert block.adapter.rank_bound(*W0.shape) == min(4, *W0.shape)
    assert torch.equal(model[0].weight, before)
    assert not any(change.any() for change in lb.delta(model).values())


def test_pissa_starts_where_peft_starts():
    base = nn.Linear(9, 7, bias=False)
    with torch.no_grad():
        base.weight.copy_(draw(3, 7, 9))
    adapter = PiSSA(base.weight.detach(), r=3, alpha=5.0)
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    signs = torch.sign((A * adapter.A).sum(1))
    assert close(A * signs[:, None], adapter.A, 2e-6) and close(B * signs, adapter.B, 2e-6)
    assert close(adapter.rest(draw(3, 7, 9, dtype=torch.float32)), layer.base_layer.weight, 2e-6)


def test_a_start_that_is_not_subtracted_is_noticed():
    class Jumps(PiSSA):
        def resting(self):
            return []

    with pytest.raises(BrokenLaw, match="law 1"):
        check(Case(Method(Jumps, "", "")))


def test_pissa_keeps_its_start_through_save_load_and_double(tmp_path):
    def base():
        model = nn.Sequential(nn.Linear(6, 5))
        with torch.no_grad():
            model[0].weight.copy_(draw(1, 5, 6)), model[0].bias.zero_()
        return model

    model, x = lb.adapt(base(), "pissa", ["0"], r=2), draw(2, 3, 6, dtype=torch.float32)
    with torch.no_grad():
        for p in model[0].adapters.parameters():
            p.add_(0.1)
    lb.save(model, tmp_path)
    again = lb.load(base(), tmp_path)
    assert torch.equal(again(x), model(x)) and torch.equal(
        again[0].adapters["all"].A0, model[0].adapters["all"].A0
    )
    want = x.double() @ (model[0].weight + lb.delta(model)["0"]).double().T
    assert close(model.double()(x.double()), want, 1e-6)


# Both in whole models


@pytest.mark.parametrize("method", ["dora", "pissa"])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_vit"])
def test_export_to_peft_keeps_outputs(method, name, tmp_path):
    model = lb.adapt(load_model(name), method, r=2, alpha=3.0)
    with torch.no_grad():
        for i, adapter in enumerate(lb.adapters(model).values()):
            for p in adapter.parameters():
                p.add_(0.05 * draw(i, *p.shape).to(p))
    lb.to_peft(model, tmp_path)
    again = peft.PeftModel.from_pretrained(load_model(name), str(tmp_path))
    batch = (
        {"pixel_values": draw(5, 2, 1, 28, 28, dtype=torch.float32)}
        if name == "tiny_vit"
        else {"input_ids": torch.arange(12).reshape(2, 6)}
    )
    with torch.no_grad():
        got, want = (run(again, batch), run(model, batch))
    assert close(got, want, 2e-6)


def run(model, batch):
    out = model(*batch.values())
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize(
    "method, options",
    [
        ("dora", {"detach_norm": 1}),
        ("dora", {"init": "zeros"}),
        ("dora", {"alpha": -1}),
        ("pissa", {"r": 99}),
        ("pissa", {"alpha": 0}),
        ("pissa", {"niter": 3}),
        ("dora", {"r": 0}),
    ],
)
def test_bad_options_are_refused_and_nothing_changes(method, options):
    model = nn.Sequential(nn.Linear(4, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lb.LoraBookError):
        lb.adapt(model, method, ["0"], **options)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
