"""LoLDU's ablations: the stored runs are the planned ones, once each, and a grid that was cut off
goes on where it stopped.
"""

import math

import pytest

import lora_book as lb
from lora_book.experiments import loldu_tables
from lora_book.experiments.loldu_tables import (
    INITS,
    TABLE_RANKS,
    TABLE_RESULTS,
    TABLE_SIZES,
    table_name,
    table_plan,
    table_run,
)


def plan(run):
    return {k: run[k] for k in ("task", "method", "seed", "lr")} | run["options"]


def test_the_stored_runs_are_the_planned_ones():
    planned = [one for task in TABLE_SIZES for one in table_plan(task)]
    runs = [plan(run) for run in TABLE_RESULTS.stored()]
    assert len(runs) == len(planned) and all(one in runs for one in planned)
    assert all(
        0 <= run["accuracy"] <= 1 and math.isfinite(run["train_loss"])
        for run in TABLE_RESULTS.stored()
    )
    own = [run for run in TABLE_RESULTS.stored() if run["method"] == "loldu"]
    assert all(
        run["trained"] % (run["options"]["r"] + run["options"]["train_scale"]) == 0 for run in own
    )


@pytest.mark.parametrize("task", TABLE_SIZES)
def test_a_plan_has_each_ablation_with_three_seeds_and_no_repetition(task):
    planned = table_plan(task)
    assert all(planned.count(one) == 1 for one in planned)
    for init in INITS:
        seeds = [
            one["seed"]
            for one in planned
            if one.get("init") == init and one.get("train_scale") and one["lr"] == loldu_tables.LR
        ]
        assert set(seeds) >= {0, 1, 2}
    assert {one["r"] for one in planned if one["method"] == "loldu"} == set(TABLE_RANKS[task])


def test_settings_and_result_have_one_name_and_no_two_settings_share_it():
    planned = [one for task in TABLE_SIZES for one in table_plan(task)]
    names = [table_name(one) for one in planned]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(table_name(run) for run in TABLE_RESULTS.stored())


def test_an_unknown_task_is_refused():
    with pytest.raises(lb.LoraBookError, match="digits"):
        table_run("digit", "loldu", 0)
