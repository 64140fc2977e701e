"""Column methods (paca, cla, random_cla, c3la, random_c3la): gradients, memory, operations, columns
reached, chains, bad input, mutants.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_book as lb
from lora_book.core.adapting import Method
from lora_book.core.laws import HOSTS, BrokenLaw, Case, check, randomise
from lora_book.core.products import column_linear, count_flops, saved_bytes
from lora_book.future.c3la import C3LA, STARTS, circulant
from lora_book.future.cla import CLA, SELECTORS, RandomCLA, first_columns
from lora_book.lab.data import batches, load_data
from lora_book.lab.models import load_model, logits
from lora_book.lab.training import evaluate, fit
from lora_book.present.paca import PaCA
from lora_book.theory import projections

COLUMN_METHODS = ("paca", "cla", "random_cla", "c3la", "random_c3la")
CHAINS = ("c3la", "random_c3la")
FEW = settings(max_examples=20, deadline=None)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def adapted(method, n=6, m=8, seed=0, dtype=torch.float64, **options):
    layer = nn.Linear(m, n, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(n, m, seed=1)), layer.bias.copy_(normal(n, seed=2))
    return lb.adapt(nn.Sequential(layer), method, ["0"], seed=seed, **options)


def adapter_of(model):
    return lb.adapters(model)["0"]


def by_definition(x, W, bias, idx, B, scale, rows):
    change = torch.zeros_like(W)
    change[rows] = scale * B @ F.one_hot(idx, W.shape[1]).to(B)
    return F.linear(x, W + change, bias)


@st.composite
def products(draw):
    n, m = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    r = draw(st.integers(1, m))
    shape = draw(st.sampled_from([(), (1,), (4,), (20,), (2, 3), (5, 4), (2, 2, 5), (0,)])) + (m,)
    start = draw(st.integers(0, n - 1))
    rows = draw(st.sampled_from([None, slice(start, draw(st.integers(start + 1, n)))]))
    return n, m, r, shape, rows, draw(st.booleans()), draw(st.integers(0, 10**6))


# The product


@FEW
@given(products())
def test_outputs_and_gradients_are_those_of_the_definition(case):
    n, m, r, shape, rows, with_bias, seed = case
    k = n if rows is None else rows.stop - rows.start
    x, B = normal(*shape, seed=seed).requires_grad_(), normal(k, r, seed=seed + 1).requires_grad_()
    W, bias = normal(n, m, seed=seed + 2), normal(n, seed=seed + 3) if with_bias else None
    idx = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:r]
    ours = column_linear(x, W, bias, [(rows, idx, B, 0.7)])
    theirs = by_definition(x, W, bias, idx, B, 0.7, rows or slice(None))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, right in zip(
        *(torch.autograd.grad(y.sin().sum(), (x, B)) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 40])
def test_transposed_input_two_blocks_and_a_layer_used_twice(tokens):
    W, idx = normal(6, 5), torch.tensor([4, 1])
    Bs = [normal(2, 2, seed=s).requires_grad_() for s in (3, 4)]
    x = normal(5, tokens, seed=5).requires_grad_()
    blocks = [(slice(0, 2), idx, Bs[0], 2.0), (slice(4, 6), idx + 0, Bs[1], 0.5)]

    def twice(layer):
        return layer(layer(x.t())[:, :5].tanh()).square().sum()

    change = torch.zeros_like(W)
    change[0:2] = 2.0 * Bs[0] @ F.one_hot(idx, 5).double()
    change[4:6] = 0.5 * Bs[1] @ F.one_hot(idx, 5).double()
    ours = torch.autograd.grad(twice(lambda z: column_linear(z, W, None, blocks)), (x, *Bs))
    theirs = torch.autograd.grad(twice(lambda z: F.linear(z, W + change)), (x, *Bs))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 9])
def test_second_derivatives(tokens):
    W, idx = normal(4, 5), torch.tensor([0, 3])
    x, B = normal(tokens, 5, seed=1).requires_grad_(), normal(4, 2, seed=2).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda X, M: column_linear(X, W, None, [(None, idx, M, 0.5)]), (x, B)
    )


def test_a_change_of_the_columns_between_forward_and_backward_is_noticed():
    model = adapted("c3la", r=2)
    loss = model(normal(20, 8, seed=3)).square().sum()
    lb.advance(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", COLUMN_METHODS)
def test_no_grad_checkpointing_and_autocast_agree_with_the_plain_pass(method):
    model = randomise(adapted(method, r=2, dtype=torch.float32), 0)
    x = normal(4, 5, 8, seed=3, dtype=torch.float32).requires_grad_()
    B, plain = adapter_of(model).B, model(x)
    want = torch.autograd.grad(plain.square().sum(), (x, B))
    with torch.no_grad():
        assert torch.equal(model(x), plain) and not model(x).requires_grad
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), (x, B))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype is torch.bfloat16
    close = torch.autograd.grad(low.float().square().sum(), (x, B))
    assert all(
        a.dtype is torch.float32 and (a - b).norm() < 0.03 * b.norm()
        for a, b in zip(close, want, strict=True)
    )


def test_sixteen_bit_weights_do_not_swallow_small_columns():
    model = adapted("cla", r=2, dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        adapter_of(model).B.fill_(1e-3)
    x, other = torch.zeros(40, 8, dtype=torch.bfloat16), torch.zeros(40, 8, dtype=torch.bfloat16)
    x[:, 0], x[:, 7], other[:, 6:] = 1.0, -1.0, torch.tensor([1.0, -1.0])
    got = model(x) - model(other)
    with torch.no_grad():
        model[0].bias.zero_()
    swallowed = (torch.ones(()) + 1e-3).bfloat16() - 1
    assert (
        swallowed == 0
        and (model(x) - model(other)).float().mean() > 5e-4
        and torch.isfinite(got).all()
    )


# What it keeps and what it computes


@pytest.mark.parametrize("method", COLUMN_METHODS)
@pytest.mark.parametrize("tokens", [24, 96])
def test_bytes_kept_are_r_numbers_a_token(method, tokens):
    model = adapted(method, 16, 48, r=4, dtype=torch.float32)
    x = normal(tokens, 48, dtype=torch.float32).requires_grad_()
    for _ in range(3 if method in CHAINS else 1):
        own = [*model.parameters(), *model.buffers(), model[0].resting_weight()]
        assert saved_bytes(lambda: model(x), exclude=own) == 4 * tokens * 4
        if method in CHAINS:
            randomise(lb.advance(model), 0)


@pytest.mark.parametrize("method", COLUMN_METHODS)
def test_operations_beyond_the_frozen_layers(method):
    n, m, r = 16, 48, 4
    model = adapted(method, n, m, r=r, dtype=torch.float32)

    def counted(tokens):
        x = normal(tokens, m, dtype=torch.float32).requires_grad_()
        return count_flops(lambda: model(x).sum().backward())

    for _ in range(4 if method in CHAINS else 1):
        assert counted(96) == 96 * (4 * n * m + 2 * r * n)
        assert counted(24) == 24 * (4 * n * m + 6 * r * n)
        lb.advance(model) if method in CHAINS else None


# Which columns


@FEW
@given(st.integers(1, 40), st.data())
def test_laws_of_the_start_are_those_of_the_theory(m, data):
    r = data.draw(st.integers(1, m))
    for law in SELECTORS:
        assert first_columns(law, m, r).tolist() == projections.starts(law, m, r)
    assert list(STARTS["block"](m, r)) == projections.starts("cyclic", m, r)
    reach = {
        law: len({s + q for s in projections.starts(law, m, r) for q in range(r)})
        for law in SELECTORS
    }
    assert reach == {"block": r * (m // r), "literal": m // r + r - 1, "window": m}


@FEW
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_picked_columns(n, m, data):
    r, seed = data.draw(st.integers(1, min(n, m))), data.draw(st.integers(0, 999))
    W0 = torch.zeros(n, m)
    assert CLA(W0, r=r).idx.tolist() == list(range(r))
    paca = PaCA(W0, r=r, seed=seed).idx.tolist()
    assert len(set(paca)) == r and paca == sorted(paca) and 0 <= paca[0] and paca[-1] < m
    for law in SELECTORS:
        idx = RandomCLA(W0, r=r, seed=seed, selector=law).idx.tolist()
        assert idx == list(range(idx[0], idx[0] + r)) and idx[0] in projections.starts(law, m, r)
    for make in (CLA, PaCA, RandomCLA):
        made = make(W0, r=r, seed=seed)
        assert torch.equal(made.A, F.one_hot(made.idx, m).float()) and made.idx.dtype is torch.int64
        assert [name for name, _ in made.named_parameters()] == ["B"] and set(
            made.state_dict()
        ) == {"B", "idx"}


@pytest.mark.parametrize("law", SELECTORS)
def test_every_start_of_a_law_is_drawn(law):
    drawn = [
        RandomCLA(torch.zeros(3, 11), r=3, seed=seed, selector=law).idx[0].item()
        for seed in range(200)
    ]
    assert sorted(set(drawn)) == projections.starts(law, 11, 3)
    assert [
        RandomCLA(torch.zeros(3, 11), r=3, seed=seed, selector=law).idx[0].item()
        for seed in range(200)
    ] == drawn


def test_every_column_is_as_likely_in_paca():
    counts = sum(
        F.one_hot(PaCA(torch.zeros(3, 10), r=3, seed=seed).idx, 10).sum(0) for seed in range(1000)
    )
    assert (counts - 300).abs().max() < 5 * (1000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("method", COLUMN_METHODS)
def test_draws_leave_the_global_state_alone_and_layers_differ_by_name(method):
    before = torch.get_rng_state()
    model = lb.adapt(
        nn.Sequential(*(nn.Linear(64, 4) for _ in range(8))),
        method,
        [str(i) for i in range(8)],
        r=2,
        seed=3,
    )
    lb.advance(model) if method in CHAINS else None
    linear_draws = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(8):
        nn.Linear(64, 4)
    assert torch.equal(torch.get_rng_state(), linear_draws)
    starts = {tuple(a.idx.tolist()) for a in lb.adapters(model).values()}
    assert len(starts) == 1 if method in ("cla", "c3la") else len(starts) > 1


def test_cla_is_paca_on_the_first_columns():
    cla, paca = adapted("cla", r=3), adapted("paca", r=3)
    adapter_of(paca).idx.copy_(torch.arange(3))
    x, y, losses = normal(30, 8, seed=4), normal(30, 6, seed=5), {}
    for name, model in (("cla", cla), ("paca", paca)):
        optimizer = torch.optim.AdamW(lb.param_groups(model, 0.05))
        losses[name] = [
            lb.train_step(model, optimizer, lambda model=model: F.mse_loss(model(x), y)).item()
            for _ in range(5)
        ]
    assert losses["cla"] == losses["paca"] and torch.equal(adapter_of(cla).B, adapter_of(paca).B)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_paca_is_training_the_columns_in_place(optimizer):
    model, x, y = adapted("paca", r=3), normal(30, 8, seed=4), normal(30, 6, seed=5)
    idx, W = adapter_of(model).idx, model[0].weight.detach().clone()
    columns, rest = W[:, idx].clone().requires_grad_(), W.clone()
    rest[:, idx] = 0
    opts = optimizer(lb.param_groups(model, 0.03)), optimizer([columns], lr=0.03)
    for _ in range(10):
        lb.train_step(model, opts[0], lambda: F.mse_loss(model(x), y))
        opts[1].zero_grad()
        F.mse_loss(F.linear(x, rest.index_add(1, idx, columns), model[0].bias), y).backward()
        opts[1].step()
    lb.merge(model)
    torch.testing.assert_close(model[0].weight[:, idx], columns, rtol=0, atol=1e-12)
    others = [j for j in range(8) if j not in idx.tolist()]
    assert torch.equal(model[0].weight[:, others], W[:, others])


# Chains


@FEW
@given(st.integers(1, 30), st.data())
def test_columns_of_the_links(m, data):
    r, seed = data.draw(st.integers(1, min(m, 6))), data.draw(st.integers(0, 99))
    blocks = -(-m // r)
    assert torch.cat([circulant(j, m, r) for j in range(blocks)]).unique().tolist() == list(
        range(m)
    )
    for method, make in (("c3la", C3LA), ("random_c3la", lb.future.c3la.RandomC3LA)):
        chain, seen = make(torch.zeros(6, m, dtype=torch.float64), r=r, seed=seed), []
        for j in range(2 * blocks):
            seen.append(chain.idx.tolist())
            assert method == "random_c3la" or seen[-1] == [(j * r + q) % m for q in range(r)]
            assert chain.rank_bound(6, m) == min(len({i for idx in seen for i in idx}), 6, m)
            chain.advance()
        laps = [sorted(idx[0] for idx in seen[:blocks]), sorted(idx[0] for idx in seen[blocks:])]
        assert method == "c3la" or laps == [list(range(0, m, r))] * 2
        assert {i for idx in seen[:blocks] for i in idx} == set(range(m))


def test_random_order_depends_on_the_seed_and_the_lap():
    def order(seed, links):
        chain, found = lb.future.c3la.RandomC3LA(torch.zeros(4, 40), r=2, seed=seed), []
        for _ in range(links):
            found.append(chain.idx[0].item())
            chain.advance()
        return found

    assert order(1, 40) == order(1, 40) != order(2, 40) and order(1, 40)[:20] != order(1, 40)[20:]


@pytest.mark.parametrize("law", SELECTORS)
def test_random_chain_uses_each_start_of_its_law_once_a_lap(law):
    chain, found = lb.future.c3la.RandomC3LA(torch.zeros(4, 11), r=3, seed=5, selector=law), []
    expected = list(STARTS[law](11, 3))
    for _ in expected:
        found.append(chain.idx[0].item())
        chain.advance()
    assert sorted(found) == expected


@pytest.mark.parametrize("method", CHAINS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_chain_lives_through_training_saving_and_merging(method, host, dtype, tmp_path):
    case = Case(lb.registry.METHODS[method], host, 5, 7, 2, dtype, 3)
    base, targets = case.base(), HOSTS[host][2]
    model = lb.adapt(copy.deepcopy(base), method, targets, r=2, alpha=4, seed=9)
    B = next(iter(lb.adapters(model).values())).B
    optimizer = torch.optim.Adam(lb.param_groups(model, 0.05))
    x, tolerance = (
        case.inputs(),
        {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype],
    )
    for _ in range(2):
        lb.train_step(model, optimizer, lambda: model(x).float().square().mean())
        before = model(x).detach()
        lb.advance(model, optimizer)
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=tolerance)
        assert (
            not optimizer.state and not B.any() and next(iter(lb.adapters(model).values())).B is B
        )
    lb.train_step(model, optimizer, lambda: model(x).float().square().mean())
    lb.save(model, tmp_path)
    again = lb.load(copy.deepcopy(base), tmp_path)
    lb.advance(model), lb.advance(again)
    for one, two in zip(lb.adapters(model).values(), lb.adapters(again).values(), strict=True):
        assert (
            torch.equal(one.idx, two.idx)
            and torch.equal(one.links_idx, two.links_idx)
            and torch.equal(one.links_B, two.links_B)
        )
        assert one.links_idx.shape == (3, 2) and len(one.links) == len(one.factors(None)) == 4
        total = sum(s * (B @ A) for A, B, s in one.factors(None))
        torch.testing.assert_close(one.delta(None), total)
    want = model(x).detach()
    lb.merge(model)
    torch.testing.assert_close(model(x).detach(), want, rtol=0, atol=tolerance)
    lb.unmerge(model)
    with lb.disabled(model):
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("method", CHAINS)
def test_lengths_and_resets(method):
    model = adapted(method, r=3, chain_length=3, reset_every=2)
    optimizer, seen = torch.optim.SGD(lb.param_groups(model, 0.01)), []
    for _ in range(9):
        seen.append(adapter_of(model).done)
        lb.train_step(model, optimizer, lambda: model(normal(4, 8, seed=3)).square().mean())
    assert seen == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(lb.LoraBookError, match="3 links"):
        lb.advance(model, optimizer)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_layers_of_two_widths_are_both_covered():
    model = lb.adapt(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "c3la", ["0", "1"], r=2, chain_length=4
    )
    seen = {name: set() for name in lb.adapters(model)}
    for _ in range(4):
        for name, adapter in lb.adapters(model).items():
            seen[name] |= set(adapter.idx.tolist())
        lb.advance(model) if adapter.has_next() else None
    assert seen == {"0": set(range(4)), "1": set(range(8))}


@pytest.mark.parametrize("method", COLUMN_METHODS)
def test_conversions_and_copies(method):
    model = randomise(adapted(method, r=2, dtype=torch.float32), 1)
    lb.advance(model) if method in CHAINS else None
    x = normal(3, 8, dtype=torch.float32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert (
        adapter_of(low).B.dtype is torch.float32
        and adapter_of(low).idx.dtype is torch.int64
        and low(x.bfloat16()).dtype is torch.bfloat16
    )
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(
        wide(x.double()),
        F.linear(x.double(), wide[0].weight + lb.delta(wide)["0"], wide[0].bias),
        rtol=0,
        atol=1e-12,
    )
    twin = adapted(method, r=2, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


# Bad input


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("random_cla", {"selector": "blocks"}, "'block'"),
        ("random_c3la", {"selector": 3}, "selector"),
        ("cla", {"selector": "block"}, "selector"),
        ("c3la", {"selector": "block"}, "selector"),
        ("paca", {"r": 7}, "7"),
        ("c3la", {"r": 0}, "r "),
        ("c3la", {"chain_length": 0}, "chain_length"),
        ("random_c3la", {"reset_every": 1.5}, "reset_every"),
        ("cla", {"alpha": -1.0}, "alpha"),
        ("paca", {"lr_ratio": 4.0}, "lr_ratio"),
        ("random_cla", {"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(method, options, says):
    model = nn.Sequential(nn.Linear(8, 6))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lb.LoraBookError, match=says):
        lb.adapt(model, method, ["0"], **{"r": 2, **options})
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("law", ["Block", None, [], "cyclic"])
def test_unknown_selector_laws(law):
    with pytest.raises(lb.LoraBookError):
        first_columns(law, 8, 2)


@pytest.mark.parametrize("method", ["paca", "cla", "random_cla"])
def test_methods_without_links_do_not_advance(method):
    with pytest.raises(lb.LoraBookError, match="links"):
        lb.advance(adapted(method, r=2))


# Planted mistakes


class Sliding(C3LA):
    "A window that slides without merging: the finished link is lost."

    def rest(self, W0):
        return W0


class Stuck(C3LA):
    "Columns never move on."

    def renew(self, S, B):
        self.B.copy_(B)


class StaleColumns(PaCA):
    "Columns patched on every other forward pass only."

    @classmethod
    def product(cls, x, W, bias, blocks):
        adapter = blocks[0].adapter
        adapter.passes = getattr(adapter, "passes", 0) + 1
        return (
            super().product(x, W, bias, blocks) if adapter.passes % 2 == 0 else F.linear(x, W, bias)
        )


class Unscaled(CLA):
    "The scale is missing from the product, not from ΔW."

    @classmethod
    def product(cls, x, W, bias, blocks):
        return column_linear(
            x, W, bias, [(b.rows, b.adapter.idx, b.adapter.B, 1.0) for b in blocks]
        )


@pytest.mark.parametrize("mutant", [Sliding, StaleColumns, Unscaled])
def test_the_laws_reject_mutants(mutant):
    with pytest.raises(BrokenLaw):
        check(Case(Method(mutant, "a mutant", "none")))


def test_the_mutant_that_stays_is_found_by_coverage():
    chain = Stuck(torch.zeros(4, 6), r=2)
    chain.advance()
    assert chain.idx.tolist() != circulant(1, 6, 2).tolist() and chain.rank_bound(4, 6) == 2


@pytest.mark.parametrize("method", ["c3la", "random_c3la"])
def test_a_chain_longer_than_the_widest_weights_columns_is_refused(method):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(lb.LoraBookError, match="chain_length = 5"):
        lb.adapt(model, method, ["0", "1"], r=2, chain_length=5)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


# What the chapters tell of their runs at their own parameters


def test_a_normal_factor_stretches_the_step():
    A = normal(16, 64) / 8
    stretch = torch.linalg.eigvalsh(A @ A.T)
    assert stretch[-1] > 3 * stretch[0]


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=200)


def test_the_first_columns_of_an_image_are_dead(digits):
    pixels = digits.train["pixel_values"].flatten(1)

    def gradient_norm(method, seed=0):
        model = nn.Sequential(nn.Linear(28 * 28, 10))
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        lb.adapt(model, method, ["0"], r=10, seed=seed)
        F.cross_entropy(model(pixels), digits.train.labels).backward()
        return adapter_of(model).B.grad.norm().item()

    assert gradient_norm("cla") == 0
    assert all(gradient_norm("paca", seed) > 0.01 for seed in range(5))


def test_columns_of_an_attention_layer_do_better_than_independent_ones(digits):
    seen, vit = [], load_model("digits_vit")
    vit.blocks[1].attn.qkv.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach())
    )
    vit(digits.train["pixel_values"])
    x = seen[0].flatten(0, 1).double()
    Sigma = x.T @ x / len(x)
    for r in (1, 2, 4, 8, 16, 32, 48):
        known = Sigma[r:, :r] @ torch.linalg.solve(Sigma[:r, :r], Sigma[:r, r:])
        left = (Sigma[r:, r:] - known).trace() / Sigma.trace()
        assert left < 1 - r / 64


@pytest.mark.parametrize(
    "method, options",
    [("cla", {}), ("random_cla", {}), ("random_cla", {"selector": "window"}), ("paca", {})],
)
def test_columns_learn_digits(digits, method, options):
    model = lb.adapt(load_model("digits_vit"), method, ["attn.qkv[q,v]"], r=4, **options)
    before = evaluate(model, digits.test)["accuracy"]
    fit(model, digits, epochs=2, lr=0.05, seed=0)
    assert evaluate(model, digits.test)["accuracy"] > before


class FullBlocks(C3LA):
    def pick(self, m, r, generator):
        return self.done % (m // r) * r + torch.arange(r)


X = torch.linalg.qr(normal(400, 10)).Q * 20
D = normal(6, 10, seed=1) / 10**0.5


def learn(make, forget=True, links=3, steps=20):
    case = Case(Method(make, "", ""), n=6, m=10, r=4)
    model = case.adapt(case.base())
    target, losses = model(X).detach() + X @ D.T, []
    optimizer = torch.optim.Adam(lb.param_groups(model, 0.02))
    for link in range(links):
        lb.advance(model, optimizer if forget else None) if link else None
        losses += [
            lb.train_step(
                model, optimizer, lambda: (model(X) - target).square().sum(1).mean()
            ).item()
            for _ in range(steps)
        ]
    return losses


def test_broken_chains_end_above_a_sound_one():
    whole, sound = D.square().sum().item(), learn(C3LA)
    assert D[:, 4:].square().sum() > 0.3 * whole
    assert sound[-1] < 0.03 * whole
    assert learn(FullBlocks)[-1] >= D[:, 8:].square().sum() > 0.1 * whole
    slides = learn(Sliding)
    assert all(abs(slides[at] - whole) < 1e-9 * whole for at in (0, 20, 40))
    assert learn(C3LA, forget=False)[-1] > 1.5 * sound[-1]
    assert learn(C3LA, forget=False, steps=8)[-1] > 1.8 * learn(C3LA, steps=8)[-1]


def test_a_window_that_moves_on_without_merging_forgets():
    W, B = normal(6, 10, seed=2), normal(6, 4, seed=3)
    assert (X @ W.index_add(1, torch.arange(4), B).T - X @ W.T).abs().max() > 1


def test_a_printed_lap_reaches_less_than_independent_draws():
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randint(22 // 4, (), generator=g) for _ in range(6)])
    printed, blocks = ((step * drawn[:, None] + torch.arange(4)).unique() for step in (1, 4))
    assert len(printed) <= 22 // 4 + 4 - 1 < len(blocks) < 22


def test_links_with_related_inputs_need_laps():
    def solve(Sigma, blocks):
        E, root = D.clone(), torch.linalg.cholesky(Sigma)
        losses = []
        for C in blocks:
            known = torch.linalg.solve(Sigma[C][:, C], torch.eye(10).double()[C])
            E = E - E @ Sigma[:, C] @ known
            losses.append(((E @ root).square().sum() / (D @ root).square().sum()).item())
        return losses

    mixing = normal(10, 10, seed=5) / 10**0.5
    eye = torch.eye(10, dtype=torch.float64)
    related = 0.2 * eye + mixing @ mixing.T
    halves = [circulant(j, 10, 5) for j in range(12)]
    assert solve(eye, halves)[1] < 1e-25 and solve(related, halves)[1] > 1e-2
    chain, shuffled = lb.future.c3la.RandomC3LA(torch.zeros(6, 10), r=2, seed=1), []
    for _ in range(40):
        shuffled.append(chain.idx.clone())
        chain.advance()
    stays = solve(related, [circulant(0, 10, 2)] * 40)[-1]
    for blocks in ([circulant(j, 10, 2) for j in range(40)], shuffled):
        assert solve(related, blocks)[-1] < 0.1 * stays


def test_a_chain_of_rank_one_fits_digits_better_than_one_column(digits):
    def adapted_vit(method, seed=0, **options):
        vit = load_model("digits_vit")
        return lb.adapt(vit, method, ["attn.qkv[q,v]"], r=1, seed=seed, **options)

    def loss(method, seed, **options):
        model = adapted_vit(method, seed, **options)
        return fit(model, digits, epochs=4, lr=0.1, seed=seed)[-1]["train_loss"]

    def first_step(method, rate):
        model = adapted_vit(method)
        batch = next(iter(batches(digits.train, 32, seed=0)))
        lb.train_step(
            model,
            torch.optim.AdamW(lb.param_groups(model, rate)),
            lambda: F.cross_entropy(logits(model, batch), batch["labels"]),
        )
        changes = [change.norm().item() for change in lb.delta(model).values()]
        return sum(changes) / len(changes)

    lengths = [a.A.norm().item() for a in lb.adapters(adapted_vit("rac")).values()]
    rate = 0.1 / (sum(lengths) / len(lengths))
    assert 0.9 < first_step("rac", rate) / first_step("cla", 0.1) < 1.1
    chains = sum(loss("c3la", seed, reset_every=3) for seed in range(3))
    assert chains < sum(loss("cla", seed) for seed in range(3))
