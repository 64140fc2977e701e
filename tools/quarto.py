"""The executed book by Quarto: a copy is prepared, rendered and looked through, and takes the
site's place if nothing is wrong with it.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import folders
from tools.site import config
from tools.site.audit import elsewhere
from tools.site.cells import assemble
from tools.site.pages import exported, source_of

FAULTS = re.compile(
    r"Unable to resolve (crossref|link)|citation .* not found|Could not (convert|fetch)|could not"
    r" be resolved",
    re.IGNORECASE,
)
SELF = "?notebook"  # without a query Quarto takes the address for the page's


def as_is(html: str) -> list:
    "Lines of Markdown that hold this HTML."
    fence = "~" * 9
    return f"{fence}{{=html}}\n{html}\n{fence}\n".splitlines(keepends=True)


def as_markdown(output: dict) -> dict:
    """An output that has HTML, as Markdown that holds it: beside HTML of its own Quarto's page has
    two libraries fetched from another host.
    """
    if "text/html" not in output.get("data", {}):
        return output
    return output | {"data": {"text/markdown": as_is("".join(output["data"]["text/html"]))}}


def for_quarto(notebook: dict, source: str) -> dict:
    """An executed notebook whose outputs of HTML are Markdown, with the HTML `source` below its
    title.
    """
    cells = [
        (
            cell | {"outputs": list(map(as_markdown, cell["outputs"]))}
            if cell["cell_type"] == "code"
            else cell
        )
        for cell in notebook["cells"]
    ]
    title, *text = cells[0]["source"]
    return notebook | {
        "cells": [
            cells[0] | {"source": [title.rstrip("\n") + "\n", "\n", *as_is(source), "\n", *text]},
            *cells[1:],
        ]
    }


def prepare(root: Path, build: Path, copy: Path) -> dict:
    """Write the book's sources to `copy`, with the chapters as they were executed in `build` and
    made ready; {path: chapter} as they were.
    """
    shutil.copytree(
        root, copy, ignore=shutil.ignore_patterns(".*", "_build", "_site*", "__pycache__")
    )
    shutil.copytree(build / "nbs", copy / "nbs", dirs_exist_ok=True)
    book = config.load(copy)
    chapters = [page for page in book.pages if page.is_notebook]
    executed = {page.path: page.file.read_bytes() for page in chapters}
    for page in chapters:
        _, shown, every = assemble(page, book.problems)
        source = source_of(page, book.library, *exported(shown, every, before=""), query=SELF)
        made = for_quarto(json.loads(executed[page.path]), source)
        page.file.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return executed


def render_quarto(root: Path, build: Path, site: Path, quarto: str) -> int:
    """Render a copy of the book, executed, with Quarto. A warning about a reference, a link, a
    citation or a formula is a failure, and so is a page that needs another host.
    """
    with tempfile.TemporaryDirectory(prefix="quarto-", dir=build) as place:
        return render_copy(root, build, site, quarto, Path(place) / "book")


def render_copy(root: Path, build: Path, site: Path, quarto: str, copy: Path) -> int:
    "Do so in the folder `copy`, which isn't there yet."
    executed = prepare(root, build, copy)
    done = subprocess.run(
        [quarto, "render", str(copy)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    faults = [line for line in done.stderr.splitlines() if FAULTS.search(line)] or elsewhere(
        copy / "_site"
    )
    if done.returncode or faults:
        print("\n".join(faults) or done.stderr, file=sys.stderr)
        return 1
    for path, chapter in executed.items():
        (copy / "_site" / path).write_bytes(chapter)
    with folders.replacing(site, root) as new:
        shutil.copytree(copy / "_site", new)
    print(f"{(site / 'index.html').resolve()}")
    return 0
