"""Work on many items at once, where this process can be forked."""

import multiprocessing
import os
import sys
from collections.abc import Callable

FORKS = sys.platform == "linux"
FEW = 8


def spread(work: Callable, items: list) -> list:
    """[work(item) for item in items], shared out among the cores unless the items are few. What
    `work` changes in an item
    may stay in another process: only what it returns comes back.
    """
    cores = len(os.sched_getaffinity(0)) if FORKS else 1
    if cores < 2 or len(items) <= FEW:
        return [work(item) for item in items]
    with multiprocessing.get_context("fork").Pool(cores, _remember, (work, items)) as pool:
        return pool.map(_one, range(len(items)), chunksize=1)


def _remember(work: Callable, items: list) -> None:
    "What a fork has to do: it inherits both, so that neither has to be sent."
    _one.job = work, items


def _one(number: int) -> object:
    work, items = _one.job
    return work(items[number])
