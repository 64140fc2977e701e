"""What a step of SAM, MGPO and GGPO costs, as a ratio to the plain step of the same adapter, interleaved in one process.

    python -m benchmarks.steps [--rounds N] [--tokens 2048] [--methods lora,asymmetric,cla] [--out benchmarks/steps.json]

A step is `train_step` on one adapted layer: forward, backward with the input's gradient, optimizer. A ratio is the median over rounds of
time / plain step of the same round. FLOPs are exact; times are this machine's and mean nothing elsewhere but as ratios.
"""
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

import lora_book as lb  # noqa: E402
from benchmarks.layer import SHAPES, adapted  # noqa: E402
from lora_book.core.products import count_flops  # noqa: E402
from lora_book.registry import STEPS  # noqa: E402

GOALS = {"mgpo": 1.08, "sam": None, "ggpo": None}


def stepper(method: str, step: str, x: torch.Tensor, g: torch.Tensor, r: int) -> Callable:
    "A function that takes one step of an adapted layer of the shape of g and x."
    model = adapted(method, x.shape[1], g.shape[1], r)
    model._lora_book.step = STEPS[step]()
    optimizer = torch.optim.AdamW(lb.param_groups(model, 1e-4))

    def take() -> None:
        x.grad = None
        lb.train_step(model, optimizer, lambda: model(x).flatten() @ g.flatten())

    return take


def measured(method: str, tokens: int, m: int, n: int, r: int, rounds: int) -> list:
    "One row a step: ratio to the plain step, and FLOPs beyond it."
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(tokens, m, generator=generator).requires_grad_(), torch.randn(tokens, n, generator=generator)
    takes = {step: stepper(method, step, x, g, r) for step in ("plain", *GOALS)}
    ratios: dict = {step: [] for step in takes}
    for i in range(rounds + 3):
        names, spent = list(takes), {}
        for step in names[i % len(names):] + names[:i % len(names)]:
            start = time.perf_counter()
            takes[step]()
            spent[step] = time.perf_counter() - start
        for step, t in spent.items():
            ratios[step] += [t / spent["plain"]] * (i >= 3)
    plain = count_flops(takes["plain"])
    return [{"method": method, "step": step, "tokens": tokens, "m": m, "n": n, "r": r, "ratio": round(statistics.median(ratios[step]), 3),
             "flops": round(count_flops(take) / plain, 4), "goal": GOALS.get(step)} for step, take in takes.items()]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", default="2048")
    parser.add_argument("--methods", default="lora,asymmetric,cla")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for method in args.methods.split(",") for tokens in map(int, args.tokens.split(",")) for m, n in SHAPES
            for row in measured(method, tokens, m, n, 16, args.rounds)]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))
    if args.out:
        setting = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "rounds": args.rounds, "processor": platform.machine()}
        args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
