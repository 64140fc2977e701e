"""The package as others take it: what it needs, how it is typed, versioned, built and checked."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import lora_book as lb
from lora_book.core.errors import LoraBookError, MissingPackage, extra
from lora_book.experiments import runner
from tools import check

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted((ROOT / "lora_book").rglob("*.py"))
UNIX = {"fcntl", "resource", "pwd", "grp", "termios"}
MISSING = [
    *("timm", "torchvision", "transformers", "datasets", "accelerate", "huggingface_hub", "peft"),
    *("scipy", "sklearn", "pandas", "matplotlib", "psutil", "mlxtend", "ray", "IPython"),
]
WITHOUT = f"""
import sys

class Missing:
    "Finds what another finder finds, without the packages that extras bring."

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {MISSING}
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Missing, sys.meta_path)
"""
LIFE = """
import tempfile
import torch
from torch import nn
import lora_book as lb

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))

x, y = torch.randn(16, 12), torch.randn(16, 2)
for method in lb.methods():
    more = {"head": ["2"]} if method == "linear_probe" else {}
    model = lb.adapt(base(), method, target_modules=["0"], r=2, **more)
    optimizer = torch.optim.SGD(lb.param_groups(model, lr=1e-2), momentum=0.9)
    for _ in range(3):
        lb.train_step(model, optimizer, lambda: nn.functional.mse_loss(model(x), y))
    out = model.eval()(x).detach()
    with tempfile.TemporaryDirectory() as folder:
        lb.save(model, folder)
        torch.testing.assert_close(lb.load(base(), folder).eval()(x), out)
    lb.merge(model)
    torch.testing.assert_close(model(x), out)
    print(method)
"""


def python(code: str, **named) -> subprocess.CompletedProcess:
    "Run code in a process of its own, in the root of the project."
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **named
    )


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    "The top names that a tree imports, each with its line; relative imports aside."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(((node.module or "").partition(".")[0], node.lineno))
    return found


def under(tree: ast.AST, held) -> set[int]:
    "The lines inside the nodes for which `held` is true."
    return {
        line
        for node in ast.walk(tree)
        if held(node)
        for line in range(node.lineno, node.end_lineno + 1)
    }


def says_extra(node: ast.AST) -> bool:
    "Whether a node is `with extra(...)`, or leaves out what isn't there."
    return isinstance(node, ast.With) and any(
        isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func) in ("extra", "suppress")
        for item in node.items
    )


def catches_import_errors(node: ast.AST) -> bool:
    return isinstance(node, ast.Try) and any(
        ast.unparse(handler.type) == "ImportError" for handler in node.handlers if handler.type
    )


def unguarded(source: str, names: set[str] | None = None) -> list[str]:
    """What a module imports without `with extra`: the packages beyond the core's own; with `names`,
    those of them outside `try … except ImportError`.
    """
    tree = ast.parse(source)
    guard = says_extra if names is None else catches_import_errors
    lines = under(tree, guard)
    core = {re.match(r"\w+", need)[0] for need in PROJECT["project"]["dependencies"]}
    return [
        name
        for name, line in imports(tree)
        if line not in lines
        and (
            name in names
            if names is not None
            else name not in {*core, *sys.stdlib_module_names, "lora_book"}
        )
    ]


def test_the_core_needs_five_packages():
    needs = {re.match(r"\w+", need)[0] for need in PROJECT["project"]["dependencies"]}
    assert needs == {"torch", "safetensors", "numpy", "tqdm", "filelock"}
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        *("lab", "peft", "book", "scale", "test")
    }


@pytest.mark.slow
def test_every_method_lives_without_the_extras():
    ran = python(WITHOUT + LIFE, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert tuple(ran.stdout.split()) == lb.methods()


@pytest.mark.parametrize(
    "code, package",
    [
        ("import lora_book.lab.figures", "matplotlib"),
        ("import lora_book.lab.protocol", "scipy"),
        ("import lora_book.lab.telling", "pandas"),
        ("from lora_book.lab.models import load_model; load_model('minilm', 2)", "transformers"),
        ("from lora_book.lab.models import load_model; load_model('digits_vit', 2)", "timm"),
        ("import lora_book; lora_book.theory.landscape", "scipy"),
    ],
)
def test_what_is_missing_is_told_with_its_extra(code, package):
    ran = python(
        WITHOUT + "from lora_book import LoraBookError\n"
        f"try:\n    {code}\nexcept LoraBookError as error:\n"
        "    assert isinstance(error, ImportError)\n    print(error.name, error)"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(package) and "pip install 'lora_book[lab]'" in ran.stdout


@pytest.mark.slow
def test_the_command_line_works_without_the_extras():
    wanted = [["methods"], ["rows"], ["claims", "C2"], ["doctor"], ["table", "2"]]
    ran = python(
        WITHOUT + "from lora_book.cli import main\n"
        f"codes = [main(arguments) for arguments in {wanted}]\nprint(codes)"
    )
    assert ran.returncode == 0 and ran.stdout.endswith("[0, 0, 0, 0, 2]\n"), ran.stderr
    assert "'lora_book[lab]'" in ran.stderr


def test_a_package_that_is_there_and_broken_keeps_its_own_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_here.py").write_text("raise ImportError('of my own')")
    with pytest.raises(ImportError, match="of my own") as caught, extra("lab"):
        importlib.import_module("broken_here")
    assert not isinstance(caught.value, LoraBookError)
    with pytest.raises(ModuleNotFoundError), extra("lab"):
        importlib.import_module("lora_book.nothing")
    with pytest.raises(MissingPackage, match=r"'not_anywhere'.*lora_book\[scale\]"), extra("scale"):
        importlib.import_module("not_anywhere.part")


# the checker of laws offers transformers' Conv1D as one of its hosts
@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_beyond_the_core_name_their_extra(path):
    known = {"laws.py": ["transformers"]}.get(path.name, [])
    assert [name for name in unguarded(path.read_text()) if name not in known] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_unix_alone_has_is_imported_with_care(path):
    assert unguarded(path.read_text(), UNIX) == []


def test_unguarded_imports_are_seen():
    assert unguarded("def f():\n    import scipy.stats") == ["scipy"]
    assert unguarded("with extra('lab'):\n    import scipy\nimport timm") == ["timm"]
    assert unguarded("import os, fcntl", UNIX) == ["fcntl"]
    assert unguarded("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", UNIX) == []
    assert unguarded("try:\n    import fcntl\nfinally:\n    pass", UNIX) == ["fcntl"]


def test_extras_that_are_named_exist():
    known = set(PROJECT["project"]["optional-dependencies"])
    named = {
        name
        for path in [*MODULES, ROOT / "README.md", *(ROOT / "tools").rglob("*.py")]
        for name in re.findall(r"(?:lora_book\[|extra\(\")(\w+)", path.read_text("utf-8"))
    }
    assert {"lab", "scale"} <= named <= known


def test_a_run_has_one_owner_without_flock_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "fcntl", None)
    path = tmp_path / "runs" / "one.lock"
    with runner.owned(path):
        with pytest.raises(runner.Busy, match="one is being run by another"), runner.owned(path):
            raise AssertionError("two owners")
    with runner.owned(path):
        pass


def test_memory_is_told_where_there_is_no_proc(monkeypatch):
    real = runner.Path

    class NoProc(type(real())):
        def read_text(self, *args, **named):
            raise FileNotFoundError

    monkeypatch.setattr(runner, "Path", NoProc)
    assert runner.peak()["process"] > 2**20


def test_adapt_returns_the_models_own_type(tmp_path):
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import torch\nimport lora_book as lb\n\n\nclass Net(torch.nn.Module):\n"
        "    own: int = 3\n\n\nnet = lb.adapt(Net(), 'lora', r=4)\nreveal_type(net)\n"
        "reveal_type(net.own)\nreveal_type(lb.methods())\nlb.adapt(3, 'lora')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", snippet],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = re.findall(r'Revealed type is "(?:builtins\.)?([^"]*)"', ran.stdout)
    assert told[:2] == ["snippet.Net", "int"] and told[2].startswith("tuple[")
    errors = [line for line in ran.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and ":13:" in errors[0] and "adapt" in errors[0]


def test_types_are_checked_with_the_rest():
    found = {name: command for name, command, *_ in check.steps(False, Path("x"))}
    assert list(found) == ["lint", "format", "types", "tests", "book"]
    assert found["types"][:2] == ["-m", "mypy"] and "lora_book/core" in found["types"]
    quick = {name: command for name, command, *_ in check.steps(True, Path("x"))}
    assert list(quick) == ["lint", "format", "types", "tests"]
    chosen = quick["tests"][-len(check.QUICK) :]
    assert all((ROOT / path).exists() for path in [*check.TYPED, *chosen])


def test_the_version_has_one_value():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert lb.__version__ == said == first
    assert PROJECT["project"]["dynamic"] == ["version"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_workflows_run_what_there_is(path):
    told = yaml.safe_load(path.read_text())
    runs = [s["run"] for job in told["jobs"].values() for s in job["steps"] if "run" in s]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert runs and True in told  # YAML reads the key `on` as true
    for run in runs:
        assert set(re.findall(r"^make (\w+)", run)) <= targets
        for module in re.findall(r"-m (tools\.\w+)", run):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        for script in re.findall(r"^bash (\S+)", run):
            assert (ROOT / script).is_file()


def test_workflows_try_each_python_with_the_oldest_and_the_newest_torch():
    full = yaml.safe_load((ROOT / ".github/workflows/full.yml").read_text())
    matrix = full["jobs"]["matrix"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and matrix["torch"] == ["oldest", "newest"]
    oldest = next(need for need in PROJECT["project"]["dependencies"] if need.startswith("torch"))
    assert oldest.replace(">=", "==") + ".*" in (ROOT / ".github/workflows/full.yml").read_text()


def test_hooks_before_a_commit_run_what_there_is():
    told = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in told["repos"] for hook in repo["hooks"]]
    assert any("ruff check" in entry for entry in entries)
    files = [word for entry in entries for word in entry.split() if word.startswith("tests/")]
    assert all((ROOT / file).is_file() for file in files)


def test_what_is_installed_for_tests_is_what_the_checks_call():
    extras = PROJECT["project"]["optional-dependencies"]
    named = {re.match(r"[\w-]+", need)[0] for need in [*extras["test"], *extras["book"]]}
    assert {"mypy", "ruff", "pytest", "pytest-xdist", "hypothesis", "build", "pyyaml"} <= named
    pinned = {
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert {"mypy", "ruff", "pytest", "build"} <= pinned


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_works_in_an_empty_folder(tmp_path):
    pytest.importorskip("build", reason="building needs the package build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    files = [
        path
        for path in (ROOT / "lora_book").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    for path in files:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", tmp_path],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert {str(path.relative_to(ROOT)) for path in files} <= set(held.namelist())
    ran = subprocess.run(
        [sys.executable, "-m", "tools.wheel", tmp_path / "dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"lora_book {lb.__version__}: adapted" in ran.stdout
