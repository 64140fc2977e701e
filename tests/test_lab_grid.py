"""A grid of runs: made once, read under its own name, and no failure costs another run."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadValue
from lora_book.experiments.comparison import ABLATION_RESULTS, TEN_RESULTS
from lora_book.experiments.loldu_tables import TABLE_RESULTS
from lora_book.lab.grid import PROBLEMS, Grid, OneFile, best_of
from lora_book.past.first_results import FIRST_RESULTS, first_plan
from lora_book.present.double_descent import SWEEP_RESULTS, WAYS_RESULTS

STORED = {
    "first": FIRST_RESULTS,
    "ten": TEN_RESULTS,
    "sweep": SWEEP_RESULTS,
    "ways": WAYS_RESULTS,
    "ablations": ABLATION_RESULTS,
    "tables": TABLE_RESULTS,
}
PLAN = [{"x": x} for x in range(5)]


def name(run) -> str:
    return f"run-{run['x']}"


@pytest.fixture(params=["folder", "file"])
def grid(request, tmp_path):
    if request.param == "file":
        return OneFile(tmp_path / "runs.json", name, about={"versions": {"torch": "1"}})
    return Grid(tmp_path, name, "run-")


def square(x):
    return {"x": x, "square": x * x}


@pytest.mark.parametrize("own", STORED)
def test_every_stored_grid_is_read(own):
    found = STORED[own].stored()
    names = [STORED[own].name(one) for one in found]
    assert found and len(set(names)) == len(names)


def test_the_first_results_are_the_planned_ones():
    found = sorted(map(FIRST_RESULTS.name, FIRST_RESULTS.stored()))
    assert found == sorted(map(FIRST_RESULTS.name, first_plan()))


@pytest.mark.parametrize("own", ["first", "ten", "sweep", "ways"])
def test_a_copied_result_is_refused_with_its_name(own, tmp_path):
    results = replace(STORED[own], place=tmp_path)
    one, other = sorted(STORED[own].place.glob(f"{results.prefix}*.json"))[:2]
    (tmp_path / one.name).write_bytes(one.read_bytes())
    assert len(results.stored()) == 1
    (tmp_path / other.name).write_bytes(one.read_bytes())
    with pytest.raises(BadValue, match=other.name):
        results.stored()


def test_what_is_stored_is_not_run_again(grid):
    assert grid.fill(PLAN[:2], square) == 2
    seen = []
    assert grid.fill(PLAN, lambda x: seen.append(x) or square(x)) == 3
    assert seen == [2, 3, 4] and grid.fill(PLAN, square) == 0
    assert sorted(one["square"] for one in grid.stored()) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize(
    "error", [BadValue, RuntimeError, FloatingPointError, OSError, MemoryError]
)
def test_a_run_that_fails_loses_no_other(grid, error):
    def run(x):
        if x in (1, 3):
            raise error(f"no {x} today")
        return square(x)

    with pytest.raises(BadValue, match=r"2 of 5 runs failed, 3 were stored(.|\n)*run-1: no 1"):
        grid.fill(PLAN, run)
    assert [one["x"] for one in grid.stored()] == [0, 2, 4]
    assert grid.fill(PLAN, square) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, NameError])
def test_a_stop_or_a_mistake_ends_at_once_and_keeps_what_is_made(grid, error):
    def run(x):
        if x == 2:
            raise error
        return square(x)

    with pytest.raises(error):
        grid.fill(PLAN, run)
    assert [one["x"] for one in grid.stored()] == [0, 1]


def test_no_run_begins_after_the_time(grid):
    assert grid.fill(PLAN, square, seconds=0) == 0 and grid.stored() == []


@pytest.mark.parametrize("content", ['{"x": 1', "[]", '{"y": 1}', "3", "null"])
def test_a_file_that_is_no_result_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "run-1.json").write_text(content)
    with pytest.raises(BadValue, match="run-1.json"):
        Grid(tmp_path, name).stored()


def test_one_file_holds_a_run_once_and_keeps_what_stands_beside(tmp_path):
    results = OneFile(tmp_path / "runs.json", name, about={"versions": {"torch": "1"}})
    results.fill(PLAN[:1], square)
    content = json.loads(results.place.read_text())
    assert content["versions"] == {"torch": "1"} and len(content["runs"]) == 1
    results.place.write_text(json.dumps({"runs": content["runs"] * 2}))
    with pytest.raises(BadValue, match="more than once"):
        results.stored()


@pytest.mark.parametrize("content", ['{"x": 1}', "3", "null", '{"runs": [', '{"runs": [1]}'])
def test_one_file_that_holds_no_results_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(BadValue, match="runs.json"):
        OneFile(tmp_path / "runs.json", name).stored()


LOSSES = st.lists(st.floats(allow_infinity=True, allow_nan=True), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(LOSSES)
def test_the_chosen_rate_has_the_smallest_finite_loss(losses):
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        with pytest.raises(BadValue, match="finite"):
            best_of(range(len(losses)), losses.__getitem__)
        return
    assert losses[best_of(range(len(losses)), losses.__getitem__)] == min(finite)


def test_a_problem_is_cut_to_size_and_its_classifier_follows_the_seed():
    digits = PROBLEMS["digits"]
    data = digits.sized(20, 7, 5)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 5, 7]
    one, again, other = (digits.fresh(seed).head.weight for seed in (0, 0, 1))
    assert one.equal(again) and not one.equal(other)
