"""LoLDU's layer against the frozen layer: time of forward and backward as a ratio, and bytes held
in between.

    OMP_NUM_THREADS=1 python benchmarks/loldu.py [--rounds 15] [--blocks 64,128,192]

All variants run in turn in one process; each figure is the median over the rounds of the variant's
CPU time over the frozen layer's of the same round; "best" is the ratio of the shortest times.
"formed" multiplies the factors out in every forward pass and leaves the rest to autograd; "dense P"
does so with a permutation matrix, as the paper's released code does.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import lora_book as lb
from lora_book.core.products import saved_bytes
from lora_book.present import loldu

SHAPES = [(256, 768, 768), (2048, 768, 768), (2048, 3072, 768), (2048, 384, 384)]


def layer(n: int, m: int) -> nn.Module:
    "A frozen layer with Gaussian weights."
    made = nn.Sequential(nn.Linear(m, n))
    with torch.no_grad():
        made[0].weight.copy_(torch.randn(n, m, generator=torch.Generator().manual_seed(0)) * 0.02)
    return made.requires_grad_(False)


def formed(n: int, m: int, r: int, dense: bool):
    "The definition, formed in each forward pass."
    model = lb.adapt(layer(n, m), "loldu", ["0"], r=r)
    adapter, W0, bias = lb.adapters(model)["0"], model[0].weight.detach(), model[0].bias.detach()
    residual = adapter.residual(W0)
    P = torch.eye(n)[:, adapter.order].contiguous() if dense else None

    def run(x):
        change = (adapter.left * (adapter.sigma * adapter.z)) @ adapter.right
        return F.linear(x, residual + (P @ change if dense else change[adapter.inverse]), bias)

    return run, [W0, residual, adapter.left, adapter.right] + ([P] if dense else [])


def variants(n: int, m: int) -> dict:
    "name -> (the layer as a function, its frozen tensors and parameters)."
    k, found = min(n, m), {"floor": layer(n, m)}
    ranks = {
        "full": ("full", 1),
        "lora r=16": ("lora", 16),
        "loldu r=16": ("loldu", 16),
        "loldu r=all": ("loldu", k),
    }
    for name, (method, r) in ranks.items():
        found[name] = lb.adapt(layer(n, m), method, ["0"], r=r)
    known = {
        name: (model, [*model.parameters(), *model.buffers()]) for name, model in found.items()
    }
    return known | {"formed": formed(n, m, k, False), "formed, dense P": formed(n, m, k, True)}


def seconds(run, x: torch.Tensor, G: torch.Tensor) -> float:
    "CPU seconds of one forward and backward pass."
    x.grad, start = None, time.process_time()
    run(x).backward(G)
    return time.process_time() - start


def compare(T: int, n: int, m: int, rounds: int) -> None:
    "Print a line for each variant of one shape."
    g = torch.Generator().manual_seed(1)
    x, G, made = (
        torch.randn(T, m, generator=g).requires_grad_(),
        torch.randn(T, n, generator=g),
        variants(n, m),
    )
    times = {name: [] for name in made}
    for i in range(rounds + 2):
        for name, (run, _) in made.items():
            took = seconds(run, x, G)
            if i > 1:
                times[name].append(took)
    print(f"T={T}, {m} -> {n}: floor {1e3 * min(times['floor']):.1f} ms")
    for name, (run, known) in made.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["floor"], strict=True))
        best, held = (
            min(times[name]) / min(times["floor"]),
            saved_bytes(partial(run, x), known) / 1e6,
        )
        print(f"  {name:16} {ratio:5.2f}   best {best:5.2f}   saved {held:6.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--blocks", default=str(loldu.BLOCK), help="block sizes of the triangular products to try"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in map(int, options.blocks.split(",")):
        loldu.BLOCK = size
        print(f"block size {size}")
        for shape in SHAPES:
            compare(*shape, options.rounds)
