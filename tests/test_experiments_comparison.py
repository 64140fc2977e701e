"""Ten methods side by side: the stored runs are the planned ones, numbers are the closed forms, and
grids that were cut off go on.
"""

import json
import math

import pytest
from test_laws import COUNTS

from lora_book.core.errors import BadValue
from lora_book.experiments import comparison
from lora_book.experiments.comparison import (
    ABLATIONS,
    BOTH_FACTORS,
    CHAINS,
    RATES,
    SMALL_RANKS,
    TASKS,
    TEN,
    ablation_plan,
    ablation_run,
    data_folder,
    file_name,
    ranks,
    relative,
    run,
    run_ablations,
    run_all,
    stored,
)

WIDTH, SITES = {"digits": 64, "source": 384}, {"digits": 8, "source": 12}
TINY = {"examples": 16, "epochs": 1, "judged": 8}


def test_every_row_has_three_seeds_of_one_configuration():
    found = {}
    for one in stored():
        found.setdefault((one["task"], one["method"], one["r"]), []).append(one)
    assert set(found) == {(task, m, r) for task in TASKS for m in TEN for r in ranks(m).values()}
    for (_, method, _), runs in found.items():
        assert sorted(one["seed"] for one in runs) == [0, 1, 2]
        assert (
            len({(one["lr"], one["examples"], one["epochs"], one["data_hash"]) for one in runs})
            == 1
        )
        assert runs[0]["lr"] in RATES[method]


def test_what_the_stored_runs_trained_is_the_closed_form():
    for one in stored():
        own = COUNTS[one["method"]](WIDTH[one["task"]], WIDTH[one["task"]], one["r"])
        assert one["trained"] == SITES[one["task"]] * own


def test_equal_numbers_are_equal():
    for width in WIDTH.values():
        counts = {COUNTS[m](width, width, ranks(m)["equal numbers"]) for m in TEN if m != "full"}
        assert len(counts) == 1
    assert {m for m in TEN if len(set(ranks(m).values())) == 1} == {"full", *BOTH_FACTORS} and set(
        CHAINS
    ) < set(TEN)


def test_a_run_is_the_same_again_and_another_seed_is_another():
    first, again, other = (run("digits", "c3la", 4, seed, 1e-2, **TINY) for seed in (0, 0, 1))
    for one in (first, again, other):
        one.pop("seconds")
        [epoch.pop("seconds") for epoch in one["history"]]
    assert (
        first == again
        and first["history"] != other["history"]
        and first["data_hash"] == other["data_hash"]
    )


def test_a_grid_that_was_cut_off_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    made = []

    def fake(task, method, r, seed, lr, **sizes):
        made.append((task, method, r, seed, lr))
        if len(made) == 4:
            raise KeyboardInterrupt
        return {"history": [{"validation": {"loss": lr}}]}

    monkeypatch.setattr(comparison, "run", fake)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, ["digits"], ["cla"])
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {file_name("digits", "cla", 8, 0)}
    assert (
        run_all(tmp_path, ["digits"], ["cla"]) == 5 and run_all(tmp_path, ["digits"], ["cla"]) == 0
    )
    assert len(list(tmp_path.iterdir())) == 6 and {
        lr for *_, seed, lr in made if seed != comparison.SELECTION_SEED
    } == {min(RATES["cla"])}


def test_the_stored_ablations_are_the_planned_ones():
    runs = json.loads((data_folder() / "comparison_ablations.json").read_text())
    plan = ablation_plan()
    assert [{k: one[k] for k in ("axis", "value", "r", "seed")} for one in runs] == plan
    assert len(plan) == len(SMALL_RANKS) * 3 * sum(len(values) for _, values in ABLATIONS.values())
    assert all(0 <= one["accuracy"] <= 1 and math.isfinite(one["test_loss"]) for one in runs)


def test_ablations_go_on_where_they_stopped(tmp_path, monkeypatch):
    made = []

    def fake(axis, value, r, seed):
        made.append((axis, value, r, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"axis": axis, "value": value, "r": r, "seed": seed}

    monkeypatch.setattr(comparison, "ablation_run", fake)
    with pytest.raises(KeyboardInterrupt):
        run_ablations(tmp_path / "a.json")
    assert run_ablations(tmp_path / "a.json") == len(ablation_plan()) - 2
    assert run_ablations(tmp_path / "a.json") == 0 and len(made) == len(ablation_plan()) + 1


@pytest.mark.parametrize("axis", ABLATIONS)
def test_each_axis_reaches_its_run(axis, monkeypatch):
    seen = {}

    def fake(task, method, r, seed, **options):
        seen.update(options, method=method, r=r, seed=seed)
        return {part: {"accuracy": 0.5, "loss": 1.0} for part in ("train", "test")}

    monkeypatch.setattr(comparison, "run", fake)
    method, values = ABLATIONS[axis]
    ablation_run(axis, values[-1], 2, 1)
    assert seen[axis] == values[-1] and (seen["method"], seen["r"], seen["seed"]) == (method, 2, 1)


def test_stored_times_are_quartiles_over_loras():
    times = json.loads((data_folder() / "comparison_times.json").read_text())
    assert set(times) == set(TASKS) and all(set(own) == set(TEN) for own in times.values())
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


def test_a_copied_result_is_refused_with_its_name(tmp_path):
    place = data_folder() / "comparison"
    content = (place / file_name("digits", "cla", 8, 0)).read_text()
    (tmp_path / file_name("digits", "cla", 8, 0)).write_text(content)
    assert len(stored(tmp_path)) == 1
    wrong = tmp_path / file_name("digits", "cla", 8, 1)
    wrong.write_text(content)
    with pytest.raises(BadValue, match=wrong.name):
        stored(tmp_path)
