"""Offline data: same rows everywhere, balanced, nothing leaked; the hub is served or refused, never
replaced.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, LoraBookError, MissingFile, UnknownName
from lora_book.lab import data as book
from lora_book.lab import hub, kinship

TEXTS = ("docstrings/source", "docstrings/match", "kinship", "kinship/2")
ALL = (
    *TEXTS,
    "docstrings/signature",
    "docstrings/choice",
    "docstrings/similarity",
    "kinship/facts",
    "lessons",
    "digits",
    "mnist5000",
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def fresh(code: str, **environ) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def no_leak(splits: dict) -> bool:
    sets = [set(map(book.plain, split)) for split in splits.values()]
    return not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def is_balanced(labels, classes: int) -> bool:
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.long), minlength=classes)
    return int(counts.max() - counts.min()) <= 1


# Determinism


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gets_the_same_rows():
    names = ("docstrings/source", "docstrings/signature", "kinship/2")
    code = (
        "from lora_book.lab.data import load_data; print([load_data(n, limit=60).hash for n in"
        f" {names!r}])"
    )
    assert ast.literal_eval(fresh(code, PYTHONHASHSEED="77")) == [
        book.load_data(name, limit=60).hash for name in names
    ]


def test_importing_the_module_loads_none_of_the_heavy_packages():
    code = (
        "import sys, types; sys.modules['lora_book'] = types.ModuleType('lora_book'); import"
        " importlib.util as u;sys.modules['lora_book'].__path__ ="
        f" [{str(os.path.dirname(os.path.dirname(book.__file__)))!r}];import"
        " lora_book.lab.data;print([n for n in ('transformers', 'datasets', 'sklearn', 'pandas',"
        " 'timm', 'matplotlib', 'torchvision') if n in sys.modules])"
    )
    assert fresh(code) == "[]"


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99))
def test_images_are_enlarged_as_pytorch_does_it(n, times, seed):
    images = torch.rand(3, n, n, generator=torch.Generator().manual_seed(seed))
    theirs = torch.nn.functional.interpolate(
        images[:, None].double(), size=n * times + 1, mode="bilinear", align_corners=False
    )[:, 0]
    ours = book.enlarged(images, n * times + 1)
    assert ours.dtype == torch.float32 and torch.allclose(ours.double(), theirs, atol=2e-6)


def test_an_older_processor_has_the_same_images():
    code = (
        "from lora_book.lab.data import load_data; import torch;"
        " print([torch.backends.cpu.get_cpu_capability(), *(load_data(n).hash for n in ('digits',"
        " 'mnist5000'))])"
    )
    assert ast.literal_eval(fresh(code, ATEN_CPU_CAPABILITY="default")) == [
        "DEFAULT",
        *(book.load_data(n).hash for n in ("digits", "mnist5000")),
    ]


def test_the_seed_changes_the_rows_and_the_hash_sees_one_changed_number():
    one, other = (
        book.load_data("digits", seed=0, limit=20),
        book.load_data("digits", seed=1, limit=20),
    )
    assert one.hash != other.hash
    one.train["pixel_values"][3, 0, 14, 14] += 1e-3
    assert book.content_hash(one) != book.load_data("digits", seed=0, limit=20).hash


def test_global_random_states_are_not_touched():
    before = torch.random.get_rng_state(), random.getstate()
    next(book.batches(book.kinship(seed=3, families=8).train, 8))
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()


@given(st.lists(st.text(max_size=8), max_size=30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_ranked_is_a_permutation_that_depends_on_content_alone(keys, seed):
    order = book.ranked(keys, seed)
    assert sorted(order) == list(range(len(keys)))
    if len(set(keys)) == len(keys):
        turned = book.ranked(keys[::-1], seed)
        assert [keys[i] for i in order] == [keys[::-1][i] for i in turned]


# Splits


@given(
    sizes=st.lists(st.integers(4, 30), min_size=2, max_size=5),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_partition_is_disjoint_and_every_prefix_is_balanced(sizes, seed, data):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    parts = book.partition(range(len(labels)), labels, seed)
    flat = [i for part in parts.values() for i in part]
    assert len(flat) == len(set(flat)) == len(sizes) * min(sizes)
    for part in parts.values():
        stop = data.draw(st.integers(0, len(part)))
        assert is_balanced([labels[i] for i in part[:stop]], len(sizes))
    assert not is_balanced([labels[i] for i in sorted(flat)[: min(sizes)]], len(sizes))


@pytest.mark.parametrize("name", ALL)
def test_splits_are_balanced_and_share_no_row(name):
    data = book.load_data(name)
    assert len(data.train) > len(data.test) > 100 and len(data.validation) > 100
    if data.classes:
        assert all(is_balanced(split.labels, len(data.classes)) for split in data.splits.values())
        assert all(
            int(split.labels.max()) == len(data.classes) - 1 for split in data.splits.values()
        )
    if name not in book.IMAGES:
        assert no_leak({part: map(str, split.texts) for part, split in data.splits.items()})
    else:
        rows = [
            {image.numpy().tobytes() for image in split["pixel_values"]}
            for split in data.splits.values()
        ]
        assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
        assert data.train["pixel_values"].shape[1:] == (1, 28, 28)
        assert (
            0
            <= float(data.train["pixel_values"].min())
            < float(data.train["pixel_values"].max())
            <= 1
        )


def test_the_leak_check_sees_a_planted_twin():
    source = {
        part: list(split.texts)
        for part, split in book.load_data("docstrings/source").splits.items()
    }
    assert no_leak(source)
    source["test"].append(source["train"][0].upper().replace(".", " !"))
    assert not no_leak(source)


@given(
    limit=st.integers(1, 90),
    name=st.sampled_from(["docstrings/source", "docstrings/match", "kinship", "digits"]),
)
@settings(max_examples=15, deadline=None)
def test_a_limit_is_a_balanced_prefix_of_the_whole(limit, name):
    whole, small = book.load_data(name), book.load_data(name, limit=limit)
    for part, split in small.splits.items():
        assert len(split) == min(limit, len(whole.splits[part])) and is_balanced(
            split.labels, len(whole.classes)
        )
        assert all(
            torch.equal(value, whole.splits[part][key][:limit])
            for key, value in split.tensors.items()
        )
        assert split.texts == whole.splits[part].texts[:limit]
    small.train.labels.fill_(0)
    assert int(whole.train.labels.max()) > 0


def test_no_summary_or_half_of_a_pair_crosses_splits():
    match = book.load_data("docstrings/match")
    assert no_leak(
        {part: [second for _, second in split.texts] for part, split in match.splits.items()}
    )
    source = book.load_data("docstrings/source")
    assert not set(source.test.texts) & {second for _, second in match.train.texts}


# Docstrings


def test_each_summary_and_each_name_is_once_right_and_once_wrong():
    for split in book.load_data("docstrings/match").splits.values():
        labels = split.labels.tolist()
        sentences, names = Counter(), Counter()
        for (name, text), label in zip(split.texts, labels):
            sentences[text, label] += 1
            names[name, label] += 1
        assert {count for count in sentences.values()} == {1} and all(
            (text, 1 - label) in sentences for text, label in sentences
        )
        assert all(count == names[name, 1 - label] for (name, label), count in names.items())
        assert labels[::2] == [1] * (len(labels) // 2) and labels[1::2] == [0] * (len(labels) // 2)


def test_summaries_are_single_clean_sentences_without_a_packages_name():
    for package, name, sign, text in book.corpus():
        assert book.SENTENCE.fullmatch(text) or "library" in text
        assert 4 <= len(text.split()) <= 16 and text.isascii() and not book.OWN_NAMES.search(text)
        assert sign.startswith(name.split(".")[-1] + "(") and package in book.PACKAGES


@pytest.mark.parametrize(
    "docstring, kept",
    [
        ("Return the NumPy array of zeros.\n\nMore.", "Return the library array of zeros."),
        ("Compute `x`\nand its inverse.", "Compute x and its inverse."),
        ("no capital letter in here.", None),
        ("Too short.", None),
        ("No full stop at the end", None),
        ("Two sentences stand. In one paragraph.", None),
        ("Has :class:`markup` in the text.", None),
        ("Draws the curve of café customers.", None),
        ("A " + "very " * 16 + "long one.", None),
    ],
)
def test_what_counts_as_a_summary(docstring, kept):
    assert book.summary(docstring) == kept


def test_functions_are_found_where_a_reader_would_find_them():
    source = """
def f(a, /, b=1, *rest, c, **more):
    "Return something quite simple."
def _hidden():
    "Return something quite hidden."
class C:
    async def m(self, x: int):
        "Return something quite late."
    def bare(self): pass
if True:
    def g(cls):
        "Return something quite conditional."
"""
    found = [
        (name, book.signature(node)) for name, node, _ in book.documented(ast.parse(source).body)
    ]
    assert found == [("f", "f(a, b, c)"), ("C.m", "m(x)"), ("g", "g()")]


def test_sentences_of_two_packages_are_dropped_and_twins_collapse():
    rows = [
        ["a", "f", "f()", "Return the sum."],
        ["b", "g", "g()", "Return the sum."],
        ["a", "h", "h()", "Do it now."],
        ["a", "i", "i()", "Do it, now."],
    ]
    assert book.distinct(rows) == [rows[2]]


@pytest.mark.parametrize("damage", ["cut", "altered", "no box", "missing"])
def test_a_damaged_corpus_cache_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(book, "PACKAGES", {"numpy": "numpy"})
    monkeypatch.setattr(
        book, "source_files", lambda folder, real=book.source_files: real(folder)[::6]
    )
    book.corpus.cache_clear()
    made = book.corpus(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert made and json.loads(whole)["content"] == made
    {
        "cut": lambda: path.write_bytes(whole[:-40]),
        "altered": lambda: path.write_bytes(whole.replace(b"Return", b"return", 1)),
        "no box": lambda: path.write_bytes(b"[1]"),
        "missing": path.unlink,
    }[damage]()
    book.corpus.cache_clear()
    assert book.corpus(tmp_path) == made and path.read_bytes() == whole
    book.corpus.cache_clear()


def test_reading_the_sources_imports_nothing_and_restores_the_collector():
    import gc

    before = set(sys.modules)
    assert book.harvest("matplotlib")[:3] == book.harvest("matplotlib")[:3]
    assert (
        not [name for name in set(sys.modules) - before if name.startswith("matplotlib")]
        and gc.isenabled()
    )


def test_a_package_that_is_missing_is_named(monkeypatch):
    with pytest.raises(MissingFile, match="no-such-package"):
        book.package_folder("no-such-package", "no_such_module")


# Numbers


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_bytes_round_trip(texts):
    ids = book.to_bytes(texts, 64)
    assert [book.from_bytes(row) for row in ids] == texts and int(ids.max()) < 258


def test_bytes_are_never_cut():
    with pytest.raises(BadValue, match="7 numbers"):
        book.to_bytes(["ab", "abcdef"], 6)


def test_joined_rows_score_the_target_alone():
    split = book.load_data("docstrings/signature", "test", limit=12)
    both = book.joined(split)
    for i, (source, target) in enumerate(split.texts):
        asked = both["labels"][i] != -100
        assert book.from_bytes(both["labels"][i][asked]) == target
        assert torch.equal(both["input_ids"][i][asked], both["labels"][i][asked])
        assert (
            book.from_bytes(both["input_ids"][i]) == source
            and int(both["attention_mask"][i].sum()) == len(source) + len(target) + 2
        )


def test_token_rows_hold_their_whole_text_almost_always():
    for name in TEXTS:
        mask = book.load_data(name, "train")["attention_mask"]
        assert (mask.sum(1) == mask.shape[1]).double().mean() < 0.02, name


# Batches


@given(
    size=st.integers(1, 40), batch=st.integers(1, 17), seed=st.integers(0, 5), shuffle=st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_batches_visit_every_row_once(size, batch, seed, shuffle):
    split = book.Split({"labels": torch.arange(size), "pixel_values": torch.arange(size) * 2.0})
    seen = list(book.batches(split, batch, seed=seed, shuffle=shuffle))
    rows = torch.cat([part["labels"] for part in seen])
    assert sorted(rows.tolist()) == list(range(size)) and all(
        len(part["labels"]) == batch for part in seen[:-1]
    )
    assert torch.equal(torch.cat([part["pixel_values"] for part in seen]), rows * 2.0)
    again = torch.cat(
        [part["labels"] for part in book.batches(split, batch, seed=seed, shuffle=shuffle)]
    )
    assert torch.equal(rows, again) and (shuffle or rows.tolist() == list(range(size)))


def test_a_generator_goes_on_from_epoch_to_epoch():
    split, generator = book.Split({"labels": torch.arange(30)}), torch.Generator().manual_seed(0)
    one, two = (
        [part["labels"].tolist() for part in book.batches(split, 30, generator=generator)]
        for _ in range(2)
    )
    assert one != two


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    targets=st.lists(st.integers(1, 5), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_trimming_cuts_padding_and_nothing_else(lengths, targets):
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths])
    labels = torch.tensor(
        [[7] * length + [-100] * (5 - length) for length in targets[: len(lengths)]]
    )
    cut = book.trimmed({"input_ids": mask * 3, "attention_mask": mask, "labels": labels})
    assert cut["attention_mask"].shape[1] == max(lengths) and cut["labels"].shape[1] == max(
        targets[: len(lengths)]
    )
    assert int(cut["attention_mask"].sum()) == sum(lengths) and int(
        cut["input_ids"].sum()
    ) == 3 * sum(lengths)
    causal = book.trimmed(
        {"input_ids": mask, "attention_mask": mask, "labels": mask.masked_fill(mask == 0, -100)}
    )
    assert causal["labels"].shape == causal["input_ids"].shape
    full = torch.full_like(mask, 7)
    assert torch.equal(
        book.trimmed({"input_ids": mask, "attention_mask": mask, "labels": full})["labels"], full
    )


# Refusals


@pytest.mark.parametrize(
    "name, instead",
    [
        ("glue/mrpc", "docstrings/match"),
        ("cifar10", "digits"),
        ("clutrr", "kinship"),
        ("someone/something", "docstrings"),
    ],
)
def test_without_a_hub_one_error_names_the_offline_choice(name, instead):
    with pytest.raises(
        MissingFile, match=f"{re.escape(name)}.*HF_HUB_OFFLINE.*{instead}"
    ) as caught:
        book.load_data(name)
    assert isinstance(caught.value, LoraBookError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, near",
    [
        ("docstring/source", "docstrings/source"),
        ("digit", "digits"),
        ("kinship/9", "kinship"),
        ("glue/mrcp", "glue/mrpc"),
        (3, "kinship"),
        ("", "docstrings"),
    ],
)
def test_a_name_nobody_knows_is_answered_with_the_nearest(name, near):
    with pytest.raises(UnknownName, match=near):
        book.load_data(name)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: book.load_data("digits", split="tests"), BadValue),
        (lambda: book.load_data("digits", limit=-1), BadValue),
        (lambda: book.load_data("digits", limit=2.5), BadType),
        (lambda: book.load_data("digits", seed=-1), BadValue),
        (lambda: next(book.batches(book.load_data("digits", "test"), 0)), BadValue),
    ],
)
def test_bad_arguments_are_refused(call, error):
    with pytest.raises(error):
        call()


def test_a_part_is_the_part_of_the_whole():
    whole = book.load_data("digits", limit=10)
    assert torch.equal(
        book.load_data("digits", "test", limit=10)["pixel_values"], whole.test["pixel_values"]
    )
    assert (
        len(book.load_data("digits", limit=0).train) == len(book.load_data("digits").train) > 1000
    )


# Stories


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_told_steps_determine_the_answer_in_every_family(seed):
    sex, parents, partner = kinship.family(random.Random(seed))
    kin, answers = kinship.relations(parents, partner), {}
    assert all(sex[a] != sex[b] for a, b in partner.items()) and all((b, a) in kin for a, b in kin)
    for path in (
        path
        for person in sex
        for hops in (2, 3)
        for path in kinship.walks(kinship.near(kin), (person,), hops)
    ):
        answers.setdefault(tuple(kin[step] for step in zip(path, path[1:])), set()).add(
            kin.get((path[0], path[-1]))
        )
    assert all(len(found) == 1 for found in answers.values())


@given(st.integers(0, 10**6), st.sampled_from([(2,), (3,), (2, 4)]))
@settings(max_examples=15, deadline=None)
def test_a_story_has_one_fact_a_step_and_names_the_asked(seed, hops):
    for (question, told), answer in kinship.family_stories(random.Random(seed), hops):
        asked = re.fullmatch(r"What is (\w+) to (\w+)\?", question).groups()
        assert (
            told.count(".") in hops
            and all(name in told for name in asked)
            and answer in kinship.RELATIONS
        )


# Choices, graded pairs and facts


def test_each_question_has_its_own_name_once_and_no_position_is_favoured():
    records = {record[3]: record for record in book.corpus()}
    for split in book.load_data("docstrings/choice").splits.values():
        for (summary, *names), right in zip(split.texts, split.labels):
            assert (
                names[right] == records[summary][1]
                and len({name.split(".")[-1].lower() for name in names}) == 4
            )
        assert is_balanced(split.labels, 4) and split["input_ids"].shape == split[
            "targets"
        ].shape == (*split.labels.shape, 4, split["attention_mask"].shape[-1])
    with pytest.raises(BadValue, match="same number of answers"):
        book.choice_split([("q", ("a", "b"), 0), ("q", ("a",), 0)])


def test_four_words_of_one_sex_stand_under_each_story_and_its_own_is_among_them():
    told = {
        " ".join(reversed(text)): word
        for part in book.stories(0, (2,), 200)[1].values()
        for text, word in part
    }
    for split in book.load_data("kinship/choice").splits.values():
        assert is_balanced(split.labels, 4)
        for (story, *words), right in zip(split.texts, split.labels):
            side = next(
                side
                for side in (0, 1)
                if re.search(r"What is (\w+) to", story)[1] in kinship.NAMES[side]
            )
            assert (
                words[right] == told[story]
                and len(set(words)) == 4
                and all(word in {own[side] for own in kinship.KIN.values()} for word in words)
            )


@given(
    st.lists(
        st.tuples(
            st.text("ab ", max_size=9),
            st.lists(st.text("cd", min_size=1, max_size=6), min_size=2, max_size=2),
            st.integers(0, 1),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_an_answer_stands_behind_its_question_and_its_letters_and_end_alone_are_targets(rows):
    split = book.choice_split(rows, (16, 16))
    for i, (question, answers, right) in enumerate(rows):
        assert split.labels[i] == right
        for j, answer in enumerate(answers):
            ids, mask, targets = (
                split[name][i, j] for name in ("input_ids", "attention_mask", "targets")
            )
            used = ids[mask.bool()].tolist()
            assert used == [
                *[byte + 2 for byte in question.encode()],
                book.END,
                *[byte + 2 for byte in answer.encode()],
                book.END,
            ]
            assert torch.equal(
                targets != -100, (torch.arange(len(ids)) > len(question.encode())) & mask.bool()
            ) and torch.equal(targets[targets != -100], ids[targets != -100])


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=9),
    st.lists(st.text("xyz", min_size=1, max_size=4), min_size=1, max_size=9),
    st.data(),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_blend_keeps_as_many_words_as_it_says(own, other, data, seed):
    kept = data.draw(st.integers(0, len(own)))
    blend = book.blended(" ".join(own), " ".join(other), kept, seed).split()
    assert (
        len(blend) == len(own)
        and sum(one == new for one, new in zip(own, blend)) == kept
        and set(blend) <= {*own, *other}
    )


def test_grades_lie_between_0_and_5_and_the_sentences_agree_with_them():
    for split in book.load_data("docstrings/similarity").splits.values():
        assert (
            split.labels.dtype == torch.float32
            and split.labels.min() == 0
            and split.labels.max() == 5
        )
        for (text, blend), label in list(zip(split.texts, split.labels))[:200]:
            same = sum(one == new for one, new in zip(text.split(), blend.split()))
            assert 5 * same / len(text.split()) >= label - 1e-5


@given(st.integers(0, 30), st.sampled_from([kinship.PLAIN, kinship.OWNED]))
@settings(max_examples=20, deadline=None)
def test_a_fact_says_in_code_what_its_sentence_says(seed, wordings):
    for sentence, code in kinship.facts(seed, 2, wordings):
        word, one, other = re.fullmatch(r"(\w+)\((\w+), (\w+)\)", code).groups()
        word = word.replace("_", "-")
        assert (
            sentence in [wording.format(a=one, b=other, word=word) for wording in wordings]
            and one != other
        )
        assert (
            one
            in kinship.NAMES[
                next(sex for words in kinship.KIN.values() for sex in (0, 1) if words[sex] == word)
            ]
            or word == "cousin"
        )


def test_the_lessons_hold_no_wording_of_the_facts_to_come_and_no_judged_sentence():
    lessons = {text for text, _ in book.load_data("lessons", "train").texts}
    assert not any(
        re.search(r"'s |s' ", text)
        and text[0].isupper()
        and "(" not in text
        and text.split()[-1][:-1] in kinship.RELATIONS
        for text in lessons
    )
    for name in ("kinship/facts", "docstrings/signature"):
        data = book.load_data(name)
        assert not lessons & {
            text for split in (data.validation, data.test) for text, _ in split.texts
        }


@given(
    st.lists(
        st.tuples(
            st.text("ab", min_size=1, max_size=6),
            st.lists(st.text("cd", min_size=1, max_size=6), min_size=3, max_size=3),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_trimming_choices_cuts_only_columns_that_no_answer_uses(rows):
    split = book.choice_split(rows, (24, 24), "bytes")
    split = book.Split(
        {
            name: (
                torch.nn.functional.pad(value, (0, 5), value=-100 * (name == "targets"))
                if value.ndim == 3
                else value
            )
            for name, value in split.tensors.items()
        }
    )
    batch = next(book.batches(split, len(rows), shuffle=False))
    width = batch["input_ids"].shape[-1]
    assert (
        batch["attention_mask"][..., -1].any()
        and not split["attention_mask"][..., width:].any()
        and batch["labels"].ndim == 1
    )
    assert (
        all(torch.equal(batch[name], split[name][..., :width]) for name in ("input_ids", "targets"))
        and (split["targets"][..., width:] == -100).all()
    )


# Tables of the hub, as it would send them


def tables(**columns):
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {
            name: Dataset.from_dict(rows, features=columns["features"])
            for name, rows in columns["rows"].items()
        }
    )


@pytest.fixture
def served(monkeypatch):
    import datasets

    def serve(features, rows):
        asked = []
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda **keys: asked.append(keys) or tables(features=features, rows=rows),
        )
        return asked

    return serve


def test_a_pair_task_of_the_hub_comes_in_our_shape(served):
    from datasets import ClassLabel, Features, Value

    features = Features(
        sentence1=Value("string"),
        sentence2=Value("string"),
        label=ClassLabel(names=["no", "yes"]),
        idx=Value("int32"),
    )

    def rows(count, secret=False):
        return {
            "sentence1": [f"a {i}" for i in range(count)],
            "sentence2": [f"b {i}" for i in range(count)],
            "label": [-1 if secret else i % 2 for i in range(count)],
            "idx": list(range(count)),
        }

    asked = served(
        features, {"train": rows(40), "validation": rows(6), "test": rows(5, secret=True)}
    )
    data = book.load_data("glue/mrpc", limit=20)
    assert asked == [{"path": "nyu-mll/glue", "name": "mrpc"}]
    assert (data.kind, data.classes, len(data.train), len(data.validation), len(data.test)) == (
        "pair",
        ("no", "yes"),
        20,
        4,
        6,
    )
    assert data.train["input_ids"].shape == (20, 128) and not set(data.train.texts) & set(
        data.validation.texts
    )
    assert all(
        int(text[0].split()[1]) % 2 == int(label)
        for text, label in zip(data.train.texts, data.train.labels)
    )


def test_images_of_the_hub_stay_bytes_until_a_batch(served):
    from datasets import ClassLabel, Features, Image
    from PIL import Image as Picture

    features = Features(img=Image(), fine_label=ClassLabel(3), coarse_label=ClassLabel(2))
    pictures = [Picture.new("RGB", (32, 32), (i, 0, 255)) for i in range(20)]
    served(
        features,
        {
            "train": {
                "img": pictures,
                "fine_label": [i % 3 for i in range(20)],
                "coarse_label": [0] * 20,
            }
        },
    )
    data = book.load_data("cifar100")
    assert [len(split) for split in data.splits.values()] == [16, 2, 2] and data.train[
        "pixel_values"
    ].dtype == torch.uint8
    batch = next(book.batches(data.train, 4, shuffle=False))
    assert batch["pixel_values"].shape == (4, 3, 224, 224) and torch.allclose(
        batch["pixel_values"][:, 2].amax(), torch.tensor(1.0)
    )
    red = data.train["pixel_values"][:, 0, 0, 0].tolist()
    assert [value % 3 for value in red] == data.train.labels.tolist()


def test_regression_and_writing_tasks_of_the_hub(served):
    from datasets import Features, Value

    words = Value("string")
    served(
        Features(sentence1=words, sentence2=words, label=Value("float32")),
        {
            part: {"sentence1": ["a"] * 10, "sentence2": ["b"] * 10, "label": [0.5] * 10}
            for part in ("train", "validation")
        },
    )
    data = book.load_data("glue/stsb")
    assert (
        data.kind == "regression"
        and data.train.labels.dtype == torch.float32
        and data.classes == ()
    )
    served(
        Features(nl=words, code=words),
        {
            part: {"nl": ["say it"] * 10, "code": ["print()"] * 10}
            for part in ("train", "validation", "test")
        },
    )
    data = book.load_data("django")
    assert (
        data.kind == "generation"
        and data.test.texts[0] == ("say it", "print()")
        and len(data.train) == 10
    )


def test_questions_with_answers_come_as_rows_by_answers_by_tokens(served):
    from datasets import Features, Sequence, Value

    words = Value("string")

    def rows(count):
        return {
            "question_stem": [f"what is {i}" for i in range(count)],
            "choices": [
                {"text": [f"it {i} {j}" for j in range(4)], "label": list("ABCD")}
                for i in range(count)
            ],
            "answerKey": ["ABCD"[i % 4] for i in range(count)],
        }

    features = Features(
        question_stem=words, choices=Sequence({"text": words, "label": words}), answerKey=words
    )
    served(features, {part: rows(8) for part in book.SPLITS})
    data = book.load_data("openbookqa")
    assert data.kind == "choice" and data.train["input_ids"].shape[:2] == data.train[
        "targets"
    ].shape[:2] == (8, 4)
    for (question, *answers), right in zip(data.train.texts, data.train.labels):
        number = int(question.split()[-1])
        assert right == number % 4 and answers == [f"it {number} {j}" for j in range(4)]
    listed = Features(
        context=words, query=words, options=Sequence(words), correct_option=Value("int32")
    )
    served(
        listed,
        {
            part: {
                "context": ["c"] * 6,
                "query": ["q"] * 6,
                "options": [["x", "y"]] * 6,
                "correct_option": [1, 0] * 3,
            }
            for part in book.SPLITS
        },
    )
    data = book.load_data("logiqa")
    assert data.train.texts[0] == ("c\nq", "x", "y") and sorted(data.train.labels.tolist()) == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]


def test_a_repository_is_read_as_its_short_name_says():
    assert hub.short_name("allenai/openbookqa") == "openbookqa" and hub.short_name(
        "nyu-mll/glue"
    ) == "nyu-mll/glue" == hub.short_name(hub.short_name("nyu-mll/glue"))
    for name, instead in (
        ("allenai/openbookqa", "kinship/choice"),
        ("yahma/alpaca-cleaned", "docstrings/signature"),
    ):
        with pytest.raises(MissingFile, match=f"offline choice is '{instead}'"):
            book.load_data(name)


def test_texts_of_the_hub_are_cut_to_the_length_asked_for_and_targets_end_once(served):
    from datasets import Features, Value

    words = Value("string")
    rows = {
        "instruction": ["say it again and again"] * 10,
        "input": ["", "it"] * 5,
        "output": ["again and again"] * 10,
    }
    served(Features(instruction=words, input=words, output=words), {"train": rows})
    data = book.load_data("alpaca", tokenizer="minilm", length=5)
    assert (
        data.kind == "generation"
        and data.train["input_ids"].shape == (8, 5) == data.train.labels.shape
    )
    end = book.load_tokenizer("minilm").sep_token_id
    assert all((row == end).sum() == 1 and row[row != -100][-1] == end for row in data.train.labels)
    assert {text for text, _ in data.train.texts + data.test.texts} == {
        "say it again and again",
        "say it again and again\nit",
    }


def test_a_long_prompt_keeps_its_end_and_an_answer_its_end(served):
    from datasets import Features, Value

    words, long = Value("string"), " ".join(["again"] * 20)
    listed = Features(
        context=words,
        query=words,
        options=__import__("datasets").Sequence(words),
        correct_option=Value("int32"),
    )
    served(
        listed,
        {
            part: {
                "context": [long] * 6,
                "query": ["why now"] * 6,
                "options": [["of this", "of that"]] * 6,
                "correct_option": [1, 0] * 3,
            }
            for part in book.SPLITS
        },
    )
    data, tokens = (
        book.load_data("logiqa", tokenizer="minilm", length=12),
        book.load_tokenizer("minilm"),
    )
    for row, mask, targets in zip(
        *(data.train[name][0] for name in ("input_ids", "attention_mask", "targets"))
    ):
        prompt = tokens.decode(row[(targets == -100) & mask.bool()])
        assert (
            "why now" in prompt
            and prompt.count("again") < 20
            and tokens.decode(targets[targets != -100]).startswith("of th")
        )
        assert targets[targets != -100][-1] == tokens.sep_token_id


def test_a_batch_is_pinned_only_where_there_is_a_cuda_device(monkeypatch):
    pinned, split = (
        [],
        book.Split(
            {"pixel_values": torch.randn(7, 2), "labels": torch.arange(7)},
            transform=lambda batch: batch | {"pixel_values": 2 * batch["pixel_values"]},
        ),
    )
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tuple(tensor.shape)) or tensor
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = list(book.batches(split, 4, seed=3))
    assert not pinned
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    same = list(book.batches(split, 4, seed=3))
    assert pinned == [(4, 2), (4,), (3, 2), (3,)]
    assert all(
        torch.equal(one[name], other[name]) for one, other in zip(plain, same) for name in one
    )


def test_a_table_that_says_nothing_is_refused():
    from datasets import Features, Value

    for features in (
        Features(x=Value("int32")),
        Features(label=Value("int32"), x=Value("int32")),
        Features(text=Value("string")),
    ):
        with pytest.raises(BadValue, match="no label or no input"):
            hub.columns(features)
    with pytest.raises(BadValue, match="no labelled training split"):
        hub.three({"test": [{"label": 1}]}, "label")


@given(
    count=st.integers(10, 60),
    have=st.sets(st.sampled_from(["validation", "test", "test_matched"])),
    seed=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_missing_splits_come_out_of_the_training_rows_and_never_overlap(count, have, seed):
    given_tables = {
        name: [{"label": 1}] * size
        for name, size in (("train", count), *((name, 3) for name in sorted(have)))
    }
    parts = hub.three(given_tables, "label", seed)
    from_train = [
        i for table, rows in parts.values() if table is given_tables["train"] for i in rows
    ]
    assert sorted(from_train) == list(range(count)) and set(parts) == set(book.SPLITS)
    assert (
        parts["test"][0]
        is given_tables[
            next(
                (name for name in sorted(have) if name.startswith("test")),
                "validation" if have else "train",
            )
        ]
    )


def test_the_hubs_switches_are_put_back_after_a_failure():
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(MissingFile, match="offline choice is 'minilm'"):
        with hub.hub_access("model", "x/y", "minilm"):
            assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
            raise ConnectionError("many\nlines")
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == before


def test_an_error_that_is_not_the_networks_is_not_disguised():
    with pytest.raises(ZeroDivisionError):
        with hub.hub_access("model", "x/y", "minilm"):
            raise ZeroDivisionError


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 999), min_size=3, max_size=3), min_size=1, max_size=9),
    st.booleans(),
)
def test_a_table_of_whole_numbers_is_read_as_it_stands(rows, ended):
    text = "\n".join(",".join(map(str, row)) for row in rows) + "\n" * ended
    assert book.numbers(text.encode(), 3).tolist() == rows


@pytest.mark.parametrize(
    "content", [b"", b"1,2.5", b"1,,2", b"1,2000", b"-1,2", b"1 2", b"1,2\n\n3,4"]
)
def test_a_table_of_something_else_is_refused(content):
    with pytest.raises(BadValue, match="whole numbers"):
        book.numbers(content, 2)
