"""All steps in order: read, fill, number, resolve, convert, write, look again."""

import posixpath
import re
import shutil
import tempfile
from pathlib import Path

from tools import folders

from . import audit, cells, code, config, ledger, links, maths, pages, previews, search
from .numbering import Numbering
from .spread import spread
from .svg import inline, titled
from .tree import each, raw, read_aloud, save, text, transform


def render(
    root: Path, build: Path | None, out: Path, partial: bool = False, draft: bool = False
) -> tuple:
    """Render the book of `root` into `out`, which must be a folder for a site (tools.folders); with
    problems the last good site stays, unless a `draft` is wanted.
    """
    folders.check(out, root)
    book = config.load(root, build, partial)
    files, exports = prepare(book)
    with tempfile.TemporaryDirectory(prefix="lora-book-") as folder:
        part = Path(folder) / "site"
        publish(book, files, exports, part)
        if draft or not book.problems:
            with folders.replacing(out, root) as place:
                shutil.copytree(part, place)
    return book, len(book.pages)


def prepare(book: config.Book) -> tuple[dict, dict]:
    """Read, fill, number and resolve all pages in place; the files beside them, and what each
    notebook exports.
    """
    numbering, exports, files = Numbering(book.problems), {}, {}
    assembled = [cells.assemble(page, book.problems) for page in book.pages]
    read = spread(read_aloud, [markdown for markdown, *_ in assembled])
    for page, (_, shown, every), (blocks, meta, complaints) in zip(book.pages, assembled, read):
        for line, complaint in complaints:
            book.problems.add(page.path, line, complaint)
        page.blocks, pictures = cells.fill(page, blocks, shown, book.code_fold, book.problems)
        files.update(pictures)
        if page.is_notebook:
            exports[page.path] = pages.exported(shown, every)
            files[page.path] = page.file.read_bytes()
        missing(page, book.problems)
        page.blocks = drawn(page, book.root)
        numbering.run(page, meta)
    links.resolve(book, numbering.labels)
    book.labels, book.rows = numbering.labels, ledger.mark(book)
    ledger.resolve(book, book.rows)
    pages.describe(book.pages)
    return files | _pictures(book, files), exports


def publish(book: config.Book, files: dict, exports: dict, folder: Path) -> None:
    "Write the site into `folder` and look at what was written."
    files["assets/search.js"] = search.script(book)
    maths.convert(book)
    files["assets/previews.js"] = previews.script(book, book.labels, book.rows)
    site = pages.Site(book, exports)

    def written(page: config.Page) -> audit.Seen:
        html = site.render(page, code.colour(page.blocks))
        save(folder / page.url, html)
        return audit.look(html)

    seen = dict(zip((page.url for page in book.pages), spread(written, book.pages)))
    for name, content in files.items():
        save(folder / name, content)
    for name in ("style.css", "book.js", "favicon.svg"):
        save(folder / "assets" / name, (pages.ASSETS / name).read_bytes())
    audit.audit(folder, seen, {page.url: page.path for page in book.pages}, book.problems)


def missing(page: config.Page, problems: config.Problems) -> None:
    "What a page itself marks as missing, `[words]{#label .missing}`, is a problem of the book."
    for item in each(page.blocks):
        if item["t"] == "Span" and "missing" in item["c"][0][1]:
            problems.add(page.path, item["c"][0][0], text(item["c"][1]).strip())


def drawn(page: config.Page, root: Path) -> list:
    "The page's blocks with the vector pictures of the book's own files as elements of the page."

    def visit(item: dict):
        target = item["c"][2][0] if item["t"] == "Image" else ""
        file = root / posixpath.normpath(posixpath.join(posixpath.dirname(page.path), target))
        if not target.endswith(".svg") or not file.is_file():
            return None
        svg = file.read_text(encoding="utf-8")
        alt = dict(item["c"][0][2]).get("fig-alt") or text(item["c"][1]).strip() or titled(svg)
        return [raw(inline(svg, file.stem, alt))] if alt else None

    return transform(page.blocks, visit)


def _pictures(book: config.Book, made: dict) -> dict:
    """The image files that markdown cells name, by address; one that is missing is found by the
    audit.
    """
    found = {}
    for page in book.pages:
        for item in each(page.blocks):
            target = item["c"][2][0] if item["t"] == "Image" else ""
            if target and not re.match(r"^([a-z]+:|//)", target):
                name = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), target))
                if name not in made and (book.root / name).is_file():
                    found[name] = (book.root / name).read_bytes()
    return found
