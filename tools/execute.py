"""Run one notebook in a fresh kernel: `python -m tools.execute SOURCE TARGET`.

SOURCE is only read, unless it is TARGET. Cells marked `#| eval: false`, `#| slow: true` or `#| gpu:
true` are left as they are, stored outputs included; LORA_BOOK_RUN="slow gpu" runs the marked ones
too. Kernel and client talk through files, so that no port is opened.

`python -m tools.execute --serve [MODULE ...]` does so for one notebook after the other: a line of
JSON in, {"source", "target", "key"}, and one out, {"code", "message"}. Where processes can be
forked each kernel is a fork of the server, which has imported the modules that are named, others'
and slow, and nothing of the book.
"""

# ruff: noqa: E402
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

sys.modules.setdefault(
    "rfc3987_syntax", None
)  # jsonschema's check of web addresses builds a grammar for seconds

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

MARKS = re.compile(r"^#\|\s*(slow|gpu|eval)\s*:?\s*(\w*)", re.MULTILINE)
SKIP = "skip-execution"
PLACES = (
    (re.compile(r"(?<!\S)\S*/site-packages/"), ""),
    (re.compile(r"(?<!\S)\S*/ipykernel_\d+/\d+\.py"), "cell"),
)
FORKS = sys.platform == "linux"


def is_skipped(source: str, wanted: set) -> bool:
    "Whether the directives of a code cell say that it isn't run here."
    marks = dict(MARKS.findall(source))
    costly = {name for name in ("slow", "gpu") if marks.get(name, "false") != "false"}
    return marks.get("eval") == "false" or bool(costly - wanted)


def tidy(cells: list) -> None:
    """Take this machine's folders out of printed text, such as the file that a warning names. A
    place is looked for from the beginning of a word alone: the time is that of one pass.
    """
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        if output["output_type"] == "stream":
            for place, name in PLACES:
                output["text"] = place.sub(name, output["text"])


# Kernels that are forks


class Child:
    "A forked process, with as much of subprocess.Popen as a kernel's provisioner asks for."

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Forking(AsyncKernelManager):
    """Starts its kernel by forking this process, once, before there's an event loop; `folder` is
    where the kernel works.
    """

    def fork(self, folder: Path) -> None:
        self.write_connection_file()
        client, pid = os.getpid(), os.fork()
        if not pid:
            become_kernel(self.connection_file, folder, client)
        self.child = Child(pid)

    async def _async_launch_kernel(self, kernel_cmd: list, **options) -> None:
        made = self.provisioner
        made.process, made.pid, made.pgid, made.cwd = (
            self.child,
            self.child.pid,
            self.child.pid,
            options.get("cwd"),
        )


def become_kernel(connection_file: str, folder: Path, client: int) -> None:
    """Be a kernel, in a session of its own, until it's shut down or the client has gone; doesn't
    return.
    """
    try:
        os.setsid()
        os.chdir(folder)
        sys.path.pop(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if "pandas" in sys.modules:  # which decides on import whether it's in a notebook
            sys.modules["pandas"].set_option("display.max_columns", 20)
        from ipykernel.kernelapp import launch_new_instance

        launch_new_instance(argv=["-f", connection_file, f"--IPKernelApp.parent_handle={client}"])
    finally:
        os._exit(0)


# One notebook


def run_cells(notebook: nbformat.NotebookNode, folder: Path, timeout: int, forked: bool) -> None:
    "Run a notebook's cells in a new kernel that works in `folder`."
    with tempfile.TemporaryDirectory(prefix="lb-") as place:
        os.environ.setdefault("IPYTHONDIR", place)
        manager = (Forking if forked else AsyncKernelManager)(
            kernel_name="python3", transport="ipc", connection_file=f"{place}/k.json"
        )
        if forked:
            manager.fork(folder)
        NotebookClient(
            notebook,
            km=manager,
            timeout=timeout,
            resources={"metadata": {"path": str(folder)}},
            shutdown_kernel="immediate",
        ).execute(cleanup_kc=True)


def execute(
    source: Path, target: Path, timeout: int = 600, note: dict | None = None, forked: bool = False
) -> None:
    """Run `source` in its own kernel and write it, with its outputs and with `note` in its
    metadata, to `target`.
    """
    notebook = nbformat.read(source, as_version=4)
    wanted = set(os.environ.get("LORA_BOOK_RUN", "").split())
    skipped = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and is_skipped(cell.source, wanted)
    ]
    for cell in skipped:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    run_cells(notebook, target.parent.resolve(), timeout, forked)
    for cell in skipped:
        cell.metadata["tags"].remove(SKIP)
        if not cell.metadata["tags"]:
            del cell.metadata["tags"]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    tidy(notebook.cells)
    notebook.metadata.pop("language_info", None)
    notebook.metadata.update(note or {})
    part = target.with_suffix(f".{os.getpid()}.part")
    nbformat.write(notebook, part)
    os.replace(part, target)


def main(source: str, target: str, key: str = "", forked: bool = False) -> None:
    note = {"lora_book": {"key": key}} if key else None
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        execute(
            Path(source),
            Path(target),
            int(os.environ.get("LORA_BOOK_CELL_TIMEOUT", "600")),
            note,
            forked,
        )
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        sys.exit(f"{source}: a cell failed\n{error}")


# One after the other


def in_a_fork(work: dict) -> tuple[int, str]:
    "Do one piece of work in a fork of this process: its exit status and what it printed."
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        pid = os.fork()
        if pid:
            code = Child(pid).wait()
            told.seek(0)
            return code, told.read()
        code = 1
        try:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            main(**work, forked=True)
            code = 0
        except SystemExit as stopped:
            print(stopped.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def in_a_process(work: dict) -> tuple[int, str]:
    "Do one piece of work in a new process: its exit status and what it printed."
    command = [sys.executable, "-m", "tools.execute", *work.values()]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def serve(modules: list) -> None:
    """Answer each line of the standard input, until it ends. What the forks inherit is kept from
    their garbage collectors.
    """
    if FORKS:
        for name in modules:
            importlib.import_module(name)
        nbformat.validate(
            nbformat.v4.new_notebook()
        )  # builds the validator that reading and writing use
        gc.collect()
        gc.freeze()
    for line in sys.stdin:
        code, message = (in_a_fork if FORKS else in_a_process)(json.loads(line))
        print(json.dumps({"code": code, "message": message}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1] == "--serve" else main(*sys.argv[1:])
