"""The command line from outside: what it prints and how it exits."""
import subprocess
import sys
from pathlib import Path

import pytest

import lora_book as lb
from lora_book.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_methods_lists_every_method_in_order(capsys):
    assert main(["methods"]) == 0
    assert tuple(line.split()[0] for line in capsys.readouterr().out.splitlines()) == lb.methods()


def test_doctor_says_what_the_machine_can_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "torch", "gpu", "smoke", "laptop", "profile", "results"))


def test_one_claim_is_recomputed(capsys):
    assert main(["claims", "C2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("C2") and "verdict" in out and "figures" in out


def test_all_claims_are_listed(capsys):
    assert main(["claims"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lb.theory.claims.claims())


@pytest.mark.parametrize("claim", ["nonsense", "C", "c2 ", ""])
def test_an_unknown_claim_exits_with_2_and_names_the_nearest(capsys, claim):
    assert main(["claims", claim]) == 2
    said = capsys.readouterr()
    assert said.out == "" and repr(claim) in said.err and "nearest" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["methods", "extra"], ["--wrong"]])
def test_a_wrong_command_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("lora-book")
    done = subprocess.run([command, "claims", "nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr
    assert subprocess.run([command, "methods"], cwd=tmp_path, capture_output=True, text=True).returncode == 0


def test_broken_settings_are_an_error_and_no_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.ini").write_text("[book]\nprofile = hueg\n")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 2 and "hueg" in capsys.readouterr().err
