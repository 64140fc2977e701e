"""The report: a paper's column holds the paper's numbers alone, missing shows as missing, spread
and verdicts follow their rule.
"""

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_book.core.errors import BadValue, UnknownName
from lora_book.experiments import report
from lora_book.experiments.report import (
    PROFILES,
    Measured,
    address,
    aligned,
    judged_rows,
    margin,
    measured,
    oriented,
    pooled,
    row_lines,
    rows_of,
    shown,
    summed,
    table_lines,
    tau,
    verdict,
)
from lora_book.experiments.rows import printed, row, rows, whole, whole_hash
from lora_book.experiments.rows import settings as settings_of
from lora_book.experiments.runner import BOOK, finished, job, results
from lora_book.experiments.tasks import WRITTEN
from lora_book.theory.tables import Cell

ROW = "vit_tiny/cifar10"
SENTINEL = 0.123456


def result(method="lora", seed=0, value=0.5, row_id=ROW, profile="laptop", metric=None, **more):
    metric = metric or row(row_id).metric
    return {
        "row": row_id,
        "method": method,
        "seed": seed,
        "profile": profile,
        "metric": metric,
        "settings": {"judged": 250},
        "data_hash": "h",
        "test": {"loss": 1.0, metric: value},
        "stand_ins": {"vit_tiny_patch16_224": "digits_vit", "cifar10": "digits"},
    } | more


def group(values, method="lora", metric="accuracy", judged=250):
    return Measured(ROW, method, "laptop", metric, tuple(values), judged, {})


def paper_column(lines):
    """{(row's id, paper's name): text of the paper's column} of a printed table, cut at the
    column's place.
    """
    found, at = {}, None
    for line in lines:
        if match := re.match(r"\S.*\) (\S+)$", line):
            row_id = match[1]
        elif line.startswith("  method"):
            at = (
                line.index("in the paper"),
                line.index("paper", line.index("in the paper") + 8),
                line.index("paper", line.index("in the paper") + 8) + 16,
            )
        elif line.startswith("  ") and at:
            found[row_id, line[at[0] : at[1]].strip()] = line[at[1] : at[2]].strip()
    return found


@pytest.mark.parametrize("number", ["2", "P4:I", "IV", "III", "VI"])
def test_the_papers_column_is_the_same_whatever_was_measured(number):
    ids = [one.id for one in rows_of(address(number))]
    every = [
        result(m, s, SENTINEL, i, p)
        for i in ids
        for m in row(i).methods
        for s in range(3)
        for p in ("laptop", "gpu")
    ]
    before, after = (
        paper_column(table_lines(number, found=[])),
        paper_column(table_lines(number, found=every)),
    )
    assert before == after and before
    for row_id in ids:
        for method in row(row_id).methods:
            cell = printed(row(row_id), method)
            text = before[row_id, row(row_id).columns[method]]
            assert (
                text.startswith("missing")
                if cell.value is None
                else text.startswith((cell.printed or f"{cell.value:g}")[:15])
            )


def test_a_measured_number_in_the_papers_column_would_be_seen(monkeypatch):
    clean = paper_column(table_lines("2", found=[]))
    monkeypatch.setattr(report, "printed", lambda one, method: Cell("", "", SENTINEL, "", "", ""))
    assert paper_column(table_lines("2", found=[])) != clean


def test_nothing_measured_shows_as_missing_and_a_run_in_its_own_column():
    assert all(
        "missing" in line
        for line in table_lines("2", found=[])
        if re.match(r"  [a-z]\w+ ", line) and "method  " not in line
    )
    lines = table_lines(
        "2", found=[result("c3la", s, v) for s, v in ((0, 0.5), (1, 0.6), (2, 0.7))]
    )
    own = [line for line in lines if "60.00 ± 10.00 (3 seeds)" in line]
    assert len(own) == 1 and own[0].split()[0] == "c3la" and "95.23" in own[0]
    assert any("laptop, digits_vit on digits" in line for line in lines)


def test_a_single_run_has_no_spread_and_says_so():
    lines = table_lines("2", found=[result("c3la", 0, 0.5)])
    assert any("50.00 no spread (1 seed)" in line for line in lines)


def test_profiles_have_columns_of_their_own():
    found = [
        result("lora", s, v, profile=p)
        for p, v in (("laptop", 0.5), ("smoke", 0.25))
        for s in range(2)
    ]
    line = next(x for x in table_lines("2", found=found) if "50.00" in x)
    assert line.index("50.00") < line.index("25.00")
    assert not any("25.00" in x for x in table_lines("2", "laptop", found=found))


def test_marks_of_the_ledger_are_shown():
    lines = table_lines("2", found=[])
    assert any(re.search(r"c3LA +80\.22 \[D2\]", line) for line in lines)
    assert (
        shown(Cell("r", "c", None, "87.", "", "last digit lost")) == "missing"
        and shown(Cell("r", "c", 18400.0, "0.0184M", "E21", "")) == "0.0184M [E21]"
    )


def test_ablations_show_measured_points_and_count_the_others():
    point = next(
        i for i in rows(ablations=True) if i.startswith("ablation/lr/vit_tiny/cifar10/r8/")
    )
    lines = table_lines("7", found=[result("lora", s, 0.5, point) for s in range(2)])
    assert f"1 of {len(rows_of(address('7')))} points measured" in lines and any(
        "50.00 ± 0.00" in line for line in lines
    )


def test_perplexity_is_no_share():
    lines = table_lines(
        "2", found=[result("lora", s, v, "gpt2_small/e2e") for s, v in ((0, 3.0), (1, 4.0))]
    )
    assert any("3.50 ± 0.71 (2 seeds)" in line for line in lines)


@pytest.mark.parametrize("number", ["2", "IV", "P4:IV", "p4:iv", "P2:6"])
def test_addresses_name_a_table(number):
    assert address(number).number in ("2", "IV", "6")


def test_tables_without_rows_and_unknown_tables_are_refused():
    with pytest.raises(BadValue, match=r"no row runs table 12 of P2; .*P2:2"):
        table_lines("12")
    with pytest.raises(UnknownName, match="no table 'P4 XIV'"):
        table_lines("XIV")


def test_runs_of_other_settings_or_data_are_never_averaged():
    for other in ({"settings": {"judged": 100}}, {"data_hash": "other"}):
        with pytest.raises(BadValue, match="can't be averaged"):
            summed([result(seed=0), result(seed=1) | other])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.randoms())
def test_a_sum_doesnt_depend_on_the_order_of_the_runs(values, rng):
    runs = [result(seed=s, value=v) for s, v in enumerate(values)]
    one = summed(runs)
    rng.shuffle(runs)
    assert summed(runs) == one and one.values == tuple(100 * v for v in values)
    assert (
        one.spread is None
        if len(values) == 1
        else math.isclose(one.spread, statistics.stdev(one.values))
    )


shares = st.lists(st.integers(0, 1000).map(lambda n: n / 10), min_size=2, max_size=5)


@settings(max_examples=100, deadline=None)
@given(shares, shares)
def test_the_rule_is_students_test_above_one_row_of_the_test_set(a, b):
    one, other = group(a), group(b)
    away = abs(one.mean - other.mean)
    assume(pooled(one, other) > 1e-9)
    p = stats.ttest_ind(a, b).pvalue
    assume(abs(p - 0.05) > 1e-6)
    assert (verdict(one, other) != "none") == (p < 0.05 and away > 100 / 250)


@settings(max_examples=50, deadline=None)
@given(shares, shares)
def test_a_verdict_turns_round_with_its_sides(a, b):
    turned = {"better": "worse", "worse": "better", "none": "none"}
    assert verdict(group(a), group(b)) == turned[verdict(group(b), group(a))]
    assert verdict(group(a), group(a)) == "none"


def test_lower_is_better_for_a_perplexity():
    good, bad = (
        group((2.0, 2.01, 2.02), metric="perplexity"),
        group((3.0, 3.01, 3.02), metric="perplexity"),
    )
    assert (
        verdict(good, bad) == "better"
        and verdict(group((20, 21, 22)), group((60, 61, 62))) == "worse"
    )


def test_equal_runs_need_more_than_one_test_row():
    assert (
        verdict(group((50.0, 50.0)), group((50.4, 50.4))) == "none"
        and verdict(group((50.0, 50.0)), group((50.9, 50.9))) == "worse"
    )


def test_a_single_seed_tells_no_difference():
    with pytest.raises(BadValue, match="single seed"):
        margin(group((1.0,)), group((2.0, 3.0)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=10, unique=True), st.randoms())
def test_tau_is_one_with_itself_minus_one_reversed_and_blind_to_order(values, rng):
    one = dict(zip("abcdefghij", values))
    other = dict(rng.sample(sorted(one.items()), len(one)))
    assert tau(one, other)[0] == pytest.approx(1) and tau(one, oriented(other, False))[
        0
    ] == pytest.approx(-1)
    assert tau(one, other)[2] == len(one) and tau(dict(list(one.items())[:2]), one) is None


def test_the_books_own_results_are_told_by_their_profile():
    for (row_id, method, profile), one in measured().items():
        assert (
            profile in PROFILES
            and row(row_id)
            and method
            and (profile == "gpu") == (not one.stand_ins)
        )


def test_the_results_of_whole_stand_ins_were_made_with_the_settings_of_the_registry():
    made = [found for found in results(BOOK) if found["profile"] == "workstation"]
    jobs = [job(found["row"], found["method"], "workstation", found["seed"]) for found in made]
    for found, own in zip(made, jobs, strict=True):
        assert (
            finished(BOOK / f"{own.name}.json", own) == found
            and found["stand_ins"] == own.stand_ins
        )
    other = job(jobs[0].row.id, jobs[0].method, "workstation", jobs[0].seed, lr=1.0)
    with pytest.raises(BadValue, match="other settings .*lr"):
        finished(BOOK / f"{other.name}.json", other)


def test_a_row_of_whole_stand_ins_has_every_method_with_every_seed():
    made = {}
    for found in results(BOOK):
        if found["profile"] == "workstation":
            made.setdefault((found["row"], found["method"]), []).append(found["seed"])
    wanted = {
        (row_id, method): list(settings_of(row_id, method, "workstation")["seeds"])
        for row_id, _ in made
        for method in row(row_id).methods
    }
    assert made and {key: sorted(seeds) for key, seeds in made.items()} == wanted


def test_a_measurement_on_all_test_rows_knows_how_many_they_were():
    for (*_, profile), one in measured(results(BOOK)).items():
        if profile == "workstation":
            assert (
                one.judged == whole(settings_of(one.row, one.method, profile)["data"])["test"] > 0
            )
            assert all(
                abs(value * one.judged / 100 - round(value * one.judged / 100)) < 1e-6
                for value in one.values
                if one.metric == "accuracy"
            )
    known = {"settings": {"judged": 0, "data": "kinship/facts"}}
    assert (
        judged_rows(known | {"metric": "accuracy"})
        == whole("kinship/facts")["test"]
        > judged_rows(known | {"metric": "exact_match"})
        == WRITTEN
    )
    assert judged_rows({"settings": {"judged": 0, "data": "glue/mrpc"}, "metric": "accuracy"}) == 0


words = st.text("abc é±", min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(words, words, words), min_size=1, max_size=6),
    st.tuples(*[st.integers(0, 40)] * 3),
)
def test_aligned_columns_begin_at_one_place_and_lose_no_cell(lines, least):
    text = aligned(list(map(list, lines)), list(least))
    starts = [
        2 + sum(max(low, *(len(line[k]) + 2 for line in lines)) for k, low in enumerate(least[:at]))
        for at in range(3)
    ]
    for line, cells in zip(text, lines, strict=True):
        assert all(line[start:].startswith(cell) for start, cell in zip(starts, cells))


def test_the_books_own_results_were_made_with_the_rows_present_settings():
    for made in results(BOOK):
        wanted = json.loads(json.dumps(settings_of(made["row"], made["method"], made["profile"])))
        wanted.pop("seeds")
        assert {key: made["settings"][key] for key in wanted} == wanted, (
            made["row"],
            made["method"],
        )


def test_lines_of_a_row_are_plain_text():
    lines = row_lines(address("2"), row(ROW), measured([result()]), ["laptop"])
    assert all(line == line.rstrip() and json.dumps(line) for line in lines)


def test_a_profile_that_there_is_not_is_refused_and_one_without_results_is_missing(monkeypatch):
    monkeypatch.delenv("LORA_BOOK_PROFILE", raising=False)
    with pytest.raises(UnknownName, match="laptop"):
        table_lines("2", "laptob")
    assert any(line.rstrip().endswith("missing") for line in table_lines("2", "smoke", found=[]))


def test_a_table_of_which_only_the_beginning_is_read_ends_without_a_traceback():
    command = (
        f'{sys.executable} -c \'from lora_book.cli import main; raise SystemExit(main(["table",'
        ' "2"]))\' | head -1'
    )
    done = subprocess.run(
        command,
        shell=True,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith("Table 2 of P2") and not done.stderr


# Metrics and rows that the tables don't know or can't run


@pytest.mark.parametrize("test", [{"loss": 1.0, "bleu": 0.25}, {"loss": 1.0}])
@pytest.mark.parametrize("row_id", [ROW, "p4/llama2_7b/mmlu"])
def test_a_metric_that_is_not_known_is_printed_with_its_name_and_no_scale(test, row_id):
    own = result("lora", 0, row_id=row_id, metric="bleu") | {"test": test}
    (line,) = [
        line
        for line in table_lines("2" if row_id == ROW else "III", found=[own])
        if line.endswith(" bleu")
    ]
    assert ("0.25 no spread" if "bleu" in test else "not measured bleu") in line
    assert all("nan" not in line for line in table_lines("2", found=[own]))


def test_a_measure_that_is_not_the_papers_says_what_it_is():
    own = result("lora", 0, 12.5, "p4/llama2_7b/mmlu", metric="perplexity")
    assert any(line.endswith("(1 seed) perplexity") for line in table_lines("III", found=[own]))
    same = result("lora", 0, 0.5)
    assert not any(line.endswith(" accuracy") for line in table_lines("2", found=[same]))


def test_a_value_that_was_not_measured_is_no_difference():
    lost = group((math.nan, 1.0, 2.0))
    assert verdict(lost, group((50.0, 51.0, 52.0))) == "none" and str(lost) == "not measured"


def test_rows_say_what_they_cannot_do_and_what_is_not_the_papers():
    for number, words in (("III", ["lm-eval"]), ("VI", ["diffusion models", "prior preservation"])):
        lines = table_lines(number, found=[])
        for word in words:
            assert sum(word in line for line in lines) == len(rows_of(address(number)))
    assert not any("can't run" in line for line in table_lines("2", found=[]))


def test_the_count_of_a_whole_stand_in_belongs_to_the_hash_of_its_rows():
    own = {"settings": {"judged": 0, "data": "docstrings/near"}, "metric": "accuracy"}
    of_here = own | {"data_hash": whole_hash("docstrings/near") + "0" * 48}
    assert judged_rows(of_here) == whole("docstrings/near")["test"]
    assert judged_rows(own | {"data_hash": "0" * 64}) == 0
