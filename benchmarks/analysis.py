"""Time and peak memory of the analysis tools: intruder counts of MiniLM's linear maps, landscapes
of the digits ViT and of MiniLM.

    python -m benchmarks.analysis [--cases intruders,plane,...] [--threads 2] [--out
    benchmarks/analysis.json]

Memory is counted twice, in copies of the model: the largest sum of tensor bytes that were alive at
once beyond what the caller holds (exact, the same on every machine), and the growth of the
process's peak resident memory, each case in a process of its own. Times are this machine's; where
it was shared, the processor's seconds say more than the clock's.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

import lora_book as lb  # noqa: E402
from benchmarks.timing import processor  # noqa: E402
from lora_book.analysis.intruders import intruder_counts  # noqa: E402
from lora_book.analysis.loss_landscape import (  # noqa: E402
    loss_surface,
    moved_weights,
    pca_directions,
    random_directions,
    random_sharpness,
)
from lora_book.analysis.spectra import spectra_of, weight_pairs  # noqa: E402
from lora_book.core.adapter import generator  # noqa: E402
from lora_book.lab.data import load_data  # noqa: E402
from lora_book.lab.models import load_model  # noqa: E402
from lora_book.lab.training import evaluate  # noqa: E402

GOALS = (
    {"intruders": {"seconds": 30, "copies": 2}}
    | {
        name: {"seconds": 60, "copies": 2}
        for name in ("plane", "held plane", "path", "adapted plane")
    }
    | {"fine plane": {"copies": 2}, "text plane": {"copies": 2}}
)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operators made and that are alive: `now`, and `peak`,
    their largest sum.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for t in tree_flatten(made)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.born(t.untyped_storage())
        return made

    def born(self, storage: torch.UntypedStorage) -> None:
        "Note a new storage, and forget it when it dies."
        at, size = storage.data_ptr(), storage.nbytes()
        if not size or at in self.seen:
            return

        def died(_, at=at, size=size):
            self.now -= size
            del self.seen[at]

        self.seen[at] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def size_of(model: torch.nn.Module) -> int:
    "The bytes of a model's parameters and buffers."
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def moved(model: torch.nn.Module) -> torch.nn.Module:
    "The model with a random change of rank 8 and a twentieth of the norm in each linear map."
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                draw = generator(0, name)
                D = torch.randn(module.out_features, 8, generator=draw) @ torch.randn(
                    8, module.in_features, generator=draw
                )
                module.weight.add_(D * module.weight.norm() / D.norm() / 20)
    return model


def bert() -> torch.nn.Module:
    "MiniLM's body without the pooler: 36 linear maps."
    model = load_model("minilm")
    model.pooler = None
    return model


@dataclass
class Case:
    """What is timed, the model whose size is the unit, what is counted (a short run with the same
    peak), and what of it is the caller's own loss.
    """

    run: Callable
    model: torch.nn.Module
    short: Callable | None = None
    loss: Callable | None = None


def pairs(use: Callable) -> Case:
    "A use of MiniLM's 36 pairs of weights, from two models."
    base, tuned = bert(), moved(bert())
    return Case(lambda: len(use(weight_pairs(base, tuned))), base)


def digits(method: str | None) -> tuple[torch.nn.Module, Callable]:
    "The digits ViT, plain or adapted, and its loss on 64 images."
    model, judged = load_model("digits_vit", n_classes=10), load_data("digits").train.first(64)
    if method is not None:
        lb.adapt(model, method, ["attn.qkv[q,v]"], r=4, head="head")
    return model.eval(), lambda m: evaluate(m, judged)["loss"]


def grid_case(model: torch.nn.Module, loss: Callable, plane: Callable, side: int) -> Case:
    "A square grid of `side` points a side on plane(), the directions included."

    def run(side: int) -> int:
        ticks = np.linspace(-1, 1, side)
        return int(loss_surface(model, loss, plane(), ticks, ticks).done.sum())

    return Case(lambda: run(side), model, lambda: run(2), lambda: loss(model))


def random_plane(method: str | None, side: int, hold: float = 0) -> Case:
    "A grid of the digits ViT on a random plane, of whose directions a share is held."
    model, loss = digits(method)
    return grid_case(
        model, loss, lambda: random_directions(moved_weights(model, copy=False), hold=hold), side
    )


def path_plane() -> Case:
    "A grid of the digits ViT on the plane of a path of 17 snapshots, which the caller holds."
    model, loss = digits(None)
    points = [
        {
            name: w + 0.01 * (16 - t) * torch.randn(w.shape, generator=generator(t, name))
            for name, w in moved_weights(model).items()
        }
        for t in range(17)
    ]
    return grid_case(model, loss, lambda: pca_directions(points), 21)


def text_plane() -> Case:
    "A grid of MiniLM, all its 22.7 million numbers moved."
    model, judged = load_model("minilm", n_classes=7), load_data("docstrings/source").test.first(16)
    return grid_case(
        model,
        lambda m: evaluate(m, judged)["loss"],
        lambda: random_directions(moved_weights(model, copy=False)),
        3,
    )


def sharpness() -> Case:
    "Sharpness of the digits ViT along 10 random directions."
    model, loss = digits(None)
    return Case(
        lambda: len(random_sharpness(model, loss, 0.2)["rises"]), model, None, lambda: loss(model)
    )


CASES = {
    "intruders": lambda: pairs(intruder_counts),
    "spectra": lambda: pairs(spectra_of),
    "plane": lambda: random_plane(None, 21),
    "held plane": lambda: random_plane(None, 21, hold=0.45),
    "adapted plane": lambda: random_plane("lora", 21),
    "path": path_plane,
    "fine plane": lambda: random_plane(None, 51),
    "text plane": text_plane,
    "sharpness": sharpness,
}


def alive(run: Callable) -> int:
    "The peak of `Alive` while run() runs."
    with Alive() as counted:
        run()
    return counted.peak


def measured(name: str, threads: int) -> dict:
    """One case: what it counted, seconds, and memory in copies of the model beyond what the caller
    holds and one evaluation of its loss needs; the growth of resident memory includes that
    evaluation, and is 0 where making the model took more.
    """
    torch.set_num_threads(threads)
    case = CASES[name]()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    busy, count = time.process_time(), case.run()
    spent, busy, grown = (
        time.perf_counter() - start,
        time.process_time() - busy,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    )
    peak, size = (
        alive(case.short or case.run) - (alive(case.loss) if case.loss else 0),
        size_of(case.model),
    )
    return {
        "case": name,
        "count": count,
        "threads": threads,
        "seconds": round(spent, 2),
        "cpu_seconds": round(busy, 2),
        "model_mb": round(size / 1e6, 2),
        "copies": round(peak / size, 2),
        "rss_mb": round(grown * 1024 / 1e6, 1),
        "goals": GOALS.get(name),
    }


def apart(name: str, threads: int) -> dict:
    "One case in a process of its own."
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.analysis", "--case", name, "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    "Run what the command line asks for, print it, and write it as JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(args.case, args.threads)))
        return
    rows = []
    for name in args.cases.split(","):
        rows.append(apart(name, args.threads))
        print(
            "  ".join(f"{key}={value}" for key, value in rows[-1].items() if value is not None),
            flush=True,
        )
    if args.out:
        setting = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": args.threads,
            "processor": processor(),
        }
        args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
