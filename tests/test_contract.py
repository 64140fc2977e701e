"""The contract: what a class of the package may be, what a stranger's method gets for the members
it writes, and that a model knows where its sites are.
"""

import ast
import copy
import importlib
import inspect
import io
import pickle
import pkgutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.core import hosts
from lora_book.core.adapter import Adapter, LowRank, Nudge, declared
from lora_book.core.adapting import record_of
from lora_book.core.hosts import ALL_HOSTS, Host, Site, adapted_blocks, host_of, sites, walked
from lora_book.core.laws import (
    HOSTS,
    BrokenLaw,
    Case,
    direction_is_the_derivative,
    hold_laws,
    randomise,
)
from lora_book.core.method import Method
from lora_book.core.steps import Step
from lora_book.future.c3la import C3LA
from lora_book.past.lora import LoRA
from lora_book.registry import METHODS

ROOT = Path(lb.__file__).parent
STEP_IDS = [None, "sam", "mgpo", "ggpo"]


# Strangers' methods


class LoRAXS(LowRank):
    "ΔW = s·B R A with B and A from W0's singular vectors, frozen, and R (r, r) trained."

    trainable = ("R",)

    def init(self, W0, r, generator):
        U, sigma, Vt = torch.linalg.svd(W0, full_matrices=False)
        return {"A": Vt[:r], "U": U[:, :r] * sigma[:r], "R": torch.zeros(r, r)}

    def moving(self):
        return [(self.A, self.U @ self.R, self.scaling)]


class Twist(Adapter):
    "ΔW = tanh(θ) W0, row by row: nothing but `init` and `delta`."

    def init(self, W0, r, generator):
        return {"theta": torch.zeros(len(W0))}

    def delta(self, W0):
        return torch.tanh(self.theta)[:, None] * W0


STRANGERS = [LoRAXS, Twist]


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()).to(dtype)


def adapted(method, **options):
    return randomise(lb.adapt(network(), method, ["0", "2"], r=2, **options), 0, 0.3)


def inputs():
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model, optimizer, passes=1):
    "One step on a loss that runs the model so many times; returns the loss."
    x = inputs()
    loss = lb.train_step(
        model, optimizer, lambda: sum(model(x).square().mean() for _ in range(passes))
    )
    return loss.item()


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield lb.register
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("method", STRANGERS)
def test_a_strangers_method_obeys_the_laws(method):
    assert hold_laws(method) == 4 * 2 * 3 * 10


@pytest.mark.parametrize("method", STRANGERS)
@pytest.mark.parametrize("step", STEP_IDS)
def test_a_stranger_trains_under_every_step(method, step):
    model = adapted(method, step=step)
    base = {name: site.weight.clone() for name, site in sites(model)}
    optimizer, x = torch.optim.Adam(lb.param_groups(model, 1e-2)), inputs()
    losses = [
        lb.train_step(model, optimizer, lambda: model(x).square().mean()).item() for _ in range(8)
    ]
    assert losses[-1] < losses[0]
    assert all(torch.equal(site.weight, base[name]) for name, site in sites(model))


def derivative(adapter, W0, M):
    "d/dt delta(θ + tM) by torch's forward mode, which the package doesn't use."
    own = dict(adapter.named_parameters()) | dict(adapter.named_buffers())

    def moved(*values):
        tensors = own | dict(zip(M, values, strict=True))
        return torch.func.functional_call(
            Delta(adapter), {f"a.{k}": v for k, v in tensors.items()}, W0
        )

    return torch.func.jvp(moved, tuple(own[k].detach() for k in M), tuple(M.values()))[1]


class Delta(nn.Module):
    "An adapter whose forward is its delta."

    def __init__(self, adapter):
        super().__init__()
        self.a = adapter

    def forward(self, W0):
        return self.a.delta(W0)


@pytest.mark.parametrize("method", [*STRANGERS, "adalora", "vera", "lora"])
@pytest.mark.parametrize("step", ["mgpo", "ggpo"])
def test_a_step_moves_a_weight_as_its_definition_says(method, step):
    """MGPO: ε = −ρ v/‖v‖ · min(1/ḡ, 10), v and ḡ from delta's derivative; GGPO: a draw by rows
    whose last gradient is delta's derivative too. The loss is the one at W + ε.
    """
    model = adapted(method, step=step, rho=0.3)
    optimizer, level = torch.optim.Adam(lb.param_groups(model, 1e-2)), {}
    for _ in range(3):
        want = {} if step == "ggpo" else along_momenta(model, optimizer, level)
        seen, norms = watched_step(model, optimizer)
        for name, nudge in seen.items():
            if step == "ggpo":
                assert nudge.norm() > 0
            else:
                assert (nudge is None) == (want[name] is None) == (name not in level)
                assert nudge is None or torch.allclose(nudge, want[name], rtol=1e-8, atol=1e-14)
            g = norms[name]
            level[name] = 0.9 * level[name] + 0.1 * g if name in level else g
        if step == "ggpo":
            for name, rows in record_of(model).step.memory.items():
                assert rows.norm().item() == pytest.approx(norms[name], rel=1e-8)


def along_momenta(model, optimizer, level):
    "MGPO's ε by delta's derivative along Adam's first moments; None before there are any."
    want = {}
    for name, b in adapted_blocks(model).items():
        kept = {n: optimizer.state.get(p, {}) for n, p in b.adapter.trained().items()}
        M = {n: own["exp_avg"] for n, own in kept.items() if "exp_avg" in own}
        v = derivative(b.adapter, b.W0.detach(), M) if M else None
        want[name] = None if v is None else -0.3 * v / v.norm() * min(1 / level[name], 10)
    return want


def dense_output(model, x, seen):
    "The network with W0 + ΔW + ε written out."
    for module, name in zip(model, "0123", strict=True):
        if isinstance(module, Site):
            (b,) = module.blocks()
            W = b.W0 + b.adapter.delta(b.W0)
            x = F.linear(x, W if seen[name] is None else W + seen[name], module.bias)
        else:
            x = module(x)
    return x


def watched_step(model, optimizer):
    "One step: the ε of each weight, and the norms of delta's derivative along the gradients."
    x, seen, norms = inputs(), {}, {}

    def loss():
        for name, b in adapted_blocks(model).items():
            nudge = b.adapter.nudge
            seen[name] = nudge and sum(B if A is None else B @ A for A, B in nudge.pieces(b))
        out = model(x)
        assert torch.allclose(out, dense_output(model, x, seen), rtol=1e-10)
        return out.square().mean()

    def measure(*_):
        for name, b in adapted_blocks(model).items():
            G = {n: p.grad for n, p in b.adapter.trained().items()}
            norms[name] = derivative(b.adapter, b.W0.detach(), G).norm().item()

    handle = optimizer.register_step_pre_hook(measure)
    lb.train_step(model, optimizer, loss)
    handle.remove()
    return seen, norms


def test_a_step_makes_a_nudge_once_whatever_the_passes(monkeypatch):
    "Derivatives are taken by the step: a loss that runs the model five times takes no more."
    counts, original = Counter(), LowRank.moves

    def counting(self, M):
        counts["moves"] += 1
        return original(self, M)

    monkeypatch.setattr(LowRank, "moves", counting)
    found = []
    for passes in (1, 5):
        model = adapted("adalora", step="mgpo")
        optimizer = torch.optim.Adam(lb.param_groups(model, 1e-2))
        train(model, optimizer, passes)
        counts.clear()
        train(model, optimizer, passes)
        found.append(counts["moves"])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("method", ["lora", "adalora", "cla", "dora", "loldu", "vera", Twist])
def test_mgpo_works_compiled(method):
    plain, compiled = adapted(method, step="mgpo"), adapted(method, step="mgpo")
    run = {}
    for name, model in (("plain", plain), ("compiled", compiled)):
        call = torch.compile(model, backend="eager") if name == "compiled" else model
        optimizer = torch.optim.Adam(lb.param_groups(model, 1e-2))
        run[name] = [train(call, optimizer) for _ in range(4)]
    assert run["plain"] == pytest.approx(run["compiled"], rel=1e-9)


@pytest.mark.parametrize("method", STRANGERS)
def test_a_stranger_has_every_verb(method, registered, tmp_path):
    registered("strangers", method)
    assert lb.methods()[-1] == "strangers"
    plain, x = bits(network()), inputs()
    model = adapted("strangers")
    want, before = model(x).detach(), bits(model)
    lb.merge(model)
    assert torch.allclose(model(x), want, atol=1e-12)
    lb.unmerge(model)
    assert same(bits(model), before)
    with lb.disabled(model):
        assert torch.equal(model(x), network()(x))
    lb.save(model, tmp_path / "a")
    assert torch.equal(lb.load(network(), tmp_path / "a")(x), want)
    again = lb.adapt(network(), "strangers", ["0", "2"], r=2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), want)
    buffer = io.BytesIO(pickle.dumps(model))
    assert torch.equal(pickle.loads(buffer.getvalue())(x), want)
    if issubclass(method, LowRank):
        lb.to_peft(model, tmp_path / "peft")
        back = lb.from_peft(network(), tmp_path / "peft")
        assert torch.allclose(back(x), want, atol=1e-6)
    else:
        with pytest.raises(lb.LoraBookError, match=method.__name__):
            lb.to_peft(model, tmp_path / "peft")
        assert not (tmp_path / "peft").exists() and same(bits(model), before)
    lb.remove(model)
    assert same(bits(model), plain) and not any(isinstance(m, Site) for m in model.modules())


def test_an_id_is_registered_once(registered):
    registered("strangers", Twist)
    kept = METHODS["strangers"]
    for name in ("strangers", "lora"):
        with pytest.raises(lb.LoraBookError, match=name):
            registered(name, LoRAXS)
    assert METHODS["strangers"] is kept


def test_a_method_without_delta_or_init_is_refused_by_that_name(registered):
    class Empty(Adapter):
        def init(self, W0, r, generator):
            return {}

    class Started(LowRank):
        def delta(self, W0):
            return W0

    before, model = lb.methods(), network()
    for method, missing in ((Empty, "delta"), (Started, "init")):
        for refuse in (lambda m: registered("strangers", m), lambda m: lb.adapt(model, m, ["0"])):
            with pytest.raises(lb.LoraBookError, match=f"{method.__name__} has no {missing}"):
                refuse(method)
    assert lb.methods() == before and same(bits(model), bits(network()))


@pytest.mark.parametrize("base", [LowRank, LoRA, C3LA])
def test_an_option_is_declared_once(base):
    name = {LowRank: "alpha", LoRA: "init", C3LA: "reset_every"}[base]
    with pytest.raises(lb.LoraBookError, match=f"Again.*'{name}'"):

        class Again(base):
            @declared
            class Options(base.Options):
                __annotations__ = {name: int}
                locals()[name] = 3


def test_an_unknown_option_names_the_nearest_of_the_methods_and_the_steps(registered):
    class Sized(Twist):
        @declared
        class Options(Adapter.Options):
            warmness: float = 1.0

    registered("sized", Sized)
    model = network()
    for method, wrong, right in (
        ("sized", "warmnes", "warmness"),
        (Sized, "warmnes", "warmness"),
        (Sized, "scop", "scope"),
        (Sized, "lr_rato", "lr_ratio"),
    ):
        with pytest.raises(lb.LoraBookError, match=f"'{wrong}'.*'{right}'"):
            lb.adapt(model, method, ["0"], step="mgpo", **{wrong: 2.0})
    assert same(bits(model), bits(network()))


class Elsewhere(Twist):
    "Breaks law 1."

    def init(self, W0, r, generator):
        return {"theta": torch.ones(len(W0))}


class Deaf(Twist):
    "Breaks law 2: its forward isn't its delta."

    def forward(self, x, W0):
        return super().forward(x, W0) * 2


class Steeper(Twist):
    "Breaks law 11."

    def direction(self, M, W0):
        return [(A, B, 2 * s) for A, B, s in super().direction(M, W0)]


@pytest.mark.parametrize("law, mutant", [(1, Elsewhere), (2, Deaf), (11, Steeper)])
def test_a_broken_law_is_named(law, mutant):
    with pytest.raises(BrokenLaw, match=f"law {law}:"):
        hold_laws(mutant)


# Law 11 for every method


@st.composite
def shapes(draw):
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return n, m, draw(st.integers(1, min(n, m))), draw(st.integers(0, 10**6))


@pytest.mark.parametrize("method_id", METHODS)
def test_direction_is_the_derivative(method_id):
    @settings(max_examples=8, deadline=None)
    @given(shape=shapes(), host=st.sampled_from(list(HOSTS)))
    def run(shape, host):
        n, m, r, seed = shape
        direction_is_the_derivative(Case(METHODS[method_id], host, n, m, r, seed=seed))

    run()


@settings(max_examples=15, deadline=None)
@given(shape=shapes(), method=st.sampled_from(["lora", "adalora", "vera", "dora", "cla", "full"]))
def test_a_direction_is_the_same_whether_gradients_are_recorded_or_not(shape, method):
    n, m, r, seed = shape
    model = randomise(
        Case(METHODS[method], "linear", n, m, r, seed=seed).adapt(
            Case(METHODS[method], "linear", n, m, r, seed=seed).base()
        ),
        seed,
    )
    for b in adapted_blocks(model).values():
        M = {k: torch.ones_like(p) for k, p in b.adapter.trained().items()}
        with torch.no_grad():
            quiet = b.adapter.tangent(M, b.W0)
        assert torch.equal(quiet, b.adapter.tangent(M, b.W0).detach())


# The classes of the package


def modules():
    names = [m.name for m in pkgutil.walk_packages([str(ROOT)], "lora_book.")]
    return [importlib.import_module(n) for n in names if not n.endswith("_modidx")]


def classes():
    return {
        kind
        for module in modules()
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
    }


@pytest.mark.parametrize("root", [Adapter, Step])
def test_a_class_is_abstract_or_final(root):
    own = [kind for kind in classes() if issubclass(kind, root)]
    assert len(own) > 3
    heirs = {kind: [k for k in own if k is not kind and issubclass(k, kind)] for kind in own}
    assert [k for k, below in heirs.items() if below and not inspect.isabstract(k)] == []
    assert [k for k, below in heirs.items() if not below and inspect.isabstract(k)] == []


def test_there_are_no_ladders_of_private_classes():
    own = classes()
    direct = {k: [c for c in own if k in c.__bases__] for k in own if k.__name__.startswith("_")}
    assert sum(len(below) == 1 for below in direct.values()) <= 2


def test_the_methods_of_the_book_are_shallow():
    depth = {k: len([c for c in k.__mro__ if c not in (nn.Module, object)]) for k in (LoRA, C3LA)}
    assert depth[LoRA] <= 4 and depth[C3LA] <= 6


# Hosts and the places of sites


def test_a_copy_of_a_host_is_the_host():
    for host in ALL_HOSTS.values():
        assert copy.deepcopy(host) is pickle.loads(pickle.dumps(host)) is host


class Doubling(nn.Linear):
    "A layer of another kind: stores (m, n) and computes 2 x W."

    def __init__(self, m, n):
        super().__init__(m, n)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())

    def forward(self, x):
        return 2 * (x @ self.weight + self.bias)


def test_a_host_is_one_row(monkeypatch):
    host = Host(
        "a Doubling",
        __name__,
        "Doubling",
        logical=hosts.stored_by_inputs,
        output=lambda product, x: 2 * product(x),
    )
    model, x = nn.Sequential(Doubling(5, 6), nn.Tanh()).double(), inputs()
    with pytest.raises(lb.LoraBookError, match="own forward"):
        lb.adapt(model, "lora", ["0"], r=2)
    monkeypatch.setattr(hosts, "ALL_HOSTS", {host.name: host} | ALL_HOSTS)
    assert host_of(model[0]) is host
    for method in ("lora", "dora", "full", "c3la"):
        own = copy.deepcopy(model)
        randomise(lb.adapt(own, method, ["0"], r=2), 0)
        assert lb.delta(own)["0"].shape == (6, 5)
        want = own(x).detach()
        assert not torch.allclose(want, model(x))
        lb.merge(own)
        assert torch.allclose(own(x), want, atol=1e-12)
        lb.remove(own)
        assert same(bits(own), bits(model))


class Wrapper(nn.Module):
    "What DDP and compile do: one child, called something else."

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_training_walks_over_no_model(monkeypatch):
    "What a step and `adapters` visit doesn't grow with the model around the sites."
    visited, original = [], nn.Module.named_modules

    def counting(self, *args, **named):
        for pair in original(self, *args, **named):
            visited.append(pair[0])
            yield pair

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    found = {}
    for size in (1, 100):
        model = network()
        model.add_module("rest", nn.Sequential(*(nn.Identity() for _ in range(size))))
        lb.adapt(model, "lora", "0|2", r=2, step="mgpo")
        optimizer = torch.optim.Adam(lb.param_groups(model, 1e-2))
        for _ in range(3):
            visited.clear()
            for around in (model, Wrapper(model)):
                train(around, optimizer)
                list(sites(model)), lb.adapters(model)
            found[size] = len(visited)
    assert found[1] == found[100]


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield copy.deepcopy(Wrapper(model)).module


def test_copies_know_their_own_sites():
    model = adapted("lora")
    list(sites(model))
    for other in copies(model):
        assert all(a is b for (_, a), (_, b) in zip(sites(other), walked(other), strict=True))
        assert not {id(s) for _, s in sites(other)} & {id(s) for _, s in sites(model)}
        assert record_of(other) is not record_of(model)


def test_places_follow_a_changed_model():
    model = adapted("lora")
    assert list(lb.adapters(model)) == ["0", "2"]
    model[0] = nn.Linear(5, 6).double()
    assert list(lb.adapters(model)) == ["2"]
    model.add_module("4", copy.deepcopy(model[2]))
    assert list(lb.adapters(model)) == ["2", "4"]
    del model[4]
    inner = nn.Sequential(model[2])
    model[2] = inner
    assert list(lb.adapters(model)) == ["2.0"]


def test_a_record_that_comes_later_is_seen():
    model = nn.ModuleDict({"a": network(), "b": network()})
    lb.adapt(model, "lora", ["a.0"], r=2)
    x, optimizer = inputs(), torch.optim.SGD(lb.param_groups(model, 0.1), 0.1)
    lb.train_step(model, optimizer, lambda: model["a"](x).sum())
    lb.adapt(model["b"], "lora", ["0"], r=2)
    with pytest.raises(lb.LoraBookError, match="one by one"):
        lb.train_step(model, optimizer, lambda: model["a"](x).sum())


def test_a_models_record_keeps_nothing_alive():
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = adapted("lora")
        seen = weakref.ref(list(sites(model))[0][1]), weakref.ref(model)
        del model
        assert [of() for of in seen] == [None, None]
    finally:
        gc.enable()


def test_a_chain_says_itself_when_its_next_link_is_due():
    class Restless(LoRA.__base__):
        "A stranger's adapter that is due after every step, and counts its links."

        opened = 0

        def init(self, W0, r, generator):
            return torch.ones(r, W0.shape[1]), torch.zeros(len(W0), r)

        def due(self, steps):
            return True

        def has_next(self):
            return True

        def check_advance(self):
            return None

        def advance(self):
            self.opened += 1

    model, x = lb.adapt(network(), Restless, ["0"], r=2), inputs()
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.1), 0.1)
    for _ in range(3):
        lb.train_step(model, optimizer, lambda: model(x).sum())
    assert lb.adapters(model)["0"].opened == 3


# Generic code names no method and no method's option


def own_options():
    return {
        name
        for method in METHODS.values()
        for name in method.options()
        if name not in ("init", "train", "budget", "eps", "every", "project")
    }


@pytest.mark.parametrize("path", sorted((ROOT / "core").glob("*.py")), ids=lambda p: p.stem)
def test_core_names_no_method_and_no_methods_option(path):
    allowed = {"chain": {"chain_length", "reset_every"}}.get(path.stem, set())
    banned = (own_options() | {m for m in METHODS if m not in ("full", "lora")}) - allowed
    texts = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert texts & banned <= PEFTS_OWN.get(path.stem, set())


PEFTS_OWN = {"peft": {"rslora", "dora", "vera", "d_initial"}}


# One name, one thing


def defined():
    "{public name: {id of the thing: modules that offer it}} over every `__all__`."
    found = {}
    for module in modules():
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            found.setdefault(name, {}).setdefault(id(thing), []).append(module.__name__)
    return found


def test_a_public_name_of_core_stands_for_one_thing():
    twice = {
        name: sorted(m.removeprefix("lora_book.") for own in things.values() for m in own)
        for name, things in defined().items()
        if len(things) > 1
    }
    of_core = {n: ms for n, ms in twice.items() if any(m.startswith("core.") for m in ms)}
    assert {n: ms for n, ms in of_core.items() if n not in ALLOWED} == {}
    assert ALLOWED.keys() <= of_core.keys()


# Names of core that another room still has a thing of its own under.
ALLOWED = {
    "WEIGHTS": "theory.claims_related",
    "WHOLE": "experiments.rows",
    "check": "theory.claims_record",
    "check_module": "analysis.spectra",
    "digest": "experiments.runner",
    "fitting": "experiments.tasks",
    "leading": "analysis.spectra",
    "nearest": "theory.claims_loldu",
    "rows_of": "experiments.report",
    "shown": "experiments.report",
    "summed": "experiments.report",
    "write": "experiments.tasks",
}


def test_a_nudge_that_isnt_prepared_is_made_when_it_is_needed():
    model, x = adapted("adalora"), inputs()
    (block, *_) = adapted_blocks(model).values()
    M = {k: torch.ones_like(p) for k, p in block.adapter.trained().items()}
    plain = model[0](x)
    block.adapter.nudge = Nudge(M, torch.tensor(0.1, dtype=torch.float64))
    added = model[0](x) - plain
    want = 0.1 * x @ derivative(block.adapter, block.W0.detach(), M).T
    assert torch.allclose(added, want, atol=1e-12)


def test_a_method_may_be_a_class_or_a_method():
    made = Method(Twist, "twist", "")
    a, b = lb.adapt(network(), made, ["0"]), lb.adapt(network(), Twist, ["0"])
    assert same(bits(a), bits(b))
