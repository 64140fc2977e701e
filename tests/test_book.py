"""What makes a chapter run again, and what a failing chapter does to the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import book
from tools.book import chapter_key, closure, main
from tools.execute import tidy

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "lora_book/__init__.py": "from .past.lora import LoRA\n",
    "lora_book/core/__init__.py": "",
    "lora_book/core/errors.py": "class Bad(Exception): pass\n",
    "lora_book/core/adapter.py": "from .errors import Bad\n",
    "lora_book/past/__init__.py": "",
    "lora_book/past/lora.py": "from ..core.adapter import Bad as LoRA\n",
    "lora_book/past/other.py": "import lora_book.core.errors\n",
    "lora_book/past/table.csv": "a,b\n",
    "lora_book/lazy.py": "import importlib\nmodule = importlib.import_module('lora_book.past')\n",
    "constraints.txt": "torch==2\n",
}


def notebook(*cells: str) -> str:
    listed = [
        {
            "cell_type": "markdown" if cell.startswith("# ") else "code",
            "id": f"c{n}",
            "metadata": {},
            "source": cell.splitlines(keepends=True),
        }
        | ({} if cell.startswith("# ") else {"outputs": [], "execution_count": None})
        for n, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return json.dumps({"cells": listed, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def project(tmp_path) -> Path:
    for name, content in {
        **FILES,
        "nbs/a.ipynb": notebook("# A {#sec-a}\n\nClaim.", "from lora_book.past import lora\n1 + 1"),
        "nbs/b.ipynb": notebook("# B {#sec-b}\n\nClaim.", "2 + 2"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "index.qmd").write_text("# Home {.unnumbered}\n")
    (tmp_path / "_quarto.yml").write_text(
        "project: {type: book}\nbook:\n  title: Small\n  chapters: [index.qmd, nbs/a.ipynb,"
        " nbs/b.ipynb]\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "code, reached",
    [
        (
            "from lora_book.past.lora import LoRA",
            {"past/lora.py", "core/adapter.py", "core/errors.py", "past/table.csv"},
        ),
        (
            "from lora_book.past import lora",
            {
                "past/__init__.py",
                "past/lora.py",
                "core/adapter.py",
                "core/errors.py",
                "past/table.csv",
            },
        ),
        ("import lora_book.core.errors", {"core/errors.py"}),
        (
            "def late():\n    from lora_book.core import errors",
            {"core/__init__.py", "core/errors.py"},
        ),
        ("%matplotlib inline\nimport lora_book.core.errors", {"core/errors.py"}),
        ("import numpy", set()),
    ],
)
def test_closure_is_what_the_code_reaches(project, code, reached):
    assert {
        path.relative_to(project / "lora_book").as_posix() for path in closure(project, [code])
    } == reached


def test_closure_of_the_package_is_what_its_first_file_imports(project):
    names = {path.name for path in closure(project, ["import lora_book as lb"])}
    assert {"lora.py", "adapter.py", "errors.py"} <= names and "other.py" not in names


def test_closure_of_an_import_by_name_is_everything(project):
    assert {
        path for path in closure(project, ["from lora_book import lazy"]) if path.suffix == ".py"
    } == set((project / "lora_book").rglob("*.py"))


@pytest.mark.parametrize(
    "file, changes",
    [
        ("lora_book/core/errors.py", True),
        ("lora_book/past/table.csv", True),
        ("constraints.txt", True),
        ("lora_book/past/other.py", False),
        ("lora_book/lazy.py", False),
        ("nbs/b.ipynb", False),
    ],
)
def test_key_changes_with_what_a_chapter_depends_on(project, file, changes):
    before = chapter_key(project, project / "nbs/a.ipynb", {"profile": "smoke"})
    (project / file).write_text((project / file).read_text() + "\n# changed\n")
    assert (
        chapter_key(project, project / "nbs/a.ipynb", {"profile": "smoke"}) != before
    ) == changes


def test_key_changes_with_code_and_settings_but_not_with_prose(project):
    def key(prose: str, code: str, **settings) -> str:
        (project / "nbs/a.ipynb").write_text(notebook(f"# {prose}", code))
        return chapter_key(project, project / "nbs/a.ipynb", settings)

    assert key("One", "1", epochs=1) == key("Two", "1", epochs=1)
    assert (
        len({key("One", "1", epochs=1), key("One", "2", epochs=1), key("One", "1", epochs=2)}) == 3
    )
    assert key("One", "1", epochs=1, workers=1) == key("One", "1", epochs=1, workers=2)


def test_book_is_executed_once_and_a_failure_stays_alone(project, capsys):
    sources = {path: path.read_bytes() for path in (project / "nbs").rglob("*.ipynb")}
    run = ["--profile", "smoke", "--renderer", "offline"]
    assert main(run, project) == 0
    first = capsys.readouterr().out
    assert first.count(" ran ") == 2 and str(project / "_site/index.html") in first
    assert ">2<" in (project / "_site/nbs/a.html").read_text() and sources == {
        path: path.read_bytes() for path in sources
    }

    (project / "nbs/a.ipynb").write_text(
        notebook("# A {#sec-a}\n\nOther words.", "from lora_book.past import lora\n1 + 1")
    )
    (project / "nbs/b.ipynb").write_text(notebook("# B {#sec-b}\n\nClaim.", "1 / 0"))
    assert main(run, project) == 1
    second = capsys.readouterr()
    assert "cached" in second.out and "FAILED" in second.out
    assert "nbs/b.ipynb failed" in second.err and "ZeroDivisionError" in second.err

    warned = (
        "import warnings\nwarnings.warn('mind')\nprint('/x/lib/site-packages/torch/nn.py:1:"
        " UserWarning')\n7 * 6"
    )
    (project / "nbs/b.ipynb").write_text(notebook("# B {#sec-b}\n\nClaim.", warned))
    assert main([*run, "--only", "b"], project) == 0
    assert "nbs/a.ipynb" not in capsys.readouterr().out
    assert (
        ">42<" in (project / "_site/nbs/b.html").read_text()
        and "Other words." in (project / "_site/nbs/a.html").read_text()
    )
    assert not list((project / "_build").rglob("*.part"))
    page = (project / "_site/nbs/b.html").read_text()
    assert (
        "cell:2: UserWarning: mind" in page
        and ">torch/nn.py:1: UserWarning" in page
        and "ipykernel" not in page
    )


def test_a_chapter_is_not_written_over_its_source(project, capsys):
    (project / "_build/smoke").mkdir(parents=True)
    (project / "_build/smoke/nbs").symlink_to(project / "nbs")
    before = (project / "nbs/a.ipynb").read_bytes()
    assert main(["--profile", "smoke", "--only", "a", "--no-render"], project) == 1
    assert "leads to the source itself" in capsys.readouterr().err
    assert (project / "nbs/a.ipynb").read_bytes() == before


PRINTED = [
    ("/x/lib/site-packages/torch/nn.py:1: W", "torch/nn.py:1: W"),
    ("a /x/site-packages/b/site-packages/c d/site-packages/e", "a c e"),
    ("/tmp/ipykernel_12/345.py:2: W /ipykernel_1/x.py", "cell:2: W /ipykernel_1/x.py"),
    ("/site-packages", "/site-packages"),
]


@pytest.mark.parametrize("text, tidied", PRINTED)
def test_printed_folders_of_this_machine_are_taken_out(text, tidied):
    cells = [{"outputs": [{"output_type": "stream", "text": text}]}, {}]
    tidy(cells)
    assert cells[0]["outputs"][0]["text"] == tidied


@pytest.mark.parametrize("unit", ["x", "/", "/ipykernel_1", "1", "/ipykernel_1/1.p", "x "])
def test_tidying_takes_time_in_proportion_to_what_is_printed(unit):
    start = time.process_time()
    tidy([{"outputs": [{"output_type": "stream", "text": unit * (150_000 // len(unit))}]}])
    assert time.process_time() - start < 2  # a hundredth; what is quadratic takes half a minute


def test_an_older_processor_has_its_arithmetic_and_its_folders(project, monkeypatch):
    code = (
        "import os, torch\nprint(torch.backends.cpu.get_cpu_capability(),"
        " os.path.basename(os.environ['LORA_BOOK_CACHE_DIR']))"
    )
    (project / "nbs/a.ipynb").write_text(notebook("# A {#sec-a}\n\nClaim.", code))
    monkeypatch.setenv("LORA_BOOK_CACHE_DIR", str(project / "models"))
    run = ["--profile", "smoke", "--no-render", "--only", "a"]
    assert main([*run, "--processor", "sse"], project) == main(run, project) == 0
    old, own = (
        (project / "_build" / name / "nbs/a.ipynb").read_text() for name in ("smoke-sse", "smoke")
    )
    assert "DEFAULT models-sse" in old and "models-sse" not in own and "models" in own


def test_a_wide_table_is_printed_alike_in_a_forked_kernel_and_in_a_cold_one(project, monkeypatch):
    (project / "nbs/a.ipynb").write_text(
        notebook(
            "# A {#sec-a}\n\nClaim.",
            "import pandas as pd\npd.DataFrame({'column %d' % i: [i] for i in range(12)})",
        )
    )
    monkeypatch.setattr(book, "WARM", ["ipykernel.kernelapp", "pandas"])
    printed = []
    for few in (0, 9):
        monkeypatch.setattr(book, "FEW", few)
        shutil.rmtree(project / "_build", ignore_errors=True)
        assert main(["--profile", "smoke", "--only", "a", "--no-render"], project) == 0
        printed.append(
            json.loads((project / "_build/smoke/nbs/a.ipynb").read_text())["cells"][-1]["outputs"][
                0
            ]["data"]
        )
    assert printed[0] == printed[1] and "column 11" in "".join(printed[0]["text/plain"])


def test_a_kernel_has_nothing_of_the_book_nor_of_the_chapter_before(project, monkeypatch):
    monkeypatch.setattr(book, "FEW", 0)
    monkeypatch.setattr(book, "WARM", ["torch"])
    marked = (
        "import os, sys\nassert 'torch' in sys.modules or sys.platform != 'linux'\nimport"
        " torch\nassert not any(name.split('.')[0] == 'lora_book' for name in sys.modules)\nassert"
        " not hasattr(torch, 'left')\ntorch.left = 1"
    )
    here = (
        "import lora_book\nassert os.path.dirname(os.path.dirname(lora_book.__file__)) =="
        " os.path.dirname(os.getcwd()).split('/_build')[0]"
    )
    for name in "ab":
        (project / f"nbs/{name}.ipynb").write_text(
            notebook(
                f"# {name} {{#sec-{name}}}\n\nClaim.",
                marked,
                here,
                "torch.initial_seed(), float(torch.rand(1))",
            )
        )
    (project / "settings.ini").write_text(
        (project / "settings.ini").read_text().replace("workers = 2", "workers = 1")
    )
    assert main(["--profile", "smoke", "--renderer", "offline"], project) == 0
    drawn = [
        json.loads((project / f"_build/smoke/nbs/{name}.ipynb").read_text())["cells"][-1]["outputs"]
        for name in "ab"
    ]
    assert drawn[0][0]["data"] == drawn[1][0]["data"]


@pytest.mark.parametrize("fatal", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_a_chapter_whose_kernel_dies_fails_and_the_next_one_runs(project, fatal, capsys):
    (project / "nbs/a.ipynb").write_text(notebook("# A {#sec-a}\n\nClaim.", f"import os\n{fatal}"))
    (project / "settings.ini").write_text(
        (project / "settings.ini").read_text().replace("workers = 2", "workers = 1")
    )
    assert main(["--profile", "smoke", "--renderer", "offline"], project) == 1
    told = capsys.readouterr()
    assert (
        "1 of 2 chapters ready" in told.out
        and "nbs/a.ipynb failed" in told.err
        and "died" in told.err.lower()
    )


def test_processes_are_gone_when_the_book_is_interrupted(project):
    (project / "nbs/a.ipynb").write_text(
        notebook(
            "# A {#sec-a}\n\nClaim.",
            "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)",
        )
    )
    code = (
        "import sys; from pathlib import Path; from tools.book import main;"
        f" sys.exit(main(['--profile', 'smoke'], Path({str(project)!r})))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    written = project / "_build/smoke/nbs/pid"
    wait_for(lambda: written.is_file() and written.read_text(), 60)
    running.send_signal(signal.SIGINT)
    assert (
        "finished chapters are kept" in running.communicate(timeout=60)[1]
        and running.returncode == 130
    )
    wait_for(lambda: not alive(int(written.read_text())), 20)


def test_signals_are_the_callers_again_when_the_pages_are_rendered(project, monkeypatch):
    def handlers() -> list:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, seen = handlers(), []
    monkeypatch.setattr(book, "render", lambda *given: seen.append(handlers()) or 0)
    assert main(["--profile", "smoke"], project) == 0 and seen == [before]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.1)


QUARTO = """#!{python}
import pathlib, shutil, sys
assert sys.argv[1] == "render"
copy = pathlib.Path(sys.argv[2])
(copy / "_site/nbs").mkdir(parents=True)
shutil.copy(copy / "nbs/a.ipynb", copy / "_site")
(copy / "_site/index.html").write_text({page!r})
(copy / "_site/style.css").write_text({style!r})
print({said!r}, file=sys.stderr)
sys.exit({status})
"""


SOURCE = (
    '<dl class="source"><div><dt>Source of this chapter</dt><dd><a href="a.ipynb?notebook"'
    " download>nbs/a.ipynb</a></dd></div></dl>"
)


@pytest.fixture
def rendered(project, monkeypatch):
    """Render the project, its first chapter executed, by a stand-in for Quarto that says what it's
    told; the exit status.
    """
    table = {
        "output_type": "execute_result",
        "execution_count": 1,
        "metadata": {},
        "data": {"text/html": ["<b>\n", "~</b>"], "text/plain": ["b"]},
    }
    executed = json.loads((project / "nbs/a.ipynb").read_text())
    executed["cells"][1]["outputs"] = [table]
    (project / "_build/smoke/nbs").mkdir(parents=True)
    (project / "_build/smoke/nbs/a.ipynb").write_text(json.dumps(executed))
    (project / "_site").mkdir()
    (project / "_site/index.html").write_text("before")

    def render(said: str = "", status: int = 0, page: str = "<p>now</p>", style: str = "") -> int:
        program = project.parent / f"{project.name}-bin" / "quarto"
        program.parent.mkdir()
        program.write_text(
            QUARTO.format(python=sys.executable, said=said, status=status, page=page, style=style)
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return book.render(
            project, project / "_build/smoke", project / "_site", None, partial=False
        )

    return render


def test_quarto_renders_what_was_executed_where_it_is_on_the_path(project, rendered, capsys):
    sources = {path: path.read_bytes() for path in (project / "nbs").rglob("*.ipynb")}
    assert rendered("[1/2] index.qmd") == 0
    out = capsys.readouterr().out
    assert "rendering with quarto" in out and str(project / "_site/index.html") in out
    assert (project / "_site/index.html").read_text() == "<p>now</p>" and sources == {
        path: path.read_bytes() for path in sources
    }
    title, code = json.loads((project / "_site/a.ipynb").read_text())["cells"]
    assert code["outputs"][0]["data"] == {
        "text/markdown": ["~~~~~~~~~{=html}\n", "<b>\n", "~</b>\n", "~~~~~~~~~\n"]
    }
    assert (project / "_site/nbs/a.ipynb").read_bytes() == (
        project / "_build/smoke/nbs/a.ipynb"
    ).read_bytes()
    assert (
        title["source"][:4] == ["# A {#sec-a}\n", "\n", "~~~~~~~~~{=html}\n", f"{SOURCE}\n"]
        and title["source"][-1] == "Claim."
    )


@pytest.mark.parametrize(
    "told",
    [
        {"said": "\33[33mWARN: nbs/a.html: Unable to resolve crossref @fig-nope\33[39m"},
        {"said": "\33[33mWARN: Unable to resolve link target: nbs/nope.ipynb\33[39m"},
        {"said": "[WARNING] Citeproc: citation nokey not found"},
        {"said": "[WARNING] Could not convert TeX math \\frac{1, rendering as TeX:"},
        {"said": "ERROR: no such format", "status": 1},
        {"page": '<link href="https://fonts.example/a.css" rel="stylesheet">'},
        {"page": '<script src="//cdn.example/a.js"></script>'},
        {"style": '@import"https://fonts.example/a.css";'},
        {"style": "a { background: url(https://example.org/a.png) }"},
    ],
)
def test_a_fault_that_quarto_only_warns_of_fails_and_leaves_the_site(
    project, rendered, told, capsys
):
    assert rendered(**told) == 1
    said = capsys.readouterr().err
    assert told.get("said", "would be fetched from elsewhere") in said
    assert (project / "_site/index.html").read_text() == "before"


def test_quarto_is_asked_for_and_not_there(project, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert (
        book.render(project, project / "_build/smoke", project / "_site", "quarto", partial=False)
        == 1
    )
    assert "quarto isn't on PATH" in capsys.readouterr().err
