"""Make the book: `python -m tools.book [--profile P] [--only CHAPTER] [--renderer offline|quarto]`.

Each chapter of `_quarto.yml` is executed into `_build/<profile>/`; the sources stay as they are. A
chapter whose key is unchanged isn't run again: the key is a hash of its code cells, the run
settings, the modules of the package that it reaches, and constraints.txt. Then the site is
rendered, by Quarto where it is installed, otherwise by tools.site.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue

from tools import folders
from tools.execute import is_skipped
from tools.quarto import render_quarto
from tools.settings import load_settings
from tools.site import config
from tools.site.__main__ import main as render_offline

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_book"
DATA = (".json", ".csv", ".yml")
SILENT = {"workers", "threads", "cell_timeout", "cache_dir", "results_dir", "source"}
WARM = [
    "ipykernel.kernelapp",
    "torch",
    "pandas",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "safetensors.torch",
    "timm",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "sklearn.linear_model",
    "sklearn.feature_extraction.text",
    "peft",
]
FEW = 4
OLDER = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "sse": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


# What a chapter depends on


def code_cells(notebook: Path) -> list:
    "The sources of a notebook's code cells."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def parsed(source: str) -> ast.AST:
    """The syntax tree of a cell or module; IPython's own lines are passed over, and so is code that
    Python can't read.
    """
    plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    try:
        return ast.parse(plain)
    except SyntaxError:
        return ast.Module([], [])


def imported(tree: ast.AST, module: str = "") -> set:
    "Dotted names that a piece of code imports; relative ones are resolved against `module`."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif "import_module" in (getattr(node, "id", ""), getattr(node, "attr", "")):
            names.add(f"{PACKAGE}.*")
    return {name for name in names if name.split(".")[0] == PACKAGE}


def module_file(root: Path, name: str) -> tuple[str, Path] | None:
    "The file of a dotted name, and the name that relative imports in it start from."
    path = root.joinpath(*name.split("."))
    if (path / "__init__.py").is_file():
        return f"{name}.__init__", path / "__init__.py"
    return (name, path.with_suffix(".py")) if path.with_suffix(".py").is_file() else None


def closure(root: Path, sources: list) -> list:
    """Every file of the package that the code in `sources` reaches, directly or through other
    modules, in order.

    A package's __init__ counts where it is imported by its own name, not where a module inside it
    is.
    """
    waiting = {name for source in sources for name in imported(parsed(source))}
    names, files = set(), set()
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        if name == f"{PACKAGE}.*":
            every = (root / PACKAGE).rglob("*.py")
            waiting |= {".".join(path.relative_to(root).with_suffix("").parts) for path in every}
        found = module_file(root, name)
        if found:
            files |= {
                found[1],
                *(path for path in found[1].parent.iterdir() if path.suffix in DATA),
            }
            waiting |= imported(parsed(found[1].read_text(encoding="utf-8")), found[0])
    return sorted(files)


def chapter_key(root: Path, notebook: Path, settings: dict) -> str:
    "The hash of everything that the outputs of a chapter depend on."
    sources = code_cells(notebook)
    run = {key: str(value) for key, value in settings.items() if key not in SILENT}
    digest = hashlib.sha256(
        json.dumps([sources, run, os.environ.get("LORA_BOOK_RUN", "")], sort_keys=True).encode()
    )
    if any(
        is_skipped(source, set(os.environ.get("LORA_BOOK_RUN", "").split())) for source in sources
    ):
        digest.update(notebook.read_bytes())
    for file in [*closure(root, sources), root / "constraints.txt", root / "tools/execute.py"]:
        if file.is_file():
            digest.update(f"\0{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def stored_key(target: Path) -> str:
    try:
        return json.loads(target.read_text(encoding="utf-8"))["metadata"]["lora_book"]["key"]
    except (OSError, ValueError, KeyError):
        return ""


# Running the chapters


class Run:
    """Executes chapters in `workers` processes, which see `more` in their environment; `failures`
    holds (chapter, message).
    """

    def __init__(self, root: Path, build: Path, settings, more: dict | None = None):
        self.root, self.build, self.settings, self.more = root, build, settings, more or {}
        self.failures, self.stopped = [], False
        self.idle, self.servers, self.warm = SimpleQueue(), [], []

    def chapters(self, paths: list) -> None:
        start, total = time.perf_counter(), len(paths)
        self.warm = WARM if total > FEW else []
        with ThreadPoolExecutor(self.settings.workers) as pool:
            jobs = [pool.submit(self.chapter, path) for path in paths]
            for done, job in enumerate(as_completed(jobs), 1):
                path, state, seconds, message = job.result()
                print(
                    f"[{done:{len(str(total))}}/{total}] {path:<44} {state:<7} {seconds:6.1f} s",
                    flush=True,
                )
                if message:
                    self.failures.append((path, message))
        self.end()
        ready = total - len(self.failures)
        print(
            f"{ready} of {total} chapters ready in {time.perf_counter() - start:.0f} s", flush=True
        )

    def chapter(self, path: str) -> tuple[str, str, float, str]:
        """Execute one chapter unless its key is unchanged: its path, what happened, seconds,
        message.
        """
        start = time.perf_counter()
        source, target = self.root / path, self.build / path
        if self.stopped or not source.is_file():
            return path, "MISSING" if not self.stopped else "stopped", 0.0, "no such notebook"
        key = chapter_key(self.root, source, asdict(self.settings))
        if stored_key(target) == key:
            fresh(source, target)
            return path, "cached", time.perf_counter() - start, ""
        code, message = self.execute(source, target, key)
        return (
            path,
            "FAILED" if code else "ran",
            time.perf_counter() - start,
            message if code else "",
        )

    def execute(self, source: Path, target: Path, key: str) -> tuple[int, str]:
        "Have one chapter run by a server that is idle, or by a new one: exit status and message."
        if target.resolve() == source.resolve():
            return 1, f"{target} leads to the source itself: remove the link in _build"
        target.unlink(missing_ok=True)
        try:
            server = self.idle.get_nowait()
        except Empty:
            server = self.started()
        work = {"source": str(source.resolve()), "target": str(target.resolve()), "key": key}
        try:
            print(json.dumps(work), file=server.stdin, flush=True)
            done = json.loads(server.stdout.readline())
        except (OSError, ValueError):
            server.kill()
            return 1, "the process that runs chapters ended"
        self.idle.put(server)
        return done["code"], done["message"]

    def started(self) -> subprocess.Popen:
        "A process that runs one notebook after the other."
        command = [sys.executable, "-m", "tools.execute", "--serve", *self.warm]
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment(),
            text=True,
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.servers.append(server)
        return server

    def environment(self) -> dict:
        threads = str(self.settings.threads)
        limits = dict.fromkeys(
            (f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")), threads
        )
        path = [str(self.root.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {
            "LORA_BOOK_PROFILE": self.settings.profile,
            "LORA_BOOK_CELL_TIMEOUT": str(self.settings.cell_timeout),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(path),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        offline = (
            {}
            if self.settings.profile == "gpu"
            else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        )
        return {**os.environ, **limits, **given, **offline, **self.more}

    def end(self) -> None:
        "Let the servers end: they've nothing more to read."
        for server in self.servers:
            with contextlib.suppress(OSError):
                server.stdin.close()
        for server in self.servers:
            server.wait()

    def stop(self, *_) -> None:
        self.stopped = True
        for server in self.servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts(stop: Callable) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM call `stop`; behind, they do what they did before: the renderer's
    processes are ended by SIGTERM.
    """
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fresh(source: Path, target: Path) -> None:
    """Take changed markdown cells of the source into the executed copy; its code cells and their
    outputs stay.
    """
    new, old = (json.loads(path.read_text(encoding="utf-8")) for path in (source, target))
    code = iter([cell for cell in old["cells"] if cell["cell_type"] == "code"])
    cells = [
        next(code) | {"id": cell.get("id")} if cell["cell_type"] == "code" else cell
        for cell in new["cells"]
    ]
    if cells != old["cells"]:
        part = target.with_suffix(".part")
        part.write_text(
            json.dumps(old | {"cells": cells}, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        os.replace(part, target)


# Rendering


def render(root: Path, build: Path, site: Path, renderer: str | None, partial: bool) -> int:
    "Render the site with the renderer asked for, or with Quarto where there's one."
    quarto = shutil.which("quarto")
    renderer = renderer or ("quarto" if quarto and not partial else "offline")
    if renderer == "quarto":
        if not quarto:
            print("quarto isn't on PATH; use --renderer offline", file=sys.stderr)
            return 1
        print("rendering with quarto", flush=True)
        return render_quarto(root, build, site, quarto)
    print("rendering with the offline renderer (tools.site)", flush=True)
    places = ["--root", str(root), "--build", str(build), "--out", str(site)]
    return render_offline([*places, "--partial"] if partial else places)


def chosen_chapters(paths: list, only: list | None) -> list:
    "The chapters that `only` names, by path or by name; all without it."
    if not only:
        return paths

    def names(path: str) -> tuple:
        return path, Path(path).stem, path.removeprefix("nbs/").removesuffix(".ipynb")

    found = [path for path in paths if set(names(path)) & set(only)]
    if not found:
        sys.exit(
            f"no chapter {', '.join(only)}; chapters:"
            f" {', '.join(Path(path).stem for path in paths)}"
        )
    return found


def main(arguments: list | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="tools.book", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", help="smoke, laptop, workstation or gpu (default: settings.ini)"
    )
    parser.add_argument(
        "--processor",
        choices=OLDER,
        help="round as an older processor does, with folders of its own",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="CHAPTER",
        help="execute this chapter alone; the others show what they have",
    )
    parser.add_argument(
        "--renderer",
        choices=("offline", "quarto"),
        help="default: quarto where it is on PATH, else offline",
    )
    parser.add_argument(
        "--out", type=Path, default="_site", help="where the site goes (default: _site)"
    )
    parser.add_argument("--no-render", action="store_true", help="execute only")
    parser.add_argument(
        "--render-only", action="store_true", help="render what was executed before"
    )
    chosen = parser.parse_args(arguments)
    environ = dict(os.environ) | ({"LORA_BOOK_PROFILE": chosen.profile} if chosen.profile else {})
    settings = load_settings(root / "settings.ini", environ)
    build, site, more = root / "_build" / settings.profile, root / chosen.out, {}
    if chosen.processor:
        build = build.with_name(f"{settings.profile}-{chosen.processor}")
        more = OLDER[chosen.processor] | {
            "LORA_BOOK_CACHE_DIR": f"{settings.cache_dir}-{chosen.processor}"
        }
    if not chosen.no_render and (reason := folders.fault(site, root)):
        print(f"{site} {reason}", file=sys.stderr)
        return 1
    if chosen.render_only:
        return render(root, build, site, chosen.renderer, True)
    listed = [page.path for page in config.load(root).pages if page.is_notebook]
    run = Run(root, build, settings, more)
    how = f"{settings.workers} workers, {settings.threads} threads each"
    print(f"profile {settings.profile}: {len(listed)} chapters, {how}", flush=True)
    try:
        with interrupts(run.stop):
            run.chapters(chosen_chapters(listed, chosen.only))
    except KeyboardInterrupt:
        print("interrupted; finished chapters are kept", file=sys.stderr)
        return 130
    for path, message in run.failures:
        print(f"\n{path} failed:\n{message}", file=sys.stderr)
    if run.failures:
        print(
            f"{len(run.failures)} chapters failed: {', '.join(path for path, _ in run.failures)}",
            file=sys.stderr,
        )
        return 1
    return 0 if chosen.no_render else render(root, build, site, chosen.renderer, bool(chosen.only))


if __name__ == "__main__":
    sys.exit(main())
