"""What a step of SAM, MGPO and GGPO costs, as a ratio to the plain step of the same adapter,
interleaved in one process.

    python -m benchmarks.steps [--tokens 2048] [--shape 768x768] [--methods lora,asymmetric,cla]
    [--builds N] [--rounds N] [--out FILE]

A step is `train_step` on one adapted layer: forward, backward with the input's gradient, optimizer.
`benchmarks.timing` says what a ratio and its interval are. FLOPs and the number of (n, m) tensors
made in a step are exact; times are this machine's and mean nothing elsewhere.
"""

from collections.abc import Callable
from functools import partial

import torch

import lora_book as lb
from benchmarks.layer import RANK, adapted, numbers
from benchmarks.timing import command_line, setting, store, summary, timed
from lora_book.core.products import Alive, count_flops
from lora_book.registry import STEPS

GOALS = {"mgpo": 1.08}
KINDS = ("plain", "mgpo", "sam", "ggpo")


def stepper(method: str, step: str, x: torch.Tensor, g: torch.Tensor) -> Callable:
    "A function that takes one step of an adapted layer of the shape of g and x."
    model = adapted(method, x.shape[1], g.shape[1], RANK)
    model._lora_book.step = STEPS[step]()
    optimizer = torch.optim.AdamW(lb.param_groups(model, 1e-4))

    def take() -> None:
        x.grad = None
        lb.train_step(model, optimizer, lambda: model(x).flatten() @ g.flatten())

    return take


def runs(method: str, tokens: int, m: int, n: int, seed: int) -> dict:
    "One step of each kind as a function; each has taken two, so that there is a momentum."
    x, g = numbers(seed, (tokens, m), (tokens, n))
    x.requires_grad_()
    made = {step: stepper(method, step, x, g) for step in KINDS}
    for take in [*made.values()] * 2:
        take()
    return made


def dense(take: Callable, n: int, m: int) -> int:
    "How many (n, m) tensors a step makes."
    with Alive() as alive:
        take()
    return alive.shapes.count((n, m)) + alive.shapes.count((m, n)) * (n != m)


def measured(method: str, tokens: int, m: int, n: int, builds: int, rounds: int) -> list:
    "One row a kind of step."
    made = runs(method, tokens, m, n, 0)
    plain = count_flops(made["plain"])
    same = {
        step: {
            "method": method,
            "tokens": tokens,
            "m": m,
            "n": n,
            "r": RANK,
            "flops": round(count_flops(take) / plain, 4),
            "dense": dense(take, n, m),
            "goal": GOALS.get(step) if tokens >= 2048 else None,
        }
        for step, take in made.items()
    }
    times = timed(partial(runs, method, tokens, m, n), "plain", builds, rounds)
    return [
        {"name": step, **own, **(summary(times[step]) if step in times else {"ratio": 1.0})}
        for step, own in same.items()
    ]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    args = command_line(__doc__, "lora,asymmetric,cla").parse_args()
    torch.set_num_threads(1)
    m, n = map(int, args.shape.split("x"))
    rows = [
        row
        for method in args.methods.split(",")
        for row in measured(method, args.tokens, m, n, args.builds, args.rounds)
    ]
    store(rows, args.out, setting(builds=args.builds, rounds=args.rounds))


if __name__ == "__main__":
    main()
