"""What the benchmarks count exactly (operations, bytes kept and alive, tensors made), how they
reckon ratios, and what they stored. Times are never asserted.
"""

import json
import math
import platform
import random
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_book as lb
from benchmarks import chains, gpu, layer, merge, steps, timing
from lora_book.analysis.benchmarks import calls
from lora_book.core.merging import rounding, write_sum
from lora_book.core.products import Alive, count_flops, peak_bytes, saved_bytes

STORED = sorted((Path(lb.__file__).parent / "data" / "benchmarks").glob("*.json"))
torch.set_num_threads(1)


# Counting


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_alive_is_followed_to_its_end(sizes, data):
    stop = data.draw(st.integers(1, len(sizes)))
    outside = torch.ones(7)
    with Alive() as alive:
        made = [torch.ones(size) for size in sizes]
        views = [t[:1] for t in made]
        outside.add_(1)
        assert alive.bytes == alive.peak == 4 * sum(sizes) and len(alive.shapes) == len(sizes)
        del made[:stop], views[:stop]
        assert alive.bytes == 4 * sum(sizes[stop:]) and alive.peak == 4 * sum(sizes)
    assert len(made) == len(views) == len(sizes) - stop


def test_a_view_keeps_its_storage_alive():
    with Alive() as alive:
        part = torch.ones(100)[:1]
        assert alive.bytes == 400
        del part
        assert alive.bytes == 0


def test_loras_peak_is_two_outputs_and_little_more_about_half_of_pefts():
    T, n, r = 2048, 768, layer.RANK
    x, g = layer.numbers(0, (T, n), (T, n))
    x.requires_grad_()
    made = {
        "lora": layer.adapted("lora", n, n, r),
        "PEFT LoRA": layer.in_peft("PEFT LoRA", torch.nn.Sequential(layer.frozen(n, n)), ["0"], r),
    }
    for model in made.values():
        layer.step(model, x, g)
    peak = {name: peak_bytes(partial(layer.step, model, x, g)) for name, model in made.items()}
    assert peak["lora"] == 4 * (2 * T * n + 2 * T * r + 2 * r * n)
    assert peak["lora"] <= 0.55 * peak["PEFT LoRA"] and not peak["lora"] <= 0.5 * peak["PEFT LoRA"]


@pytest.mark.parametrize(
    "method, per_token",
    [
        ("full", 40),
        ("lora", 56),
        ("rslora", 56),
        ("lora_plus", 56),
        ("cola", 56),
        ("pissa", 56),
        ("asymmetric", 16),
        ("rac", 16),
        ("cla", 16),
        ("random_cla", 16),
        ("c3la", 16),
        ("random_c3la", 16),
        ("paca", 16),
    ],
)
@pytest.mark.parametrize("tokens", [24, 96])
def test_bytes_kept_beyond_the_floor(method, per_token, tokens):
    found = layer.layer_exact([method], [], tokens, 40, 36)
    assert (
        found[method]["saved"] == 4 * tokens * per_token
        and found["floor"]["saved"] == found["floor"]["flops"] == 0
    )


@pytest.mark.parametrize("tokens", [24, 96])
@pytest.mark.parametrize("method", ["lora", "asymmetric", "cla"])
def test_mgpo_makes_no_dense_tensor_that_the_plain_step_doesnt(method, tokens):
    made = steps.runs(method, tokens, 40, 36, 0)
    dense = {step: steps.dense(take, 36, 40) for step, take in made.items()}
    copies = {"lora": 1 if tokens >= 80 else 0}.get(method, 2 if tokens >= 40 else 0)
    assert dense["plain"] == copies and dense["mgpo"] == (0 if method == "lora" else copies)
    assert dense["sam"] == 2 * dense["plain"] and dense["ggpo"] > dense["mgpo"]
    flops = {step: count_flops(take) for step, take in made.items()}
    assert flops["sam"] == 2 * flops["plain"]


@pytest.mark.parametrize("method", ["cola", "rac", "c3la", "random_c3la"])
def test_a_step_counts_the_same_at_every_link(method):
    x, g = layer.numbers(0, (64, 48), (64, 40))
    x.requires_grad_()
    found = [
        layer.exact(partial(layer.step, model, x, g), partial(model, x), layer.tensors(model))
        for model in chains.models(method, 48, 40).values()
    ]
    assert all(own == found[0] for own in found)


# Merging

floats = st.floats(-1e6, 1e6, width=32)


@given(
    pairs=st.lists(st.tuples(floats, floats), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_the_rounding_error_of_a_merge_is_exact(pairs, dtype):
    W0, change = (torch.tensor([p], dtype=torch.float64).T for p in zip(*pairs, strict=True))
    W0, change = W0.to(dtype), change.to(torch.promote_types(dtype, torch.float32))
    target = torch.empty_like(W0)
    reported = write_sum(target, W0, change)
    gaps = [
        abs(Fraction(s) - Fraction(a) - Fraction(b))
        for s, a, b in zip(
            target.flatten().tolist(), W0.flatten().tolist(), change.flatten().tolist(), strict=True
        )
    ]
    assert torch.equal(target, (W0.to(change.dtype) + change).to(dtype))
    assert (
        math.isclose(reported, float(max(gaps)), rel_tol=1e-12, abs_tol=0)
        if dtype != torch.float32
        else Fraction(reported) == max(gaps)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merge_that_isnt_finite_has_no_finite_error(bad, dtype):
    W0, change = torch.ones(3, 2, dtype=dtype), torch.ones(3, 2)
    change[1, 1] = bad
    assert not math.isfinite(write_sum(torch.empty_like(W0), W0, change))
    assert not math.isfinite(
        rounding(
            torch.full((1, 1), 1e5).half(), torch.ones(1, 1).half(), torch.full((1, 1), 1e5)
        ).item()
    )


def test_the_merge_benchmark_times_what_merge_writes():
    model = layer.shaken(
        lb.adapt(
            torch.nn.Sequential(layer.frozen(6, 5), layer.frozen(5, 4)), "lora", ["0", "1"], r=2
        )
    )
    sums = merge.written(merge.blocks(model))
    lb.merge(model)
    assert all(torch.equal(model[i].weight, total) for i, total in enumerate(sums))


# Whole steps


def linear_shapes():
    "(m, n) of every linear map of the small model."
    return [
        (part.in_features, part.out_features)
        for part in gpu.small()[0].modules()
        if isinstance(part, torch.nn.Linear)
    ]


@pytest.mark.parametrize("name", ["floor", *gpu.IN_PEFT, *gpu.METHODS])
def test_a_step_changes_what_trains_and_nothing_else(name):
    step, model = gpu.contender(name, gpu.small, "cpu")
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step(), step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert (
        moved == trains if name not in ("full", "floor") else moved <= trains
    )  # in bfloat16 one step is too small for a weight of 1
    assert bool(moved) == bool(trains) == (name != "floor") and all(
        p.grad is None for p in model.parameters()
    )


def test_a_step_of_the_floor_and_what_training_adds_to_it():
    flops = {
        name: count_flops(gpu.contender(name, gpu.small, "cpu")[0])
        for name in ("floor", "full", "lora", "asymmetric", "cla")
    }
    beyond, tokens, r = (
        {name: own - flops["floor"] for name, own in flops.items()},
        2 * 16,
        gpu.RANK,
    )
    assert beyond["full"] == 2 * tokens * sum(m * n for m, n in linear_shapes())
    assert beyond["lora"] == 6 * tokens * r * sum(m + n for m, n in linear_shapes())
    assert beyond["cla"] < beyond["asymmetric"] < beyond["lora"]


def test_rows_hold_a_ratio_to_the_floor_and_to_peft():
    time = {}
    for name in ("floor", "PEFT LoRA", "PEFT DoRA", "cla", "dora"):
        step, _ = gpu.contender(name, gpu.small, "cpu")
        time[name] = [calls(step) for _ in range(3)][
            -1
        ]  # the first step makes the optimizer's state
    rows = gpu.measured(
        "small",
        ["cla", "dora"],
        1,
        2,
        lambda name, build: (gpu.contender(name, build, "cpu")[0], {"peak": len(name)}),
        calls,
    )
    found = {row["name"]: row for row in rows}
    assert (
        list(found) == ["floor", *gpu.IN_PEFT, "cla", "dora"]
        and found["floor"]["milliseconds"] == time["floor"]
    )
    for name, own in time.items():
        assert found[name]["ratio"] == round(own / time["floor"], 3) and found[name]["peak"] == len(
            name
        )
    for name, key, peer in (
        ("cla", "to_lora", "PEFT LoRA"),
        ("dora", "to_lora", "PEFT LoRA"),
        ("dora", "to_peer", "PEFT DoRA"),
    ):
        assert (
            set(found[name][key]) == {"ratio", "low", "high"}
            and len(set(found[name][key].values())) == 1
        )
        assert found[name][key]["ratio"] == pytest.approx(
            time[name] / time[peer], rel=0, abs=0.000501
        )  # three digits
    assert (
        not any("to_lora" in found[name] for name in ("floor", *gpu.IN_PEFT))
        and "to_peer" not in found["cla"]
    )


@pytest.mark.parametrize("texts, length", [(2, 16), (3, 40)])
def test_lora_keeps_a_shared_input_once_and_none_that_attention_keeps_and_peft_keeps_each(
    texts, length
):
    held = {}
    for name in ("lora", "PEFT LoRA", "cla"):
        model = gpu.contender(name, gpu.small, "cpu")[1]
        x = torch.randn(texts, length, 64, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            held[name] = saved_bytes(partial(model, inputs_embeds=x), layer.tensors(model))
    ours, each = (
        2 * (64 + 64 + 128),
        sum(m for m, _ in linear_shapes()),
    )  # of q, k, v; of gate, up; of down; in two layers
    assert held["lora"] - held["cla"] == 2 * (
        texts * length * ours + gpu.RANK * each
    )  # and A in bfloat16
    assert held["PEFT LoRA"] - held["cla"] == 2 * (texts * length * each + gpu.RANK * each)


@given(times=st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_calls_are_counted_but_for_views_and_memory(times):
    x = torch.ones(3, 4)
    assert (
        calls(
            lambda: (
                [x.t()[0].view(3, 1) for _ in range(times)] + [torch.empty(3)] + [x.sum().item()]
            )
        )
        == 1
    )
    assert calls(lambda: [(x + 1) @ x.t() for _ in range(times)]) == 2 * times


# Reckoning


def test_a_ratio_is_against_the_two_runs_beside_it(monkeypatch):
    clock = iter([0, 2, 2, 8, 8, 12])  # the base takes 2, the contender 6, the base 4
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock))
    assert timing.one_build({"base": int, "own": int}, "base", 1, random.Random(0), warm=0) == {
        "own": [2.0]
    }


@given(st.lists(st.lists(st.floats(0.5, 2), min_size=3, max_size=5), min_size=3, max_size=5))
@settings(max_examples=20, deadline=None)
def test_the_interval_holds_the_middle_and_ignores_one_bad_round(builds):
    own = timing.summary(builds)
    assert own["low"] <= own["ratio"] <= own["high"] and timing.summary(builds) == own
    assert timing.summary([[3.0] * 4] * 3) == {"ratio": 3.0, "low": 3.0, "high": 3.0}
    assert timing.middle([[1, 1, 99], [1, 1, 1], [1, 99, 1]]) == 1
    assert timing.quotients([[2, 6]], [[1, 2]]) == [[2, 3]]


@pytest.mark.parametrize("tokens, m, n", [(5, 24, 30), (70, 24, 20)])
def test_the_products_alone_are_those_of_a_step_of_lora(tokens, m, n):
    model, (x, g) = (
        layer.adapted("lora", m, n, layer.RANK),
        layer.numbers(3, (tokens, m), (tokens, n)),
    )
    adapter = lb.adapters(model)["0"]
    Y = model(x.requires_grad_())
    wanted = [Y, *torch.autograd.grad(Y, [x, adapter.A, adapter.B], g)]
    base = layer.frozen(m, n)
    base.bias.copy_(model[0].bias)
    for own, one in zip(layer.products(base, adapter.A, adapter.B, x, g), wanted, strict=True):
        assert torch.allclose(own, one, atol=1e-5)
    assert {"floor", "lora", "products"} == layer.layer_runs(
        ["lora", "products"], [], tokens, m, n, 0
    ).keys()


def test_processors_are_told_apart(tmp_path):
    (tmp_path / "one").write_text(
        "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon:"
        " a\nstepping\t: 7\n"
    )
    (tmp_path / "other").write_text(
        "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nstepping\t: 7\n"
    )
    assert timing.processor(tmp_path / "one") == f"{platform.machine()} GenuineIntel 6 85 7"
    assert timing.processor(tmp_path / "other") == f"{platform.machine()} GenuineIntel 6 143 7"
    assert (
        timing.processor(tmp_path / "none") == platform.machine()
        and timing.setting()["processor"] == timing.processor()
    )


# What is stored


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_name_their_setting_and_no_host(path):
    stored = json.loads(path.read_text())
    needed = {"torch", "python", "processor", "cores", "threads", "rounds"} | (
        {"device", "dtype"} if path.stem.startswith("gpu-") else set()
    )
    assert needed <= stored["setting"].keys() <= needed | {"builds"}
    assert re.fullmatch(
        r"NVIDIA [A-Z]+\d+[\w ]*", stored["setting"].get("device", "NVIDIA H100")
    )  # a model, as the driver calls it
    for row in stored["rows"]:
        assert row["name"] and row["ratio"] > 0
        assert row["ratio"] == 1 or row["low"] <= row["ratio"] <= row["high"]


def test_a_run_is_appended_behind_those_that_the_file_holds(tmp_path, monkeypatch, capsys):
    path, row, how = (
        tmp_path / "runs.json",
        {"name": "lora", "ratio": 1.1},
        {"torch": "2", "builds": 3},
    )
    for number in (1, 2, 3):
        timing.store(
            layer.another_run(layer.stored_runs(path, how), [row, row | {"name": "full"}]),
            path,
            how,
        )
        rows = json.loads(path.read_text())["rows"]
        assert [(own["run"], own["name"]) for own in rows] == [
            (run, name) for run in range(1, number + 1) for name in ("lora", "full")
        ]
    monkeypatch.setattr("sys.argv", ["layer", "--append"])
    with pytest.raises(SystemExit):
        layer.main()
    assert "--out FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"torch": "3"}, "torch"),
        ({"device": "H100"}, "device"),
        ({"torch": "3", "builds": 4}, "builds, torch"),
    ],
)
def test_a_run_in_another_setting_is_not_appended(tmp_path, monkeypatch, capsys, more, named):
    path, how = tmp_path / "runs.json", {"torch": "2", "builds": 3}
    timing.store(layer.another_run([], [{"name": "lora", "ratio": 1.1}]), path, how)
    before = path.read_bytes()
    monkeypatch.setattr(layer, "setting", lambda **given: how | more)
    monkeypatch.setattr(
        layer, "one_layer", lambda *given: pytest.fail("measured, though the run can't be stored")
    )
    monkeypatch.setattr("sys.argv", ["layer", "--append", "--out", str(path)])
    with pytest.raises(SystemExit):
        layer.main()
    assert f"another setting: {named}" in capsys.readouterr().err and path.read_bytes() == before


def test_every_method_with_a_goal_is_stored():
    rows = json.loads((STORED[0].parent / "layer-2048.json").read_text())["rows"]
    assert {row["name"]: row["goal"] for row in rows if row["goal"]} == layer.GOALS
    exact = layer.layer_exact(["lora", "cla"], ["PEFT LoRA"], 2048, 768, 768)
    for row in rows:
        if row["name"] in exact:
            assert {key: row[key] for key in ("saved", "peak", "flops")} == exact[row["name"]], row[
                "name"
            ]


def test_freed_memory_stays_with_the_process_where_the_c_library_can():
    import platform
    import resource

    assert timing.keep_memory() == (platform.libc_ver()[0] == "glibc")
    if not timing.keep_memory():
        pytest.skip("the C library isn't glibc")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(2**21)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 512, "8 MB are 2048 pages, and they should have been there already"
