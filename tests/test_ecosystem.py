"""What others do with an adapted model: loops, optimizers, Trainer, Accelerate, compilers,
checkpointing, copies, number formats.
"""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_book as lb
from lora_book.core.laws import randomise
from lora_book.lab.models import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = ("lora", "cla", "cola", "c3la")
CHAINS = ("cola", "rac", "c3la", "random_c3la")
G = torch.Generator().manual_seed(0)
IDS, LABELS = torch.randint(5, 200, (8, 12), generator=G), torch.arange(8) % 3


def adapted(method, links=2, size=0.1, **options):
    model = lb.adapt(
        load_model("tiny_bert", n_classes=3), method, head=["classifier"], r=3, **options
    )
    if size:
        randomise(model, 1, size)
        for seed in range(1, links if method in CHAINS else 1):
            randomise(lb.advance(model), seed + 1, size)
    return model


def scores(model):
    return model(input_ids=IDS).logits


def loss(model, rows=slice(None)):
    return model(input_ids=IDS[rows], labels=LABELS[rows]).loss


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def gap(one, other):
    return max(
        (a.double() - b.double()).abs().max().item() for a, b in zip(one, other, strict=True)
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Copies, files, formats


@pytest.mark.parametrize("method", lb.methods())
def test_copies_files_and_conversions_keep_an_adapted_model(method):
    model = adapted(method)
    want = scores(model).detach()
    twin = copy.deepcopy(model)
    assert torch.equal(scores(twin), want) and lb.n_trainable(twin) == lb.n_trainable(model)
    with torch.no_grad():
        twin.classifier.weight.add_(1)
    assert torch.equal(scores(model), want), "a copy shares no numbers"
    fresh = adapted(method, size=0)
    fresh.load_state_dict(from_bytes(to_bytes(model.state_dict())))
    assert torch.equal(scores(fresh), want)
    assert scores(copy.deepcopy(model).double()).dtype == torch.float64
    assert gap([scores(copy.deepcopy(model).double())], [want]) < 1e-4
    narrow = copy.deepcopy(model).bfloat16()
    assert scores(narrow).dtype == torch.bfloat16 and all(
        p.dtype == torch.float32 for a in lb.adapters(narrow).values() for p in a.parameters()
    )
    assert gap([scores(narrow)], [want]) < 0.2 * max(1, want.abs().max().item())


@pytest.mark.parametrize("method", FEW)
def test_merged_models_can_be_copied_and_converted(method):
    model = adapted(method)
    want = scores(model).detach()
    lb.merge(model)
    twin = copy.deepcopy(model)
    assert torch.equal(scores(lb.unmerge(twin)), want)
    assert gap([scores(lb.unmerge(copy.deepcopy(model).double()))], [want]) < 1e-4
    with lb.disabled(model):
        base = scores(model).detach()
    assert torch.equal(base, scores(load_model("tiny_bert", n_classes=3)))


@settings(max_examples=15, deadline=None)
@given(
    method=st.sampled_from(FEW),
    links=st.integers(1, 4),
    extra=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
def test_a_state_dict_carries_any_number_of_links(method, links, extra, seed):
    model = randomise(adapted(method, links=links), seed, 0.1)
    fresh = adapted(method, links=1 + extra)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(scores(fresh), scores(model))
    if method in CHAINS:
        lb.advance(fresh), lb.advance(model)
        assert torch.equal(scores(fresh), scores(model)), "the link that comes next is the same too"


# Loops and optimizers


@pytest.mark.parametrize(
    "method", [m for m in lb.methods() if m not in ("adalora", "sam", "mgpo", "ggpo")]
)
def test_train_step_is_the_usual_four_lines(method):
    one, two = adapted(method, size=0), adapted(method, size=0)
    first, second = (torch.optim.AdamW(lb.param_groups(m, 1e-2)) for m in (one, two))
    for _ in range(3):
        lb.train_step(one, first, lambda: loss(one))
        loss(two).backward()
        second.step()
        second.zero_grad()
    assert same(one.parameters(), two.parameters())


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax"]
)
def test_any_optimizer_moves_what_trains_and_nothing_else(name):
    model = adapted("lora", size=0)
    optimizer = getattr(torch.optim, name)(lb.param_groups(model, 1e-2), weight_decay=0.1)
    for _ in range(2):
        lb.train_step(model, optimizer, lambda: loss(model))
    base = dict(load_model("tiny_bert", n_classes=3).named_parameters())
    moved = {n for n, p in model.named_parameters() if n in base and not torch.equal(p, base[n])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert all(a.B.any() for a in lb.adapters(model).values())


# Checkpointed activations


@pytest.mark.parametrize("method", lb.methods())
def test_checkpointed_activations_give_the_same_gradients(method):
    model = adapted(method, links=1).train()
    want = gradients(model)
    for reentrant in (False, True):
        light = copy.deepcopy(model)
        light.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            light.enable_input_require_grads()
        assert same(gradients(light), want)


# Compilation


def small(method):
    "Two layers, one of them fused, with something in every adapter."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))
    return randomise(lb.adapt(net, method, ["0[q,v]", "2"], r=2), 1, 0.5)


@pytest.mark.parametrize("method", FEW[:3])
def test_a_compiled_model_follows_every_change(method):
    torch._dynamo.reset()
    model, x = small(method), torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def agrees(mode=torch.no_grad):
        with mode():
            return torch.equal(compiled(x), model(x))

    assert agrees() and agrees(torch.inference_mode) and agrees(torch.enable_grad)
    changes = [lambda m: randomise(m, 5, 0.1), lb.merge, lb.unmerge]
    for change in [*changes, *([lb.advance] if method in CHAINS else [])]:
        change(model)
        assert agrees()
    plain = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))
    plain.load_state_dict(
        {name: p for name, p in model.state_dict().items() if "adapters" not in name}
    )
    with lb.disabled(compiled):
        assert torch.equal(compiled(x), plain(x))
    optimizer = torch.optim.AdamW(lb.param_groups(compiled, 1e-2))
    before = lb.train_step(compiled, optimizer, lambda: compiled(x).square().sum())
    assert (
        lb.train_step(compiled, optimizer, lambda: compiled(x).square().sum()) < before and agrees()
    )


def test_a_compiled_transformer_has_one_graph_and_the_same_gradients():
    torch._dynamo.reset()
    model = adapted("cola")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (
        torch.equal(scores(compiled), scores(model))
        and gap(gradients(compiled), gradients(model)) == 0
    )


@pytest.mark.parametrize("method", FEW[1:3])
def test_aot_autograd_traces_forward_and_backward(method):
    torch._dynamo.reset()
    model, x = small(method), torch.randn(3, 6)

    def slopes(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert (
        gap(slopes(torch.compile(model, backend="aot_eager", fullgraph=True)), slopes(model)) < 1e-6
    )


# Accelerate


@pytest.fixture
def accelerate():
    "A way to make accelerators whose process-wide state is forgotten afterwards."

    def make(**settings):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("method", [*FEW, "lora_plus", "sam"])
def test_accelerate_trains_to_the_same_bits(method, accelerate, tmp_path):
    accelerator, alone, shared = accelerate(), adapted(method, size=0), adapted(method, size=0)
    optimizer = torch.optim.AdamW(lb.param_groups(alone, 1e-2))
    prepared, theirs = accelerator.prepare(shared, torch.optim.AdamW(lb.param_groups(shared, 1e-2)))
    for step in range(4):
        lb.train_step(alone, optimizer, lambda: loss(alone), max_grad_norm=1.0)
        lb.train_step(
            prepared,
            theirs,
            lambda: loss(prepared),
            backward=accelerator.backward,
            max_grad_norm=1.0,
        )
        if step == 1 and method in CHAINS:
            before = len(optimizer.state)
            lb.advance(alone, optimizer), lb.advance(prepared, theirs)
            assert len(optimizer.state) == len(theirs.state) == 2 < before, "the head's state stays"
    assert same(alone.parameters(), shared.parameters())
    lb.save(prepared, tmp_path)
    assert torch.equal(
        scores(lb.load(load_model("tiny_bert", n_classes=3), tmp_path)), scores(alone)
    )


def test_accumulated_half_batches_are_one_step(accelerate):
    accelerator, alone, shared = (
        accelerate(gradient_accumulation_steps=2),
        adapted("cola", size=0),
        adapted("cola", size=0),
    )
    optimizer = torch.optim.SGD(lb.param_groups(alone, 0.1), momentum=0.9)
    prepared, theirs = accelerator.prepare(
        shared, torch.optim.SGD(lb.param_groups(shared, 0.1), momentum=0.9)
    )
    for _ in range(3):
        lb.train_step(alone, optimizer, lambda: loss(alone))
        for rows in (slice(0, 4), slice(4, 8)):
            with accelerator.accumulate(prepared):
                lb.train_step(
                    prepared,
                    theirs,
                    lambda rows=rows: loss(prepared, rows),
                    backward=accelerator.backward,
                )
    assert gap(alone.parameters(), shared.parameters()) < 1e-5


@pytest.mark.parametrize("method", FEW)
def test_mixed_precision_trains_float32_adapters(method, accelerate):
    accelerator, model = accelerate(mixed_precision="bf16"), adapted(method, size=0)
    prepared, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(lb.param_groups(model, 1e-2))
    )
    losses = [
        lb.train_step(
            prepared, optimizer, lambda: loss(prepared), backward=accelerator.backward
        ).item()
        for _ in range(5)
    ]
    assert losses[-1] < losses[0]
    assert {p.dtype for a in lb.adapters(model).values() for p in a.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scores(adapted(method)).dtype == torch.bfloat16


# transformers' Trainer

ROWS = [
    {"input_ids": ids, "labels": label}
    for ids, label in zip(IDS.repeat(3, 1), LABELS.repeat(3), strict=True)
]


class OpenLinks(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **rest):
        if state.epoch < args.num_train_epochs:
            lb.advance(model, optimizer)


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        return lb.train_step(
            model,
            self.optimizer,
            lambda: self.compute_loss(model, inputs),
            backward=self.accelerator.backward,
            max_grad_norm=self.args.max_grad_norm,
        )


def trainer(model, folder, kind=Trainer, callbacks=(), save="no"):
    options = TrainingArguments(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy=save,
        seed=0,
    )
    optimizer = torch.optim.AdamW(lb.param_groups(model, 1e-2))
    return kind(
        model, options, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=list(callbacks)
    )


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield


def test_trainer_trains_the_adapters_and_own_steps_end_at_the_same_bits(tmp_path):
    plain, own = (
        trainer(adapted("lora", size=0), tmp_path / "a"),
        trainer(adapted("lora", size=0), tmp_path / "b", OwnStep),
    )
    first = loss(plain.model).item()
    plain.train(), own.train()
    assert loss(plain.model.eval()).item() < first and same(
        plain.model.parameters(), own.model.parameters()
    )
    assert lb.adapters(own.model) and own.model._lora_book.steps == 9


@pytest.mark.parametrize("method, callbacks, links", [("lora", [], None), ("cola", [OpenLinks], 3)])
def test_trainer_resumes_from_its_checkpoint(method, callbacks, links, tmp_path):
    whole = trainer(
        adapted(method, size=0), tmp_path / "run", callbacks=[c() for c in callbacks], save="epoch"
    )
    whole.train()
    assert links is None or {len(a.links) for a in lb.adapters(whole.model).values()} == {links}
    checkpoints = sorted(
        (tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
    )
    again = trainer(adapted(method, size=0), tmp_path / "run", callbacks=[c() for c in callbacks])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=str(checkpoints[0]))
    assert same(whole.model.state_dict().values(), again.model.state_dict().values())


def test_a_loop_without_the_methods_own_step_is_seen_to_differ(tmp_path):
    "The failing twin: SAM under the plain Trainer trains as LoRA does, and not as SAM does."
    plain, sam, lora = (
        trainer(adapted(m, size=0), tmp_path / str(i), k)
        for i, (m, k) in enumerate([("sam", Trainer), ("sam", OwnStep), ("lora", Trainer)])
    )
    for each in (plain, sam, lora):
        each.train()
    assert same(plain.model.parameters(), lora.model.parameters()) and not same(
        sam.model.parameters(), plain.model.parameters()
    )
