"""The one template: a page's blocks between the sidebar, the table of contents and the way to its
neighbours.
"""

import ast
import re
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from .cells import Cell
from .config import Book, Page
from .tree import attr, document, pandoc, string, text, unlinked, write, write_many

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = Template((ASSETS / "page.html").read_text(encoding="utf-8"))


class Site:
    "Renders pages once all of them are numbered and resolved."

    def __init__(self, book: Book, exports: dict):
        self.book, self.exports = book, exports
        flat = [(page.path, heading) for page in book.pages for heading in page.outline]
        names = [*(page.title for page in book.pages), *(heading[3] for _, heading in flat)]
        titles = write_many([unlinked(name) for name in names])
        self.titles = dict(zip((page.path for page in book.pages), titles))
        self.outline: dict = {page.path: [] for page in book.pages}
        for (path, (level, ident, number, _)), html in zip(flat, titles[len(book.pages) :]):
            self.outline[path].append((level, ident, number, html))

    def render(self, page: Page, blocks: list) -> str:
        "The page with these blocks, as HTML."
        index = self.book.pages.index(page)
        before = self.book.pages[index - 1] if index else None
        after = self.book.pages[index + 1] if index + 1 < len(self.book.pages) else None
        name = text(page.title, False).strip()
        full = escape(name if page.path == "index.qmd" else f"{name} – {self.book.title}")
        return TEMPLATE.substitute(
            full=full,
            lang=escape(self.book.lang),
            up=page.up,
            book=escape(self.book.title),
            subtitle=escape(self.book.subtitle),
            home=page.up + self.book.pages[0].url,
            sidebar=self.sidebar(page),
            contents=self.contents(page),
            header=self.header(page),
            body=write(_claim(page, blocks)) + self.source(page),
            description=self.describe(page, name),
            neighbours=self.neighbour(page, before, "prev", "Previous")
            + self.neighbour(page, after, "next", "Next"),
        )

    def name(self, page: Page) -> str:
        number = f'<span class="secno">{page.number}</span> ' if page.number else ""
        return number + self.titles[page.path]

    def header(self, page: Page) -> str:
        kicker = f"{page.part} · Chapter {page.number}" if page.number and page.part else page.part
        kicker = f'<p class="kicker">{escape(kicker)}</p>' if kicker else ""
        ident = f' id="{page.ident}"' if page.ident else ""
        title = f"<h1{ident}>{self.titles[page.path]}</h1>"
        return f'<header class="chapter">{kicker}{title}{self.buttons(page)}</header>'

    def buttons(self, page: Page) -> str:
        "Where a chapter can be opened, which needs the book's repository, and its file."
        if not page.is_notebook:
            return ""
        shown = "".join(
            f'<a href="{escape(to)}" title="{does}">{words}</a>'
            for to, words, does in elsewhere(self.book.repository, page.path)
        )
        shown += f'<a href="{escape(Path(page.path).name)}" download>Download notebook</a>'
        switch = '<button type="button" class="all" hidden>Show all code</button>'
        return f'<p class="tools">{shown}{switch}</p>'

    def source(self, page: Page) -> str:
        "Where the page comes from, at its foot: for those who change the book."
        if not page.is_notebook:
            return ""
        return source_of(page, self.book.library, *self.exports[page.path])

    def describe(self, page: Page, name: str) -> str:
        "What search engines and messages show of a page: its claim, or the book's description."
        words = _cut(page.told or self.book.description)
        told = {"og:title": name, "og:description": words, "og:type": "article"}
        told |= {"og:site_name": self.book.title, "twitter:card": "summary"}
        lines = [f'<meta name="description" content="{escape(words)}">'] if words else []
        lines += [
            f'<meta property="{key}" content="{escape(value)}">'
            for key, value in told.items()
            if value
        ]
        return "\n".join(lines)

    def sidebar(self, page: Page) -> str:
        out, part, opened = [], None, False
        for other in self.book.pages:
            if other.part != part:
                out.append("</ul></details>" if opened else "")
                part, opened = other.part, bool(other.part)
                if opened:
                    here = " open" if part == page.part else ""
                    out.append(f"<details{here}><summary>{escape(part)}</summary><ul>")
            here = ' aria-current="page"' if other is page else ""
            item = f'<a href="{page.up}{other.url}"{here}>{self.name(other)}</a>'
            out.append(f"<li>{item}</li>" if opened else f'<p class="lone">{item}</p>')
        out.append("</ul></details>" if opened else "")
        return "".join(out)

    def contents(self, page: Page) -> str:
        shown = ""
        for level, ident, number, html in self.outline[page.path]:
            if level <= 3:
                number = f'<span class="secno">{number}</span> ' if number else ""
                shown += f'<li class="l{level}"><a href="#{ident}">{number}{html}</a></li>'
        return f"<ul>{shown}</ul>" if shown else ""

    def neighbour(self, page: Page, other: Page | None, rel: str, word: str) -> str:
        if other is None:
            return "<span></span>"
        return (
            f'<a class="{rel}" rel="{rel}"'
            f' href="{page.up}{other.url}"><small>{word}</small>{self.name(other)}</a>'
        )


def elsewhere(repository: str, path: str) -> list:
    """Colab and Binder for a notebook of a repository on GitHub, as (address, words, what it does);
    nothing without one.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?", repository)
    if not found:
        return []
    colab = f"https://colab.research.google.com/github/{found[1]}/blob/HEAD/{path}"
    binder = f"https://mybinder.org/v2/gh/{found[1]}/HEAD?labpath={quote(path, safe='')}"
    return [(colab, "Colab", "Open in Colab"), (binder, "Binder", "Open in Binder")]


def _cut(words: str, most: int = 200) -> str:
    "At most so many characters, cut between words."
    return words if len(words) <= most else words[:most].rsplit(" ", 1)[0] + "…"


def describe(pages: list) -> None:
    "Note what each chapter claims, as plain words, while its formulas can still be read."
    chapters = [page for page in pages if page.is_notebook and _begins(page.blocks)]
    mark = "@@page@@"
    blocks = [b for page in chapters for b in (page.blocks[0], {"t": "Para", "c": [string(mark)]})]
    told = pandoc(document(blocks), "-f", "json", "-t", "plain", "--wrap=none")[0].split(mark)
    for page, words in zip(chapters, told):
        page.told = re.sub(r"\s+", " ", words).strip()


def _begins(blocks: list) -> bool:
    return bool(blocks) and blocks[0]["t"] == "Para"


def _claim(page: Page, blocks: list) -> list:
    "A chapter's first paragraph is its claim."
    if page.is_notebook and _begins(blocks):
        return [{"t": "Div", "c": [attr("", ("claim",)), blocks[:1]]}, *blocks[1:]]
    return blocks


def source_of(page: Page, library: str, module: str, names: list, query: str = "") -> str:
    """Where a chapter comes from and what it adds to the package, as HTML; `names` with the
    identifiers of their cells, `query` behind the file's address.
    """
    link = f'<a href="{escape(Path(page.path).name)}{query}" download>{escape(page.path)}</a>'
    parts = [f"<div><dt>Source of this chapter</dt><dd>{link}</dd></div>"]
    if module:
        module = ".".join(filter(None, [library, module]))
        told = ", the cells with a bar at their left" if names else ""
        parts.append(f"<div><dt>Exports</dt><dd><code>{escape(module)}</code>{told}</dd></div>")
    if names:
        links = ", ".join(
            f'<a href="#{ident}"><code>{escape(name)}</code></a>' for name, ident in names
        )
        parts.append(f"<div><dt>Names</dt><dd>{links}</dd></div>")
    return f'<dl class="source">{"".join(parts)}</dl>'


def exported(cells: list, everything: list, before: str = "cell-") -> tuple[str, list]:
    """The module that a notebook exports, and its public names with the identifier of the cell that
    defines each, `before` and the cell's own.
    """
    module = next(
        (str(cell.options["default_exp"]) for cell in everything if "default_exp" in cell.options),
        "",
    )
    names = []
    for cell in cells:
        if cell.says("export", False):
            names += [(name, before + cell.ident) for name in defined(cell)]
    return module, names


def defined(cell: Cell) -> list:
    "Names that a cell defines at its top level, without the private ones."
    if re.search(r"^[%!]", cell.source, re.MULTILINE):
        return []
    names = []
    for node in ast.parse(cell.source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]
