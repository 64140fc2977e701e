"""Double descent: the best loss of a rank, what counts as a phase or a turn, sharpness of weights,
and runs that resume.
"""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_book as lb
from lora_book.core.laws import randomise
from lora_book.lab.models import load_model
from lora_book.present import double_descent as chapter
from lora_book.present.double_descent import (
    Sweep,
    best_losses,
    feature_errors,
    has_three_phases,
    roughness,
    smooth,
    turns,
    weight_sharpness,
)

SEEDS = st.integers(0, 10**6)
LOSSES = st.lists(st.floats(0.0, 10.0), min_size=2, max_size=30)


def drawn(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


# The best loss of each rank


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), extra=st.integers(0, 5), seed=SEEDS)
def test_best_losses_fall_are_reached_and_never_passed(n, m, extra, seed):
    X, R = drawn(seed, (m + extra, m), (m + extra, n))
    best = best_losses(X, R)
    assert len(best) == min(n, m) + 1 and (best.diff() <= 1e-9).all()
    assert torch.allclose(best[0], R.square().sum(), rtol=1e-9)
    residual = R - X @ torch.linalg.lstsq(X, R).solution
    assert torch.allclose(best[-1], residual.square().sum(), rtol=1e-7, atol=1e-9)
    U, S, V = torch.linalg.svd(R - residual, full_matrices=False)
    for r, value in enumerate(best):
        nearest = torch.linalg.pinv(X) @ (U[:, :r] * S[:r]) @ V[:r]
        assert torch.allclose((X @ nearest - R).square().sum(), value, rtol=1e-6, atol=1e-8)
        B, A = drawn(seed + r + 1, (n, r), (r, m))
        assert (X @ (B @ A).T - R).square().sum() >= value - 1e-9


def test_without_the_projection_the_formula_promises_too_much():
    X, R = drawn(0, (12, 3), (12, 4))
    wrong = torch.linalg.svdvals(R).square().flip(0).cumsum(0).flip(0)
    assert wrong[1] < best_losses(X, R)[1] - 1e-3


def test_rows_must_match():
    with pytest.raises(lb.LoraBookError, match="rows"):
        best_losses(torch.ones(3, 2), torch.ones(4, 2))


@settings(max_examples=15, deadline=None)
@given(N=st.integers(2, 12), more=st.integers(0, 10), noise=st.floats(0, 1), seed=SEEDS)
def test_enough_features_fit_the_training_set(N, more, noise, seed):
    p = 4 * N + more
    train, test = feature_errors(p, N, N, noise, torch.Generator().manual_seed(seed))
    assert train < 1e-8 and test >= 0
    assert (train, test) == feature_errors(p, N, N, noise, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "bad", [{"p": 0}, {"N": 0}, {"d": 0}, {"noise": -1.0}, {"noise": float("nan")}, {"p": 2.5}]
)
def test_features_refuse_what_makes_no_sense(bad):
    with pytest.raises(lb.LoraBookError, match=next(iter(bad))):
        feature_errors(
            **{"p": 3, "N": 3, "d": 2, "noise": 0.1, "generator": torch.Generator()} | bad
        )


# Phases and turns


@settings(max_examples=50, deadline=None)
@given(values=LOSSES, k=st.integers(1, 8))
def test_running_means(values, k):
    losses = torch.tensor(values, dtype=torch.float64)
    if k > len(values):
        with pytest.raises(lb.LoraBookError):
            smooth(losses, k)
    else:
        want = [sum(values[i : i + k]) / k for i in range(len(values) - k + 1)]
        assert torch.allclose(
            smooth(losses, k), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def three_by_hand(values, share):
    "The definition, looked up pair by pair."
    whole = values[0] - min(values)
    for t2 in range(1, len(values)):
        low = min(values[: t2 + 1])
        if low < values[0] and values[t2] - low > share * whole:
            return values[-1] < low
    return False


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(0, 12), min_size=2, max_size=20),
    share=st.sampled_from([0.05, 0.1, 0.5]),
)
def test_three_phases_are_those_of_the_definition(values, share):
    losses = torch.tensor(values, dtype=torch.float64)
    assert has_three_phases(losses, 1, share) == three_by_hand(values, share)
    assert has_three_phases(4 * losses + 8, 1, share) == has_three_phases(losses, 1, share), (
        "units don't matter"
    )


@settings(max_examples=40, deadline=None)
@given(values=LOSSES)
def test_falling_and_rising_curves_have_no_three_phases(values):
    falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert not has_three_phases(falling, 1) and not has_three_phases(falling.flip(0), 1)


def test_each_phase_is_needed():
    assert has_three_phases(torch.tensor([4.0, 2.0, 3.0, 1.0]), 1)
    for cut in ([2.0, 3.0, 1.0], [4.0, 2.0, 3.0], [4.0, 2.0, 1.0], [4.0, 2.0, 2.1, 1.0]):
        assert not has_three_phases(torch.tensor(cut), 1)
    with pytest.raises(lb.LoraBookError):
        has_three_phases(torch.ones(9), share=0)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=20),
    factor=st.sampled_from([0.5, 4.0]),
)
def test_roughness_has_no_unit(values, factor):
    losses = torch.tensor(values, dtype=torch.float64)
    assert (
        roughness(factor * losses) == pytest.approx(roughness(losses))
        and roughness(torch.ones(5)) == 0
    )


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    spread=st.sampled_from([0.0, 1.0, 3.0, 20.0]),
)
def test_turns_alternate_and_keep_their_meaning(values, spread):
    found = turns(values, [spread] * len(values))
    assert not set(found) - set("+-") and "++" not in found and "--" not in found
    assert turns([-v for v in values], [spread] * len(values)) == found.translate(
        str.maketrans("+-", "-+")
    )
    assert turns([2 * v + 1 for v in values], [2 * spread] * len(values)) == found
    if max(values) - min(values) <= spread:
        assert found == ""
    if spread == 0:
        signs = ["+" if b > a else "-" for a, b in zip(values, values[1:]) if a != b]
        assert found == "".join(s for i, s in enumerate(signs) if i == 0 or s != signs[i - 1])


def test_a_move_inside_the_spread_is_none_and_a_slow_fall_is_one():
    assert turns([4, 2, 3, 1], [0.9] * 4) == "-+-" and turns([4, 2, 3, 1], [1.0] * 4) == "-"
    assert turns([5, 4.5, 4, 3.5, 3], [1.0] * 5) == "-", "small steps add up"
    assert turns([4, 1, 1.5, 2.0, 2.5], [1.0] * 5) == "-+"
    with pytest.raises(lb.LoraBookError):
        turns([1, 2], [0.1])


# Sharpness of the weights


def rescaled(model, c):
    "A to cA and B to B/c: the same model in other numbers."
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for adapter in lb.adapters(twin).values():
            adapter.A.mul_(c)
            adapter.B.div_(c)
    return twin


def test_sharpness_of_weights_knows_no_factors_and_leaves_the_model_alone():
    model = randomise(
        lb.adapt(load_model("tiny_vit", dtype="float64"), "lora", ["attn.qkv[q,v]"], r=2), 0, 0.1
    )
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 1, 28, 28, generator=g).double(), torch.randint(10, (6,), generator=g)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def sharp(m):
        return weight_sharpness(
            m,
            lambda own: torch.nn.functional.cross_entropy(own(x), y),
            0.01,
            3,
            torch.Generator().manual_seed(1),
        )

    one, other = sharp(model), sharp(rescaled(model, 8.0))
    assert one["ascent"] > 0 and one == pytest.approx(other, rel=1e-6)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(True) == 8


# Runs

TINY = Sweep(
    "digits",
    "tiny_vit",
    None,
    ("attn.qkv[q,v]",),
    (1, 2),
    (1e-2,),
    2,
    (1e-2,),
    8,
    3,
    2,
    16,
    24,
    "tiny",
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(chapter, "SWEEPS", {"tiny": TINY})
    monkeypatch.setattr(chapter, "WAYS", {"lora": [{}], "mgpo": [{"rho": 0.01}, {"rho": 0.1}]})


GRIDS = {"sweep": chapter.SWEEP_RESULTS, "ways": chapter.WAYS_RESULTS}


def fill(folder, adapt=lb.adapt):
    "The sweep of the tiny task, then its comparison of steps."
    for name, plan in {"sweep": chapter.sweep_plan, "ways": chapter.ways_plan}.items():
        results = replace(GRIDS[name], place=folder)
        run = partial(chapter.several, adapt, compare=name == "ways", seeds=range(2))
        results.fill(plan("tiny"), run)


def contents(folder):
    return {
        path.name: {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        for path in folder.iterdir()
    }


def test_runs_resume_with_the_same_numbers(tiny, tmp_path):
    fill(tmp_path)
    first = contents(tmp_path)
    assert set(first) == {
        "sweep-tiny-lora-1-0.01.json",
        "sweep-tiny-lora-2-0.01.json",
        "sweep-tiny-rslora-2-0.01.json",
        "ways-tiny-lora-0.01.json",
        "ways-tiny-mgpo-0.01.json",
    }
    for result in first.values():
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        assert all(len(run["seen"]) == 3 and len(run["measured"]) == 3 for run in result["runs"])
    assert first["ways-tiny-mgpo-0.01.json"]["options"] in chapter.WAYS["mgpo"]
    lost, kept = (
        tmp_path / "sweep-tiny-rslora-2-0.01.json",
        tmp_path / "sweep-tiny-lora-2-0.01.json",
    )
    lost.unlink()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"marked": 1}))
    fill(tmp_path)
    assert json.loads(kept.read_text()).get("marked") == 1, "a finished result isn't run again"
    again = contents(tmp_path)
    again[kept.name].pop("marked")
    assert again == first


def test_an_interrupted_setting_leaves_no_file(tiny, tmp_path):
    calls = []

    def adapt(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return lb.adapt(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, adapt)
    assert list(tmp_path.iterdir()) == []


def test_a_still_curve_is_measured_with_nothing_moved(tiny):
    plain = chapter.swept_run(lb.adapt, "tiny", "lora", 2, 1e-9, 0, True)
    moved = chapter.swept_run(lb.adapt, "tiny", "mgpo", 2, 1e-9, 0, True, rho=5.0)
    assert plain["seen"] == pytest.approx(moved["seen"], abs=1e-5)


def test_stored_results_are_whole():
    for kind in ("sweep", "ways"):
        found = GRIDS[kind].stored()
        assert found
        for result in found:
            made = chapter.SWEEPS[result["task"]]
            assert (result["steps"], result["batch"], result["every"], result["judged"]) == (
                made.steps,
                made.batch,
                made.every,
                made.judged,
            )
            assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
            for run in result["runs"]:
                assert (
                    len(run["seen"]) == made.steps
                    and len(run["measured"]) == -(-made.steps // made.every) + 1
                )
                assert torch.isfinite(torch.tensor(run["seen"] + run["measured"])).all()
    have = {(d["task"], d["method"], d["r"], d["lr"]) for d in GRIDS["sweep"].stored()}
    wanted = {(task, *setting) for task in chapter.SWEEPS for setting in chapter.sweep_points(task)}
    assert have <= wanted and {key for key in wanted if key[0] == "digits"} <= have


@pytest.mark.parametrize("kind", ["sweep", "ways"])
def test_a_copied_result_is_refused_with_its_name(tmp_path, kind):
    first = next(GRIDS[kind].place.glob(f"{kind}-digits-*-0.01.json"))
    (tmp_path / first.name).write_bytes(first.read_bytes())
    assert len(replace(GRIDS[kind], place=tmp_path).stored()) == 1
    wrong = tmp_path / first.name.replace("-0.01", "-0.001")
    wrong.write_bytes(first.read_bytes())
    with pytest.raises(lb.LoraBookError, match=wrong.name):
        replace(GRIDS[kind], place=tmp_path).stored()
