"""The four places of a new method, as a stub that runs: `python -m tools.method NAME`.

They are its notebook, its line in the registry (and the import above it), its line in
`_quarto.yml`, and its entry in `references.bib`. All four are worked out before the first is
written; what was written is taken back if a later one fails.
"""

import argparse
import json
import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = [
    (
        "markdown",
        """# NAME: its title {#sec-NAME}

One sentence says what the method changes and what that gives.""",
    ),
    ("code", "#| default_exp: present.NAME\n#| include: false"),
    (
        "markdown",
        r"""| | |
|---|---|
| Paper | @NAME |
| $\Delta W$ | $\frac{\alpha}{r}BA$ |
| Start | $B=0$, $A$ random |
| Trained numbers | $r(n+m)$ per weight |
| Rank bound | $r$ |
| Needs | @sec-lora |""",
    ),
    ("code", "import torch\n\nfrom lora_book.core.laws import hold_laws"),
    ("code", "n, m, r = 6, 8, 2"),
    (
        "markdown",
        r"""## Definition

With $B\in\mathbb R^{n\times r}$ and $A\in\mathbb R^{r\times m}$,

$$ \Delta W=\frac{\alpha}{r}BA. $$ {#eq-NAME-delta}""",
    ),
    (
        "code",
        """#| export: true
import torch
from torch import Tensor

from lora_book.core.adapter import Adapter
from lora_book.core.method import Method, Part""",
    ),
    (
        "code",
        """#| export: true
class CLASS(Adapter):
    "ΔW = (α/r)·B A (@eq-NAME-delta)."

    def init(self, W0: Tensor, r: int, generator) -> dict:
        "B (n, r) is 0, A (r, m) is drawn."
        n, m = W0.shape
        return {
            "A": torch.randn(r, m, generator=generator) / m**0.5,
            "B": torch.zeros(n, r),
        }

    def delta(self, W0: Tensor) -> Tensor:
        "(α/r)·B A: (n, m)."
        return self.options.scale * self.B @ self.A

    def rank_bound(self, n: int, m: int) -> int:
        "r."
        return min(self.options.r, n, m)


NAME = Method(
    CLASS,
    "NAME",
    "Author Year",
    count=lambda n, m, r: r * (n + m),
    equation=r"\\frac{\\alpha}{r}BA",
    picture=(
        [Part("W_0", "n×m", start="pre-trained")],
        [
            r"\\frac{\\alpha}{r}",
            Part("B", "n×r", trains=True, start="starts at 0"),
            Part("A", "r×m", trains=True, start="random"),
        ],
    ),
    start="B = 0, A random",
)""",
    ),
    ("markdown", "## The smallest case\n\nWith $B=0$ the weight starts where it was."),
    (
        "code",
        """adapter = CLASS(torch.ones(n, m), r=r)
assert not adapter.delta(torch.ones(n, m)).any()
adapter.delta(torch.ones(n, m)).shape""",
    ),
    ("markdown", "## Laws\n\nThe laws (@sec-laws) hold, each on every kind of host."),
    ("code", "hold_laws(NAME)"),
    ("markdown", "## Summary\n\nThree sentences."),
]
ENTRY = """
@misc{NAME,
  author = {Author, Some},
  title = {The title of the paper on NAME},
  year = {2026},
}
"""


class Refused(ValueError):
    "The method can't be added under this name; nothing was written."


def notebook(name: str) -> str:
    "The chapter as a notebook's text."
    class_name = "".join(part.title() for part in name.split("_"))
    cells = []
    for at, (kind, text) in enumerate(CELLS):
        source = text.replace("NAME", name).replace("CLASS", class_name)
        cell = {"cell_type": kind, "id": f"c{at:02}", "metadata": {}}
        cell["source"] = source.splitlines(True)
        cells.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def after_last(text: str, pattern: str, line: str, where: str) -> str:
    "The text with `line` below the last line that the pattern matches."
    found = list(re.finditer(rf"^{pattern}.*\n", text, re.MULTILINE))
    if not found:
        raise Refused(f"{where} has no line like {pattern!r} to stand below")
    end = found[-1].end()
    return text[:end] + line + "\n" + text[end:]


def in_registry(text: str, name: str) -> str:
    "The registry's notebook with the method's import and its line, last of all."
    whole = json.loads(text)
    for cell in whole["cells"]:
        source = "".join(cell["source"]) + "\n"
        if "from lora_book.present.vera" in source and "export" in source:
            line = f"from lora_book.present.{name} import {name}"
            source = after_last(source, r"from lora_book\.present\.", line, "the registry")
        elif source.startswith("#| export: true\nMETHODS"):
            head, brace, tail = source.partition("\n}\n")
            source = f'{head}\n    "{name}": {name},{brace}{tail}'
        cell["source"] = source.rstrip("\n").splitlines(True)
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def check_name(name: str, root: Path) -> None:
    "Raise Refused for a name that is no identifier, or is taken in one of the four places."
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise Refused(f"a name is lower-case letters, digits and _, such as lora_xs, not {name!r}")
    registry = json.loads((root / "nbs/registry.ipynb").read_text("utf-8"))
    lines = "".join("".join(cell["source"]) + "\n" for cell in registry["cells"])
    if re.search(rf'^    "{name}": ', lines, re.MULTILINE):
        raise Refused(f"{name!r} is a method already")
    if any((root / "nbs").glob(f"*/{name}.ipynb")) or (root / f"nbs/{name}.ipynb").exists():
        raise Refused(f"there is a notebook {name}.ipynb already")
    if re.search(rf"^@\w+{{{name},", (root / "references.bib").read_text("utf-8"), re.MULTILINE):
        raise Refused(f"references.bib has an entry {name!r} already")


def places(name: str, root: Path) -> dict[Path, str]:
    "{file: its new text}, all four."
    book, bib = root / "_quarto.yml", root / "references.bib"
    registry = root / "nbs/registry.ipynb"
    line = f"        - nbs/present/{name}.ipynb"
    text = book.read_text("utf-8")
    return {
        root / f"nbs/present/{name}.ipynb": notebook(name),
        registry: in_registry(registry.read_text("utf-8"), name),
        book: after_last(text, r" +- nbs/present/", line, book.name),
        bib: bib.read_text("utf-8") + ENTRY.replace("NAME", name),
    }


def add(name: str, root: Path = ROOT) -> list[Path]:
    "Write the four places and return them; raises Refused, or what the disk says."
    check_name(name, root)
    new = places(name, root)
    old = {path: path.read_bytes() if path.exists() else None for path in new}
    try:
        for path, text in new.items():
            path.write_text(text, "utf-8")
    except BaseException:
        for path, content in old.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise
    return list(new)


def main(arguments: list | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.method", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="the method's id, such as lora_xs")
    try:
        for path in add(parser.parse_args(arguments).name):
            print(path.relative_to(ROOT))
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
