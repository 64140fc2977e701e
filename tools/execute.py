"""Run one notebook in a fresh kernel: `python -m tools.execute SOURCE TARGET`.

SOURCE is only read, unless it is TARGET. Cells marked `#| eval: false`, `#| slow: true` or `#| gpu: true` are left as
they are, stored outputs included; LORA_BOOK_RUN="slow gpu" runs the marked ones too. Kernel and client talk through
files, so that no port is opened.
"""
# ruff: noqa: E402
import os
import re
import sys
import tempfile
from pathlib import Path

sys.modules.setdefault("rfc3987_syntax", None)      # jsonschema's check of web addresses builds a grammar for seconds

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

MARKS = re.compile(r"^#\|\s*(slow|gpu|eval)\s*:?\s*(\w*)", re.MULTILINE)
SKIP = "skip-execution"
PLACES = ((re.compile(r"\S*/site-packages/"), ""), (re.compile(r"\S*/ipykernel_\d+/\d+\.py"), "cell"))


def is_skipped(source: str, wanted: set) -> bool:
    "Whether the directives of a code cell say that it isn't run here."
    marks = dict(MARKS.findall(source))
    costly = {name for name in ("slow", "gpu") if marks.get(name, "false") != "false"}
    return marks.get("eval") == "false" or bool(costly - wanted)


def tidy(cells: list) -> None:
    "Take this machine's folders out of printed text, such as the file that a warning names."
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        if output["output_type"] == "stream":
            for place, name in PLACES:
                output["text"] = place.sub(name, output["text"])


def execute(source: Path, target: Path, timeout: int = 600, note: dict | None = None) -> None:
    "Run `source` in its own kernel and write it, with its outputs and with `note` in its metadata, to `target`."
    notebook = nbformat.read(source, as_version=4)
    wanted = set(os.environ.get("LORA_BOOK_RUN", "").split())
    skipped = [cell for cell in notebook.cells if cell.cell_type == "code" and is_skipped(cell.source, wanted)]
    for cell in skipped:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        os.environ.setdefault("IPYTHONDIR", folder)
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=f"{folder}/k.json")
        where = {"metadata": {"path": str(target.parent.resolve())}}
        NotebookClient(notebook, km=manager, timeout=timeout, resources=where, shutdown_kernel="immediate").execute(cleanup_kc=True)
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


def main(source: str, target: str) -> None:
    note = {"lora_book": {"key": os.environ["LORA_BOOK_KEY"]}} if "LORA_BOOK_KEY" in os.environ else None
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        execute(Path(source), Path(target), int(os.environ.get("LORA_BOOK_CELL_TIMEOUT", "600")), note)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        sys.exit(f"{source}: a cell failed\n{error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
