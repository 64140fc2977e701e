"""The printed tables: valid files, one value an address, lost cells explained, wrong cells tied to
the ledger.
"""

import csv
import json
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import UnknownName
from lora_book.theory.claims import claims
from lora_book.theory.tables import column_values, row_values, table, tables

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
