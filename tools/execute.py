"""Run one notebook in a fresh kernel: `python -m tools.execute SOURCE TARGET`. SOURCE is only read, unless it is TARGET.

Cells marked `#| eval: false`, `#| slow: true` or `#| gpu: true` are left as they are, stored outputs included;
LORA_BOOK_RUN="slow gpu" runs the marked ones too.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

MARKS = re.compile(r"^#\|\s*(slow|gpu|eval)\s*:?\s*(\w*)", re.M)


def is_skipped(source: str, wanted: set) -> bool:
    "Whether the directives of a code cell say that it isn't run here."
    marks = dict(MARKS.findall(source))
    return marks.get("eval") == "false" or any(name in marks and name not in wanted for name in ("slow", "gpu"))


def execute(source: Path, target: Path, timeout: int = 600) -> None:
    "Run `source` from top to bottom in its own kernel and write it, with its outputs, to `target`."
    notebook = nbformat.read(source, as_version=4)
    wanted = set(os.environ.get("LORA_BOOK_RUN", "").split())
    tagged = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and is_skipped(cell.source, wanted):
            cell.metadata["tags"] = cell.metadata.get("tags", []) + ["skip-execution"]
            tagged.append(cell)
    folder = str(target.parent.resolve())
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()
    for cell in tagged:
        cell.metadata["tags"].remove("skip-execution")
        if not cell.metadata["tags"]:
            del cell.metadata["tags"]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    part = target.with_suffix(".part")
    nbformat.write(notebook, part)
    os.replace(part, target)


if __name__ == "__main__":
    try:
        target = Path(sys.argv[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        execute(Path(sys.argv[1]), target, int(os.environ.get("LORA_BOOK_CELL_TIMEOUT", "600")))
    except CellExecutionError as error:
        sys.exit(f"{sys.argv[1]}: a cell failed\n{error}")
