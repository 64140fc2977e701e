"""The printed tables: valid files, one value an address, lost cells explained, wrong cells tied to
the ledger.
"""

import csv
import json
import math
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import UnknownName
from lora_book.theory.claims import claims
from lora_book.theory.tables import (
    column_values,
    doubtful,
    least,
    readings,
    row_values,
    table,
    tables,
)

DATA = files("lora_book") / "data"
ALL = tables()
keys = st.sampled_from(ALL)


def test_every_file_is_in_the_index_and_the_other_way_round():
    index = json.loads((DATA / "tables.json").read_text(encoding="utf-8"))
    assert {entry["file"] for entry in index} == {
        f.name for f in DATA.iterdir() if f.name.endswith(".csv")
    }
    assert {(e["paper"], e["number"]) for e in index} == set(ALL) and len(index) == len(ALL)


def test_the_tables_of_both_papers_are_there():
    roman = "I II III IV V VI VII VIII IX X XI XII".split()
    assert set(ALL) == {("P2", str(n)) for n in range(2, 16)} | {("P4", n) for n in roman}


@pytest.mark.parametrize("key", ALL, ids=" ".join)
def test_every_cell_has_an_address_and_a_value_or_a_reason(key):
    t = table(*key)
    assert t.title and t.unit and t.rows_are and t.columns_are and t.source
    assert len({(c.row, c.column) for c in t.cells}) == len(t.cells) > 0
    for cell in t.cells:
        assert cell.row.strip() and cell.column.strip()
        assert isinstance(cell.value, (float, str)) or (cell.value is None and cell.note)
        assert not isinstance(cell.value, float) or abs(cell.value) < float("inf")


@pytest.mark.parametrize("key", ALL, ids=" ".join)
def test_marks_are_claims_of_the_ledger(key):
    ids = {claim.id for claim in claims()}
    assert {c.ledger for c in table(*key).cells if c.ledger} <= ids


@pytest.mark.parametrize("name", sorted(f.name for f in DATA.iterdir() if f.name.endswith(".csv")))
def test_files_are_plain_rectangular_text(name):
    rows = list(csv.reader((DATA / name).read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["row", "column", "value", "printed", "ledger", "note"] and {
        len(r) for r in rows
    } == {6}


@settings(max_examples=40, deadline=None)
@given(key=keys, data=st.data())
def test_look_ups_agree_with_the_cells(key, data):
    t = table(*key)
    cell = data.draw(st.sampled_from(t.cells))
    assert t.cell(cell.row, cell.column) == cell
    assert (
        row_values(t, cell.row).get(cell.column)
        == cell.value
        == column_values(t, cell.column).get(cell.row)
    )
    assert cell.row in t.names("row") and cell.column in t.names("column")


@settings(max_examples=25, deadline=None)
@given(key=keys, name=st.text(max_size=8))
def test_unknown_names_are_refused(key, name):
    t = table(*key)
    if name not in t.names("row"):
        for look_up in (lambda: t.cell(name, t.cells[0].column), lambda: row_values(t, name)):
            with pytest.raises(UnknownName, match="nearest"):
                look_up()
    if name not in t.names("column"):
        with pytest.raises(UnknownName, match="nearest"):
            column_values(t, name)


@pytest.mark.parametrize(
    "paper, number", [("P2", 1), ("P2", 16), ("P4", 4), ("P4", "XIII"), ("P3", "I"), (None, None)]
)
def test_unknown_table_is_refused(paper, number):
    with pytest.raises(UnknownName, match="nearest"):
        table(paper, number)


@pytest.mark.parametrize(
    "paper, number, row, column, value",
    [
        ("P2", 2, "ViT-Base / OfficeHome", "cLA", 89.21),
        ("P2", 2, "DeBERTa-v2-XXL / TREC-50", "RAC", 92.02),
        ("P2", 2, "RoBERTa-Base / MRPC", "cLA drop", 2.94),
        ("P2", 3, "ViT-Tiny / OfficeHome", "CoLA", 0.00955),
        ("P2", 5, "ViT-Base / CIFAR-10", "lr FFT", 3e-4),
        ("P2", 7, "ViT-Tiny / OfficeHome / LoRA / 8", "1e-3", 79.39),
        ("P2", 8, "DeBERTa-v3-Base / TREC-50 / c3LA / 8", "2r", 84.7),
        ("P2", 12, "RoBERTa-Base / CoLA", "naive sparse", 4.5e13),
        ("P2", 13, "r-c3LA", "eps 0.8, 100 %", 437.9),
        ("P2", 14, "FFT", "eps 0.4, 25 %", 517.1),
        ("P2", 15, "RoBERTa-Large / CoLA", "RAC", 0.175),
        ("P4", "I", "VeRA", "parameters", 43000.0),
        ("P4", "V", "uniform / without", "Flowers", 98.82),
        ("P4", "IX", "optimizer", "value", "AdamW"),
        ("P4", "XI", "1e-5", "Flowers", 0.88),
        ("P4", "XII", "LoRA", "parameters", 581.0),
    ],
)
def test_cells_hold_what_the_papers_print(paper, number, row, column, value):
    assert table(paper, number).cell(row, column).value == value


DEBERTA, TINY = "DeBERTa-v3-Base / ", "ViT-Tiny / "


@pytest.mark.parametrize("key", ALL, ids=" ".join)
def test_two_readings_give_a_value_only_where_the_first_digit_alone_differs(key):
    for cell in table(*key).cells:
        if len(read := readings(cell)) == 2:
            digits = [re.sub(r"\D", "", text) for text in read]
            printable = [text for text in read if re.fullmatch(r"[1-9]\d\.\d", text)]
            agree = digits[0][1:] == digits[1][1:] and set(map(len, digits)) == {3}
            decided = len(printable) == 1 and agree
            assert cell.value == (float(printable[0]) if decided else None) and cell.note


@pytest.mark.parametrize(
    "number, row, column, both, value",
    [
        (10, DEBERTA + "CoLA / c3LA / 8", "1", ("060", "86.0"), 86.0),
        (10, DEBERTA + "CoLA / c3LA / 8", "10", ("86.2", "80.2"), None),
        (10, DEBERTA + "CoLA / c3LA / 8", "15", ("86.3", "80.5"), None),
        (10, DEBERTA + "CoLA / c3LA / 8", "20", ("86.", "80"), None),
        (8, DEBERTA + "TREC-50 / RAC / 16", "4r", ("78.0", "76.0"), None),
        (8, DEBERTA + "TREC-50 / cLA / 16", "r/2", ("80.2", "00.2"), 80.2),
        (8, DEBERTA + "TREC-50 / c3LA / 16", "2r", ("07.5", "87.5"), 87.5),
    ],
)
def test_lines_read_twice_keep_both_readings(number, row, column, both, value):
    cell = table("P2", number).cell(row, column)
    assert readings(cell) == both and cell.value == value and "two readings" in cell.note
    assert value is not None or math.isnan(least(cell))


@pytest.mark.parametrize(
    "number, row, values",
    [
        (6, DEBERTA + "TREC-50 / RAC / 2", [10.9] * 4 + [34.9, 46.6, 72.8, 85.9, 87.5]),
        (
            6,
            DEBERTA + "TREC-50 / c3LA / 2",
            [10.9] * 3 + [34.7, 42.3, 79.2, 66.7, 62.1, 10.9],
        ),
        (
            6,
            DEBERTA + "TREC-50 / CoLA / 8",
            [10.9, 10.9, 42.9, 65.5, 82.3, 87.1, 90.9, 10.9, 10.9],
        ),
        (
            6,
            DEBERTA + "PAWS / LoRA / 2",
            [92.1, 93.7, 94.0, 94.2, 94.7, 94.5, 94.0, 55.8, 55.8],
        ),
        (
            6,
            DEBERTA + "PAWS / LoRA / 4",
            [92.3, 94.1, 94.0, 94.4, 94.2, 94.8, 94.0, 55.8, 55.8],
        ),
        (
            6,
            DEBERTA + "PAWS / Asym / 4",
            [55.8, 55.8, 92.9, 92.3, 92.7, 93.2, 94.0, 94.4, 94.5],
        ),
        (
            6,
            DEBERTA + "PAWS / Asym / 8",
            [55.8, 55.8, 92.3, 93.1, 94.1, 94.7, 94.7, 94.7, 94.2],
        ),
        (
            7,
            TINY + "CIFAR-10 / LoRA / 64",
            [91.79, 94.0, 95.3, 96.44, 96.43, 81.73, 14.33, 11.3, 12.12],
        ),
        (
            7,
            TINY + "CIFAR-10 / RAC / 2",
            [85.61, 89.68, 90.98, 91.87, 92.72, 91.94, 91.47, 89.51, 80.24],
        ),
        (9, TINY + "OfficeHome / RAC / 8", [75.9]),
        (9, TINY + "OfficeHome / cLA / 8", [76.6]),
    ],
)
def test_rows_that_the_scan_still_shows_are_there(number, row, values):
    assert list(row_values(table("P2", number), row).values()) == values


def test_partly_legible_rows_have_their_number_in_its_column():
    for number, row, column, value in (
        (8, DEBERTA + "TREC-50 / LoRA / 8", "4r", 75.4),
        (8, DEBERTA + "TREC-50 / CoLA / 8", "4r", 85.5),
        (8, DEBERTA + "TREC-50 / Asym / 8", "r/2", 87.7),
        (8, DEBERTA + "TREC-50 / RAC / 8", "4r", 89.7),
        (8, DEBERTA + "TREC-50 / cLA / 8", "2r", 82.5),
        (9, TINY + "OfficeHome / RAC / 8", "r", 75.9),
        (9, TINY + "OfficeHome / cLA / 8", "r", 76.6),
    ):
        assert row_values(table("P2", number), row) == {column: value}


def test_equal_rows_of_a_sweep_are_marked():
    for number in (6, 7, 8, 9, 10, 11):
        t, seen = table("P2", number), {}
        for row in t.names("row"):
            values = tuple(row_values(t, row).values())
            if len(values) == len(t.names("column")):
                seen.setdefault(values, []).append(row)
        for rows in seen.values():
            cells = [t.cell(row, column) for row in rows for column in t.names("column")]
            assert len(rows) == 1 or all(map(doubtful, cells)), rows


def test_a_number_that_two_methods_share_at_a_high_rate_is_marked():
    t = table("P2", 7)
    shared = []
    for row in t.names("row"):
        if " / OfficeHome / LoRA / " in row:
            twin = row.replace(" / LoRA / ", " / CoLA / ")
            for column, value in row_values(t, row).items():
                if row_values(t, twin).get(column) == value:
                    shared.append(value)
                    assert "CoLA" in t.cell(row, column).note
                    assert "LoRA" in t.cell(twin, column).note
    assert len(shared) == 12


def test_a_misread_number_has_no_value_and_keeps_its_print():
    cell = table("P2", 7).cell(TINY + "CIFAR-10 / cLA / 4", "1e-3")
    assert (cell.value, cell.printed) == (None, "34.5") and "92.0" in cell.note
    cell = table("P2", 7).cell(TINY + "OfficeHome / Asym / 16", "1e-3")
    assert (cell.value, cell.printed, cell.note) == (None, "771.3", "misread")


def test_the_selection_and_the_whole_table_of_gaps_agree():
    third, fifteenth = table("P2", 3), table("P2", 15)
    for cell in third.cells:
        other = fifteenth.cell(cell.row, cell.column)
        assert cell.value == other.value
        assert not ("read in Table 15" in cell.note and "read in Table 3" in other.note)
    assert third.cell("TinyLlama / LogiQA", "c3LA").value == 0.11


def test_least_is_the_value_or_the_smallest_reading():
    assert least(table("P2", 9).cell(TINY + "CIFAR-10 / Asym / 8", "2r")) == 94.0
    assert least(table("P2", 7).cell(TINY + "OfficeHome / LoRA / 8", "1e-3")) == 79.39
    assert math.isnan(least(table("P4", "IX").cell("optimizer", "value")))
    assert math.isnan(least(table("P2", 6).cell(DEBERTA + "MRPC / LoRA / 2", "1e-6")))
