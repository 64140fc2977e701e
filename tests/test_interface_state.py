"""State dicts and pickles of adapted models: what a run needs to go on travels with the numbers, a
merged change counts once, and what can't be loaded is refused with every bit in place.
"""

import copy
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import CHAINS, TARGETS, adapted, inputs, move, moved, net, numbers, snapshot
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import nn
from transformers import Trainer, TrainingArguments

import lora_book as lb
from lora_book.core.adapting import record_of
from lora_book.core.errors import BadState
from lora_book.core.hosts import as_number, as_text, packed, unpacked
from lora_book.present.loldu import LoLDU
from lora_book.present.vera import VeRA

every_method = pytest.mark.parametrize("method", lb.methods())
FEW = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**64 - 1)
OPTIONS = {
    "loldu": [
        {},
        {"init": "uniform", "keep_start": True},
        {"init": "normal", "train_scale": False},
    ],
    "asymmetric": [{}, {"train": "A"}, {"init": "orthonormal"}],
    "vera": [{}, {"d_initial": 1.0}],
}


def same(one: nn.Module, other: nn.Module) -> bool:
    "Whether two models compute the same bits, and say the same of their change."
    x = inputs()
    return torch.equal(one(x), other(x)) and all(
        torch.equal(a, b)
        for a, b in zip(lb.delta(one).values(), lb.delta(other).values(), strict=True)
    )


def through_a_file(state: dict) -> dict:
    "A state dict written and read by safetensors, as Trainer and Accelerate do."
    return read_tensors(write_tensors({k: t.detach().clone() for k, t in state.items()}))


# Another seed


@FEW
@given(st.data(), st.sampled_from(lb.methods()), seeds, seeds)
def test_a_state_dict_of_another_seed_brings_its_draws_along(data, method, seed, other):
    options = data.draw(st.sampled_from(OPTIONS.get(method, [{}])))
    assign = data.draw(st.booleans())
    model, twin = (adapted(method, seed=s, **options) for s in (seed, other))
    move(model)
    found = twin.load_state_dict(through_a_file(model.state_dict()), assign=assign)
    assert not found.missing_keys and same(model, twin)
    if method in CHAINS:
        for each in (model, twin):
            move(lb.advance(each))
        assert same(model, twin) and numbers(model) == numbers(twin), "the next draw differs"


@pytest.mark.parametrize("mutant", [VeRA, LoLDU])
def test_without_the_draws_outputs_would_differ(mutant, monkeypatch):
    method = mutant.__name__.lower()
    options = {"init": "uniform", "keep_start": True} if mutant is LoLDU else {}
    model, twin = move(adapted(method, seed=1, **options)), adapted(method, seed=2, **options)
    monkeypatch.setattr(mutant, "reseed", lambda self, seed, W0: None)
    twin.load_state_dict(model.state_dict())
    assert not same(model, twin)


@every_method
def test_the_adapters_part_of_a_state_dict_is_enough(method, tmp_path):
    model, twin = moved(method, seed=1), adapted(method, seed=2)
    rest = set(record_of(model).base) | {"norm.weight", "norm.bias"}
    part = {k: t for k, t in model.state_dict().items() if "adapters" in k or k in rest}
    twin.load_state_dict(part, strict=False)
    assert same(model, twin)
    lb.save(twin, tmp_path)
    assert same(model, lb.load(net(), tmp_path))


def test_layers_still_share_their_draws_after_loading():
    model, twin = (adapted("vera", targets=["first", "proj"], seed=s) for s in (1, 2))
    twin.load_state_dict(move(model).state_dict())
    first, proj = lb.adapters(twin).values()
    own = next(iter(lb.adapters(model).values()))
    assert first.A.data_ptr() == proj.A.data_ptr() == own.A.data_ptr()
    drawn = sum(t.numel() for k, t in model.state_dict().items() if k.endswith((".A", ".B")))
    assert drawn == 0 and twin.state_dict().keys() == model.state_dict().keys()


def test_stored_factors_give_way_to_drawn_ones_and_back():
    model, twin = moved("vera", targets=["first"]), adapted("vera", targets=["first"])
    (own,), (other,) = lb.adapters(model).values(), lb.adapters(twin).values()
    own.load_state_dict({**own.state_dict(), "A": own.A + 1, "B": own.B - 1})
    drawn = twin.state_dict()
    drawn = {k: t.clone() for k, t in drawn.items()}
    twin.load_state_dict(model.state_dict())
    assert same(model, twin) and not other.drawn
    twin.load_state_dict(drawn, strict=False)
    assert same(twin, adapted("vera", targets=["first"]))


# While merged


@every_method
@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}])
def test_a_state_dict_taken_while_merged_counts_the_change_once(method, how):
    model, twin, base = moved(method), adapted(method, seed=5), net()
    want = numbers(model)
    lb.merge(model)
    state = through_a_file(model.state_dict())
    assert torch.equal(state["first.weight"], model.first.weight)
    found = twin.load_state_dict(state, **how)
    assert not found.missing_keys and not found.unexpected_keys
    assert same(lb.unmerge(model), twin) and numbers(twin) == numbers(model) == want
    with lb.disabled(twin):
        assert torch.equal(twin(inputs()), base(inputs()))


@every_method
def test_a_wrapper_s_prefix_makes_no_difference(method):
    model, twin = moved(method, seed=1), adapted(method, seed=2)
    outer, other = nn.ModuleDict({"module": model}), nn.ModuleDict({"module": twin})
    lb.merge(model)
    other.load_state_dict(outer.state_dict())
    assert same(lb.unmerge(model), twin)
    lb.merge(twin)
    before = snapshot(twin)
    with pytest.raises(BadState, match="module.first.*merged"):
        other.load_state_dict(outer.state_dict())
    assert snapshot(twin) == before


@every_method
@pytest.mark.parametrize("state_of", ["merged", "disabled"])
@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}])
def test_a_merged_or_disabled_model_keeps_every_bit(method, state_of, how):
    model, state = moved(method), moved(method, seed=4).state_dict()
    if state_of == "merged":
        lb.merge(model)
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="merged"):
            model.load_state_dict(state, **how)
        assert snapshot(model) == before
    else:
        with lb.disabled(model):
            before = snapshot(model)
            with pytest.raises(lb.LoraBookError, match="disabled"):
                model.load_state_dict(state, **how)
            assert snapshot(model) == before


def test_a_part_of_a_merged_model_refuses_before_it_changes():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    lb.adapt(model, "lora", ["0.1"], r=2)
    state = {k: t + 1 for k, t in model[0].state_dict().items() if "extra" not in k}
    lb.merge(model)
    before = snapshot(model)
    with pytest.raises(BadState, match="1.*merged"):
        model[0].load_state_dict(state, strict=False)
    assert snapshot(model) == before
    lb.unmerge(model)
    model[0].load_state_dict(state, strict=False)
    assert torch.equal(model[0][0].weight, state["0.weight"])


# Old and altered ones


@every_method
def test_a_state_dict_without_the_extra_state_says_so(method):
    model, twin = moved(method), adapted(method)
    old = {k: t for k, t in model.state_dict().items() if "_extra_state" not in k}
    if len(old) < len(model.state_dict()):
        with pytest.raises(RuntimeError, match="first.adapters._extra_state"):
            copy.deepcopy(twin).load_state_dict(old)
    found = twin.load_state_dict(old, strict=False)
    assert len(found.missing_keys) == len(model.state_dict()) - len(old) and same(model, twin)


@FEW
@given(st.sampled_from(("lora", "vera", "cola")), st.integers(0, 10**6), st.integers(1, 255))
def test_an_altered_extra_state_is_refused_and_changes_nothing(method, place, by):
    model, state = adapted(method), dict(moved(method, seed=1).state_dict())
    key = "proj.adapters.all._extra_state" if method == "" else "proj.adapters._extra_state"
    state[key] = state[key][: place % 8]
    before = snapshot(model)
    with pytest.raises(BadState, match="proj.adapters._extra_state"):
        model.load_state_dict(state)
    assert snapshot(model) == before


@FEW
@given(seeds, st.integers(1, 5))
def test_packed_tensors_come_back(number, n):
    found = unpacked(packed({"a": torch.arange(n), "b": as_text(number)}).half(), "x")
    assert torch.equal(found["a"], torch.arange(n)) and as_number(found["b"]) == number


# Going on


RUNS = {
    "lora": {},
    "lora_plus": {},
    "cola": {"chain_length": 9, "reset_every": 3},
    "rac": {"reset_every": 3},
    "random_c3la": {"reset_every": 3},
    "adalora": {"total_steps": 10, "warmup": 1, "final": 2, "target_rank": 1},
    "sam": {},
    "mgpo": {},
    "ggpo": {},
    "vera": {"step": "mgpo", "scope": "global"},
    "loldu": {"step": "ggpo"},
}


def run(model, optimizer, steps, wrapper=None):
    outer = model if wrapper is None else wrapper
    x, y = inputs(), torch.tensor([0, 1, 2, 0, 1])
    for _ in range(steps):
        lb.train_step(outer, optimizer, lambda: nn.functional.cross_entropy(model(x), y))


def make(method, seed=0, **more):
    model = adapted(method, seed=seed, **RUNS[method], **more)
    return model, torch.optim.AdamW(lb.param_groups(model, 0.02))


@FEW
@given(st.sampled_from(sorted(RUNS)), st.integers(1, 7), st.integers(0, 1), st.booleans())
def test_a_resumed_run_ends_at_the_same_bits(method, at, other, wrapped):
    whole, optimizer = make(method)
    run(whole, optimizer, at, nn.ModuleDict({"module": whole}) if wrapped else None)
    saved = through_a_file(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, 8 - at)
    again, second = make(method, seed=other)
    again.load_state_dict(saved[0]), second.load_state_dict(saved[1])
    run(again, second, 8 - at)
    assert numbers(again) == numbers(whole) and record_of(again).steps == 8


@pytest.mark.parametrize("method", [m for m in RUNS if m not in ("lora", "lora_plus", "sam")])
def test_a_run_that_forgets_ends_elsewhere(method):
    whole, optimizer = make(method)
    run(whole, optimizer, 4)
    kept = {k: t for k, t in whole.state_dict().items() if "_extra_state" not in k}
    saved = copy.deepcopy((kept, optimizer.state_dict()))
    run(whole, optimizer, 4)
    again, second = make(method)
    again.load_state_dict(saved[0], strict=False), second.load_state_dict(saved[1])
    run(again, second, 4)
    assert numbers(again) != numbers(whole)


@pytest.fixture
def fresh_state():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield


@pytest.mark.parametrize("method", ["cola", "adalora", "mgpo", "ggpo", "vera"])
def test_accelerate_resumes_from_its_folder(method, tmp_path, fresh_state):
    whole, optimizer = make(method)
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(whole, optimizer)
    run(model, prepared, 4)
    accelerator.save_state(str(tmp_path))
    run(model, prepared, 4)
    AcceleratorState._reset_state(True)
    again, second = make(method, seed=3)
    accelerator = Accelerator(cpu=True)
    twin, other = accelerator.prepare(again, second)
    accelerator.load_state(str(tmp_path))
    run(twin, other, 4)
    assert numbers(again) == numbers(whole)


class Scored(nn.Module):
    "A model as Trainer wants it: called with names, it returns its loss."

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels):
        scores = self.net(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class OwnStep(Trainer):
    def training_step(self, model, batch, num_items_in_batch=None):
        batch = self._prepare_inputs(batch)
        return lb.train_step(
            model,
            self.optimizer,
            lambda: self.compute_loss(model, batch),
            backward=self.accelerator.backward,
        )


@pytest.mark.parametrize("method", ["cola", "adalora", "mgpo", "ggpo"])
def test_trainer_resumes_from_its_checkpoint(method, tmp_path, fresh_state):
    rows = [{"x": x, "labels": i % 3} for i, x in enumerate(inputs(shape=(12, 8)))]

    def trainer(save):
        model = lb.adapt(Scored(), method, TARGETS, r=2, head="net.head", **RUNS[method])
        with torch.random.fork_rng(devices=[]):
            model.net.load_state_dict(net().state_dict(), strict=False)
        options = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy=save,
            save_steps=4,
            seed=0,
        )
        optimizer = torch.optim.AdamW(lb.param_groups(model, 0.02))
        return OwnStep(model, options, train_dataset=rows, optimizers=(optimizer, None))

    whole = trainer("steps")
    whole.train()
    again = trainer("no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert numbers(again.model) == numbers(whole.model) and record_of(again.model).steps == 8


# Pickles


@every_method
def test_a_pickled_model_is_a_model_of_its_own(method):
    model = moved(method)
    optimizer = torch.optim.AdamW(lb.param_groups(model, 0.01))
    run(model, optimizer, 1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.deepcopy(model),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert numbers(twin) == numbers(model) and same(model, twin)
        assert record_of(twin).method is record_of(model).method
        want = numbers(model)
        run(twin, torch.optim.AdamW(lb.param_groups(twin, 0.01)), 1)
        assert numbers(model) == want and record_of(twin).steps == 2
        twin.load_state_dict(model.state_dict())
        lb.merge(twin)
        with pytest.raises(BadState):
            twin.load_state_dict(model.state_dict())
        lb.merge(lb.unmerge(twin), unload=True)
        assert twin.state_dict().keys() == net().state_dict().keys()
        twin.load_state_dict(net().state_dict())
        pickle.dumps(twin)


@every_method
def test_a_merged_model_is_pickled_as_it_is(method):
    model = moved(method)
    want = model(inputs()).detach()
    lb.merge(model)
    twin = pickle.loads(pickle.dumps(model))
    assert numbers(twin) == numbers(model) and torch.equal(lb.unmerge(twin)(inputs()), want)


def test_a_spawned_process_gets_the_model():
    model, x = moved("cola").requires_grad_(False), inputs()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(nn.Module.__call__, (model, x))
    assert torch.allclose(found, model(x), atol=1e-6)  # another process, other threads


@pytest.mark.parametrize(
    "method, options",
    [("vera", {}), ("loldu", {"init": "uniform", "keep_start": True}), ("rac", {}), ("full", {})],
)
def test_one_site_of_another_seed_is_saved_with_it(method, options, tmp_path):
    model, other = (move(adapted(method, seed=s, **options), s) for s in (1, 2))
    state = other.state_dict()
    part = {k: t for k, t in state.items() if k.startswith("first.")}
    model.load_state_dict(part, strict=False)
    again = lb.load(net(), lb.save(model, tmp_path / "mixed"))
    assert same(model, again) and not same(model, other)
    assert method == "full" or set(record_of(model).config["per_site"]) == set(
        lb.adapters(model)
    ) - {"first"}
    model.load_state_dict(state)
    assert "per_site" not in record_of(model).config
    assert same(other, lb.load(net(), lb.save(model, tmp_path / "whole")))
