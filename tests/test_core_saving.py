"""Saving and loading from outside: what goes in comes out, and a file that was touched or belongs
elsewhere is refused.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interface_tools import CHAINS, adapted, inputs, largest, move, moved, net, numbers, snapshot
from safetensors.torch import load, save
from torch import nn

import lora_book as lb
from lora_book.core.saving import (
    base_tensors,
    description_bytes,
    fingerprint,
    tensors_name,
)
from lora_book.lab.models import load_model

METHODS = lb.methods()
every_method = pytest.mark.parametrize("method", METHODS)


def numbers_file(folder) -> Path:
    "The folder's one file of numbers."
    (path,) = Path(folder).glob("adapter*.safetensors")
    return path


def content(folder) -> dict[str, bytes]:
    "{name: bytes} of all files in a folder."
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def forge(folder, new=None, **changes) -> Path:
    """Edit a saved adapter as someone would who knows the format: other numbers, other entries, and
    new checksums and names.
    """
    path = Path(folder) / "adapter.json"
    description = json.loads(path.read_text().rsplit("\n", 2)[0])
    if new is not None:
        data = save(new)
        checksum = hashlib.sha256(data).hexdigest()
        numbers_file(folder).unlink()
        (folder / tensors_name(checksum)).write_bytes(data)
        changes = {"sha256": checksum, "tensors": tensors_name(checksum)} | changes
    for key, value in changes.items():
        place = description["config"] if key in description["config"] else description
        if value is KeyError:
            del place[key]
        else:
            place[key] = value
    path.write_bytes(description_bytes(description))
    return folder


def assert_refused(folder, *words, base=None) -> None:
    """Loading raises a ValueError, TypeError or KeyError of the package, and the model is what it
    was.
    """
    model = net() if base is None else base
    before = snapshot(model)
    with pytest.raises(lb.LoraBookError) as caught:
        lb.load(model, folder)
    assert isinstance(caught.value, (ValueError, TypeError, KeyError)) and all(
        word in str(caught.value) for word in words
    ), str(caught.value)
    assert snapshot(model) == before


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_saved_comes_back(method, dtype, tmp_path):
    model, x = moved(method, dtype, alpha=3.0, seed=7), inputs(dtype)
    want = model(x)
    lb.save(model, tmp_path)
    fresh = net(dtype)
    assert lb.load(fresh, str(tmp_path)) is fresh
    assert torch.equal(fresh(x), want) and lb.n_trainable(fresh, heads=True) == lb.n_trainable(
        model, heads=True
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(lb.delta(model).values(), lb.delta(fresh).values(), strict=True)
    )
    with lb.disabled(fresh):
        assert torch.equal(fresh(x), net(dtype)(x))
    other = tmp_path / "merged"
    lb.merge(model)
    lb.save(model, other)
    assert all(
        (tmp_path / name).read_bytes() == (other / name).read_bytes() for name in os.listdir(other)
    )


class Tied(nn.Module):
    "An output map that shares its weight with the embedding."

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.middle(self.embedding(ids))))


def tied() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied()


@every_method
def test_a_tied_target_comes_back_and_stays_tied(method, tmp_path):
    model, ids = lb.adapt(tied(), method, ["middle", "out"], r=2), torch.arange(9)
    if lb.n_trainable(model):
        move(model)
    lb.save(model, tmp_path)
    fresh = lb.load(tied(), tmp_path)
    assert torch.equal(fresh(ids), model(ids)) and fresh.out.weight is fresh.embedding.weight
    other = tied()
    with torch.no_grad():
        other.embedding.weight[0, 0] += 1
    assert_refused(tmp_path, "base", base=other)
    with lb.disabled(fresh):
        assert torch.equal(fresh(ids), tied()(ids))


@every_method
def test_numpy_s_numbers_are_numbers(method, tmp_path):
    model = moved(method, r=np.int64(2), alpha=np.float32(3.0), seed=np.int32(4))
    lb.save(model, tmp_path / "numpy")
    lb.save(moved(method, r=2, alpha=3.0, seed=4), tmp_path / "python")
    assert torch.equal(lb.load(net(), tmp_path / "numpy")(inputs()), model(inputs()))
    assert all(
        (tmp_path / "numpy" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
        for name in os.listdir(tmp_path / "numpy")
    )


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_keeps_its_links_and_goes_on_alike(method, tmp_path):
    model, x = moved(method, chain_length=4), inputs()
    for seed in (1, 2):
        lb.advance(model)
        move(model, seed)
    lb.save(model, tmp_path)
    fresh = lb.load(net(), tmp_path)
    assert torch.equal(fresh(x), model(x))
    for one in (model, fresh):
        optimizer = torch.optim.AdamW(lb.param_groups(one, 1e-2))
        for _ in range(2):
            lb.train_step(one, optimizer, lambda one=one: one(x).pow(2).mean())
        lb.advance(one, optimizer)
        lb.train_step(one, optimizer, lambda one=one: one(x).pow(2).mean())
    assert numbers(fresh) == numbers(model)
    for one in (model, fresh):
        with pytest.raises(ValueError, match="4"):
            lb.advance(one)


@pytest.mark.parametrize("method", ["cola", "c3la"])
def test_steps_are_counted_on_after_loading(method, tmp_path):
    model, x = adapted(method, reset_every=3), inputs()
    optimizer = torch.optim.SGD(lb.param_groups(model, 1e-2))
    for _ in range(2):
        lb.train_step(model, optimizer, lambda: model(x).pow(2).mean())
    lb.save(model, tmp_path)
    fresh = lb.load(net(), tmp_path)
    lb.train_step(
        fresh, torch.optim.SGD(lb.param_groups(fresh, 1e-2)), lambda: fresh(x).pow(2).mean()
    )
    assert lb.adapters(fresh)["first"].done == 1


def test_moved_statistics_are_saved(tmp_path):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(8, 8),
                nn.BatchNorm1d(8),
                nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 2)),
            )

    model = lb.adapt(make(), "lora", "0", r=2, head="2")
    optimizer = torch.optim.SGD(lb.param_groups(model, 0.1))
    lb.train_step(model, optimizer, lambda: model(inputs()).pow(2).mean())
    lb.save(model.eval(), tmp_path)
    fresh = lb.load(make(), tmp_path).eval()
    assert torch.equal(fresh(inputs()), model(inputs()))
    other = make()
    other[1].running_mean.add_(1.0)
    assert_refused(tmp_path, "base", base=other)


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_vit", "tiny_llama", "tiny_t5"])
def test_real_architectures(name, tmp_path):
    model = move(lb.adapt(load_model(name), "lora", r=2))
    lb.save(model, tmp_path)
    assert numbers(lb.load(load_model(name), tmp_path)) == numbers(model)
    assert_refused(tmp_path, "base", base=load_model(name, seed=1))
    assert_refused(tmp_path, "architecture")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    lb.save(moved("cola"), folder)
    return folder


def test_the_folder_holds_safetensors_and_json_alone(saved):
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_no_byte_can_change(saved, suffix, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = next(path for path in tmp_path.iterdir() if path.suffix == suffix)
    whole, base = victim.read_bytes(), net()

    @given(at=st.integers(0, len(whole) - 1), flip=st.integers(1, 255))
    @settings(max_examples=60, deadline=None)
    def altered(at, flip):
        victim.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        assert_refused(tmp_path, base=base)

    @given(length=st.integers(0, len(whole) - 1))
    @settings(max_examples=30, deadline=None)
    def truncated(length):
        victim.write_bytes(whole[:length])
        assert_refused(tmp_path, base=base)

    altered()
    truncated()
    for wrong in (
        whole + b"\0",
        whole + b"\n",
        b" " + whole,
        whole.replace(b"\n", b"\r\n") if suffix == ".json" else whole * 2,
    ):
        victim.write_bytes(wrong)
        assert_refused(tmp_path, base=base)
    victim.write_bytes(whole)
    assert numbers(lb.load(base, tmp_path)) == numbers(moved("cola"))


def test_files_that_are_missing_or_no_files(saved, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere")
    assert_refused(tmp_path)
    assert_refused(None)
    assert_refused(3)
    assert_refused(saved / "adapter.json")
    for path in saved.iterdir():
        folder = tmp_path / path.suffix
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        assert_refused(folder, "adapter")
    (tmp_path / "mixed").mkdir()
    lb.save(moved("lora"), tmp_path / "mixed")
    (tmp_path / "mixed" / "adapter.json").write_bytes((saved / "adapter.json").read_bytes())
    assert_refused(tmp_path / "mixed")


def test_other_files_beside_them_are_left_alone(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text("mine")
    lb.load(net(), tmp_path)
    lb.save(moved("lora"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


def rewritten(saved: Path, folder: Path, **changes) -> Path:
    "A copy whose description was edited and given a new checksum."
    return forge(Path(shutil.copytree(saved, folder)), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 3},
        {"r": "2"},
        {"r": 99},
        {"alpha": -1},
        {"method": "lroa"},
        {"method": 3},
        {"format": 1},
        {"format": 3},
        {"format": 2.0},
        {"format": True},
        {"tensors": "../adapter.safetensors"},
        {"base": {}},
        {"base": []},
        {"base": {"first.weight": 3}},
        {"buffers": []},
        {"sites": ["first"]},
        {"sites": ["frist"]},
        {"sites": [3]},
        {"sites": ["first", "qkv[q", "proj"]},
        {"sites": ["norm"]},
        {"head": ["hed"]},
        {"head": KeyError},
        {"config": {}},
        {"config": KeyError},
        {"dtype": "nonsense"},
        {"dtype": "int64"},
        {"options": {"rank": 3}},
        {"options": []},
        {"step_options": 3},
        {"steps": -1},
        {"steps": "1"},
        {"in_place": ["first.weight"]},
        {"in_place": ["nope"]},
        {"sha256": "0"},
        {"sha256": KeyError},
        {"step": "sma"},
        {"seed": None},
    ],
)
def test_an_edited_description_with_a_new_checksum(saved, tmp_path, changes):
    assert_refused(rewritten(saved, tmp_path / "edited", **changes))


def test_another_architecture_shape_or_base(saved):
    assert_refused(saved, "architecture", base=net(width=12))
    assert_refused(saved, "architecture", base=nn.Sequential(net()))
    assert_refused(saved, "base", base=net(seed=1))
    changed = net()
    with torch.no_grad():
        changed.norm.bias[0] = 1e-7
    assert_refused(saved, "base", base=changed)
    assert_refused(saved, base=net(classes=5))
    renamed = net()
    renamed.other = renamed.proj
    del renamed.proj
    assert_refused(saved, "architecture", base=renamed)


@every_method
def test_an_adapted_model_doesn_t_load(method, saved):
    model = moved(method)
    before = snapshot(model)
    for one in (model, nn.Sequential(model), model.first):
        with pytest.raises(lb.LoraBookError, match="adapted"):
            lb.load(one, saved)
    assert snapshot(model) == before


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_aren_t_finite_are_neither_saved_nor_loaded(method, bad, tmp_path):
    model = moved(method)
    lb.save(model, tmp_path / "good")
    before = {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = bad
    with pytest.raises(ValueError, match="NaN"):
        lb.save(model, tmp_path / "good")
    assert {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()} == before
    tensors = load(numbers_file(tmp_path / "good").read_bytes())
    name = next(n for n, t in tensors.items() if t.is_floating_point() and t.numel())
    tensors[name].view(-1)[-1] = bad
    forge(tmp_path / "good", tensors)
    assert_refused(tmp_path / "good", "NaN")


@pytest.mark.parametrize(
    "call, fails_at", [("fsync", 1), ("fsync", 3), ("replace", 1), ("replace", 2)]
)
def test_a_full_disk_leaves_the_old_pair(tmp_path, monkeypatch, fails_at, call):
    model = moved("cola")
    lb.save(model, tmp_path)
    before, calls, real = content(tmp_path), [], getattr(os, call)

    def full(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space") as caught:
        lb.save(move(model, 9), tmp_path)
    assert isinstance(caught.value, lb.LoraBookError) and caught.value.errno == 28
    monkeypatch.undo()
    assert content(tmp_path) == before
    lb.load(net(), tmp_path)


WRITER = """
import sys
import torch
from interface_tools import moved
import lora_book as lb
models = [moved("lora", seed=seed) for seed in (1, 2)]
print("ready", flush=True)
while True:
    for model in models:
        lb.save(model, sys.argv[1])
"""


def writer(folder) -> subprocess.Popen:
    "A process that saves two adapters in turn, and has begun to."
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (root, root / "tests")))
    made = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    made.stdout.readline()
    return made


def test_two_writers_that_are_killed_and_a_reader(tmp_path):
    lb.save(moved("lora"), tmp_path)
    whole = [numbers(moved("lora", seed=seed)) for seed in (0, 1, 2)]
    for wait in (0.1, 0.23):
        writers, end = [writer(tmp_path) for _ in range(2)], time.time() + wait
        try:
            while time.time() < end:
                assert numbers(lb.load(net(), tmp_path)) in whole
        finally:
            for one in writers:
                one.kill()
                one.wait()
        assert numbers(lb.load(net(), tmp_path)) in whole
    lb.save(moved("lora"), tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_two_threads_may_save_to_one_folder(tmp_path):
    models, errors = [moved("lora", seed=seed) for seed in (1, 2)], []

    def save_often(model):
        try:
            for _ in range(8):
                lb.save(model, tmp_path)
        except lb.LoraBookError as error:
            errors.append(error)

    threads = [threading.Thread(target=save_often, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and numbers(lb.load(net(), tmp_path)) in map(numbers, models)
    assert len(list(tmp_path.iterdir())) == 2


def test_only_our_own_old_files_go(tmp_path):
    others = ["adapter-backup.safetensors", f"adapter-{'a' * 63}.safetensors", ".other.part", "x"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / f"adapter-{'b' * 64}.safetensors").symlink_to(tmp_path / "x")
    for seed in (1, 2):
        lb.save(moved("lora", seed=seed), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    (tmp_path / "adapter.json").write_text("mine too")
    assert_refused(tmp_path)
    lb.save(moved("lora"), tmp_path)
    lb.load(net(), tmp_path)


def test_the_first_format_still_loads_and_is_replaced(tmp_path):
    model = moved("lora")
    lb.save(model, tmp_path)
    base, buffers = base_tensors(model, ["head"])
    shapes, hashed = fingerprint(base | buffers)
    numbers_file(tmp_path).rename(tmp_path / "adapter.safetensors")
    forge(tmp_path, format=1, architecture=shapes, base=hashed, tensors=KeyError, buffers=KeyError)
    assert numbers(lb.load(net(), tmp_path)) == numbers(model)
    assert_refused(tmp_path, "base", base=net(seed=1))
    assert_refused(tmp_path, "architecture", base=net(width=12))
    lb.save(moved("lora", seed=3), tmp_path)
    assert not (tmp_path / "adapter.safetensors").exists() and lb.load(net(), tmp_path)


def test_no_link_is_followed_and_temporary_names_differ(tmp_path, monkeypatch):
    victim, seen, real = tmp_path / "victim", [], os.replace
    victim.write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.json").symlink_to(victim)

    def watched(source, target):
        seen.append(Path(source).name)
        return real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    for _ in range(2):
        lb.save(moved("lora"), folder)
    assert victim.read_text() == "mine" and not (folder / "adapter.json").is_symlink()
    assert len(set(seen)) == len(seen) == 4


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "/dev/null/x"], ids=["long", "null", "device"]
)
def test_a_path_that_can_t_be_one(path):
    with pytest.raises(lb.LoraBookError):
        lb.load(net(), path)
    with pytest.raises(lb.LoraBookError):
        lb.save(moved("lora"), path)


def test_a_description_too_deep_to_parse(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "deep"))
    (folder / "adapter.json").write_text('{"a":' + "[" * 200000 + "]" * 200000 + "}")
    assert_refused(folder, "adapter.json")


@pytest.mark.parametrize("method", ["paca", "c3la", "random_cla"])
def test_columns_out_of_range_and_other_kinds_of_number(method, tmp_path):
    lb.save(moved(method), tmp_path)
    good = load(numbers_file(tmp_path).read_bytes())
    name = next(n for n in good if n.endswith("/idx"))
    factor = name.replace("idx", "B")
    for new in (
        {name: good[name] + 10**6},
        {name: -1 - good[name]},
        {name: good[name].float()},
        {factor: good[factor].double() * 1e300},
        {factor: good[factor].to(torch.float8_e4m3fn)},
        {factor: good[factor].long()},
        {factor: good[factor].to(torch.complex64)},
    ):
        assert_refused(forge(tmp_path, good | new))
    lb.load(net(), forge(tmp_path, good))


def test_names_with_brackets_and_slashes(tmp_path):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            odd = {"task[0]": nn.Linear(4, 4), "a/b": nn.Linear(4, 6), "a": nn.Linear(4, 4)}
            return nn.ModuleDict(odd)

    for targets in (["task[0]", "a/b", "a"], ["task[0][0:2]", "a/b[q,v]"], "all-linear"):
        model = move(lb.adapt(make(), "lora", targets, r=2))
        again = lb.load(make(), lb.save(model, tmp_path))
        assert numbers(again) == numbers(model) and list(lb.delta(again)) == list(lb.delta(model))


def test_a_buffer_that_is_no_longer_stored(tmp_path):
    def make(stored, shift=0):
        made = net()
        made.register_buffer("position_ids", torch.arange(4) + shift, persistent=stored)
        return made

    for there, here in ((True, False), (False, True)):
        model = moved_one(make(there))
        lb.save(model, tmp_path)
        assert lb.load(make(here), tmp_path) is not None
    lb.save(moved_one(make(True)), tmp_path)
    assert_refused(tmp_path, "'position_ids'", base=make(True, 1))


def moved_one(model) -> nn.Module:
    return move(lb.adapt(model, "lora", ["first"], r=2))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_saved_after_rounding(method, dtype, tmp_path):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
            made[1].running_mean.normal_()
            return made

    model = lb.adapt(make(), method, ["0"], r=2, head="2").to(dtype)
    lb.save(model, tmp_path)
    for base in (make(), make().to(dtype), make().to(dtype).float()):
        fresh = lb.load(base, tmp_path)
        assert all(
            largest(a, b) < 1e-2
            for a, b in zip(lb.delta(model).values(), lb.delta(fresh).values(), strict=True)
        )
    other = make()
    other[1].running_mean.add_(1)
    assert_refused(tmp_path, "'1.running_mean'", base=other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_another_type_is_the_same_base(dtype, tmp_path):
    model = moved("lora")
    lb.save(model, tmp_path)
    x = inputs(dtype)
    assert largest(lb.load(net().to(dtype), tmp_path)(x), copy.deepcopy(model).to(dtype)(x)) == 0
    lb.load(net().to(dtype).float(), tmp_path)
    lb.save(lb.adapt(net().to(dtype), "lora", ["first"], r=2), tmp_path)
    for base in (net(), net().to(dtype), net().to(dtype).float()):
        lb.load(base, tmp_path)
    changed = net()
    with torch.no_grad():
        changed.proj.weight[1, 2] += 0.5
    for base in (changed, copy.deepcopy(changed).to(dtype)):
        assert_refused(tmp_path, "another base", "'proj.weight'", base=base)


def test_the_error_names_what_is_another_architecture(saved):
    assert_refused(saved, "architecture", "head.", base=nn.Sequential(net()))
    more = net()
    more.extra = nn.Linear(2, 2)
    assert_refused(saved, "architecture", "'extra.bias'", base=more)
    wider = net()
    wider.norm.weight = nn.Parameter(torch.ones(9))
    assert_refused(saved, "architecture", "'norm.weight'", "(9,)", base=wider)


def test_heads_are_saved_with_the_adapter(tmp_path):
    model = moved("lora")
    lb.save(model, tmp_path)
    fresh = net()
    with torch.no_grad():
        fresh.head.weight.zero_()
    base = copy.deepcopy(fresh)
    lb.load(fresh, tmp_path)
    assert torch.equal(fresh.head.weight, model.head.weight)
    with lb.disabled(fresh):
        assert torch.equal(fresh(inputs()), base(inputs()))
