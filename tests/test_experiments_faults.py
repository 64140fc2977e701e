"""What goes wrong around a run: killed, interrupted, a full disk, damaged files, two owners.
Nothing is lost or mixed, and each says what happened.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_experiments_runner import ROW, SMALL, numbers, small

import lora_book as lb
from lora_book.cli import main
from lora_book.core import files
from lora_book.experiments import runner

ROOT = Path(__file__).resolve().parent.parent
NAME = runner.job(ROW, "cola", "smoke", 0).name
LONG = SMALL | {"epochs": 4, "batch_size": 8}  # 20 steps, the chain advances after each epoch


def long(folder: Path, **own) -> dict:
    return runner.run(ROW, "cola", profile="smoke", folder=folder, save_every=3, **(LONG | own))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    "The result of a run that nothing happened to."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield numbers(long(tmp_path_factory.mktemp("whole")))
    torch.set_num_threads(threads)


FORKS = """
import json, os, signal, sys, time
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
import test_experiments_faults as t
from lora_book.experiments import runner

def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act() or 0)
        finally:
            os._exit(70)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
KILLS = """
def killed_in(step):
    real, left = runner.fit, [step]
    def fit(model, data, loss, **rest):
        def last(model, batch):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(model, batch)
        return real(model, data, loss=last, **rest)
    runner.fit = fit
    t.long(t.Path({folder!r}))

for step in {kills!r}:
    print(ended(child(lambda: killed_in(step))))
"""
TWICE = """
def late(seconds):
    "A run that is still at it when the other one asks."
    real = runner.train
    runner.train = lambda *args, **hooks: (time.sleep(seconds), real(*args, **hooks))[1]
    return t.main(["run", t.ROW, "--method", "cola", "--profile", "smoke", "--seeds", "0", "--out", {folder!r}])

first = child(lambda: late(4))
while not any(t.Path({folder!r}).glob("*.lock")):
    time.sleep(0.02)
second = child(lambda: late(0))
print(ended(second), first)
print(ended(first))
"""


def forked(code: str, **words) -> subprocess.CompletedProcess:
    """Run a script whose children are forked, so that one import serves them all. It may look for a
    CUDA device only in a way that lets its children have it.
    """
    text = (FORKS + code).format(
        tests=str(ROOT / "tests"),
        **{key: str(w) if isinstance(w, Path) else w for key, w in words.items()},
    )
    own = os.environ | {
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-c", text], env=own, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_with_the_same_numbers(whole, tmp_path):
    kills = torch.randint(4, 8, (3,)).tolist()
    done = forked(KILLS, folder=tmp_path, kills=kills)
    assert done.stdout.split() == ["-9"] * 3, (kills, done.stderr[-2000:])
    assert (tmp_path / "checkpoints" / NAME / "checkpoint.safetensors").exists() and not list(
        tmp_path.glob("*.json")
    )
    assert (tmp_path / f"{NAME}.lock").exists(), (
        "the dead owner's lock should have been left behind"
    )
    steps = []
    real = runner.train
    with pytest.MonkeyPatch.context() as counted:
        counted.setattr(
            runner,
            "train",
            lambda *args, **hooks: real(
                *args, **(hooks | {"watch": lambda position: steps.append(position["at"])})
            ),
        )
        assert numbers(long(tmp_path)) == whole
    assert 0 < len(steps) < 20 and steps[-1] == 20, "it should have gone on from a checkpoint"
    assert not list(tmp_path.glob("*.lock")) and not (tmp_path / "checkpoints" / NAME).exists()


@pytest.mark.slow
def test_two_runs_of_the_same_job_at_once(tmp_path):
    done = forked(TWICE, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = [line for line in done.stdout.splitlines() if line and line.split()[0].isdigit()]
    second, owner = codes[0].split()
    assert (second, codes[1]) == ("2", "0"), done.stdout + done.stderr[-2000:]
    assert f"is being run by process {owner}" in done.stdout
    assert [path.name for path in tmp_path.glob("*.json")] == [
        f"{NAME}.json"
    ] and runner.read_result(tmp_path / f"{NAME}.json")


def test_a_held_lock_is_respected_and_a_dead_ones_is_taken(tmp_path):
    lock = tmp_path / f"{NAME}.lock"
    with runner.owned(lock):
        with pytest.raises(runner.Busy, match=f"process {os.getpid()}"):
            long(tmp_path)
        assert not list(tmp_path.glob("*.json")) and lock.exists()
    assert not lock.exists()
    lock.write_text("999999")
    with runner.owned(lock):
        assert lock.read_text() == str(os.getpid())


# Ctrl-C


def interrupted_at(step: int):
    "A `train` that gets Ctrl-C during a step."
    real = runner.train

    def train(*args, **hooks):
        return real(
            *args,
            **(
                hooks
                | {
                    "watch": lambda position: (
                        os.kill(os.getpid(), signal.SIGINT) if position["at"] == step else None
                    )
                }
            ),
        )

    return train


def test_ctrl_c_leaves_a_checkpoint_of_that_very_step_and_says_how_to_go_on(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runner, "train", interrupted_at(7))
    monkeypatch.setattr(runner, "ALSO", runner.ALSO)
    real = runner.job
    monkeypatch.setattr(runner, "job", lambda *names, **own: real(*names, **(LONG | own)))
    before = signal.getsignal(signal.SIGINT)
    assert (
        main(
            [
                "run",
                ROW,
                "--method",
                "cola",
                "--profile",
                "smoke",
                "--seeds",
                "0",
                "--out",
                str(tmp_path),
            ]
        )
        == 130
    )
    said = capsys.readouterr().err
    assert (
        "stopped after step 8 of 20" in said
        and "the same command goes on from there" in said
        and "Traceback" not in said
    )
    assert (
        signal.getsignal(signal.SIGINT) is before
        and not list(tmp_path.glob("*.lock"))
        and not list(tmp_path.glob("*.json"))
    )
    monkeypatch.undo()
    assert numbers(long(tmp_path)) == whole


def test_the_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), runner.asked_to_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# Disks and files


@pytest.fixture
def disk(tmp_path):
    """A function that limits a folder to some KiB: a small tmpfs where mounting is allowed, else
    skipped.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs isn't allowed here")
    yield (
        folder,
        lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True),
    )
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(whole, disk, capsys):
    folder, resize = disk
    (folder / "kept.json").write_bytes(b"x")
    with pytest.raises(OSError, match="No space"):
        long(folder)
    assert (
        main(
            [
                "run",
                ROW,
                "--method",
                "cola",
                "--profile",
                "smoke",
                "--seeds",
                "0",
                "--out",
                str(folder),
            ]
        )
        == 2
    )
    said = capsys.readouterr()
    assert (
        "No space left" in said.out
        and "what is finished is kept" in said.out
        and "1 of 1 runs failed" in said.err
    )
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["kept.json"], (
        "a part of a file was left"
    )
    resize("4m")
    assert numbers(long(folder)) == whole


@pytest.mark.parametrize("failing", ["checkpoint.safetensors", f"{NAME}.json"])
def test_a_write_that_fails_leaves_what_was_there(whole, tmp_path, monkeypatch, failing):
    write, seen = files.write_part, []

    def full(path, content):
        if path.name.startswith(failing) and (
            seen.append(1) or len(seen) > 1 or failing == f"{NAME}.json"
        ):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(files, "write_part", full)
    with pytest.raises(OSError, match="No space"):
        long(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        "checkpoint.safetensors"
    ]
    assert numbers(long(tmp_path)) == whole


def test_a_damaged_checkpoint_is_named_and_nothing_else_is_touched(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runner, "train", interrupted_at(7))
    with pytest.raises(KeyboardInterrupt):
        long(tmp_path)
    monkeypatch.undo()
    file = tmp_path / "checkpoints" / NAME / "checkpoint.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    damaged = file.read_bytes()
    with pytest.raises(ValueError, match="damaged") as caught:
        long(tmp_path)
    assert (
        str(file) in str(caught.value)
        and file.read_bytes() == damaged
        and not list(tmp_path.glob("*.json"))
    )
    assert numbers(long(tmp_path, resume=False)) == whole


def test_a_checkpoint_of_other_settings_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", interrupted_at(7))
    with pytest.raises(KeyboardInterrupt):
        long(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="lr: .* there"):
        long(tmp_path, lr=0.5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("stored")
    small(folder=folder)
    return next(folder.glob("*.json")).read_bytes()


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_edited_or_cut_result_is_refused(stored, tmp_path, data):
    at = data.draw(st.integers(0, len(stored) - 2))
    edited = data.draw(
        st.sampled_from(
            [
                stored[:at],
                stored[:at]
                + bytes([stored[at] ^ data.draw(st.integers(1, 127))])
                + stored[at + 1 :],
            ]
        )
    )
    path = tmp_path / "vit_tiny--cifar10--lora--smoke--0.json"
    path.write_bytes(edited)
    try:
        same = json.dumps(json.loads(edited)) == json.dumps(json.loads(stored))
    except ValueError:
        same = False
    if same:
        assert runner.read_result(path)
        return
    for read in (
        lambda: runner.read_result(path),
        lambda: small(folder=tmp_path),
        lambda: runner.results(tmp_path),
    ):
        with pytest.raises(lb.LoraBookError, match=path.name):
            read()
    assert path.read_bytes() == edited


def test_a_result_is_never_written_over(stored, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(stored)
    with pytest.raises(ValueError, match="never written over"):
        runner.write_result(path, {"row": "x"})
    assert path.read_bytes() == stored
