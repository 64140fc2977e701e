"""Every optimizer-side option with every adapter: SAM, MGPO and GGPO, LoRA+'s ratio, also on
chains; closed-form counts on real models.
"""

import copy

import pytest
import timm
import torch
import transformers
from interface_tools import CHAINS, adapted, bits, inputs, move
from test_laws import COUNTS
from torch import nn

import lora_book as lb
from lora_book.lab.models import load_model

TRAINS_AN_ADAPTER = [m for m in lb.methods() if m not in ("full", "linear_probe", "bitfit")]
PLAIN = [m for m in TRAINS_AN_ADAPTER if m not in ("sam", "mgpo", "ggpo")]
STEPS = ("sam", "mgpo", "ggpo")


def two_factors(method: str) -> bool:
    "Whether LoRA+'s ratio means something: the method trains an A and a B."
    names = {
        name.split(".")[-1]
        for a in lb.adapters(adapted(method)).values()
        for name, _ in a.named_parameters()
    }
    return {"A", "B"} <= names


WITH_RATIO = [m for m in PLAIN if two_factors(m)]


def fixed(model: nn.Module) -> dict[str, bytes]:
    "The bits of every parameter and buffer that doesn't train and that no adapter keeps."
    own = {id(t) for a in lb.adapters(model).values() for t in [*a.parameters(), *a.buffers()]}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: bits(t) for name, t in named if not t.requires_grad and id(t) not in own}


def loss_of(model: nn.Module, step: int):
    return lambda: (model(inputs(torch.float64, seed=step)) - 1).square().mean()


def after_two_steps(method: str, rho: float | None, step: str, **options) -> torch.Tensor:
    """What trains, in one vector, after a plain-sized warm-up step and one more, the second with a
    perturbation of size rho (None: none).
    """
    model = move(
        adapted(
            method, torch.float64, **({} if rho is None else {"step": step, "rho": rho}), **options
        )
    )
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.01), momentum=0.9)
    before = fixed(model)
    for number in range(2):
        lb.train_step(model, optimizer, loss_of(model, number))
    assert fixed(model) == before
    return torch.cat(
        [p.detach().flatten() for group in optimizer.param_groups for p in group["params"]]
    )


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_perturbs_every_adapter_by_the_first_power_of_rho(method, step):
    options = {"lr_ratio": 4.0} if method in WITH_RATIO else {}
    plain = after_two_steps(method, None, step, **options)
    whole, half = (after_two_steps(method, rho, step, **options) - plain for rho in (2e-5, 1e-5))
    assert whole.norm() > 0
    assert (whole - 2 * half).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("method", PLAIN)
def test_sam_is_the_gradient_at_the_top_of_the_climb(method):
    model = move(adapted(method, torch.float64, step="sam", rho=0.1))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(lb.param_groups(model, 1.0))
    start = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    lb.train_step(model, optimizer, loss_of(model, 0))
    ps = [p for group in lb.param_groups(twin, 1.0) for p in group["params"]]
    penalty = lb.registry.method(method).penalty

    def gradient():
        extra = penalty(lb.adapters(twin))
        return torch.autograd.grad(loss_of(twin, 0)() + (0 if extra is None else extra), ps)

    here = gradient()
    norm = torch.stack([g.square().sum() for g in here]).sum().sqrt()
    with torch.no_grad():
        for p, g in zip(ps, here, strict=True):
            p.add_(0.1 * g / norm)
    moved = [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    for (p, lr), old, g in zip(moved, start, gradient(), strict=True):
        assert torch.allclose(p, old - lr * g, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", CHAINS)
@pytest.mark.parametrize("step", (None, *STEPS))
def test_a_chain_advances_under_every_step(method, step):
    options = {} if step is None else {"step": step, "rho": 0.05}
    model = adapted(method, torch.float64, reset_every=2, chain_length=3, **options)
    optimizer = torch.optim.Adam(lb.param_groups(model, 0.01))
    seen = []
    for number in range(6):
        lb.train_step(model, optimizer, loss_of(model, number))
        seen.append({len(a.links) for a in lb.adapters(model).values()})
    assert seen == [{1}, {2}, {2}, {3}, {3}, {3}]


@pytest.mark.parametrize("ratio", [0.5, 8.0])
def test_loras_ratio_holds_on_every_link_of_a_chain(ratio):
    model = move(adapted("cola", torch.float64, lr_ratio=ratio, chain_length=3))
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.01), momentum=0.9)
    for link in range(3):
        for number in range(2):
            lb.train_step(model, optimizer, loss_of(model, number))
        assert remembered(optimizer, model)
        if link < 2:
            lb.advance(model, optimizer)
            assert not remembered(optimizer, model)
            check_first_step(model, optimizer, ratio)


def remembered(optimizer, model) -> list:
    "What the optimizer remembers of the adapters' parameters."
    return [
        optimizer.state[p]
        for a in lb.adapters(model).values()
        for p in a.parameters()
        if optimizer.state.get(p)
    ]


def check_first_step(model, optimizer, ratio) -> None:
    """One step of the new link moves A by lr times its gradient and B by lr·ratio times its own: no
    momentum is left.
    """
    found = {
        (name, part): p
        for name, a in lb.adapters(model).items()
        for part, p in a.named_parameters()
    }
    grads = dict(
        zip(
            found,
            torch.autograd.grad(loss_of(model, 9)(), list(found.values()), allow_unused=True),
            strict=True,
        )
    )
    before = {key: p.detach().clone() for key, p in found.items()}
    lb.train_step(model, optimizer, loss_of(model, 9))
    for (name, part), p in found.items():
        rate = 0.01 * (ratio if part.split(".")[-1] == "B" else 1)
        assert torch.allclose(
            p - before[name, part], -rate * grads[name, part], rtol=1e-9, atol=1e-13
        )


# Counts on real architectures


def minilm():
    return load_model("minilm"), ["query", "value"], [(384, 384)] * 12


def vit():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=3)
    return model, ["attn.qkv[q,v]", "mlp.fc1"], [(192, 192)] * 6 + [(768, 192)] * 3


def gpt2():
    config = transformers.GPT2Config(n_layer=1, vocab_size=64)
    return (
        transformers.GPT2LMHeadModel(config),
        ["attn.c_attn[q,v]", "mlp.c_proj"],
        [(768, 768)] * 2 + [(768, 3072)],
    )


@pytest.mark.parametrize("make", [minilm, vit, gpt2], ids=lambda make: make.__name__)
def test_counts_on_real_models_are_the_closed_forms(make):
    base, targets, shapes = make()
    for method in (m for m in lb.methods() if m != "linear_probe"):
        model = lb.adapt(copy.deepcopy(base), method, targets, r=4)
        assert lb.n_trainable(model) == sum(COUNTS[method](n, m, 4) for n, m in shapes), method
        if method not in ("full", "bitfit"):
            assert lb.n_trainable(model) == sum(
                p.numel() for p in model.parameters() if p.requires_grad
            ), method
    probe = lb.adapt(
        base,
        "linear_probe",
        head=(
            last := [name for name, part in base.named_modules() if isinstance(part, nn.Linear)][-1]
        ),
    )
    assert lb.n_trainable(probe) == 0 and lb.n_trainable(probe, heads=True) == sum(
        p.numel() for p in base.get_submodule(last).parameters()
    )
