"""How long merging a whole model takes, as a ratio to forming every merged weight and writing it
once.

    python -m benchmarks.merge [--methods lora,cla,dora] [--builds N] [--rounds N] [--out FILE]

The model is BERT 6x384 with every linear map adapted. "written" adds ΔW to W0 for each adapted
weight and puts the sum into fresh memory,
and no more: no check, no report, no way back. "copied" copies each weight. `benchmarks.timing` says
what a ratio and its interval are.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lora_book as lb
from benchmarks.layer import RANK, bert, shaken
from benchmarks.timing import setting, store, summary, timed
from lora_book.core.hosts import sites

GOAL = 2.0


def blocks(model: nn.Module) -> list:
    "Every adapted weight's block."
    return [block for _, site in sites(model) for block in site.blocks()]


@torch.no_grad()
def written(parts: list) -> list:
    "W0 + ΔW of every block, each a new tensor."
    return [block.W0 + block.adapter.delta(block.W0) for block in parts]


@torch.no_grad()
def copied(parts: list) -> list:
    "W0 of every block, each a new tensor."
    return [block.W0.clone() for block in parts]


def merged(model: nn.Module) -> None:
    "Merge; what takes it back costs nothing."
    lb.merge(model)
    lb.unmerge(model)


def runs(method: str, seed: int) -> dict[str, Callable]:
    "The contenders on one adapted model."
    model = shaken(lb.adapt(bert(seed), method, "all-linear", r=RANK))
    parts = blocks(model)
    return {
        "written": partial(written, parts),
        "copied": partial(copied, parts),
        "merged": partial(merged, model),
    }


def main() -> None:
    "Measure, print, and write it as JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--methods", default="lora,cla,dora")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {
            "name": name,
            "method": method,
            "model": "BERT 6x384",
            "r": RANK,
            **summary(own),
            "goal": GOAL if name == "merged" else None,
        }
        for method in args.methods.split(",")
        for name, own in timed(partial(runs, method), "written", args.builds, args.rounds).items()
    ]
    store(rows, args.out, setting(builds=args.builds, rounds=args.rounds))


if __name__ == "__main__":
    main()
