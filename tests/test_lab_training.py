"""The training loop from outside: killed anywhere it ends as if it hadn't been, and it refuses what
isn't its own.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import CHAINS, adapted, net, numbers, snapshot
from torch import nn

import lora_book as lb
from lora_book.core import files
from lora_book.lab.data import Data, Split
from lora_book.lab.models import load_model, logits
from lora_book.lab.training import Alone, Stopped, fit, rate_at, recompute_activations

ROOT = Path(__file__).resolve().parent.parent
RUN = {"epochs": 3, "lr": 1e-2, "batch_size": 8, "seed": 4}


def made(seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)

    def split(n):
        x = torch.randn(n, 8, generator=g)
        return Split({"pixel_values": x, "labels": x[:, :3].argmax(1)})

    return Data(
        "toy", "image", ("a", "b", "c"), split(29), split(10), split(10), "drawn here", "CC0"
    )


def told(history: list) -> list:
    "A history without its times."
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


class Dropping(nn.Module):
    "A model whose dropout draws from the global generator."

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = net(classes=8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        with torch.no_grad():
            self.head.weight.fill_(0.1)
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.norm(self.drop(self.body(x))))


def model_of(method: str, **options) -> nn.Module:
    return adapted(method, targets=["first", "qkv[q,v]", "proj"], base=Dropping(), **options)


class Stop(BaseException):
    pass


class StopsAt:
    "A loss that raises when it is called for the n-th time."

    def __init__(self, n: int):
        self.left = n

    def __call__(self, model, batch):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("full", {}),
        ("lora", {"step": "sam"}),
        ("mgpo", {}),
        ("ggpo", {}),
        ("adalora", {}),
        ("loldu", {}),
        *((chain, {"reset_every": 4}) for chain in CHAINS),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(method, options, tmp_path_factory):
    data = made()
    whole = model_of(method, **options)
    want = told(fit(whole, data, loss=StopsAt(10**6), **RUN))

    @given(stops=st.lists(st.integers(0, 14), min_size=1, max_size=3), every=st.integers(1, 5))
    @settings(max_examples=4, deadline=None)
    def run(stops, every):
        folder = tmp_path_factory.mktemp("run")
        for n in stops:
            try:
                fit(
                    model_of(method, **options),
                    data,
                    loss=StopsAt(n),
                    checkpoint=folder,
                    save_every=every,
                    **RUN,
                )
            except Stop:
                continue
        model = model_of(method, **options)
        history = fit(model, data, loss=StopsAt(10**6), checkpoint=folder, save_every=every, **RUN)
        assert told(history) == want and numbers(model) == numbers(whole)

    run()


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import test_lab_training as t
slow = lambda model, batch: (time.sleep(0.05), t.StopsAt(10**6)(model, batch))[1]
t.fit(t.model_of("cola", reset_every=4), t.made(), loss=slow, checkpoint={folder!r}, save_every=1, **t.RUN)
"""


def test_a_killed_process_is_resumed(tmp_path):
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    file, end = tmp_path / "checkpoint.safetensors", time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert file.exists()
    whole, model = model_of("cola", reset_every=4), model_of("cola", reset_every=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = told(fit(whole, made(), loss=StopsAt(10**6), **RUN))
    assert told(fit(model, made(), loss=StopsAt(10**6), checkpoint=tmp_path, **RUN)) == want
    torch.set_num_threads(threads)
    assert numbers(model) == numbers(whole)


def test_a_finished_run_is_not_run_again(tmp_path):
    model = model_of("lora")
    first = fit(model, made(), checkpoint=tmp_path, **RUN)
    again = model_of("lora")
    assert fit(again, made(), loss=StopsAt(0), checkpoint=tmp_path, **RUN) == first and numbers(
        again
    ) == numbers(model)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(Stop):
        fit(model_of("cola"), made(), loss=StopsAt(6), checkpoint=folder, save_every=2, **RUN)
    return (folder / "checkpoint.safetensors").read_bytes()


def assert_refused(folder, method="cola", data=None, words=(), options=None, **changes):
    model = model_of(method, **(options or {}))
    before = snapshot(model)
    with pytest.raises(lb.LoraBookError) as caught:
        fit(model, data or made(), checkpoint=folder, **(RUN | changes))
    assert isinstance(caught.value, ValueError) and all(
        word in str(caught.value) for word in words
    ), caught.value
    after = snapshot(model)
    assert after["tensors"] == before["tensors"]


def test_a_damaged_checkpoint_is_refused(halfway, tmp_path):
    file = tmp_path / "checkpoint.safetensors"

    @given(at=st.integers(0, len(halfway) - 1), flip=st.integers(1, 255), cut=st.booleans())
    @settings(max_examples=30, deadline=None)
    def damaged(at, flip, cut):
        file.write_bytes(
            halfway[:at] if cut else halfway[:at] + bytes([halfway[at] ^ flip]) + halfway[at + 1 :]
        )
        assert_refused(tmp_path, words=["damaged"])

    damaged()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 2e-2},
        {"epochs": 4},
        {"batch_size": 9},
        {"seed": 5},
        {"optimizer": "sgd"},
        {"warmup": 0.5},
        {"weight_decay": 0.1},
        {"max_grad_norm": None},
        {"scheduler": "cosine"},
        {"foot": 0.1},
        {"accumulate": 2},
        {"advance_every": 1},
        {"method": "lora"},
        {"data": made(1)},
        {"options": {"r": 3}},
        {"options": {"seed": 1}},
        {"options": {"chain_length": 3}},
    ],
)
def test_a_checkpoint_of_another_run_is_refused(halfway, tmp_path, changes):
    (tmp_path / "checkpoint.safetensors").write_bytes(halfway)
    assert_refused(tmp_path, words=["settings"], **changes)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        fit(model_of("lora"), made(), loss=StopsAt(5), checkpoint=tmp_path, save_every=2, **RUN)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_part", full)
    with pytest.raises(OSError, match="No space"):
        fit(model_of("lora"), made(), loss=StopsAt(10**6), checkpoint=tmp_path, save_every=2, **RUN)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    whole, model = model_of("lora"), model_of("lora")
    assert told(fit(model, made(), loss=StopsAt(10**6), checkpoint=tmp_path, **RUN)) == told(
        fit(whole, made(), loss=StopsAt(10**6), **RUN)
    )
    assert numbers(model) == numbers(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"lr": 0},
        {"lr": float("nan")},
        {"warmup": 2},
        {"warmup": "x"},
        {"foot": 2},
        {"scheduler": "line"},
        {"accumulate": 0},
        {"optimizer": "adm"},
        {"weight_decay": -1},
        {"save_every": 0},
        {"advance_every": 0},
        {"max_grad_norm": 0},
    ],
)
def test_impossible_settings(changes):
    model = model_of("cola")
    before = snapshot(model)["tensors"]
    with pytest.raises(lb.LoraBookError):
        fit(model, made(), **(RUN | changes))
    assert snapshot(model)["tensors"] == before


def test_a_diverging_run_says_so():
    with pytest.raises(ValueError, match="lr"):
        fit(
            model_of("lora"),
            made(),
            **(RUN | {"loss": lambda m, b: m(b["pixel_values"]).sum() * float("nan")}),
        )


def test_the_same_seed_is_the_same_run_and_the_global_state_rests():
    one, two, other = (model_of("lora") for _ in range(3))
    state = torch.get_rng_state()
    histories = [
        told(fit(m, made(), **(RUN | {"seed": s}))) for m, s in ((one, 1), (two, 1), (other, 2))
    ]
    assert histories[0] == histories[1] != histories[2] and numbers(one) == numbers(two) != numbers(
        other
    )
    assert torch.equal(state, torch.get_rng_state()) and not one.training


def test_it_learns_and_reports():
    history = fit(model_of("lora"), made(), **(RUN | {"epochs": 12}))
    assert [record["epoch"] for record in history] == list(range(1, 13)) and history[-1][
        "train_loss"
    ] < history[0]["train_loss"]
    assert all(
        record.keys() == {"epoch", "train_loss", "validation", "seconds"} for record in history
    )


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_rate_rises_then_falls_and_is_never_zero_or_above_one(steps, warmup, data):
    rates = [rate_at(i, steps, warmup) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) > 0.5
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(
        rates[top:], reverse=True
    )


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("lora", {"step": "sam"}), ("mgpo", {}), ("adalora", {})]
)
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_takes_the_same_steps(method, options, parts):
    def run(accumulate):
        model = adapted(
            method, targets=["first", "qkv[q,v]", "proj"], base=net(classes=3), **options
        ).double()
        data = made()
        data = replace(
            data,
            **{
                n: replace(
                    s, tensors={"pixel_values": s["pixel_values"].double(), "labels": s.labels}
                )
                for n, s in data.splits.items()
            },
        )
        history = fit(model, data, loss=StopsAt(10**6), accumulate=accumulate, **RUN)
        return [record["train_loss"] for record in history], torch.cat(
            [p.flatten() for p in model.parameters() if p.requires_grad]
        )

    (losses, whole), (others, part) = run(1), run(parts)
    assert others == pytest.approx(losses, rel=1e-9) and torch.allclose(
        whole, part, rtol=1e-6, atol=1e-8
    )


def test_a_run_asked_to_stop_leaves_its_checkpoint_and_goes_on(tmp_path):
    whole, seen = model_of("cola", reset_every=4), []
    want = told(
        fit(whole, made(), loss=StopsAt(10**6), watch=lambda run: seen.append(run["at"]), **RUN)
    )
    assert seen == list(range(1, 13))
    with pytest.raises(Stopped, match="after step 5 of 12"):
        stopped_run(tmp_path, 5)
    model = model_of("cola", reset_every=4)
    assert told(
        fit(model, made(), loss=StopsAt(10**6), checkpoint=tmp_path, **RUN)
    ) == want and numbers(model) == numbers(whole)


def stopped_run(folder, step: int) -> None:
    "A run that is asked to stop in a step."
    calls = iter(range(1, 99))
    fit(
        model_of("cola", reset_every=4),
        made(),
        loss=StopsAt(10**6),
        checkpoint=folder,
        stop=lambda: next(calls) == step,
        **RUN,
    )


def test_what_a_record_says_is_the_callers_choice():
    history = fit(
        model_of("lora"), made(), measure=lambda model, split: {"rows": len(split)}, **RUN
    )
    assert [record["validation"] for record in history] == [{"rows": 10}] * 3


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_bert", "tiny_gpt2"])
def test_activations_computed_again_give_the_same_gradients(name):
    def gradients(again: bool):
        model = lb.adapt(load_model(name, n_classes=3), "lora", r=2, seed=1)
        model = recompute_activations(model) if again else model
        batch = (
            {"pixel_values": torch.ones(2, 1, 28, 28)}
            if name == "tiny_vit"
            else {"input_ids": torch.arange(12).reshape(2, 6)}
        )
        model.train()
        kept: list = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ):
            loss = nn.functional.cross_entropy(logits(model, batch), torch.tensor([0, 2]))
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad], sum(kept)

    (plain, much), (same, less) = gradients(False), gradients(True)
    assert (
        all(torch.allclose(one, two, atol=1e-7) for one, two in zip(plain, same, strict=True))
        and less < much
    )
    with pytest.raises(TypeError, match="Linear"):
        recompute_activations(nn.Linear(2, 2))


class InBfloat16(Alone):
    mixed_precision = "bf16"

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)


def test_bfloat16_products_stay_near_and_the_factors_stay_float32():
    model = model_of("lora")
    history = fit(model, made(), accelerator=InBfloat16(), **RUN)
    exact = fit(model_of("lora"), made(), **RUN)
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert (
        history[-1]["train_loss"] == pytest.approx(exact[-1]["train_loss"], rel=0.05)
        and history[-1]["train_loss"] != exact[-1]["train_loss"]
    )
