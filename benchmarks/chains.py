"""What a step of a chain's later links costs, as a ratio to a step of its first, interleaved in one
process.

    python -m benchmarks.chains [--tokens 2048] [--shape 768x768] [--methods cola,rac,c3la]
    [--builds N] [--rounds N] [--out FILE]

A step is forward and backward of one adapted layer, the input's gradient included.
`benchmarks.timing` says what a ratio and its interval are.
"""

from functools import partial

import torch
from torch import nn

import lora_book as lb
from benchmarks.layer import RANK, adapted, exact, numbers, shaken, step, tensors
from benchmarks.timing import command_line, setting, store, summary, timed

LINKS, GOAL = (1, 2, 4, 8), 1.03


def at_link(method: str, j: int, m: int, n: int) -> nn.Module:
    "The layer whose chain trains its j-th link."
    model = adapted(method, m, n, RANK)
    for _ in range(j - 1):
        shaken(lb.advance(model))
    return model


def models(method: str, m: int, n: int) -> dict:
    "{link: layer}, and the first link once more, which shows what the ratios' noise is."
    return {f"link {j}": at_link(method, j, m, n) for j in LINKS} | {
        "link 1 again": at_link(method, 1, m, n)
    }


def runs(method: str, tokens: int, m: int, n: int, seed: int) -> dict:
    "One step at each link as a function."
    x, g = numbers(seed, (tokens, m), (tokens, n))
    x.requires_grad_()
    return {name: partial(step, model, x, g) for name, model in models(method, m, n).items()}


def measured(method: str, tokens: int, m: int, n: int, builds: int, rounds: int) -> list:
    "One row a link."
    x, g = numbers(0, (tokens, m), (tokens, n))
    x.requires_grad_()
    times = timed(partial(runs, method, tokens, m, n), "link 1", builds, rounds)
    return [
        {
            "name": name,
            "method": method,
            "tokens": tokens,
            "m": m,
            "n": n,
            "r": RANK,
            "goal": None if name.startswith("link 1") else GOAL,
            **(summary(times[name]) if name in times else {"ratio": 1.0}),
            **exact(partial(step, model, x, g), partial(model, x), tensors(model)),
        }
        for name, model in models(method, m, n).items()
    ]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    args = command_line(__doc__, "cola,rac,c3la").parse_args()
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
