"""What the black-box tests of the public interface share: a small model, a strict snapshot, and
moves of what trains.
"""

import copy

import torch
from torch import Tensor, nn

import lora_book as lb

TARGETS = ["first", "qkv[q,v]", "proj"]
SITES = ["first", "qkv[q]", "qkv[v]", "proj"]
CHAINS = ("cola", "rac", "c3la", "random_c3la")
DRAWING = (
    "lora",
    "rslora",
    "lora_plus",
    "asymmetric",
    "cola",
    "rac",
    "vera",
    "adalora",
    "sam",
    "mgpo",
    "ggpo",
)


class Net(nn.Module):
    "A linear map, a fused projection, an output projection with no bias, a norm and a head."

    def __init__(self, width: int = 8, classes: int = 3):
        super().__init__()
        self.first, self.qkv = nn.Linear(width, width), nn.Linear(width, 3 * width)
        self.proj, self.norm, self.head = (
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.head(self.norm(h + self.proj(torch.sigmoid(q) * k + v)))


def net(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes) -> nn.Module:
    "The same model for the same seed, without a trace in the global random state."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**sizes).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, shape=(5, 8), seed: int = 1) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def adapted(
    method: str,
    dtype: torch.dtype = torch.float32,
    targets=TARGETS,
    seed: int = 0,
    base: nn.Module | None = None,
    **options,
) -> nn.Module:
    "The model adapted with its head, so that every method has something to train."
    options = {"r": 2, "head": "head"} | options
    return lb.adapt(net(dtype) if base is None else base, method, targets, seed=seed, **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for group in lb.param_groups(model, 1e-2) for p in group["params"]]


@torch.no_grad()
def move(model: nn.Module, seed: int = 3, size: float = 0.2) -> nn.Module:
    "Add noise to everything that trains."
    g = torch.Generator().manual_seed(seed)
    for p in trained(model):
        p.add_(size * torch.randn(p.shape, generator=g).to(p))
    return model


def moved(method: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return move(adapted(method, dtype, **options))


def bits(t: Tensor) -> bytes:
    return (
        t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if t.numel()
        else b""
    )


def own(value) -> object:
    "A comparable stand-in for an attribute: plain values themselves, everything else by identity."
    return value if isinstance(value, (int, float, str, bool, tuple, type(None))) else id(value)


def snapshot(model: nn.Module) -> dict:
    """Everything an error must leave alone: modules, classes, attributes, hooks, modes, parameters,
    flags, gradients and bits.
    """
    seen = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kinds = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        tables = {
            key: [(str(k), id(v)) for k, v in value.items()]
            for key, value in vars(module).items()
            if isinstance(value, dict)
        }
        seen[name] = (id(module), type(module), {k: own(v) for k, v in kinds.items()}, tables)
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    state = {
        name: (
            (id(t),)
            if isinstance(t, nn.UninitializedParameter)
            else (
                id(t),
                t.dtype,
                tuple(t.shape),
                t.requires_grad,
                t.data_ptr(),
                bits(t),
                None if t.grad is None else bits(t.grad),
            )
        )
        for name, t in tensors
    }
    return {"modules": seen, "tensors": state}


def numbers(model: nn.Module) -> dict[str, bytes]:
    "The bits of a state dict."
    return {name: bits(t) for name, t in model.state_dict().items()}


def gradients(model: nn.Module, x: Tensor) -> list:
    model.zero_grad()
    model(x).float().pow(2).sum().backward()
    return [p.grad.clone() for p in trained(model)]


def largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
