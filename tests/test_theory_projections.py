"""Properties of lora_book.theory.projections: exact averages against enumeration and sampling, for
every law.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, LoraBookError, UnknownName
from lora_book.theory import projections as P

FEW = settings(max_examples=30, deadline=None)
SELECTING = tuple(P.STARTS)


@st.composite
def sizes(draw, most=12):
    m = draw(st.integers(1, most))
    return m, draw(st.integers(1, m))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def by_formula(A):
    return A.mT @ torch.linalg.pinv(A @ A.mT) @ A


def windows(law, m, r):
    "The selected columns of each equally likely draw, written out again from the law's wording."
    whole, part = m // r, -(-m // r)
    first = {
        "block": [j * r for j in range(whole)],
        "literal": list(range(whole)),
        "window": list(range(m - r + 1)),
        "fixed": [0],
        "cyclic": [j * r for j in range(part)],
    }[law]
    return [[(start + q) % m for q in range(r)] for start in first]


@pytest.mark.parametrize("law", SELECTING)
def test_exact_average_is_the_enumerated_one(law):
    for m in range(1, 13):
        for r in range(1, m + 1):
            rates = torch.zeros(m, dtype=torch.float64)
            for window in windows(law, m, r):
                rates[window] += 1 / len(windows(law, m, r))
            exact = P.expected_projection(law, m, r)
            assert exact.shape == (m, m) and exact.dtype == torch.float64
            torch.testing.assert_close(exact, torch.diag(rates), rtol=0, atol=1e-12)
            assert P.lambda_min(law, m, r) == pytest.approx(
                torch.linalg.eigvalsh(torch.diag(rates))[0].item(), abs=1e-12
            )
            assert type(P.lambda_min(law, m, r)) is float


@FEW
@given(sizes())
def test_gaussian_average_is_r_over_m(size):
    m, r = size
    torch.testing.assert_close(
        P.expected_projection("gaussian", m, r), r / m * torch.eye(m, dtype=torch.float64)
    )
    assert P.lambda_min("gaussian", m, r) == r / m


@FEW
@given(sizes(60), st.sampled_from(P.LAWS))
def test_no_law_beats_r_over_m(size, law):
    m, r = size
    assert 0 <= P.lambda_min(law, m, r) <= r / m + 1e-15
    assert P.column_rates(law, m, r).sum().item() == pytest.approx(r)


@FEW
@given(sizes(40))
def test_closed_forms(size):
    m, r = size
    assert P.lambda_min("block", m, r) == pytest.approx(r / m if m % r == 0 else 0.0)
    assert P.lambda_min("window", m, r) == pytest.approx(1 / (m - r + 1))
    assert P.lambda_min("cyclic", m, r) == pytest.approx(1 / -(-m // r))
    assert P.lambda_min("fixed", m, r) == float(r == m)
    reached = int((P.column_rates("literal", m, r) > 0).sum())
    assert reached == m // r + r - 1 and (P.lambda_min("literal", m, r) > 0) == (reached == m)


@settings(max_examples=18, deadline=None)
@given(sizes(8), st.sampled_from(P.LAWS), st.integers(0, 2**31))
def test_samples_agree_with_the_exact_average(size, law, seed):
    """Each entry of a projector lies in [-1, 1], so the mean of 400 draws is within 6 standard
    errors of at most 1/20.
    """
    (m, r), draws = size, 400
    if law == "cyclic":
        draws = 5 * len(P.starts(law, m, r))
    sampled = P.sampled_projection(law, m, r, draws, seeded(seed))
    tolerance = 1e-12 if law in ("cyclic", "fixed") else 6 / draws**0.5
    torch.testing.assert_close(sampled, P.expected_projection(law, m, r), rtol=0, atol=tolerance)


def test_sampling_tells_the_printed_selector_from_the_proved_one():
    sampled = P.sampled_projection("literal", 12, 3, 400, seeded(0))
    assert (sampled - P.expected_projection("literal", 12, 3)).abs().max() < 0.15
    assert (sampled - P.expected_projection("block", 12, 3)).abs().max() > 0.3


def test_an_excluded_upper_end_is_noticed():
    """Mutant of ledger C5: the last block is never drawn, and lambda_min of the sampled average is
    0.
    """
    drawn = [
        P.selector(12, 3, 3 * int(torch.randint(0, 12 // 3 - 1, (1,), generator=seeded(i))))
        for i in range(200)
    ]
    mutant = torch.stack([P.projector(A) for A in drawn]).mean(0)
    assert torch.linalg.eigvalsh(mutant)[0].abs() < 1e-12 < P.lambda_min("block", 12, 3)


@FEW
@given(sizes(7), st.integers(0, 2**31), st.integers(1, 3))
def test_projector_laws(size, seed, copies):
    m, r = size
    generator = seeded(seed)
    A = torch.randn(r, m, generator=generator, dtype=torch.float64)
    S = torch.randn(r, r, generator=generator, dtype=torch.float64) + 3 * torch.eye(
        r, dtype=torch.float64
    )
    H = P.projector(torch.cat([S @ A] * copies))
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-8)
    torch.testing.assert_close(H @ H, H, rtol=0, atol=1e-8)
    torch.testing.assert_close(A @ H, A, rtol=1e-6, atol=1e-6)
    assert H.trace().item() == pytest.approx(r, abs=1e-8)
    Q = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    torch.testing.assert_close(P.projector(A @ Q), Q.mT @ P.projector(A) @ Q, rtol=0, atol=1e-8)


def test_projector_is_the_formula_where_the_formula_can_be_computed():
    A = torch.randn(3, 8, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(P.projector(A), by_formula(A), rtol=0, atol=1e-9)
    short = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1e-9, 0.0]], dtype=torch.float64)
    assert P.projector(short).trace().item() == pytest.approx(2.0)
    assert by_formula(short).trace().item() < 1.5
    assert torch.equal(P.projector(torch.zeros(2, 3)), torch.zeros(3, 3))
    assert (A.mT @ A - P.projector(A)).abs().max() > 0.1


@FEW
@given(sizes(), st.sampled_from(P.LAWS), st.integers(0, 2**31), st.integers(0, 50))
def test_draws_are_reproducible_and_leave_the_global_state(size, law, seed, step):
    m, r = size
    before = torch.get_rng_state()
    first, second = (P.draw(law, m, r, seeded(seed), step) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (r, m) and first.dtype == torch.float64
    assert torch.equal(before, torch.get_rng_state())
    if law != "gaussian":
        assert first.sum(1).tolist() == [1.0] * r and sorted(first.argmax(1).tolist()) in map(
            sorted, windows(law, m, r)
        )


@FEW
@given(sizes())
def test_turns_of_the_cycle(size):
    m, r = size
    blocks = -(-m // r)
    seen = [P.draw("cyclic", m, r, step=step).argmax(1).tolist() for step in range(2 * blocks)]
    assert seen[:blocks] == seen[blocks:] == windows("cyclic", m, r)
    assert {column for block in seen for column in block} == set(range(m))
    assert all(
        torch.equal(P.draw("fixed", m, r, step=step), torch.eye(r, m, dtype=torch.float64))
        for step in (0, 3)
    )


@pytest.mark.parametrize("function", [P.expected_projection, P.lambda_min, P.column_rates, P.draw])
def test_bad_arguments(function):
    for bad in (("gausian", 4, 2), ("", 4, 2)):
        with pytest.raises(UnknownName, match="gaussian|nearest"):
            function(*bad)
    for m, r in ((4, 5), (4, 0), (4, -1), (0, 1), (-3, 1)):
        with pytest.raises(BadValue):
            function("block", m, r)
    for law, m, r in (
        (None, 4, 2),
        (3, 4, 2),
        (["block"], 4, 2),
        ("block", 4.0, 2),
        ("block", 4, True),
        ("block", "4", 2),
    ):
        with pytest.raises(BadType):
            function(law, m, r)


def test_more_bad_arguments():
    with pytest.raises(UnknownName, match="'gausian'.*'gaussian'"):
        P.lambda_min("gausian", 4, 2)
    with pytest.raises(BadValue, match="r must be an int from 1 to 4, not 5"):
        P.lambda_min("block", 4, 5)
    for value in (torch.ones(3), torch.ones(0, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(BadValue):
            P.projector(value)
    for value in ([[1.0]], torch.ones(2, 2, dtype=torch.long), None):
        with pytest.raises(BadType):
            P.projector(value)
    for call in (
        lambda: P.draw("block", 4, 2, 7),
        lambda: P.draw("gaussian", 4, 2),
        lambda: P.draw("fixed", 4, 2, step=0.5),
    ):
        with pytest.raises(BadType):
            call()
    for call in (
        lambda: P.starts("gaussian", 4, 2),
        lambda: P.selector(4, 2, 4),
        lambda: P.draw("cyclic", 4, 2, step=-1),
        lambda: P.sampled_projection("block", 4, 2, 0, seeded(0)),
    ):
        with pytest.raises(LoraBookError):
            call()
