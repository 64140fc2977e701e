"""Reading stored runs: nothing invented, missing runs said to be missing, effects as the
protocol gives them.
"""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadValue, UnknownName
from lora_book.experiments import text
from lora_book.experiments.rows import row
from lora_book.lab.protocol import effects

ROW = "vit_tiny/cifar10"
SHARES = st.lists(st.integers(0, 250).map(lambda count: count / 250), min_size=1, max_size=5)


def run(method: str, seed: int, accuracy: float, loss: float = 0.5, **other) -> dict:
    return {
        "row": ROW,
        "method": method,
        "profile": "laptop",
        "seed": seed,
        "settings": {"judged": 250},
        "stand_ins": {},
        "metric": "accuracy",
        "trained": 10,
        "train": {"loss": 0.2},
        "test": {"loss": loss, "accuracy": accuracy},
        "seconds": 30.0,
        "data_hash": "ab" * 32,
    } | other


def runs(**methods) -> list:
    return [
        run(method, seed, value)
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]


@given(SHARES, SHARES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_table_says_mean_spread_and_the_effect_whatever_the_order_of_the_files(
    lora, c3la, random
):
    stored = runs(lora=lora, c3la=c3la)
    wanted = text.compared(ROW, found=stored)
    random.shuffle(stored)
    found = text.compared(ROW, found=stored)
    assert found == wanted and list(found) == list(row(ROW).methods)
    assert (
        found["c3la"]["test"].startswith(f"{100 * statistics.mean(c3la):.1f}")
        and found["lora"]["minus lora"] == ""
    )
    both = range(min(len(lora), len(c3la)))
    pair = tuple({seed: 100 * values[seed] for seed in both} for values in (c3la, lora))
    said = effects({"c3la": pair})["c3la"].text(1) if len(both) > 1 else "missing"
    assert found["c3la"]["minus lora"] == said


def test_missing_runs_are_said_to_be_missing_and_other_profiles_are_not_used():
    stored = runs(lora=[0.9, 0.8]) + [run("cla", seed, 0.5, profile="smoke") for seed in range(3)]
    found = text.compared(ROW, found=stored)
    assert found["cla"] == {
        "test": "missing",
        "minus lora": "missing",
        "gap": "missing",
        "trained": None,
    }
    assert text.summary(ROW, found=stored).count("0 of 0 comparisons") == 1
    assert "no run is stored" in text.effort(ROW, found=[])
    assert (
        "too few runs" in text.resolution(ROW, found=stored)
        and text.compared(ROW, found=[])["lora"]["test"] == "missing"
    )


def test_a_clear_difference_is_told_and_a_small_one_is_not():
    stored = runs(
        lora=[0.80, 0.81, 0.82],
        cla=[0.90, 0.91, 0.92],
        rac=[0.815, 0.80, 0.83],
        full=[0.5, 0.512, 0.52],
    )
    found = {m: line["minus lora"] for m, line in text.compared(ROW, found=stored).items()}
    assert found["cola"] == "missing" and found["full"].startswith("-29.9 [")
    assert found["full"].endswith(" *") and not found["rac"].endswith(" *")
    said = text.summary(ROW, found=stored)
    assert "full -29.9" in said and "rac" not in said


def test_a_reference_without_runs_is_missing_and_not_an_error():
    stored = runs(cla=[0.9, 0.8])
    for reference in ("lora", "loldu"):
        assert (
            text.compared(ROW, reference, found=stored)["cla"][f"minus {reference}"] == "missing"
            and text.thresholds(ROW, reference, found=stored) == []
        )


def test_an_effect_is_in_the_metrics_own_unit():
    stored = [
        run(m, s, 0.0, metric="perplexity")
        | {"test": {"loss": 1.0, "perplexity": value + s * s / (100 if m == "cla" else 50)}}
        for m, value in (("lora", 3.0), ("cla", 2.0))
        for s in range(3)
    ]
    assert text.compared(ROW, found=stored)["cla"]["minus lora"].startswith("-1.0")


def test_runs_of_other_data_are_not_averaged():
    with pytest.raises(BadValue, match="data_hash"):
        text.compared(
            ROW,
            found=[
                run("lora", 0, 0.5),
                run("lora", 1, 0.5),
                run("cla", 0, 0.5),
                run("cla", 1, 0.5, data_hash="cd"),
            ],
        )


def test_the_gap_is_test_minus_training_loss_and_the_papers_range_its_own():
    assert text.gap(run("lora", 0, 0.5, loss=0.75)) == pytest.approx(0.55)
    assert text.printed_range(ROW) > 0 and text.printed_range("mgpo/t5_base/mrpc") is None
    with pytest.raises(UnknownName):
        text.runs_of("vit_tiny/cifar11", found=[])


def test_both_scales_of_a_row_are_laid_out():
    found = text.scales(ROW)
    assert (
        found["model"] == ["vit_tiny_patch16_224", "digits_vit"]
        and found["examples"][0] == "all"
        and set(found) == set(text.SIZES)
    )


def test_dots_draw_every_run_once_and_name_what_is_missing():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    text.dots(ax, ROW, found=runs(lora=[0.9, 0.8, 0.7], cla=[0.5]))
    drawn = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    assert sum(map(len, drawn)) == 4 and [note.get_text() for note in ax.texts] == ["missing"] * (
        len(row(ROW).methods) - 2
    )
    plt.close("all")


def test_a_measure_that_was_not_made_is_said_to_be_missing():
    stored = [run("lora", seed, 0.5, metric="bleu") for seed in range(3)]
    assert text.compared(ROW, found=stored)["lora"]["test"] == "not measured"
