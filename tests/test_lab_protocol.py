"""Effects paired by seed: their intervals hold the truth as often as they say, Holm keeps a page's
false alarms at the level, and nothing is told where there is nothing to tell by.
"""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_book.core.errors import BadValue
from lora_book.lab.protocol import (
    RISK,
    Effect,
    effects,
    holm,
    paired,
    told_sentence,
)

PS = st.lists(st.floats(0, 1), min_size=1, max_size=12)
VALUES = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=2, max_size=8)
TIMES = 2000
ERROR = 3 * math.sqrt(RISK * (1 - RISK) / TIMES)  # three standard errors of a share at the level


def by_seed(values) -> dict:
    return dict(enumerate(map(float, values)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_effect_is_the_paired_test(data):
    mine = data.draw(VALUES)
    theirs = data.draw(st.permutations(mine).map(lambda v: [x + 1 for x in v]))
    apart = [a - b for a, b in zip(mine, theirs)]
    found = paired(by_seed(mine), by_seed(theirs))
    if len(set(apart)) == 1:
        assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1) and not found.told
        return
    known = stats.ttest_rel(mine, theirs)
    low, high = known.confidence_interval()
    assert found.mean == pytest.approx(statistics.mean(apart))
    assert (found.low, found.high, found.p) == pytest.approx((low, high, known.pvalue), abs=1e-9)
    assert found.seeds == len(mine)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.randoms(use_true_random=False), st.sampled_from([0.01, 1.0, 8.0]))
def test_an_effect_turns_round_with_its_sides_keeps_its_unit_and_knows_no_order(values, rng, unit):
    theirs = by_seed(rng.sample(values, len(values)))
    mine = by_seed(values)
    one, other = paired(mine, theirs), paired(theirs, mine)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)
    shuffled = dict(rng.sample(sorted(mine.items()), len(mine)))
    assert paired(shuffled, theirs) == one
    scaled = paired(*({s: unit * v for s, v in side.items()} for side in (mine, theirs)))
    assert scaled.p == pytest.approx(one.p, abs=1e-6)
    assert scaled.mean == pytest.approx(unit * one.mean, abs=1e-9)


def test_rounding_alone_is_no_spread():
    mine, theirs = by_seed([0.884, 0.892, 0.9]), by_seed([0.88, 0.888, 0.896])
    mine[0] += 1e-16
    assert len({mine[s] - theirs[s] for s in mine}) > 1
    found = paired(mine, theirs)
    assert not found.told and found.high == math.inf and "[?]" in found.text()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [({0: 1.0}, {0: 2.0}), ({}, {}), ({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}), ({0: 1.0, 1: 1.0}, {})],
)
def test_an_effect_without_pairs_is_refused(mine, theirs):
    with pytest.raises(BadValue, match="paired by seed"):
        paired(mine, theirs)


@settings(max_examples=100, deadline=None)
@given(PS, st.randoms(use_true_random=False))
def test_holm_by_its_definition(ps, rng):
    held, order = holm(ps), sorted(range(len(ps)), key=ps.__getitem__)
    for place, at in enumerate(order):
        wanted = max((len(ps) - k) * ps[order[k]] for k in range(place + 1))
        assert held[at] == pytest.approx(min(1, wanted))
    mixed = rng.sample(range(len(ps)), len(ps))
    assert holm([ps[at] for at in mixed]) == pytest.approx([held[at] for at in mixed])
    assert all(p <= q <= 1 and q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, held))


@pytest.mark.parametrize("common", [0.0, 5.0])
@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, common):
    rng, truth, held, alarms = np.random.default_rng(seeds), 0.7, 0, 0
    for _ in range(TIMES):
        shared = common * rng.normal(size=seeds)
        a, b = (shared + rng.normal(size=seeds) for _ in range(2))
        found = paired(by_seed(a + truth), by_seed(b))
        held += found.low < truth < found.high
        alarms += paired(by_seed(a), by_seed(b)).told
    assert abs(held / TIMES - (1 - RISK)) < ERROR
    assert abs(alarms / TIMES - RISK) < ERROR


def any_alarm(rng, ask) -> bool:
    "Whether nine equal methods against a tenth, three seeds each, give an alarm."
    runs = [by_seed(rng.normal(size=3)) for _ in range(10)]
    return any(effect.told for effect in ask({k: (runs[k], runs[0]) for k in range(1, 10)}))


def test_a_page_of_equal_methods_alarms_no_more_often_than_the_level():
    rng = np.random.default_rng(0)
    with_holm = np.mean([any_alarm(rng, lambda asked: effects(asked).values()) for _ in range(800)])
    alone = np.mean(
        [any_alarm(rng, lambda asked: [paired(*p) for p in asked.values()]) for _ in range(800)]
    )
    assert with_holm < RISK + 3 * math.sqrt(RISK * (1 - RISK) / 800) < 0.15 < alone


def test_a_difference_that_is_there_is_told_and_its_neighbours_keep_their_own():
    rng = random.Random(0)
    base = {s: rng.gauss(0, 1) for s in range(12)}
    found = effects(
        {
            "far": ({s: v + 5 + rng.gauss(0, 1) for s, v in base.items()}, base),
            "near": ({s: v + rng.gauss(0, 1) for s, v in base.items()}, base),
        }
    )
    assert found["far"].told and not found["near"].told
    assert found["far"].text(1).endswith(" *") and not found["near"].text(1).endswith("*")
    said = told_sentence(found, 1)
    assert said.startswith("1 of 2") and "far" in said and "near" not in said
    assert told_sentence({("a", 8): Effect(1, 0.5, 2, 0, 3, 0)}, 0).count("a 8 +1") == 1
