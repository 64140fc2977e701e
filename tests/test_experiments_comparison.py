"""Ten methods side by side: the stored runs are the planned ones, numbers are the closed forms, and
grids that were cut off go on.
"""

import json
import math
from dataclasses import replace

import pytest
from test_laws import COUNTS

from lora_book.experiments import comparison
from lora_book.experiments.comparison import (
    ABLATION_RESULTS,
    ABLATIONS,
    BOTH_FACTORS,
    CHAINS,
    SMALL_RANKS,
    TEN,
    TEN_RATES,
    TEN_RESULTS,
    TEN_TASKS,
    ablation_plan,
    ablation_run,
    relative,
    ten_plan,
    ten_ranks,
    ten_rated,
    ten_run,
)
from lora_book.lab.grid import DATA, SELECTION_SEED

WIDTH, SITES = {"digits": 64, "source": 384}, {"digits": 8, "source": 12}
TINY = {"examples": 16, "epochs": 1, "judged": 8}


def test_every_row_has_three_seeds_of_one_configuration():
    found = {}
    for one in TEN_RESULTS.stored():
        found.setdefault((one["task"], one["method"], one["r"]), []).append(one)
    assert set(found) == {
        (task, m, r) for task in TEN_TASKS for m in TEN for r in ten_ranks(m).values()
    }
    for (_, method, _), runs in found.items():
        assert sorted(one["seed"] for one in runs) == [0, 1, 2]
        assert (
            len({(one["lr"], one["examples"], one["epochs"], one["data_hash"]) for one in runs})
            == 1
        )
        assert runs[0]["lr"] in TEN_RATES[method]


def test_what_the_stored_runs_trained_is_the_closed_form():
    for one in TEN_RESULTS.stored():
        own = COUNTS[one["method"]](WIDTH[one["task"]], WIDTH[one["task"]], one["r"])
        assert one["trained"] == SITES[one["task"]] * own


def test_equal_numbers_are_equal():
    for width in WIDTH.values():
        counts = {
            COUNTS[m](width, width, ten_ranks(m)["equal numbers"]) for m in TEN if m != "full"
        }
        assert len(counts) == 1
    assert {m for m in TEN if len(set(ten_ranks(m).values())) == 1} == {
        "full",
        *BOTH_FACTORS,
    } and set(CHAINS) < set(TEN)


def test_a_run_is_the_same_again_and_another_seed_is_another():
    first, again, other = (ten_run("digits", "c3la", 4, seed, 1e-2, **TINY) for seed in (0, 0, 1))
    for one in (first, again, other):
        one.pop("seconds")
        [epoch.pop("seconds") for epoch in one["history"]]
    assert (
        first == again
        and first["history"] != other["history"]
        and first["data_hash"] == other["data_hash"]
    )


def test_a_rate_is_chosen_once_for_what_is_missing(tmp_path, monkeypatch):
    made = []

    def fake(task, method, r, seed, lr):
        made.append((task, method, r, seed, lr))
        own = {"task": task, "method": method, "r": r, "seed": seed}
        return own | {"lr": lr, "history": [{"validation": {"loss": lr}}]}

    monkeypatch.setattr(comparison, "ten_run", fake)
    comparison.ten_rate.cache_clear()
    results, planned = replace(TEN_RESULTS, place=tmp_path), ten_plan(["digits"], ["cla"])
    assert results.fill(planned, ten_rated) == 6 and results.fill(planned, ten_rated) == 0
    comparison.ten_rate.cache_clear()
    assert len([one for one in made if one[3] == SELECTION_SEED]) == 2 * len(TEN_RATES["cla"])
    assert {one["lr"] for one in results.stored()} == {min(TEN_RATES["cla"])}


def test_the_stored_ablations_are_the_planned_ones():
    runs = ABLATION_RESULTS.stored()
    plan = ablation_plan()
    assert [{k: one[k] for k in ("axis", "value", "r", "seed")} for one in runs] == plan
    assert len(plan) == len(SMALL_RANKS) * 3 * sum(len(values) for _, values in ABLATIONS.values())
    assert all(0 <= one["accuracy"] <= 1 and math.isfinite(one["test_loss"]) for one in runs)


@pytest.mark.parametrize("axis", ABLATIONS)
def test_each_axis_reaches_its_run(axis, monkeypatch):
    seen = {}

    def fake(task, method, r, seed, **options):
        seen.update(options, method=method, r=r, seed=seed)
        return {part: {"accuracy": 0.5, "loss": 1.0} for part in ("train", "test")}

    monkeypatch.setattr(comparison, "ten_run", fake)
    method, values = ABLATIONS[axis]
    ablation_run(axis, values[-1], 2, 1)
    assert seen[axis] == values[-1] and (seen["method"], seen["r"], seen["seed"]) == (method, 2, 1)


def test_stored_times_are_quartiles_over_loras():
    times = json.loads((DATA / "comparison_times.json").read_text())
    assert set(times) == set(TEN_TASKS) and all(set(own) == set(TEN) for own in times.values())
    assert all(
        low <= middle <= high and middle > 0
        for own in times.values()
        for low, middle, high in own.values()
    )
    assert all(own["lora"] == [1.0, 1.0, 1.0] for own in times.values())


def test_relative_times_compare_within_a_round():
    times = {m: [1.0, 2.0, 4.0, 8.0] for m in TEN} | {"full": [2.0, 4.0, 8.0, 16.0]}
    found = relative(times)
    assert found["full"] == [2.0, 2.0, 2.0] and found["cla"] == [1.0, 1.0, 1.0]
