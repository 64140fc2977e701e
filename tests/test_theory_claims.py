"""The ledger: every claim verifies, verdicts follow from figures, and a mutant of a table or a
formula changes them.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_book as lb
from lora_book.core.errors import LoraBookError, UnknownName
from lora_book.present.loldu import SIGMA_MIN
from lora_book.registry import METHODS
from lora_book.theory import (
    claims_algorithms,
    claims_convergence,
    claims_experiments,
    claims_generalization,
    claims_loldu,
    claims_record,
    claims_related,
    generalization,
    tables,
)
from lora_book.theory.claims import claims, counts, ledger_html, verify
from lora_book.theory.claims_record import CLASSES, Finding, check, finding, judge
from lora_book.theory.convergence import smooth_minimum
from lora_book.theory.projections import lambda_min

LEDGER = claims()
IDS = [claim.id for claim in LEDGER]
booleans = st.booleans()


@pytest.fixture(scope="module")
def results():
    return {id: verify(id) for id in IDS}


@pytest.mark.parametrize("id", IDS)
def test_claim_comes_out_as_recorded(id, results):
    result, claim = results[id], LEDGER[id]
    assert (result.id, result.verdict) == (id, claim.verdict)
    assert result.mended and result.holds == (claim.verdict == "holds")
    assert result.figures and all(
        type(x) is float and np.isfinite(x) for x in result.figures.values()
    )


@pytest.mark.parametrize("claim", LEDGER, ids=IDS)
def test_record_is_complete(claim):
    assert claim.claim and claim.amended and claim.location and claim.title
    assert (
        claim.paper in {"P0", "P1", "P2", "P3", "P4"}
        and claim.chapter.startswith("sec-")
        and claim.verdict in CLASSES
    )


def test_ids_are_the_reports_in_its_order():
    lengths = {"A": 10, "B": 23, "C": 19, "D": 8, "E": 22, "F": 5}
    assert IDS == [f"{letter}{i}" for letter, n in lengths.items() for i in range(1, n + 1)]


def test_counts_are_those_of_the_results(results):
    found = counts(results.values())
    assert found == {v: Counter(c.verdict for c in LEDGER)[v] for v in CLASSES}
    assert found == {"holds": 16, "amended": 34, "false": 24, "typo": 13}


@pytest.mark.parametrize("id", ["A2", "B7", "C8", "D4", "F2"])
def test_verify_repeats_itself_and_leaves_the_global_generator_alone(id, results):
    before = np.random.get_state()[1].copy()
    assert verify(id) == results[id]
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("bad, near", [("B77", "B7"), ("A11", "A1"), ("", "A1"), ("E23", "E2")])
def test_unknown_id_is_refused_with_the_nearest(bad, near):
    with pytest.raises(UnknownName, match=near):
        verify(bad)
    with pytest.raises(UnknownName):
        claims()[bad]


@pytest.mark.parametrize("bad", [7, None, b"B7", ["B7"]])
def test_id_of_another_type_is_refused(bad):
    with pytest.raises((LoraBookError, TypeError)):
        verify(bad)


@given(printed=booleans, mended=booleans, kind=st.sampled_from(CLASSES))
def test_verdict_follows_from_the_finding(printed, mended, kind):
    verdict = judge(Finding(printed, mended, {}), kind)
    assert (verdict == "holds") == printed
    assert printed or mended or verdict == "false"
    assert printed or not mended or verdict == ("false" if kind == "holds" else kind)


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b_c", "d"]),
        st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-1, 1)),
        min_size=1,
    )
)
def test_figures_become_plain_numbers(figures):
    found = finding(True, True, **{name: np.float64(x) for name, x in figures.items()})
    assert all(type(x) is float for x in found.figures.values()) and found.figures == {
        k: float(v) for k, v in figures.items()
    }


def test_figure_that_is_no_number_is_refused():
    with pytest.raises((TypeError, ValueError)):
        finding(True, size="large")
    with pytest.raises(LoraBookError):
        check("Z1", "wrong", "P2", "nowhere", "sec-claims")


def test_registering_reads_the_docstring():
    try:

        @check("Z9", "typo", "P1", "nowhere", "sec-claims")
        def z9_two_and_two():
            """Two and two
            make five.

            Four."""
            return finding(2 + 2 == 5, 2 + 2 == 4, total=4)

        record = claims()["Z9"]
        assert (record.claim, record.amended, record.title) == (
            "Two and two make five.",
            "Four.",
            "two and two",
        )
        assert verify("Z9").verdict == "typo"
    finally:
        del claims_record.REGISTRY["Z9"]
    assert len(claims()) == len(IDS)


def edited(paper, number, row, column, value):
    "A stand-in for `tables.table` in which one cell has another value."

    def table(p, n):
        printed = tables.table(p, n)
        if (p, str(n)) != (paper, str(number)):
            return printed
        printed.cell(row, column)
        cells = [
            c._replace(value=value) if (c.row, c.column) == (row, column) else c
            for c in printed.cells
        ]
        return replace(printed, cells=tuple(cells))

    return table


TABLE_MUTANTS = [
    ("E18", claims_loldu, ("P4", "VI", "LoLDU", "average", 0.624), "holds"),
    ("E15", claims_loldu, ("P4", "I", "LoLDU", "average", 86.8), "false"),
    ("E19", claims_loldu, ("P4", "XI", "5e-3", "FGVC", 14.13), "false"),
    ("E16", claims_loldu, ("P4", "IV", "FT", "average", 88.20), "false"),
    ("E11", claims_loldu, ("P4", "VIII", "rank", "value", 256.0), "holds"),
    ("E10", claims_loldu, ("P4", "XII", "8", "parameters", 216.0), "false"),
    ("E8", claims_loldu, ("P4", "IX", "alpha", "value", 1.0), "holds"),
    ("E8", claims_loldu, ("P4", "IX", "alpha", "value", 64.0), "false"),
    ("D1", claims_experiments, ("P2", "2", "RoBERTa-Base / MRPC", "cLA drop", 12.94), "false"),
    ("D2", claims_experiments, ("P2", "2", "DeBERTa-v3-Base / MRPC", "c3LA", 90.22), "holds"),
    ("D3", claims_experiments, ("P2", "13", "CoLA", "eps 0.8, 100 %", 100.0), "false"),
    (
        "D7",
        claims_experiments,
        ("P2", "12", "ViT-Base / CIFAR-10", "naive sparse", 1.6e15),
        "false",
    ),
]


@pytest.mark.parametrize(
    "id, module, cell, verdict", TABLE_MUTANTS, ids=[f"{m[0]}-{m[3]}" for m in TABLE_MUTANTS]
)
def test_altered_cell_changes_the_verdict(id, module, cell, verdict, monkeypatch, results):
    monkeypatch.setattr(module, "table", edited(*cell))
    assert verify(id).verdict == verdict != results[id].verdict


@pytest.mark.parametrize(
    "id, module, cell",
    [
        ("E20", claims_loldu, ("P4", "XII", "768", "FGVC", 38.5)),
        ("E14", claims_loldu, ("P4", "II", "LoRA", "parameters percent", 0.677)),
        ("E12", claims_loldu, ("P4", "III", "LoLDU", "parameters", 33_600_000 / 100)),
        ("D2", claims_experiments, ("P2", "2", "ViT-Base / OfficeHome", "FFT", 95.0)),
        ("E22", claims_loldu, ("P4", "I", "LoRA", "parameters", 24.0 * (8 * 768 + 768))),
        ("E22", claims_loldu, ("P4", "I", "VeRA", "parameters", 24.0 * 768**2)),
    ],
    ids=["E20", "E14", "E12", "D2", "E22-LoRA", "E22-VeRA"],
)
def test_altered_cell_of_a_false_claim_breaks_its_correction(id, module, cell, monkeypatch):
    monkeypatch.setattr(module, "table", edited(*cell))
    assert not verify(id).mended


def printed_recurrence(w, d, lipschitz, sigma0, C):
    return claims_generalization.printed_bound(w, d, lipschitz, sigma0, C)


FORMULA_MUTANTS = [
    ("B7", claims_generalization, "perturbation_bound", printed_recurrence),
    ("B8", claims_generalization, "perturbation_bound", lambda w, d, ell, s, C: 0.1 * C * sum(d)),
    ("B5", claims_generalization, "perturbation_bound", printed_recurrence),
    (
        "B4",
        claims_generalization,
        "path_term",
        lambda i, w, d: np.prod(w if (i - 1) >> (len(w) - 1) & 1 else d),
    ),
    (
        "B13",
        claims_generalization,
        "hoeffding_bound",
        lambda N, delta, C: 0.5 * (np.log(1 / delta) / 2 / N) ** 0.5,
    ),
    (
        "C6",
        claims_convergence,
        "theorem2_bound",
        lambda gap, lam, gamma, T: gap / (lam * gamma * T) / 2,
    ),
    (
        "C8",
        claims_convergence,
        "cycle_bound",
        lambda gap, L_G, gamma, cycles, k, s: gap / (gamma * cycles) / 100,
    ),
    (
        "C9",
        claims_convergence,
        "theorem2_bound",
        lambda gap, lam, gamma, T: gap / (lam * gamma * T),
    ),
    ("C14", claims_convergence, "frozen_smoothness", lambda frozen: 1.0),
    ("C17", claims_convergence, "local_smoothness_bound", lambda A, B, g: 0.5 * g),
    ("A4", claims_algorithms, "mended_link", claims_algorithms.printed_link),
    ("F5", claims_related, "first_change", lambda scale, r, rng: scale * r),
    ("E5", claims_loldu, "lu_flops", lambda n, m: n * m * m),
]


@pytest.mark.parametrize(
    "id, module, name, mutant", FORMULA_MUTANTS, ids=[m[0] for m in FORMULA_MUTANTS]
)
def test_wrong_formula_in_the_mended_place_fails(id, module, name, mutant, monkeypatch, results):
    monkeypatch.setattr(module, name, mutant)
    result = verify(id)
    assert not result.holds and not result.mended or result.verdict != results[id].verdict
    assert result.verdict == "false"


def without_offsets(w, d, ell, s, C):
    return generalization.perturbation_bound(w, d, ell, [0.0] * len(w), C)


def unscaled_pac(*args, lipschitz=1.0, **options):
    return generalization.pac_bayes_bound(*args, **options)


def without_minimum(method, shapes, r, k=1):
    "The count of Table 1 as it is printed: a chain of any length holds k times as many."
    return k * generalization.numbers_stored(method, shapes, r)


def scaled(function, factor, only=None):
    def mutant(*args, **options):
        return function(*args, **options) * (factor if only in (None, args[0]) else 1)

    return mutant


def uncapped(sigma, z, eps, least):
    return min(max(sigma, least), 1.0), z


# Each check has to notice what it is about: a right statement in the printed place makes it hold,
# a wrong library or table makes it false
CHECK_MUTANTS = [
    ("A8", claims_algorithms, "training_bytes", lambda optimizer: 8.0, "holds"),
    ("A8", claims_algorithms, "training_bytes", lambda optimizer: 4.0, "false"),
    ("A9", claims_algorithms, "PRINTED_METHODS", {"abstract": 9, "section 4": 9}, "holds"),
    (
        "A10",
        claims_algorithms,
        "numbers_stored",
        scaled(generalization.numbers_stored, 0.5, "cla"),
        "false",
    ),
    ("B6", claims_generalization, "perturbation_bound", without_offsets, "false"),
    ("B6", claims_generalization, "work", lambda name, *rest: 1023, "holds"),
    ("B8", claims_generalization, "printed_mean", lambda x, layers: x.mean(), "holds"),
    (
        "B8",
        claims_generalization,
        "perturbation_bound",
        scaled(generalization.perturbation_bound, 2),
        "false",
    ),
    ("B12", claims_generalization, "pac_bayes_bound", unscaled_pac, "false"),
    (
        "B12",
        claims_generalization,
        "pac_bayes_bound",
        scaled(generalization.pac_bayes_bound, 0.05),
        "false",
    ),
    ("B12", claims_generalization, "memorised", lambda *sizes: (0.1, 1e-12), "holds"),
    ("B21", claims_generalization, "numbers_stored", without_minimum, "holds"),
    (
        "B21",
        claims_generalization,
        "numbers_stored",
        scaled(generalization.numbers_stored, 0.5),
        "false",
    ),
    ("B22", claims_generalization, "stored_factor", lambda rate, sign, grid=0: 1.0, "holds"),
    (
        "B22",
        claims_generalization,
        "stored_factor",
        lambda rate, sign, grid=0: 1 + sign * rate,
        "false",
    ),
    ("B22", claims_generalization, "numbers_stored", lambda *sizes: 1, "holds"),
    (
        "C11",
        claims_convergence,
        "expected_projection",
        lambda law, m, r: lambda_min(law, m, r) * torch.eye(m).double(),
        "holds",
    ),
    (
        "C11",
        claims_convergence,
        "theorem2_bound",
        scaled(claims_convergence.theorem2_bound, 0.9),
        "false",
    ),
    ("E8", claims_loldu, "nearest", uncapped, "false"),
]


@pytest.mark.parametrize(
    "id, module, name, mutant, verdict",
    CHECK_MUTANTS,
    ids=[f"{m[0]}-{m[2]}-{m[4]}" for m in CHECK_MUTANTS],
)
def test_every_half_of_a_check_can_come_out_otherwise(
    id, module, name, mutant, verdict, monkeypatch, results
):
    monkeypatch.setattr(module, name, mutant)
    assert verify(id).verdict == verdict != results[id].verdict


BASE = tuple(claims_loldu.base_counts(1))


def squares(n):
    return dict.fromkeys(BASE, 24 * n * n)


def one_paraboloid(w, centres, heights):
    return smooth_minimum(w, centres[:1], heights[:1])


@pytest.mark.parametrize(
    "id, module, name, mutant",
    [
        ("C8", claims_convergence, "smooth_minimum", one_paraboloid),
        ("C8", claims_convergence, "circulant_ratio", lambda k: 1.2),
        ("E22", claims_loldu, "base_counts", squares),
    ],
    ids=["C8-convex", "C8-two-blocks", "E22-squares"],
)
def test_wrong_figures_break_the_correction_of_a_false_claim(id, module, name, mutant, monkeypatch):
    monkeypatch.setattr(module, name, mutant)
    assert not verify(id).mended


def tower(width, depth=3):
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))


@pytest.mark.parametrize("method", ["lora", "asymmetric", "rac", "cla", "c3la"])
def test_counts_of_the_ledger_are_those_of_the_adapters(method):
    model = lb.adapt(tower(12), method, target_modules=["0", "1", "2"], r=3)
    assert lb.n_trainable(model) == generalization.numbers_stored(method, [(12, 12)] * 3, 3)


def test_counts_of_table_1_are_those_of_the_methods():
    counts, pair = claims_loldu.base_counts(768), (768, 768)
    assert counts["LoRA"] == 24 * METHODS["lora"].count(*pair, 8)
    assert counts["VeRA"] == 24 * METHODS["vera"].count(*pair, 1024)
    assert counts["LoLDU with sigma"] == 24 * METHODS["loldu"].count(*pair, 768)
    model = lb.adapt(tower(12), "bitfit", target_modules=["0", "1", "2"])
    assert (
        lb.n_trainable(model) * 24 // 3 == claims_loldu.base_counts(12)["BitFit of the same maps"]
    )


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(-2, 3),
    eps=st.floats(0.1, 3),
    z=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_the_projection_of_the_ledger_is_that_of_loldu(sigma, eps, z):
    model = lb.adapt(
        tower(4, 1).double(), "loldu", target_modules=["0"], r=3, project=True, eps=eps
    )
    (adapter,) = lb.adapters(model).values()
    z = torch.tensor(z, dtype=adapter.z.dtype) + 0.01
    with torch.no_grad():
        adapter.z.copy_(z)
        adapter.sigma.fill_(sigma)
    adapter.constrain()
    ours = claims_loldu.nearest(sigma, z.double().numpy(), eps, SIGMA_MIN)
    assert adapter.sigma.item() == pytest.approx(ours[0], rel=1e-6)
    assert adapter.z.tolist() == pytest.approx(ours[1].tolist(), rel=1e-5, abs=1e-7)


def loss_of(model, x):
    return -model(x).sum()


@pytest.mark.parametrize("rate", [1.0, 1e-6, 1e-12])
def test_the_step_of_the_ledger_is_that_of_lora_plus(rate):
    "One step of LoRA+ writes the sign of the data into A at any rate."
    stored = []
    for sign in (-1.0, 1.0):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)).double()
        lb.adapt(model, "lora_plus", target_modules=["0"], r=1, lr_ratio=1 / rate)
        (adapter,) = lb.adapters(model).values()
        with torch.no_grad():
            adapter.A.fill_(1)
            adapter.B.fill_(1)
        optimizer = torch.optim.SGD(lb.param_groups(model, rate))
        one = torch.ones(1, 1, dtype=torch.float64)
        lb.train_step(model, optimizer, partial(loss_of, model, sign * one))
        stored.append(adapter.A.item())
    assert stored == pytest.approx(
        [claims_generalization.stored_factor(rate, sign) for sign in (-1.0, 1.0)], rel=1e-15
    )
    assert (stored[0] != stored[1]) == (adapter.A.dtype == torch.float64 or rate > 1e-7)


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 200), data=st.data())
def test_mended_schedule_gives_every_link_its_steps(T, data):
    k = data.draw(st.integers(1, T))
    steps = np.bincount(
        [claims_algorithms.mended_link(t, T, k) for t in range(1, T + 1)], minlength=k
    )
    assert len(steps) == k and steps.min() >= T // k and steps.sum() == T
    assert claims_algorithms.printed_link(T, T, k) >= k


@settings(max_examples=25, deadline=None)
@given(L=st.integers(1, 6), seed=st.integers(0, 999))
def test_recurrence_and_both_ways_of_mending_the_indices_agree(L, seed):
    case = claims_generalization.norms(np.random.default_rng(seed), L)
    bound = claims_generalization.perturbation_bound(*case)
    assert claims_generalization.closed_form(*case) == pytest.approx(bound, rel=1e-9)
    assert claims_generalization.swapped_sets(*case) == pytest.approx(bound, rel=1e-9)
    assert claims_generalization.scalar_change(*case) == pytest.approx(bound, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), data=st.data())
def test_wrapped_chain_reaches_every_column(m, data):
    r = data.draw(st.integers(1, m))
    links = -(-m // r)
    assert claims_algorithms.covered(m, r, links, wrap=True) == m
    assert claims_algorithms.covered(m, r, m // r) == m - m % r


class Rows(HTMLParser):
    """Collects the class of every table row, the ids of inputs, and complains about unknown closing
    tags.
    """

    def __init__(self):
        super().__init__()
        self.rows, self.inputs, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.rows += [attrs["class"]] if tag == "tr" and "class" in attrs else []
        self.inputs += [attrs["id"]] if tag == "input" else []
        self.outside += [v for k, v in attrs.items() if k in ("src", "href") and "//" in v] + (
            [tag] if tag == "script" else []
        )


def test_html_lists_every_claim_and_needs_no_network(results):
    parser = Rows()
    parser.feed(ledger_html(LEDGER, results.values()))
    assert parser.rows == [f"claim {results[id].verdict}" for id in IDS]
    assert parser.inputs == ["only-all", *(f"only-{v}" for v in CLASSES)] and not parser.outside
    with pytest.raises(ValueError):
        ledger_html(LEDGER, list(results.values())[:-1])
