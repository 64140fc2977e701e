"""The book on a CUDA device: the laws, the same numbers as on the CPU, and runs that need no other
line of code.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from interface_tools import CHAINS, adapted, inputs, largest, move, moved, net, trained
from test_core_peft import EXPORTED, IDS, off_by, peft
from test_lab_training import RUN, made, model_of, told
from test_laws import COUNTS, cases

import lora_book as lb
from lora_book.core.laws import Case, check, randomise
from lora_book.experiments import runner
from lora_book.lab.data import batches, load_data
from lora_book.lab.models import load_model
from lora_book.lab.training import fit
from lora_book.registry import METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROW, SMALL = "vit_tiny/cifar10", {"examples": 96, "judged": 96, "epochs": 2, "batch_size": 16}


@dataclass(frozen=True)
class OnDevice(Case):
    "A case of the laws whose model and inputs lie on the device."

    def base(self):
        return super().base().to(DEVICE)

    def inputs(self):
        return super().inputs().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("method_id", METHODS)
def test_every_law_holds_on_the_device(method_id, dtype):
    @settings(max_examples=6, deadline=None)
    @given(case=cases(method_id, dtype))
    def run(case):
        assert check(OnDevice(**vars(case)), COUNTS.get(method_id, METHODS[method_id].count)) > 8

    run()


def gradients(model, x) -> list:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in trained(model)]


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_the_cpus(method):
    here, x = moved(method, torch.float64), inputs(torch.float64)
    want, wanted = here(x).detach(), [g.clone() for g in gradients(here, x)]
    there = here.to(DEVICE)
    assert largest(there(x.to(DEVICE)).cpu(), want) < 1e-12
    assert max(map(largest, [g.cpu() for g in gradients(there, x.to(DEVICE))], wanted)) < 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_adapted_there_or_adapted_here_and_moved_is_the_same_start(method):
    there = adapted(method, torch.float64, base=net(torch.float64).to(DEVICE))
    here = adapted(method, torch.float64).to(DEVICE)
    x = inputs(torch.float64).to(DEVICE)
    assert all(p.device.type == DEVICE for p in there.parameters())
    assert largest(there(x), here(x)) < 1e-12
    for one, other in zip(trained(there), trained(here), strict=True):
        assert (
            one.shape == other.shape and largest(one.abs(), other.abs()) < 1e-9
        )  # a singular vector's sign is free


@pytest.mark.parametrize("method", METHODS)
def test_a_file_written_on_one_device_is_read_on_the_other(method, tmp_path):
    here, x = moved(method, torch.float64), inputs(torch.float64)
    want = here(x).detach()
    lb.save(here.to(DEVICE), tmp_path / "there")
    again = lb.load(net(torch.float64), tmp_path / "there")
    assert largest(again(x), want) < 1e-12
    lb.save(again, tmp_path / "here")
    assert (
        largest(lb.load(net(torch.float64).to(DEVICE), tmp_path / "here")(x.to(DEVICE)).cpu(), want)
        < 1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_merged_moved_and_unmerged(method):
    model, x = moved(method, torch.float64), inputs(torch.float64)
    want = model(x).detach()
    lb.merge(model)
    model.to(DEVICE)
    assert largest(model(x.to(DEVICE)).cpu(), want) < 1e-11
    lb.unmerge(model)
    assert largest(model(x.to(DEVICE)).cpu(), want) < 1e-11
    assert largest(model.cpu()(x), want) < 1e-11


def toy(data):
    "The toy data in float64."
    for split in data.splits.values():
        split.tensors["pixel_values"] = split.tensors["pixel_values"].double()
    return data


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("bitfit", {}),
        *((m, {}) for m in METHODS if m not in ("full", "bitfit", "linear_probe")),
        ("lora", {"step": "sam"}),
        ("dora", {"step": "mgpo"}),
        *((c, {"reset_every": 4}) for c in CHAINS),
    ],
)
def test_a_run_learns_what_it_learns_on_the_cpu(method, options):
    def history(device):
        return told(fit(adapted(method, torch.float64, **options).to(device), toy(made()), **RUN))

    for one, other in zip(history("cpu"), history(DEVICE), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert one["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("mgpo", {}), ("c3la", {"reset_every": 4})]
)
def test_an_interrupted_run_goes_on_on_the_device(method, options, tmp_path):
    whole = told(fit(model_of(method, **options).to(DEVICE), made(), **RUN))
    calls = iter(range(1, 99))
    with pytest.raises(KeyboardInterrupt):
        fit(
            model_of(method, **options).to(DEVICE),
            made(),
            checkpoint=tmp_path,
            stop=lambda: next(calls) == 6,
            **RUN,
        )
    again = told(fit(model_of(method, **options).to(DEVICE), made(), checkpoint=tmp_path, **RUN))
    for one, other in zip(whole, again, strict=True):
        assert one["train_loss"] == pytest.approx(
            other["train_loss"], rel=1e-4
        )  # sums on the device have no fixed order


def test_batches_lie_in_pinned_memory():
    split = load_data("digits").train.first(40)
    assert all(value.is_pinned() for batch in batches(split, 16) for value in batch.values())
    assert not split["pixel_values"].is_pinned()


def result(folder: Path, method: str = "lora", **own) -> dict:
    return runner.run(ROW, method, profile="smoke", folder=folder, **(SMALL | own))


ON_CPU = (
    "import sys; sys.path.insert(0, 'tests'); import test_cuda as t; t.result(t.Path(sys.argv[1]),"
    " sys.argv[2])"
)


@pytest.mark.parametrize("method", ["lora", "c3la", "full"])
def test_a_row_runs_there_without_another_line_and_agrees(method, tmp_path):
    there = result(tmp_path / "there", method)
    subprocess.run(
        [sys.executable, "-c", ON_CPU, str(tmp_path / "here"), method],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    here = result(tmp_path / "here", method)
    assert there["machine"]["device"] != "cpu" == here["machine"]["device"]
    assert (
        there["peak_memory"]["cuda"] > 10**5
        and there["data_hash"] == here["data_hash"]
        and there["settings"] == here["settings"]
    )
    for one, other in zip(there["history"], here["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3)
    assert abs(there["test"]["accuracy"] - here["test"]["accuracy"]) <= 2 / SMALL["judged"]


def test_bfloat16_parts_of_batches_and_recomputed_activations_run_and_stay_near(tmp_path):
    plain = result(tmp_path / "plain")
    for i, own in enumerate(
        (
            {"dtype": "bfloat16"},
            {"accumulate": 2},
            {"recompute": True},
            {"dtype": "bfloat16", "accumulate": 2, "recompute": True},
        )
    ):
        other = result(tmp_path / str(i), **own)
        assert other["history"][-1]["train_loss"] == pytest.approx(
            plain["history"][-1]["train_loss"], rel=0.05 if "dtype" in own else 2e-3
        )


def test_recomputed_activations_take_less_memory(tmp_path):
    own = {"examples": 256, "batch_size": 256, "epochs": 1}
    much, less = (
        result(tmp_path / name, recompute=again, **own)["peak_memory"]["cuda"]
        for name, again in (("a", False), ("b", True))
    )
    assert less < 0.85 * much  # the library of products keeps some 30 MB of its own in both


@pytest.mark.parametrize("method", EXPORTED)
def test_an_export_gives_pefts_outputs_there(method, tmp_path):
    model = lb.adapt(load_model("tiny_bert").to(DEVICE), method, r=3, alpha=7)
    randomise(model, 1, 0.1)
    ids = IDS.to(DEVICE)
    want = model(input_ids=ids)[0].detach()
    lb.to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        load_model("tiny_bert").to(DEVICE), str(tmp_path)
    ).eval()
    assert off_by(theirs(input_ids=ids)[0], want) < 5e-6


def test_the_device_is_named(capsys):
    from lora_book.cli import main

    assert main(["doctor"]) == 0 and torch.cuda.get_device_name(0) in capsys.readouterr().out


def test_noise_moves_the_same_numbers_whatever_the_device():
    here, there = moved("lora"), move(adapted("lora").to(DEVICE))
    assert all(torch.equal(p, q.cpu()) for p, q in zip(trained(here), trained(there), strict=True))
