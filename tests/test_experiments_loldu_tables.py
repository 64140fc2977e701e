"""LoLDU's ablations: the stored runs are the planned ones, once each, and a grid that was cut off
goes on where it stopped.
"""

import json
import math

import pytest

import lora_book as lb
from lora_book.experiments import loldu_tables
from lora_book.experiments.loldu_tables import (
    INITS,
    RANKS,
    SIZES,
    run_all,
    settings_of,
    stored,
    trial,
)


def plan(run):
    return {k: run[k] for k in ("task", "method", "seed", "lr")} | run["options"]


def test_the_stored_runs_are_the_planned_ones():
    planned = [one for task in SIZES for one in settings_of(task)]
    runs = [plan(run) for run in stored()["runs"]]
    assert len(runs) == len(planned) and all(one in runs for one in planned)
    assert all(
        0 <= run["accuracy"] <= 1 and math.isfinite(run["train_loss"]) for run in stored()["runs"]
    )
    own = [run for run in stored()["runs"] if run["method"] == "loldu"]
    assert all(
        run["trained"] % (run["options"]["r"] + run["options"]["train_scale"]) == 0 for run in own
    )


@pytest.mark.parametrize("task", SIZES)
def test_a_plan_has_each_ablation_with_three_seeds_and_no_repetition(task):
    planned = settings_of(task)
    assert all(planned.count(one) == 1 for one in planned)
    for init in INITS:
        seeds = [
            one["seed"]
            for one in planned
            if one.get("init") == init and one.get("train_scale") and one["lr"] == loldu_tables.LR
        ]
        assert set(seeds) >= {0, 1, 2}
    assert {one["r"] for one in planned if one["method"] == "loldu"} == set(RANKS[task])


def test_a_grid_that_was_cut_off_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    made = []

    def fake(task, method, seed, lr, **options):
        made.append((task, method, seed, lr, tuple(sorted(options.items()))))
        if len(made) == 5:
            raise KeyboardInterrupt
        return {"task": task, "method": method, "seed": seed, "lr": lr, "options": options}

    monkeypatch.setattr(loldu_tables, "trial", fake)
    path = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        run_all(path, ("source",))
    assert len(json.loads(path.read_text())["runs"]) == 4
    assert run_all(path, ("source",), seconds=0) == len(settings_of("source")) - 4
    assert run_all(path, ("source",)) == 0
    assert len(made) == len(settings_of("source")) + 1 and len(set(made)) == len(made) - 1


def test_an_unknown_task_is_refused():
    with pytest.raises(lb.LoraBookError, match="digits"):
        trial("digit", "loldu", 0)
