"""Times of several contenders as ratios to one of them, on a machine that does other things too.

A contender's run stands between two runs of the base; their mean is what it's divided by, so a slow
second hits both. Time is CPU time of
this process: waiting for a core doesn't count. Where a tensor lies in memory moves a matrix
product's time by some percent, so contenders and inputs are built anew several times, and a ratio
is the median over builds of the median over rounds. Its interval (95 %) comes from drawing builds,
and rounds within them, with replacement.

Memory that a run frees stays with the process. Else the C library gives it back to the system after
some steps and keeps it after others, as the end of the heap happens to lie, and a step that must
fetch thousands of pages again is up to a tenth slower, the floor's as anybody's.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_memory() -> bool:
    "Have freed memory stay with this process; whether the C library can (glibc)."
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    )
    return (
        mallopt is not None
        and bool(mallopt(MMAP_THRESHOLD, 1 << 25))
        and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
    )


def seconds(run: Callable) -> float:
    "CPU seconds of one run."
    start = time.process_time()
    run()
    return time.process_time() - start


def one_build(
    runs: dict,
    base: str,
    rounds: int,
    order: random.Random,
    warm: int = 1,
    clock: Callable = seconds,
) -> dict:
    """{name: ratios}, one a round; the contenders come in a new order every round. clock(run): the
    time that a run takes.
    """
    names, found = (
        [name for name in runs if name != base],
        {name: [] for name in runs if name != base},
    )
    for run in [*runs.values()] * warm:
        run()
    for _ in range(rounds):
        order.shuffle(names)
        before = clock(runs[base])
        for name in names:
            own, after = clock(runs[name]), clock(runs[base])
            found[name].append(2 * own / (before + after))
            before = after
    return found


def timed(build: Callable, base: str, builds: int, rounds: int) -> dict:
    """{name: [[ratio of a round, ...] of a build, ...]} for the contenders that `build(seed)`
    makes, a dict of functions; all but the base.
    """
    keep_memory()
    order, found = random.Random(0), {}
    for seed in range(builds):
        runs = build(seed)
        for name, own in one_build(runs, base, rounds, order).items():
            found.setdefault(name, []).append(own)
        del runs
        gc.collect()
    return found


def quotients(own: list, other: list) -> list:
    "Round by round, one contender's time over another's."
    return [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(own, other, strict=True)]


def middle(builds: list) -> float:
    "The median over builds of the median over rounds."
    return statistics.median(map(statistics.median, builds))


def interval(builds: list, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    "The 95 % bootstrap interval of `middle`."
    chance = random.Random(seed)
    found = sorted(
        middle([chance.choices(own, k=len(own)) for own in chance.choices(builds, k=len(builds))])
        for _ in range(draws)
    )
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def summary(builds: list) -> dict:
    "Ratio and interval, rounded."
    low, high = interval(builds)
    return {"ratio": round(middle(builds), 3), "low": round(low, 3), "high": round(high, 3)}


def command_line(doc: str, methods: str) -> argparse.ArgumentParser:
    """The arguments that the benchmarks of methods share; `doc` is the script's docstring,
    `methods` what it measures by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--builds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shape", default="768x768", help="inputs x outputs")
    parser.add_argument("--methods", default=methods)
    parser.add_argument("--out", type=Path)
    return parser


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """What tells processors apart: the architecture and, where the system says so (Linux on x86),
    maker, family, model and stepping.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    facts = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return " ".join(
        [
            platform.machine(),
            *(
                facts[name]
                for name in ("vendor_id", "cpu family", "model", "stepping")
                if name in facts
            ),
        ]
    )


def setting(**more: object) -> dict:
    "What a result depends on and may be told."
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **more,
    }


def store(rows: list, path: Path | None, how: dict) -> None:
    "Print the rows and, with a path, write them as JSON beside the setting."
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))
    if path:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        path.write_text(f'{{"setting": {json.dumps(how)},\n "rows": [\n{lines}\n]}}\n')
