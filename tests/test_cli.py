"""The command line from outside: what it prints and how it exits."""

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_book as lb
from lora_book import registry
from lora_book.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_methods_lists_every_method_in_order(capsys):
    assert main(["methods"]) == 0
    assert tuple(line.split()[0] for line in capsys.readouterr().out.splitlines()) == lb.methods()


def test_methods_tell_the_options_of_their_steps(capsys):
    from lora_book.core.steps import step_options

    main(["methods"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, method in registry.METHODS.items():
        for option in [*method.options(), *step_options(registry.STEPS[method.step or "plain"])]:
            assert re.search(rf"[:,] {option}\b", lines[name])
    assert "step mgpo: rho, ema" in lines["mgpo"]


def test_methods_in_markdown_are_a_table(capsys, monkeypatch):
    odd = dataclasses.replace(registry.METHODS["lora"], equation=r"\lVert B\rVert|A|", count=None)
    monkeypatch.setitem(registry.METHODS, "odd", odd)
    assert main(["methods", "--markdown"]) == 0
    head, rule, *rows = (
        re.split(r"(?<!\\)\|", line)[1:-1] for line in capsys.readouterr().out.splitlines()
    )
    assert {len(row) for row in (head, rule, *rows)} == {5}
    assert tuple(row[0].strip(" `") for row in rows) == lb.methods()
    lora = next(row for row in rows if row[0] == " `lora` ")
    assert "`init`" in lora[3] and lora[4].strip() == f"{8 * (768 + 768):,}"
    assert rows[-1][2].strip() == r"$\lVert B\rVert\|A\|$" and not rows[-1][4].strip()


@pytest.mark.parametrize("more", [[], ["--ablations"]])
def test_rows_lists_every_row_and_where_it_runs(more, capsys):
    from lora_book.experiments.rows import row, rows

    assert main(["rows", *more]) == 0
    told = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert tuple(name for name, _ in told) == rows(ablations=bool(more))
    for name, rest in told:
        able = rest.split("; ")[1].split(", ")
        assert ("laptop" in able) == bool(row(name).stand_in)
        assert ("gpu" in able) == (not row(name).unfinished)


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == (
        f"lora_book {lb.__version__}"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_import_no_torch(arguments):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from lora_book.cli import main\n"
        f"sys.exit(main({arguments}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout and ran.stderr.strip() == "False"


def test_doctor_says_what_the_machine_can_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in (
            "python",
            "torch",
            "gpu",
            "smoke",
            "laptop",
            "workstation",
            "profile",
            "results",
        )
    )


def test_one_claim_is_recomputed(capsys):
    assert main(["claims", "C2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("C2") and "verdict" in out and "figures" in out


def test_all_claims_are_listed(capsys):
    assert main(["claims"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lb.theory.claims.claims())


def test_the_list_of_claims_is_recomputed(capsys, monkeypatch):
    from lora_book.theory import claims_algorithms

    monkeypatch.setattr(claims_algorithms, "training_bytes", lambda optimizer: 8.0)
    assert main(["claims"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert rows["A8"] == "holds" and rows["A9"] == "typo"


@pytest.mark.parametrize("claim", ["nonsense", "C", "c2 ", ""])
def test_an_unknown_claim_exits_with_2_and_names_the_nearest(capsys, claim):
    assert main(["claims", claim]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and repr(claim) in said.err
        and "nearest" in said.err
        and "Traceback" not in said.err
    )


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["methods", "extra"], ["--wrong"]])
def test_a_wrong_command_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("lora-book")
    done = subprocess.run(
        [command, "claims", "nonsense"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr
    assert (
        subprocess.run(
            [command, "methods"], cwd=tmp_path, capture_output=True, text=True
        ).returncode
        == 0
    )


def test_broken_settings_are_an_error_and_no_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.ini").write_text("[book]\nprofile = hueg\n")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 2 and "hueg" in capsys.readouterr().err


# Experiments

RUN = ["run", "vit_tiny/cifar10", "--profile", "smoke", "--seeds", "0"]


@pytest.mark.slow
def test_a_row_is_run_and_each_line_says_how_far_it_is(tmp_path, capsys):
    assert main([*RUN, "--method", "c3la", "lora", "--out", str(tmp_path)]) == 0
    stand_ins, first, second, where = capsys.readouterr().out.splitlines()
    assert "stand-ins digits_vit for vit_tiny_patch16_224 and digits for cifar10" in stand_ins
    assert (
        "c3la seed 0: test accuracy 0." in first
        and "[1 of 2, about" in first
        and second.endswith("[2 of 2]")
        and str(tmp_path) in where
    )
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        f"vit_tiny--cifar10--{m}--smoke--0.json" for m in ("c3la", "lora")
    ]
    written = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert main([*RUN, "--method", "c3la", "--method", "lora", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split("[")[0] == first.split("[")[0]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == written


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "vit_tiny/cifar"], "vit_tiny/cifar10"),
        ([*RUN, "--method", "c3al"], "c3la"),
        (["run", "vit_tiny/cifar10", "--profile", "smok"], "smoke"),
    ],
)
def test_a_name_that_is_wrong_exits_with_2_before_anything_runs(arguments, word, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and word in said.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[*RUN, "--seeds", "0,x"], [*RUN, "--engine", "spark"], ["run"], ["table"]]
)
def test_arguments_that_are_wrong_are_explained(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_papers_scale_without_a_gpu_exits_with_2_and_names_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        main(
            [
                "run",
                "vit_tiny/cifar10",
                "--method",
                "c3la",
                "--profile",
                "gpu",
                "--out",
                str(tmp_path),
            ]
        )
        == 2
    )
    said = capsys.readouterr()
    assert said.out == "" and all(
        word in said.err for word in ("a CUDA device", "the hub", "vit_tiny_patch16_224", "smoke")
    )


def test_another_process_of_the_same_run_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["methods"]) == 0 and capsys.readouterr().out == ""


def test_a_table_stands_beside_what_was_measured(capsys):
    assert main(["table", "2"]) == 0
    out = capsys.readouterr().out
    assert "ViT-Tiny / CIFAR-10" in out and len(out.splitlines()) > 10
    assert main(["table", "99"]) == 2 and "99" in capsys.readouterr().err


def test_doctor_knows_what_the_experiments_may_need(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert all(package in out for package in ("ray", "tensorboard", "diffusers", "accelerate"))


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["methods"],
        ["methods", "--markdown"],
        ["rows"],
        ["claims"],
        ["claims", "C2"],
        ["claims", "C2³\udcff"],
        ["doctor"],
        ["table", "2"],
        ["table", "III"],
        ["table", "³"],
        ["run", "vit_tiny/cifar³"],
    ],
)
def test_a_console_without_the_letters_gets_question_marks(arguments, encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = main(arguments)
    said = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]
    assert (code, bool(said[0]), bool(said[1])) in {(0, True, False), (2, False, True)}


@pytest.mark.parametrize(
    "name", [[], ["run"], ["table"], ["claims"], ["methods"], ["rows"], ["doctor"]]
)
def test_help_is_ascii(name, capsys):
    with pytest.raises(SystemExit):
        main([*name, "--help"])
    assert capsys.readouterr().out.isascii()


def test_rows_that_cannot_run_yet_are_named_by_doctor_and_refused(tmp_path, capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for one in ("p4/llama2_7b/mmlu", "p4/sd15/dino"):
        assert one in out
        assert main(["run", one, "--profile", "gpu", "--out", str(tmp_path)]) == 2
        assert "can't run in the profile gpu yet" in capsys.readouterr().err
    assert main(["run", "p4/sd15/dino", "--profile", "laptop", "--out", str(tmp_path)]) == 2
    assert "can't run yet" in capsys.readouterr().err and not list(tmp_path.iterdir())
