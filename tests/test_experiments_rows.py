"""The rows of the experiments: every address is printed somewhere, every setting is the paper's
own, every name exists.
"""

import csv
import json
import platform
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadValue, MissingFile, UnknownName
from lora_book.experiments import rows as module
from lora_book.experiments import runner
from lora_book.experiments.report import PROFILES
from lora_book.experiments.rows import (
    Row,
    addresses,
    group,
    is_chain,
    place,
    printed,
    printed_settings,
    row,
    rows,
)
from lora_book.experiments.rows import settings as settings_of
from lora_book.experiments.runner import BOOK
from lora_book.experiments.runner import results as book_results
from lora_book.experiments.tasks import prepare
from lora_book.lab import data as book_data
from lora_book.lab import hub as book_hub
from lora_book.lab import models as book_models
from lora_book.registry import METHODS, methods
from lora_book.theory.tables import table

DATA = files("lora_book") / "data"
RESULTS, POINTS = rows(), rows(ablations=True)
TEN = (
    "full",
    "lora",
    "lora_plus",
    "asymmetric",
    "cola",
    "rac",
    "cla",
    "random_cla",
    "c3la",
    "random_c3la",
)
any_row = st.sampled_from(RESULTS + POINTS)


def cells_of(name: str) -> dict:
    "The text of a table's file, read without the book's own reader."
    lines = csv.DictReader((DATA / name).read_text(encoding="utf-8").splitlines())
    return {(line["row"], line["column"]): line["value"] for line in lines}


def test_every_row_of_the_papers_tables_of_results_is_there():
    printed_rows = set(table("P2", 2).names("row"))
    assert {row(i).paper_row for i in RESULTS if row(i).table == "2"} == printed_rows
    assert all(row(i).methods == TEN for i in RESULTS if row(i).table == "2")
    for number in ("I", "III", "IV", "VI"):
        wanted = set(table("P4", number).names("column")) - {"parameters", "average", "model"}
        assert {
            row(i).paper_row for i in RESULTS if (row(i).paper, row(i).table) == ("P4", number)
        } == wanted


@pytest.mark.parametrize("number", [6, 7, 8, 9, 10, 11])
def test_every_cell_of_an_ablation_table_is_a_point_once(number):
    found = [
        (column, row(i).paper_row)
        for i in POINTS
        if (row(i).paper, row(i).table) == ("P2", str(number))
        for column in row(i).columns.values()
    ]
    t = table("P2", number)
    assert sorted(found) == sorted((r, c) for r in t.names("row") for c in t.names("column"))


@settings(max_examples=60, deadline=None)
@given(any_row)
def test_a_row_stands_in_a_printed_table_and_its_methods_in_the_registry(row_id):
    chosen = row(row_id)
    assert (
        chosen.id == row_id
        and isinstance(chosen, Row)
        and set(chosen.methods) == set(chosen.columns)
        and set(chosen.methods) <= set(methods())
    )
    if chosen.table:
        t = table(chosen.paper, chosen.table)
        assert {chosen.paper_row, *chosen.columns.values()} <= {*t.names("row"), *t.names("column")}
        for method in chosen.methods:
            cell = printed(chosen, method)
            assert {cell.row, cell.column} == {chosen.paper_row, chosen.columns[method]} and (
                cell.value is not None or cell.note
            )
    else:
        assert chosen.paper == "P1" and all(
            printed(chosen, method).value is None for method in chosen.methods
        )


@settings(max_examples=60, deadline=None)
@given(row_id=any_row, data=st.data())
def test_settings_are_complete_and_possible_in_every_profile(row_id, data):
    chosen, profile = row(row_id), data.draw(st.sampled_from(PROFILES))
    method = data.draw(st.sampled_from(chosen.methods))
    if profile != "gpu" and not chosen.stand_in:
        with pytest.raises(BadValue, match="diffusers"):
            settings_of(row_id, method, profile)
        return
    own = settings_of(row_id, method, profile)
    assert tuple(own) == module.ORDER
    assert (
        own["lr"] > 0
        and own["r"] >= 1
        and own["alpha"] > 0
        and own["epochs"] >= 1
        and own["batch_size"] >= 1
        and 0 <= own["warmup"] <= 1
    )
    assert (
        own["scheduler"] in ("linear", "constant", "cosine")
        and own["seeds"]
        and len(set(own["seeds"])) == len(own["seeds"])
    )
    assert (own["reset_every_epochs"] is not None) == is_chain(method)
    assert json.loads(json.dumps(own))["lr"] == own["lr"]


def test_the_settings_of_table_2_are_those_of_table_5():
    cells, column = (
        cells_of("p2_table_05.csv"),
        {
            "full": "FFT",
            "lora": "LoRA",
            "lora_plus": "LoRA",
            "cola": "LoRA",
        },
    )
    for row_id in (i for i in RESULTS if row(i).table == "2"):
        for method in TEN:
            own, at = settings_of(row_id, method, "gpu"), row(row_id).paper_row
            assert own["lr"] == float(cells[at, f"lr {column.get(method, 'Asym')}"])
            assert own["weight_decay"] == float(
                cells[at, "weight decay " + ("FFT" if method == "full" else "LoRA")]
            )
            assert (own["epochs"], own["batch_size"], own["max_length"]) == tuple(
                int(cells[at, name])
                for name in ("epochs", "batch size", "max length or image size")
            )
            assert (
                own["seeds"] == tuple(map(int, cells[at, "seeds"].split()))
                and own["scheduler"] == cells[at, "scheduler"].lower()
            )
            assert own["warmup"] == float(cells.get((at, "warmup ratio")) or 0) and own[
                "warmup_lr"
            ] == float(cells.get((at, "warmup lr")) or 0)
            if method in ("cola", "rac", "c3la", "random_c3la"):
                assert own["reset_every_epochs"] == int(cells[at, "chain reset every epochs"])
            assert (own["r"], own["alpha"]) == (16, 32)


def test_the_settings_of_p4_are_those_of_its_appendix():
    glue, images = cells_of("p4_table_07.csv"), cells_of("p4_table_09.csv")
    for row_id in (i for i in RESULTS if row(i).paper == "P4"):
        own, at = settings_of(row_id, "loldu", "gpu"), row(row_id).paper_row
        if row(row_id).table == "I":
            assert (own["lr"], own["epochs"], own["max_length"]) == (
                float(glue[at, "lr"]),
                int(glue[at, "epochs"]),
                int(glue[at, "max length"]),
            )
        if row(row_id).table == "IV":
            assert (own["lr"], own["r"], own["alpha"]) == tuple(
                float(images[name, "value"]) for name in ("learning rate", "rank", "alpha")
            )
            assert own["seeds"] == (int(images["seed", "value"]),) and own["warmup_steps"] == int(
                images["warmup steps", "value"]
            )


def test_no_number_that_a_table_prints_is_typed_again():
    for row_id in (i for i in RESULTS if row(i).table):
        recipe = row(row_id).recipe
        assert not set(recipe["printed"]) & set(recipe["own"])


@settings(max_examples=40, deadline=None)
@given(row_id=st.sampled_from(POINTS), data=st.data())
def test_a_point_of_an_ablation_varies_what_its_heading_says(row_id, data):
    chosen, method = row(row_id), data.draw(st.sampled_from(row(row_id).methods))
    for profile in ("laptop", "workstation", "gpu"):
        own, base = settings_of(row_id, method, profile), chosen.recipe["both"]
        assert all(own[key] == value for key, value in base.items())
    if chosen.paper == "P2":
        r = int(chosen.columns[method].split(" / ")[-1])
        assert own["r"] == r and own["epochs"] == 30
        assert own["alpha"] == (2 * r if chosen.table not in ("8", "9") else own["alpha"])


@pytest.mark.parametrize(
    ("setting", "label", "r", "wanted"),
    [
        ("lr", "1e-3.5", 16, {"lr": 0.000316228}),
        ("lr", "5e-2", 768, {"lr": 0.05}),
        ("alpha", "r/4", 16, {"alpha": 4}),
        ("alpha", "2r", 8, {"alpha": 16}),
        ("alpha", "r", 8, {"alpha": 8}),
        ("reset_every_epochs", "15", 4, {"reset_every_epochs": 15}),
        ("r", "512", 768, {"r": 512}),
    ],
)
def test_headings_are_read_as_the_papers_mean_them(setting, label, r, wanted):
    assert module._value(setting, label, r) == wanted


def test_lost_cells_of_the_settings_are_left_out():
    chosen = row("tinyllama/clutrr")
    cells = {key: table(*a[:2]).cell(*a[2:]) for key, a in addresses(chosen, "lora").items()}
    lost = {key for key, cell in cells.items() if cell.value is None}
    assert lost == {"warmup_lr", "warmup"} and not lost & set(printed_settings(chosen, "lora"))


@pytest.mark.parametrize(
    "name", sorted({row(i).stand_in["name"] for i in RESULTS if row(i).stand_in})
)
def test_a_stand_in_is_offline_and_has_sizes_and_rates(name):
    files_ = {
        part: json.loads((DATA / "experiments" / f"{part}.json").read_text())
        for part in ("names", "sizes", "rates")
    }
    stand_in = files_["names"]["stand_ins"][name]
    assert stand_in["data"] in book_data.OFFLINE and stand_in["model"] in book_models.MODELS
    assert all(
        name in files_["sizes"]["profiles"][profile]
        for profile in ("smoke", "laptop", "workstation")
    )
    assert files_["sizes"]["whole"][stand_in["data"]]["test"] > 0 and {
        "FFT",
        "LoRA",
        "Asym",
    } <= set(files_["rates"][name])


@pytest.mark.parametrize(
    "name", sorted({row(i).stand_in["name"] for i in RESULTS if row(i).stand_in})
)
def test_a_stand_in_is_whole_on_a_workstation(name):
    for row_id in (i for i in RESULTS if row(i).stand_in.get("name") == name):
        for method in row(row_id).methods:
            whole_, small = (
                settings_of(row_id, method, profile) for profile in ("workstation", "laptop")
            )
            assert (
                whole_["examples"] == whole_["judged"] == 0
                and whole_["dtype"] == "bfloat16"
                and small["examples"] > 0
            )
            assert all(
                whole_[key] == small[key]
                for key in module.ORDER
                if key not in ("lr", "epochs", "batch_size", "examples", "judged", "dtype")
            )


HERE = platform.python_version().rpartition(".")[0]


@pytest.mark.parametrize(
    "name", sorted(json.loads((DATA / "experiments" / "sizes.json").read_text())["whole"])
)
def test_the_rows_of_whole_stand_ins_are_counted(name):
    found, begins = book_data.load_data(name), module.whole_hash(name)
    if HERE != module.whole_python() and not found.hash.startswith(begins):
        pytest.skip(f"the docstrings of Python {HERE} are others than the ones counted")
    assert found.hash.startswith(begins)
    assert module.whole(name) == {split: len(part) for split, part in found.splits.items()}


def test_data_made_of_docstrings_says_that_it_belongs_to_a_version_of_python():
    counted = json.loads((DATA / "experiments" / "sizes.json").read_text())["whole"]
    assert {name for name in counted if module.whole_hash(name)} == {
        name for name in counted if name.startswith("docstrings/")
    }
    assert re.fullmatch(r"3\.\d+", module.whole_python())


def test_data_of_the_hub_is_not_counted():
    assert module.whole("glue/mrpc") == {}


def test_rates_of_whole_stand_ins_are_used_there_alone():
    rates, whole_rates = (
        json.loads((DATA / "experiments" / f"{name}.json").read_text())
        for name in ("rates", "rates_whole")
    )
    assert whole_rates
    for name, groups in whole_rates.items():
        row_id = next(
            i for i in RESULTS if row(i).stand_in.get("name") == name and row(i).table == "2"
        )
        for method in TEN:
            entry, before = groups[group(method)], rates[name][group(method)]["lr"]
            assert (
                settings_of(row_id, method, "workstation")["lr"] == entry["lr"]
                and settings_of(row_id, method, "laptop")["lr"] == before
            )
            assert all(
                max(map(float, losses)) / min(map(float, losses)) <= 10.1
                and len(losses) == 3
                and any(float(lr) == before for lr in losses)
                for losses in entry["losses"].values()
            )


@pytest.mark.parametrize("name", ["rates", "rates_whole"])
def test_a_chosen_rate_is_the_candidate_with_the_smallest_mean_loss(name):
    rates = json.loads((DATA / "experiments" / f"{name}.json").read_text())
    chosen = [
        (own, entry)
        for own, groups in rates.items()
        for entry in groups.values()
        if "losses" in entry
    ]
    assert len(chosen) >= 3
    for own, entry in chosen:
        candidates = list(next(iter(entry["losses"].values())))
        means = {lr: sum(losses[lr] for losses in entry["losses"].values()) for lr in candidates}
        assert (
            len(candidates) > 1
            and entry["seed"] == 100
            and entry["lr"] == float(min(means, key=means.get))
        ), own


def test_a_chosen_radius_is_the_candidate_with_the_smallest_loss_and_the_papers_is_kept_on_gpu():
    radii = json.loads((DATA / "experiments" / "radii.json").read_text())
    assert radii
    for name, methods_ in radii.items():
        row_id = next(
            i for i in RESULTS if row(i).paper == "P1" and row(i).stand_in["name"] == name
        )
        for method, entry in methods_.items():
            paper = settings_of(row_id, method, "gpu")["options"]["rho"]
            assert (
                entry["seed"] == 100 and len(entry["losses"]) > 1 and str(paper) in entry["losses"]
            )
            assert (
                entry["rho"]
                == float(min(entry["losses"], key=entry["losses"].get))
                == settings_of(row_id, method, "laptop")["options"]["rho"]
            )


def test_methods_of_a_row_share_their_rate_by_group():
    assert {group(m) for m in TEN} == {"FFT", "LoRA", "Asym"} and {
        m for m in TEN if group(m) == "Asym"
    } == set(TEN) - {"full", "lora", "lora_plus", "cola"}
    assert {m for m in METHODS if is_chain(m)} == {"cola", "rac", "c3la", "random_c3la"}


@settings(max_examples=30, deadline=None)
@given(any_row)
def test_a_place_is_the_papers_on_gpu_and_the_stand_ins_elsewhere(row_id):
    chosen = row(row_id)
    assert (
        place(chosen, "gpu")["model"] == chosen.model
        and place(chosen, "gpu")["data"] == chosen.data
    )
    for profile in ("smoke", "laptop", "workstation"):
        assert place(chosen, profile).get("model") == chosen.stand_in.get("model")


@pytest.mark.parametrize(
    "wrong", ["vit_tiny/cifar100", "vit-tiny/cifar10", "", "p4/vit_base/cifar10"]
)
def test_an_unknown_row_names_the_nearest(wrong):
    with pytest.raises(UnknownName, match=r"no row .*nearest"):
        row(wrong)


def test_rows_of_multiple_choice_adapt_a_generator_and_nothing_beside_it():
    chosen = [i for i in RESULTS if row(i).kind == "choice"]
    assert chosen == ["tinyllama/openbookqa", "tinyllama/logiqa"]
    for row_id in chosen:
        for profile in PROFILES:
            own = settings_of(row_id, "lora", profile)
            assert (own["kind"], own["head"], own["metric"]) == ("choice", None, "accuracy")
            assert own["model"] == ("tinyllama" if profile == "gpu" else "byte_llama")
            assert own["data"] in (book_hub.HUB_DATA if profile == "gpu" else book_data.OFFLINE)


MEASURED = {
    "accuracy",
    "matthews",
    "pearson",
    "spearman",
    "exact_match",
    "token_accuracy",
    "perplexity",
    "loss",
}


def test_a_row_whose_measure_the_book_does_not_make_says_that_it_cannot_run():
    for row_id in RESULTS + POINTS:
        chosen = row(row_id)
        assert bool(chosen.unfinished) == (chosen.metric not in MEASURED), row_id
        assert set(chosen.notes) <= set(chosen.methods)
        if chosen.stand_in:
            assert place(chosen, "laptop")["metric"] in MEASURED


def test_a_row_that_cannot_run_yet_is_refused_with_the_reason_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(runner, "missing", lambda chosen: [])
    for row_id in (i for i in RESULTS if row(i).unfinished):
        method = row(row_id).methods[-1]
        with pytest.raises(MissingFile, match=re.escape(row(row_id).unfinished)):
            runner.check_ready(runner.job(row_id, method, "gpu"))
        if not row(row_id).stand_in:
            with pytest.raises(BadValue, match=re.escape(row(row_id).unfinished)):
                settings_of(row_id, method, "laptop")
    runner.check_ready(runner.job("vit_tiny/cifar10", "lora", "gpu"))


def test_an_unknown_method_or_profile_is_refused():
    with pytest.raises(UnknownName, match="method"):
        settings_of("vit_tiny/cifar10", "c4la", "laptop")
    with pytest.raises(UnknownName, match="profile"):
        settings_of("vit_tiny/cifar10", "c3la", "laptob")


def test_rows_without_a_stand_in_say_what_they_need():
    for row_id in RESULTS:
        chosen = row(row_id)
        assert chosen.stand_in or (chosen.needs and chosen.extras)
    assert {row(i).extras for i in RESULTS if row(i).kind == "diffusion"} == {("diffusers",)}


def test_a_profile_caps_the_examples(monkeypatch):
    monkeypatch.setenv("LORA_BOOK_EXAMPLES", "7")
    assert settings_of("vit_tiny/cifar10", "lora", "laptop")["examples"] == 7
    monkeypatch.setenv("LORA_BOOK_EXAMPLES", "0")
    assert settings_of("vit_tiny/cifar10", "lora", "laptop")["examples"] > 7


def test_data_files_hold_no_path_and_no_host():
    for path in (DATA / "experiments").iterdir():
        assert not re.search(
            r"(/home|/root|/work|/tmp|https?://)", path.read_text(encoding="utf-8")
        )


@pytest.mark.parametrize(
    ("name", "kept", "longest"), [("docstrings/paraphrase", 0.5, 16), ("docstrings/near", 0.25, 7)]
)
def test_paraphrases_keep_the_words_that_their_label_says(name, kept, longest):
    for split in book_data.load_data(name).splits.values():
        same = [
            sum(w == o for w, o in zip(*map(str.split, pair))) / len(pair[0].split())
            for pair in split.texts
        ]
        near, far = (
            [k for k, label in zip(same, split.labels.tolist()) if label == want] for want in (1, 0)
        )
        assert (
            len(near) == len(far)
            and sum(near) / len(near) > 0.75
            and sum(far) / len(far) < kept
            and min(near) >= 0.7
        )
        assert all(len(a.split()) == len(b.split()) <= longest for a, b in split.texts)


@pytest.mark.slow
def test_a_stored_result_was_made_on_the_rows_that_its_row_has_now():
    for made in (
        found for found in book_results(BOOK) if found["method"] == "lora" and found["seed"] == 0
    ):
        own = settings_of(made["row"], "lora", made["profile"])
        _, rows_now = prepare(
            own["model"], own["data"], own["kind"], limit=own["examples"], judged=own["judged"]
        )
        assert rows_now.hash == made["data_hash"], made["row"]
        assert {key: made["settings"][key] for key in own if key != "seeds"} == json.loads(
            json.dumps({key: value for key, value in own.items() if key != "seeds"})
        )


def test_rows_that_share_a_stand_in_share_its_runs():
    same = {}
    for made in book_results(BOOK):
        key = json.dumps(
            [made["settings"], made["method"], made["seed"], made["profile"]], sort_keys=True
        )
        same.setdefault(key, []).append((made["row"], made["test"], made["validation"]))
    shared = [runs for runs in same.values() if len(runs) > 1]
    assert {"roberta_base/mrpc", "mgpo/t5_base/mrpc"} in [
        {row_id for row_id, *_ in runs} for runs in shared
    ]
    assert all(run[1:] == runs[0][1:] for runs in shared for run in runs)


def test_no_result_is_stored_of_a_stand_in_whose_rates_were_not_tried():
    rates = {
        name: json.loads((DATA / "experiments" / f"{name}.json").read_text())
        for name in ("rates", "rates_whole")
    }
    made = {
        (row(found["row"]).stand_in["name"], group(found["method"]), found["profile"])
        for found in book_results(BOOK)
    }
    tried = {
        profile: rates["rates_whole" if profile == "workstation" else "rates"]
        for profile in PROFILES
    }
    assert len(made) > 5 and all(
        "losses" in tried[profile][name][own] for name, own, profile in made
    )
    assert "paraphrase" not in {name for name, *_ in made}
