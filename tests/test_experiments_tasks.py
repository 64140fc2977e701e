"""Tasks: losses and measures against scikit-learn, scipy and transformers; padding, batch size and
processes never change them.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics

from lora_book.core.errors import BadValue, MissingFile, UnknownName
from lora_book.experiments import tasks
from lora_book.lab import data as book
from lora_book.lab.models import load_model

CLASSES = st.integers(1, 40).flatmap(
    lambda rows: st.tuples(*[st.lists(st.integers(0, 4), min_size=rows, max_size=rows)] * 2)
)
WORDS = st.text("abcdefgh ", min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def close(found: dict, wanted: dict, tolerance: float = 1e-9) -> bool:
    return found.keys() == wanted.keys() and all(
        abs(found[name] - wanted[name]) <= tolerance for name in found
    )


# Measures


@given(CLASSES)
@settings(max_examples=100, deadline=None)
def test_matthews_and_accuracy_are_scikit_learns(columns):
    guesses, labels = map(torch.tensor, columns)
    assert tasks.matthews(guesses, labels) == pytest.approx(
        metrics.matthews_corrcoef(columns[1], columns[0]), abs=1e-12
    )
    assert tasks.share_right(guesses, labels) == pytest.approx(
        metrics.accuracy_score(columns[1], columns[0]), abs=1e-12
    )


def test_matthews_is_a_correlation_for_two_classes_and_nothing_for_a_constant_guess():
    draw = torch.Generator().manual_seed(0)
    guesses, labels = (torch.randint(0, 2, (50,), generator=draw) for _ in range(2))
    assert tasks.matthews(guesses, labels) == pytest.approx(
        np.corrcoef(guesses, labels)[0, 1], abs=1e-12
    )
    assert tasks.matthews(torch.ones(50, dtype=torch.long), labels) == 0
    assert tasks.matthews(labels, labels) == 1 and tasks.matthews(1 - labels, labels) == -1


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.just(2), st.integers(3, 30)),
        elements=st.integers(-50, 50).map(float),
    )
)
@settings(max_examples=100, deadline=None)
def test_correlations_are_scipys_and_0_for_a_constant(columns):
    guesses, labels = map(torch.from_numpy, columns)
    constant = any(column.min() == column.max() for column in columns)
    for name, measure in tasks.task("regression").measures.items():
        wanted = 0.0 if constant else getattr(stats, name + "r")(*columns).statistic
        assert measure(guesses, labels) == pytest.approx(wanted, abs=1e-12)


# Classification, regression and choice: the loss is the mean over rows, and batches don't matter


class Fixed(torch.nn.Module):
    "A model that returns the scores it is handed as its input."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        return pixel_values * self.weight


@given(st.integers(1, 30), st.integers(2, 5), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_losses_and_measures_are_means_over_rows_whatever_the_batch_size(rows, classes, size, seed):
    draw = torch.Generator().manual_seed(seed)
    scores, labels = (
        torch.randn(rows, classes, generator=draw),
        torch.randint(0, classes, (rows,), generator=draw),
    )
    split = book.Split({"pixel_values": scores, "labels": labels})
    found = tasks.task("image").measure(Fixed(), split, size)
    wanted = {
        "loss": F.cross_entropy(scores.double(), labels).item(),
        "accuracy": (scores.argmax(1) == labels).double().mean().item(),
    }
    assert close(found, wanted, 1e-6)
    values = book.Split({"pixel_values": scores[:, :1], "labels": scores[:, 1] * 2})
    found = tasks.task("regression").measure(Fixed(), values, size)
    assert found["loss"] == pytest.approx(
        (scores[:, 0] - 2 * scores[:, 1]).double().square().mean().item(), rel=1e-5
    )


def test_measuring_puts_the_mode_back_even_when_the_model_raises():
    model, split = (
        Fixed().train(),
        book.Split({"pixel_values": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 9])}),
    )
    with pytest.raises(IndexError):
        tasks.task("image").measure(model, split)
    assert model.training and torch.is_grad_enabled()


def test_half_precision_scores_are_averaged_in_single_precision():
    scores = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    split = book.Split({"pixel_values": scores, "labels": torch.zeros(64, dtype=torch.long)})
    found = tasks.task("image").measure(Fixed().bfloat16(), split, 16)["loss"]
    assert found == pytest.approx(
        F.cross_entropy(scores.double(), torch.zeros(64, dtype=torch.long)).item(), abs=1e-6
    )


@pytest.mark.parametrize(
    "name, kind, data",
    [
        ("tiny_bert", "pair", "docstrings/match"),
        ("tiny_llama", "choice", "kinship/choice"),
        ("tiny_bert", "regression", "docstrings/similarity"),
    ],
)
def test_padding_and_batches_change_no_measure_of_a_text(name, kind, data):
    model, rows = tasks.prepare(name, data, kind, limit=20, judged=20)
    one, other = (tasks.task(kind).measure(model, rows.test, size) for size in (20, 3))
    assert close(one, other, 1e-5)
    assert kind == "regression" or 0 <= one["accuracy"] <= 1


# Several processes, here as threads that meet where processes would


class Crew:
    "One of several threads with the part of Accelerate's `Accelerator` that judging uses."

    device = torch.device("cpu")

    def __init__(self, index: int, box: list, meet: threading.Barrier):
        self.process_index, self.num_processes, self.box, self.meet = index, len(box), box, meet

    def everyones(self, own) -> list:
        self.box[self.process_index] = own
        self.meet.wait(timeout=20)
        found = list(self.box)
        self.meet.wait(timeout=20)
        return found

    def gather(self, units):
        return torch.cat(self.everyones(units))

    def pad_across_processes(self, units, dim):
        most = max(self.everyones(len(units)))
        return torch.cat([units, units.new_zeros(most - len(units), *units.shape[1:])])


def by_all(count: int, act) -> list:
    "What `act(crew)` returns in each of `count` threads."
    box, meet = [None] * count, threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(act, [Crew(index, box, meet) for index in range(count)]))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_every_row_is_judged_by_one_process_and_batches_stay_whole(rows, size, processes):
    split, box = book.Split({"labels": torch.arange(rows)}), [None] * processes
    ends = [tasks.own_rows(split, size, Crew(index, box, None)) for index in range(processes)]
    assert [i for begin, end in ends for i in range(begin, end)] == list(range(rows))
    assert all(begin % size == 0 or begin == end for begin, end in ends)
    counts = [-(-(end - begin) // size) for begin, end in ends]
    assert max(counts) - min(counts) <= 1


@given(st.integers(1, 23), st.integers(1, 9), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_process_finds_the_numbers_of_one(rows, size, processes, seed):
    draw = torch.Generator().manual_seed(seed)
    scores, labels = (
        torch.randn(rows, 4, generator=draw),
        torch.randint(0, 4, (rows,), generator=draw),
    )
    splits = {
        "text": book.Split({"pixel_values": scores, "labels": labels}),
        "regression": book.Split({"pixel_values": scores[:, :1], "labels": scores[:, 1] * 2}),
    }
    for kind, split in splits.items():
        wanted = tasks.task(kind).measure(Fixed(), split, size)
        found = by_all(
            processes,
            lambda crew, kind=kind, split=split: tasks.task(kind).measure(
                Fixed(), split, size, crew
            ),
        )
        assert found == [wanted] * processes


def test_a_mean_of_the_processes_means_would_be_another_number():
    scores, labels = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    split = book.Split({"pixel_values": scores, "labels": labels})
    whole = tasks.task("image").measure(Fixed(), split, 2)["loss"]
    parts = [
        split.between(*tasks.own_rows(split, 2, Crew(index, [None] * 2, None)))
        for index in range(2)
    ]
    assert (
        abs(
            sum(tasks.task("image").measure(Fixed(), part, 2)["loss"] for part in parts) / 2 - whole
        )
        > 1e-3
    )


# Choices

QUESTIONS = st.lists(
    st.tuples(WORDS, st.lists(WORDS, min_size=3, max_size=3, unique=True), st.integers(0, 2)),
    min_size=1,
    max_size=4,
)


def widened(tensors: dict, extra: int) -> dict:
    "The same rows with more padding, whose numbers are no padding token."
    fills = {"input_ids": 7, "attention_mask": 0, "targets": -100}
    return {
        name: F.pad(value, (0, extra), value=fills[name]) if name in fills else value
        for name, value in tensors.items()
    }


def by_definition(model, question: str, answer: str) -> list:
    "The log-probability of each letter of an answer and of its end, one model call a letter."
    ids, told, found = (
        book.to_bytes([question], 64)[0][: len(question) + 1],
        book.to_bytes([answer], 64)[0][: len(answer) + 1],
        [],
    )
    for letter in told:
        with torch.no_grad():
            found.append(model(input_ids=ids[None]).logits[0, -1].log_softmax(-1)[letter].item())
        ids = torch.cat([ids, letter[None]])
    return found


@given(QUESTIONS, st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_an_answer_weighs_what_the_definition_says_whatever_stands_beside_it(rows, extra):
    model, split = small().double(), book.choice_split(rows, (32, 32))
    with torch.no_grad():
        scores, labels = tasks.weighed(model, widened(split.tensors, extra))
    right = []
    for i, (question, answers, own) in enumerate(rows):
        letters = [by_definition(model, question, answer) for answer in answers]
        wanted = torch.tensor(
            [[sum(each), sum(each) / len(each)] for each in letters], dtype=torch.float64
        )
        assert torch.allclose(scores[i], wanted, rtol=0, atol=1e-10)
        right.append([wanted[:, score].argmax().item() == own for score in (0, 1)])
    found = tasks.task("choice").measure(model, split, 2)
    assert [found["accuracy"], found["accuracy_norm"]] == torch.tensor(right).double().mean(
        0
    ).tolist()
    assert found["loss"] == pytest.approx(
        -scores[range(len(rows)), labels, 0].mean().item(), abs=1e-10
    )


@given(QUESTIONS, st.permutations(range(3)))
@settings(max_examples=20, deadline=None)
def test_permuted_answers_permute_the_scores_and_the_choice(rows, order):
    model = small().double()
    moved = [
        (question, [answers[j] for j in order], order.index(own)) for question, answers, own in rows
    ]
    with torch.no_grad():
        (scores, _), (other, labels) = (
            tasks.weighed(model, book.choice_split(some, (32, 32)).tensors)
            for some in (rows, moved)
        )
    assert torch.allclose(other, scores[:, list(order)], rtol=0, atol=1e-10)
    assert torch.equal(
        other[..., 0].argmax(1),
        torch.tensor([order.index(i) for i in scores[..., 0].argmax(1).tolist()]),
    )
    assert torch.equal(tasks.shares(other), tasks.shares(scores)[:, list(order)])
    assert tasks.earned(0)(tasks.shares(other), labels) == tasks.earned(0)(
        tasks.shares(scores), torch.tensor([own for *_, own in rows])
    )


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6), st.data()
)
@settings(max_examples=60, deadline=None)
def test_answers_that_tie_for_the_best_share_the_point_wherever_they_stand(whole, data):
    scores = torch.tensor(whole, dtype=torch.float64)[..., None].expand(-1, -1, 2)
    labels = torch.tensor([data.draw(st.integers(0, 3)) for _ in whole])
    wanted = [(row[right] == max(row)) / row.count(max(row)) for row, right in zip(whole, labels)]
    points = tasks.shares(scores)
    assert tasks.earned(0)(points, labels) == pytest.approx(sum(wanted) / len(wanted), abs=1e-12)
    assert torch.allclose(points.sum(1), torch.ones((), dtype=torch.float64))


def test_a_model_that_knows_nothing_gets_the_share_of_a_guess_wherever_the_right_answers_stand():
    model = small()
    torch.nn.init.zeros_(model.lm_head.weight)
    split = book.choice_split([(f"q{i}", ["ab", "cd", "ef", "gh"], 0) for i in range(5)], (32, 32))
    found = tasks.task("choice").measure(model, split)
    assert found["accuracy"] == found["accuracy_norm"] == 0.25
    assert found["loss"] == pytest.approx(3 * math.log(264), rel=1e-6)


def test_training_reads_the_right_answer_alone_and_its_loss_is_the_judged_one():
    rows = [("one", ["ab", "cde", "f"], 1), ("another", ["gh", "i", "jk"], 2)]
    model, kind = small().double(), tasks.task("choice")
    batch = book.choice_split(rows, (32, 32)).tensors
    loss = kind.loss(model, batch)
    assert loss.item() == pytest.approx(
        kind.measure(model, book.choice_split(rows, (32, 32)))["loss"], abs=1e-10
    )
    others = book.choice_split(
        [("one", ["xyz", "cde", "y"], 1), ("another", ["z", "xy", "jk"], 2)], (32, 32)
    ).tensors
    assert kind.loss(model, others).item() == pytest.approx(loss.item(), abs=1e-10)
    own = torch.autograd.grad(loss, model.lm_head.weight)[0]
    both = -tasks.weighed(model, batch)[0][range(2), [1, 2], 0].mean()
    assert torch.allclose(
        own, torch.autograd.grad(both, model.lm_head.weight)[0], rtol=0, atol=1e-10
    )
    assert kind.lesson(batch)["input_ids"].shape[:2] == (2, 1)


def test_an_answer_that_begins_another_is_never_the_less_likely_one_without_its_end():
    model = small()
    batch = book.choice_split([("who", ["son", "son-in-law"], 0)], (32, 32)).tensors
    with torch.no_grad():
        bare = tasks.weighed(
            model,
            batch | {"targets": batch["targets"].masked_fill(batch["targets"] == book.END, -100)},
        )[0][0, :, 0]
    assert bare[0] > bare[1]


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_t5", "tiny_vit"])
@pytest.mark.parametrize("kind, data", [("choice", "kinship/choice"), ("causal", "kinship/facts")])
def test_a_model_that_continues_no_text_is_refused(name, kind, data):
    with pytest.raises(BadValue, match="causal language model"):
        tasks.prepare(name, data, kind, limit=4, judged=4)


# Generation


def small():
    "A random model that reads bytes, its data in one row each."
    return load_model("tiny_llama", seed=3)


def rows_of(texts) -> book.Split:
    return book.joined(book.generation_split(texts, (32, 32)))


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=7), st.integers(1, 8), st.integers(0, 9)
)
@settings(max_examples=25, deadline=None)
def test_the_loss_of_a_generator_counts_each_target_letter_once_and_nothing_else(
    texts, size, extra
):
    model, split = small(), rows_of(texts)
    found = tasks.task("causal").measure(model, split, size)
    losses = []
    with torch.no_grad():
        for text in texts:
            row = rows_of([text])
            scores, labels = model(input_ids=row["input_ids"]).logits[0, :-1], row.labels[0, 1:]
            losses.append(
                F.cross_entropy(scores, labels, ignore_index=-100, reduction="none")[labels != -100]
            )
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    wide = book.Split(
        {
            "input_ids": F.pad(split["input_ids"], (0, extra), value=7),
            "attention_mask": F.pad(split["attention_mask"], (0, extra)),
            "labels": F.pad(split.labels, (0, extra), value=-100),
        }
    )
    assert tasks.task("causal").loss(model, wide.tensors).item() == pytest.approx(
        tasks.task("causal").loss(model, split.tensors).item(), abs=1e-5
    )


def slowly(model, source, count):
    "Greedy writing for one source, by the definition: the whole text again for every letter."
    ids = source.clone()
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        if ids[-1] == book.END:
            break
    return ids[len(source) :]


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_a_batch_is_written_as_each_source_alone_without_a_cache(texts):
    model, batch = small(), rows_of(texts).tensors
    written, targets = tasks.write(model, batch)
    for i, (source, target) in enumerate(texts):
        own = slowly(model, book.to_bytes([source], 32)[0][: len(source) + 1], targets.shape[1])
        assert written[i, : len(own)].tolist() == own.tolist()
        assert book.from_bytes(targets[i].masked_fill(targets[i] == -100, book.PAD)) == target


def test_exact_match_asks_for_the_whole_text_and_its_end():
    model, sources = small(), ["ab", "a longer source", "c"]
    own = [
        slowly(model, book.to_bytes([source], 32)[0][: len(source) + 1], 6) for source in sources
    ]

    def judged(targets):
        rows = [
            torch.cat([book.to_bytes([source], 32)[0][: len(source) + 1], target])
            for source, target in zip(sources, targets)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True
        )
        labels = torch.full_like(ids, -100)
        for i, (source, target) in enumerate(zip(sources, targets)):
            labels[i, len(source) + 1 : len(source) + 1 + len(target)] = target
        return tasks.exact_match(
            model, book.Split({"input_ids": ids, "attention_mask": mask, "labels": labels}), 2
        )

    assert judged(own) == 1
    spoilt = [own[0], torch.cat([own[1][:-1], (own[1][-1:] + 1) % 258]), own[2]]
    assert judged(spoilt) == pytest.approx(2 / 3)
    assert (
        judged(
            [
                torch.cat([row, torch.tensor([book.END])]) if row[-1] != book.END else row
                for row in own
            ]
        )
        < 1
    )


def test_writing_is_bounded(monkeypatch):
    asked = []
    monkeypatch.setattr(
        tasks,
        "write",
        lambda model, batch: (
            asked.append(len(batch["labels"])) or (batch["labels"], batch["labels"])
        ),
    )
    split = rows_of([("a", "b")] * (tasks.WRITTEN + 5))
    assert tasks.exact_match(small(), split, 50) == 1 and sum(asked) == tasks.WRITTEN


# A model and its data


@pytest.mark.parametrize(
    "model, data, kind, outputs",
    [
        ("tiny_bert", "docstrings/source", "text", 7),
        ("tiny_llama", "kinship/2", "pair", 22),
        ("tiny_vit", "digits", "image", 10),
        ("tiny_bert", "docstrings/similarity", "regression", 1),
        ("tiny_llama", "docstrings/choice", "choice", 1),
        ("tiny_llama", "kinship/choice", "choice", 1),
        ("tiny_llama", "kinship/facts", "causal", 264),
        ("tiny_gpt2", "docstrings/signature", "causal", 264),
    ],
)
def test_a_model_gets_the_head_and_the_tokens_that_the_data_needs(model, data, kind, outputs):
    made, rows = tasks.prepare(model, data, kind, seed=1, limit=12, judged=8)
    batch = next(book.batches(rows.train, 4))
    scores, labels = tasks.task(kind).answers(made, batch)
    assert tasks.task(kind).loss(made, batch).ndim == 0 and torch.isfinite(
        tasks.task(kind).loss(made, batch)
    )
    assert (
        len(rows.train) == 12
        and len(rows.test) == len(rows.validation) == 8
        and len(scores) == len(labels)
    )
    assert outputs == (scores.shape[-1] if scores.ndim == 2 and kind != "choice" else 1)
    _, same = tasks.prepare(model, data, kind, seed=2, limit=12, judged=8)
    assert same.hash == rows.hash


def test_all_rows_are_taken_when_no_number_is_given():
    _, rows = tasks.prepare("tiny_vit", "digits", "image", limit=None, judged=0)
    whole = book.load_data("digits")
    assert [len(split) for split in rows.splits.values()] == [
        len(split) for split in whole.splits.values()
    ]


def test_wrong_names_and_kinds_are_refused():
    with pytest.raises(UnknownName, match="regression"):
        tasks.task("regresion")
    with pytest.raises(BadValue, match="generation"):
        tasks.prepare("tiny_bert", "docstrings/match", "causal")
    with pytest.raises(UnknownName):
        tasks.prepare("minilmm", "docstrings/match", "pair", limit=4)


@pytest.mark.parametrize(
    "model, data, kind, instead",
    [
        ("roberta-base", "glue/mrpc", "pair", "docstrings/match"),
        ("tinyllama", "openbookqa", "choice", "kinship/choice"),
        ("deberta-v3-base", "glue/stsb", "regression", "docstrings/similarity"),
        ("deepseek-coder", "django", "causal", "kinship/facts"),
        ("tinyllama", "logiqa", "choice", "kinship/choice"),
        ("tinyllama", "folio", "pair", "kinship"),
        ("vit_tiny_patch16_224", "cifar10", "image", "digits"),
        ("gpt2", "docstrings/signature", "causal", "byte_llama"),
    ],
)
def test_without_a_hub_the_offline_choice_is_named(model, data, kind, instead):
    with pytest.raises(MissingFile, match=f"(byte_llama|minilm|{instead})"):
        tasks.prepare(model, data, kind)
