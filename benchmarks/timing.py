"""Times of several contenders as ratios to one of them, on a machine that does other things too.

A contender's run stands between two runs of the base; their mean is what it's divided by, so a slow second hits both. Time is CPU time of
this process: waiting for a core doesn't count. Where a tensor lies in memory moves a matrix product's time by some percent, so contenders and
inputs are built anew several times, and a ratio is the median over builds of the median over rounds. Its interval (95 %) comes from drawing
builds, and rounds within them, with replacement.
"""
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


def seconds(run: Callable) -> float:
    "CPU seconds of one run."
    start = time.process_time()
    run()
    return time.process_time() - start


def one_build(runs: dict, base: str, rounds: int, order: random.Random, warm: int) -> dict:
    "{name: ratios}, one a round; the contenders come in a new order every round."
    names, ratios = [name for name in runs if name != base], {name: [] for name in runs}
    for _ in range(warm):
        for run in runs.values():
            run()
    for _ in range(rounds):
        order.shuffle(names)
        before = seconds(runs[base])
        for name in names:
            own, after = seconds(runs[name]), seconds(runs[base])
            ratios[name].append(2 * own / (before + after))
            before = after
    return ratios


def middle(builds: list) -> float:
    "The median over builds of the median over rounds."
    return statistics.median(map(statistics.median, builds))


def interval(builds: list, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    "The 95 % bootstrap interval of `middle`."
    chance = random.Random(seed)
    found = sorted(middle([chance.choices(own, k=len(own)) for own in chance.choices(builds, k=len(builds))]) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def ratios(build: Callable, base: str, builds: int = 5, rounds: int = 10, warm: int = 2) -> dict:
    "{name: {ratio, low, high}} for the contenders that `build(seed)` makes, a dict of functions; the base itself is 1."
    order, found = random.Random(0), {}
    for seed in range(builds):
        runs = build(seed)
        for name, own in one_build(runs, base, rounds, order, warm).items():
            found.setdefault(name, []).append(own)
        del runs
        gc.collect()
    return {name: summary(own) for name, own in found.items() if name != base} | {base: {"ratio": 1.0}}


def summary(builds: list) -> dict:
    "Ratio and interval, rounded."
    low, high = interval(builds)
    return {"ratio": round(middle(builds), 3), "low": round(low, 3), "high": round(high, 3)}


def setting(**more: object) -> dict:
    "What a result depends on and may be told."
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "processor": platform.machine(), **more}
