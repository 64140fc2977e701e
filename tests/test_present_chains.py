"""CoLA, RAC and the chain they share: what a passage to a new link keeps, forgets, costs and saves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora_book as lb
from lora_book.core.adapting import Method
from lora_book.core.chain import Chain, folded
from lora_book.core.hosts import sites
from lora_book.core.laws import HOSTS, NUMBERED, TOLERANCE, BrokenLaw, Case, check, randomise
from lora_book.core.products import saved_bytes
from lora_book.present.cola import CoLA, cola
from lora_book.present.rac import RAC, rac

FEW = settings(max_examples=20, deadline=None)
CHAINS = {"cola": cola, "rac": rac}
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda nm: st.tuples(st.just(nm[0]), st.just(nm[1]), st.integers(1, min(nm)))
)
seeds = st.integers(0, 10**6)
names = st.sampled_from(list(CHAINS))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
OPTIMIZERS = {
    "adam": lambda ps: torch.optim.Adam(ps, 0.05),
    "momentum": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.05),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 0.05),
}


@st.composite
def cases(draw, **options):
    n, m, r = draw(shapes)
    return Case(
        CHAINS[draw(names)],
        draw(st.sampled_from(list(HOSTS))),
        n,
        m,
        r,
        draw(dtypes),
        draw(seeds),
        options,
    )


def chained(case, links):
    "The case's model after `links` random links, the last one open."
    model = randomise(case.adapt(case.base()), case.seed)
    for j in range(links - 1):
        randomise(lb.advance(model), case.seed + 1 + j)
    return model


def adapter_of(model):
    return next(iter(lb.adapters(model).values()))


def plain(dtype=torch.float32):
    "A small classifier; the same one at each call."
    g = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model


def net(method="cola", seed=0, dtype=torch.float32, **options):
    "The classifier with an adapted body and a head that trains."
    return lb.adapt(plain(dtype), method, ["0"], r=2, head="2", seed=seed, **options)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(8)
    return torch.randn(20, 8, generator=g).to(dtype), torch.randn(20, 3, generator=g).to(dtype)


def train(model, optimizer, steps):
    x, y = batch(next(model.parameters()).dtype)
    return [
        lb.train_step(model, optimizer, lambda: (model(x) - y).square().mean()).item()
        for _ in range(steps)
    ]


# The passage keeps the function


@FEW
@given(cases(), st.integers(1, 4))
def test_advancing_keeps_outputs_and_delta_and_opens_at_zero_change(case, links):
    model, x = chained(case, links), case.inputs()
    out, change = model(x).detach(), lb.delta(model)
    lb.advance(model)
    scale = max(1.0, out.double().abs().max().item())
    assert (model(x).double() - out.double()).abs().max() <= TOLERANCE[case.dtype] * scale
    for name, adapter in lb.adapters(model).items():
        assert adapter.done == links and not adapter.B.any() and adapter.A.any()
        assert torch.allclose(
            lb.delta(model)[name].double(),
            change[name].double(),
            atol=1e-4 if case.dtype is not torch.float64 else 1e-11,
        )


@FEW
@given(cases(), st.integers(1, 4))
def test_the_links_sum_to_delta_and_the_rank_is_theirs(case, links):
    model = chained(case, links)
    for adapter in lb.adapters(model).values():
        found = adapter.delta(None).detach().double()
        total = sum(
            adapter.scaling * B.detach().double() @ A.detach().double() for A, B in adapter.links
        )
        assert len(adapter.links) == links and torch.allclose(
            found, total, atol=1e-3 if case.dtype is not torch.float64 else 1e-10
        )
        bound = adapter.rank_bound(case.n, case.m)
        assert bound == min(links * case.r, case.n, case.m)
        assert (
            case.dtype is not torch.float64 or torch.linalg.matrix_rank(found, rtol=1e-9) == bound
        )


@FEW
@given(st.integers(0, 4), shapes, seeds)
def test_folded_is_the_sum_of_products(links, shape, seed):
    (n, m, r), g = shape, torch.Generator().manual_seed(seed)
    Bs, As = (
        torch.randn(links, *size, generator=g, dtype=torch.float64) for size in ((n, r), (r, m))
    )
    assert torch.allclose(folded(Bs, As), torch.einsum("knr,krm->nm", Bs, As), atol=1e-12)


@FEW
@given(cases())
def test_laws_hold(case):
    assert check(case, case.method.count) == len(NUMBERED) + 1


@pytest.mark.parametrize("name", CHAINS)
def test_rests_leave_rows_outside_the_views_and_the_base_weight_alone(name):
    case = Case(CHAINS[name], "fused_conv1d", 4, 5, 2)
    model, base = chained(case, 3), case.base()
    ((_, site),) = sites(model)
    stored, before = site.resting_weight(), base.layer.weight
    assert torch.equal(stored[:, 4:8], before[:, 4:8]) and not torch.equal(
        stored[:, :4], before[:, :4]
    )
    assert torch.equal(model.layer.weight, before)


# The passage forgets the old link, and nothing else


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_forgets_the_link_and_keeps_the_head(name, optimizer):
    model = net(name)
    made = OPTIMIZERS[optimizer](lb.param_groups(model, 0.05))
    train(model, made, 4)
    adapter, heads = adapter_of(model), list(model[2].parameters())
    ids, kept = [id(p) for p in model.parameters()], copy.deepcopy([made.state[p] for p in heads])
    lb.advance(model, made)
    assert ids == [id(p) for p in model.parameters()] and set(made.state) == set(heads)
    for p, old in zip(heads, kept, strict=True):
        assert all(
            torch.equal(torch.as_tensor(made.state[p][key]), torch.as_tensor(value))
            for key, value in old.items()
            if value is not None
        )
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    start = {key: p.detach().clone() for key, p in adapter.named_parameters()}
    for p in heads:
        p.grad = None
    for group in made.param_groups:
        group["weight_decay"] = 0.0
    made.step()
    assert all(torch.equal(p, start[key]) for key, p in adapter.named_parameters()), (
        "a gradient of zero moved the new link"
    )


@pytest.mark.parametrize("name", CHAINS)
def test_the_new_link_trains_as_with_a_new_optimizer(name):
    one = net(name)
    old = OPTIMIZERS["adam"](lb.param_groups(one, 0.05))
    train(one, old, 5)
    lb.advance(one, old)
    old.state.clear()
    two = copy.deepcopy(one)
    new = OPTIMIZERS["adam"](lb.param_groups(two, 0.05))
    assert train(one, old, 3) == train(two, new, 3)
    stale = net(name)
    optimizer = OPTIMIZERS["adam"](lb.param_groups(stale, 0.05))
    train(stale, optimizer, 5)
    lb.advance(stale)
    train(stale, optimizer, 3)
    assert not torch.equal(adapter_of(stale).B, adapter_of(one).B), (
        "stale moments left no trace: the test is blind"
    )


@pytest.mark.parametrize("name", CHAINS)
def test_a_gradient_of_the_old_link_never_reaches_the_new_one(name):
    model, (x, y) = net(name), batch()
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.05), lr=0.05)
    (model(x) - y).square().mean().backward()
    lb.advance(model)
    out = model(x).detach()
    heads = [p.detach().clone() for p in model[2].parameters()]
    for p in model[2].parameters():
        p.grad = None
    optimizer.step()
    assert torch.equal(model(x), out) and all(
        torch.equal(p, old) for p, old in zip(model[2].parameters(), heads, strict=True)
    )


def test_a_chain_advances_in_the_middle_of_an_epoch():
    model = net("cola", reset_every=3)
    optimizer = OPTIMIZERS["adam"](lb.param_groups(model, 0.05))
    losses = train(model, optimizer, 10)
    assert adapter_of(model).done == 3 and losses[-1] < losses[0]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


# What a step costs


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CHAINS)
def test_flops_and_kept_bytes_are_those_of_the_first_link(name):
    g, T, n, m, r = torch.Generator().manual_seed(0), 16, 24, 32, 4
    x = torch.randn(T, m, generator=g, requires_grad=True)
    model = lb.adapt(nn.Sequential(nn.Linear(m, n)), name, ["0"], r=r)
    counts, kept = [], []
    for _ in range(6):
        counts.append(flops(model, x))
        weights = [site.resting_weight() for _, site in sites(model)]
        kept.append(
            saved_bytes(lambda: model(x), exclude=[x, *model.state_dict().values(), *weights])
        )  # noqa: B023
        lb.advance(model)
    assert len(set(counts)) == len(set(kept)) == 1
    assert kept[0] == 4 * T * r and 4 * T * n * m < counts[0] <= 4 * T * n * m + 2 * T * r * (
        3 * m + 3 * n
    )


def test_the_flop_check_sees_a_chain_that_never_folds():
    class Unfolded(CoLA):
        def moving(self):
            return [*self.resting(), *super().moving()]

        def rest(self, W0):
            return W0

    case, x = (
        Case(Method(Unfolded, "never folds", "none"), n=6, m=8),
        torch.randn(4, 8, dtype=torch.float64),
    )
    assert flops(chained(case, 5), x) > flops(chained(case, 1), x)


@FEW
@given(shapes, st.integers(1, 5), names)
def test_trained_numbers_are_those_of_one_link(shape, links, name):
    n, m, r = shape
    model = chained(Case(CHAINS[name], "fused", n, m, r), links)
    assert (
        lb.n_trainable(model)
        == 2 * CHAINS[name].count(n, m, r)
        == 2 * r * (n + (m if name == "cola" else 0))
    )


# Saving, copying, merging


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_chain_goes_on_with_the_same_bits_in_the_middle_of_a_link(name, dtype, tmp_path):
    base, model = plain(dtype), net(name, dtype=dtype, reset_every=4)
    train(model, torch.optim.SGD(lb.param_groups(model, 0.05)), 6)
    lb.save(model, tmp_path)
    again = lb.load(base, tmp_path)
    x, _ = batch(dtype)
    assert torch.equal(again(x), model(x)) and adapter_of(again).done == 1
    for each in (model, again):
        train(each, torch.optim.SGD(lb.param_groups(each, 0.05)), 3)
    one, two = adapter_of(model), adapter_of(again)
    assert one.done == two.done == 2, (
        "the loaded chain doesn't change links when the other one does"
    )
    assert all(
        torch.equal(t, two.state_dict()[key]) for key, t in one.state_dict().items()
    ) and torch.equal(again(x), model(x))


@FEW
@given(cases(), st.integers(1, 4))
def test_a_state_dict_fits_a_fresh_model_that_was_adapted_alike(case, links):
    model, fresh = chained(case, links), case.adapt(case.base())
    fresh(case.inputs())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(case.inputs()), model(case.inputs()))
    for each in (model, fresh):
        lb.advance(each)
    assert all(torch.equal(t, fresh.state_dict()[key]) for key, t in model.state_dict().items())


def test_a_state_dict_of_another_rank_is_refused_and_changes_no_link():
    case = Case(cola, n=6, m=8, r=2)
    model, other = chained(case, 3), chained(Case(cola, n=6, m=8, r=3), 2)
    out = model(case.inputs())
    with pytest.raises(RuntimeError, match="links_A"):
        model.load_state_dict(other.state_dict())
    assert adapter_of(model).done == 2 and torch.allclose(model(case.inputs()), out)


@FEW
@given(cases(), seeds)
def test_links_depend_on_seed_and_number_alone(case, other):
    one, two = chained(case, 3), chained(case, 3)
    assert all(torch.equal(t, two.state_dict()[key]) for key, t in one.state_dict().items())
    state = torch.random.get_rng_state()
    lb.advance(one)
    assert torch.equal(torch.random.get_rng_state(), state), (
        "a link was drawn from the global generator"
    )
    starts = [A for A, _ in adapter_of(one).links]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


@FEW
@given(cases(), st.integers(2, 4))
def test_merging_with_finished_links(case, links):
    model, x, base = chained(case, links), case.inputs(), case.base()
    before, out = {key: t.clone() for key, t in model.state_dict().items()}, model(x).detach()
    with lb.disabled(model):
        assert torch.equal(model(x), base(x))
    lb.merge(model)
    assert (model(x).double() - out.double()).abs().max() <= TOLERANCE[case.dtype] * max(
        1.0, out.double().abs().max().item()
    )
    with pytest.raises(ValueError, match="merged"):
        lb.advance(model)
    with lb.disabled(model):
        assert torch.equal(model(x), base(x))
    lb.unmerge(model)
    assert all(
        torch.equal(t, before[key]) for key, t in model.state_dict().items()
    ) and torch.equal(model(x), out)


@pytest.mark.parametrize("name", CHAINS)
def test_a_moved_or_copied_chain_computes_the_same(name):
    case = Case(CHAINS[name], dtype=torch.float32)
    model, x = chained(case, 3), case.inputs()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    randomise(lb.advance(twin), 3)
    assert adapter_of(model).done == 2 and not torch.equal(twin(x), model(x))
    wide = copy.deepcopy(model).double()
    want = case.base().double()(x.double()) + x.double() @ lb.delta(wide)["layer"].T
    assert (
        torch.allclose(wide(x.double()), want, atol=1e-9)
        and (wide(x.double()) - model(x)).abs().max() < 1e-4
    )
    assert adapter_of(copy.deepcopy(model).bfloat16()).links_A.dtype is torch.float32


def test_bfloat16_errors_dont_grow_with_the_number_of_links():
    case = Case(cola, n=48, m=48, r=2, dtype=torch.bfloat16)
    model, errors = randomise(case.adapt(case.base()), 0, 0.02), []
    in_place = model.layer.weight.detach().clone()
    ((_, site),) = sites(model)
    for j in range(40):
        adapter = adapter_of(model)
        in_place += (adapter.scaling * adapter.B @ adapter.A).detach().bfloat16()
        randomise(lb.advance(model), j, 0.02)
        exact = model.layer.weight.double() + sum(
            adapter.scaling * B.double() @ A.double() for A, B, _ in adapter.resting()
        )
        errors.append(
            [
                (W.double() - exact).square().mean().sqrt().item()
                for W in (site.resting_weight(), in_place)
            ]
        )
    assert errors[-1][0] < 2 * errors[0][0], "the resting weight drifts"
    assert errors[-1][1] > 3 * errors[-1][0], "adding in place doesn't drift: the test is blind"


# Schedules and refusals


@FEW
@given(st.integers(1, 5), st.integers(1, 20), names)
def test_reset_every_gives_every_link_its_steps_and_the_last_one_the_rest(
    chain_length, every, name
):
    model = net(name, chain_length=chain_length, reset_every=every)
    optimizer, found = torch.optim.SGD(lb.param_groups(model, 0.01)), []
    for _ in range(30):
        found.append(adapter_of(model).done)
        train(model, optimizer, 1)
    assert found == [min(t // every, chain_length - 1) for t in range(30)]


@pytest.mark.parametrize(
    "method, options, error",
    [
        ("lora", {}, TypeError),
        ("asymmetric", {}, TypeError),
        ("cola", {"chain_length": 1}, ValueError),
        ("rac", {"chain_length": 1}, ValueError),
    ],
)
def test_a_refused_advance_leaves_everything_as_it_was(method, options, error):
    model = net(method, **options)
    optimizer = OPTIMIZERS["adam"](lb.param_groups(model, 0.05))
    train(model, optimizer, 2)
    before, x = {key: t.clone() for key, t in model.state_dict().items()}, batch()[0]
    out, states = (
        model(x).detach(),
        {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()},
    )
    with pytest.raises(error) as caught:
        lb.advance(model, optimizer)
    assert isinstance(caught.value, lb.LoraBookError)
    assert all(
        torch.equal(t, before[key]) for key, t in model.state_dict().items()
    ) and torch.equal(model(x), out)
    assert all(
        torch.equal(v, states[id(p)][k]) for p, s in optimizer.state.items() for k, v in s.items()
    ) and len(states) == len(optimizer.state)


def test_advance_takes_an_optimizer_and_nothing_else():
    model = net()
    with pytest.raises(TypeError, match="not a list"):
        lb.advance(model, lb.param_groups(model, 0.1))
    assert adapter_of(model).done == 0
    with pytest.raises(ValueError, match="isn't adapted"):
        lb.advance(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"chain_length": 0}, ValueError),
        ({"chain_length": 2.0}, TypeError),
        ({"reset_every": 0}, ValueError),
        ({"reset_every": "epoch"}, TypeError),
        ({"reset_every": True}, TypeError),
        ({"init": "svd"}, ValueError),
        ({"chain_lenght": 2}, KeyError),
    ],
)
@pytest.mark.parametrize("name", CHAINS)
def test_impossible_options_are_refused_by_name_and_leave_the_model(name, options, error):
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(error) as caught:
        lb.adapt(model, name, ["0"], r=2, **options)
    assert (
        isinstance(caught.value, lb.LoraBookError)
        and next(iter(options)) in str(caught.value)
        and type(model[0]) is nn.Linear
    )


# What the laws would miss or must see


class Sliding(CoLA):
    "Opens a new link without keeping the old one."

    def advance(self):
        super().advance()
        self.links_B.zero_()


class KeepsB(CoLA):
    "Opens a new link with the old B."

    def renew(self, A, B):
        self.A.copy_(A)


class Forgetful(CoLA):
    "Its resting weight lacks the finished links."

    def rest(self, W0):
        return W0


class Amnesiac(CoLA):
    "Saves no finished link."

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in ("links_A", "links_B"):
            destination[prefix + key] = destination[prefix + key][:0]


class TrainsA(RAC):
    "Trains the factor that should be frozen."

    trainable = "AB"


@pytest.mark.parametrize(
    "make, law, method",
    [
        (Sliding, "law 8", cola),
        (KeepsB, "law 8", cola),
        (Forgetful, "law 8", cola),
        (Amnesiac, "law 9", cola),
        (TrainsA, "law 4", rac),
    ],
)
def test_planted_mutants_are_caught(make, law, method):
    with pytest.raises(BrokenLaw, match=law):
        check(Case(Method(make, "mutant", "none")), method.count)


def test_a_rac_that_never_draws_again_is_seen_by_its_rank():
    class Stubborn(RAC):
        def init(self, W0, r, generator):
            return super().init(W0, r, torch.Generator().manual_seed(0))

    ranks = {
        make: int(
            torch.linalg.matrix_rank(
                lb.delta(chained(Case(Method(make, "chain", "none")), 3))["layer"], rtol=1e-9
            )
        )
        for make in (RAC, Stubborn)
    }
    assert ranks == {RAC: 6, Stubborn: 2}


@FEW
@given(st.integers(2, 6), st.integers(2, 9), seeds)
def test_an_exact_rac_leaves_what_the_projectors_leave(n, m, seed):
    D = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chain, left = RAC(torch.zeros_like(D), r=1, init="orthonormal", seed=seed), D.clone()
    for _ in range(4):
        chain.B.data = (D - chain.delta(None).detach()) @ chain.A.T
        left = left - left @ chain.A.T @ chain.A
        assert torch.allclose(D - chain.delta(None), left, atol=1e-10)
        chain.advance()


def test_a_chain_is_abstract_in_its_links():
    with pytest.raises(TypeError, match="init"):
        Chain(torch.zeros(3, 4), r=1)
