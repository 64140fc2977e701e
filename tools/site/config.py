"""What `_quarto.yml` says: the title, the parts, the chapters in order, their numbers and
addresses.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml


class Problems(list):
    "What is wrong with the book: (file, label, message), in the order found."

    def add(self, file: str, label: str, message: str) -> None:
        if (file, label, message) not in self:
            self.append((file, label, message))

    def __str__(self) -> str:
        return "\n".join(
            f"{file}: {label + ': ' if label else ''}{message}" for file, label, message in self
        )


@dataclass
class Page:
    """One page: `path` as `_quarto.yml` has it, `number` as printed ('' for none), `part` its
    part's title.

    `title` is a list of inlines, `outline` the headings below it as [level, identifier, number,
    inlines], `told` its first words, for a description.
    """

    path: str
    part: str = ""
    number: str = ""
    appendix: bool = False
    file: Path | None = None
    title: list = field(default_factory=list)
    ident: str = ""
    blocks: list = field(default_factory=list)
    told: str = ""
    outline: list = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(PurePosixPath(self.path).with_suffix(".html"))

    @property
    def up(self) -> str:
        "The way from this page to the site's root."
        return "../" * (len(PurePosixPath(self.path).parts) - 1)

    @property
    def is_notebook(self) -> bool:
        return self.path.endswith(".ipynb")


@dataclass
class Book:
    root: Path
    title: str
    subtitle: str
    pages: list
    bibliography: list
    code_fold: str
    library: str
    repository: str
    description: str
    lang: str
    problems: Problems
    labels: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)


def _entries(items: list, part: str = ""):
    """Each chapter of a `chapters:` list with its part; a part's own page, where it has one, comes
    first.
    """
    for item in items or []:
        if isinstance(item, dict) and "part" in item:
            name = str(item["part"])
            if name.endswith((".qmd", ".ipynb", ".md")):
                yield name, part
            yield from _entries(item.get("chapters"), name)
        elif isinstance(item, dict):
            yield str(item.get("href") or item.get("file") or item), part
        else:
            yield str(item), part


def _listed(value) -> list:
    return value if isinstance(value, list) else [value] if value else []


def load(root: Path, build: Path | None = None, partial: bool = False) -> Book:
    """Read `_quarto.yml` in `root`; notebooks come from `build` (from `root` too where `partial`),
    the rest from `root`.
    """
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    problems = Problems()
    book = config.get("book", {})
    if config.get("project", {}).get("type") != "book":
        problems.add("_quarto.yml", "project.type", "must be 'book'")
    html = (config.get("format") or {}).get("html") or {}
    listed = [(path, part, False) for path, part in _entries(book.get("chapters"))]
    listed += [
        (path, part or "Appendices", True) for path, part in _entries(book.get("appendices"))
    ]
    pages = [Page(path, part, appendix=appendix) for path, part, appendix in listed]
    for page in pages:
        page.file = _find(root, build, page, partial, problems)
        if [other.path for other in pages].count(page.path) > 1:
            problems.add("_quarto.yml", page.path, "this chapter is listed twice")
    if not pages or pages[0].path != "index.qmd":
        problems.add("_quarto.yml", "book.chapters", "the first chapter must be index.qmd")
    return Book(
        root,
        str(book.get("title", "")),
        str(book.get("subtitle", "")),
        [page for page in pages if page.file],
        _listed(config.get("bibliography")),
        str(html.get("code-fold", False)).lower(),
        _library(root),
        str(book.get("repo-url") or "").rstrip("/"),
        str(book.get("description") or book.get("subtitle") or ""),
        str(config.get("lang") or "en"),
        problems,
    )


def _library(root: Path) -> str:
    "The name of the package that the notebooks export, from pyproject.toml."
    file = root / "pyproject.toml"
    tools = (
        tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}) if file.is_file() else {}
    )
    return tools.get("nbdev", {}).get("lib_path", "").replace("/", ".")


def _find(
    root: Path, build: Path | None, page: Page, partial: bool, problems: Problems
) -> Path | None:
    """The file that a page is read from: executed notebooks in the build folder, everything else in
    the sources.
    """
    places = [root]
    if build and page.is_notebook:
        places = [build, root] if partial else [build]
    for place in places:
        if (place / page.path).is_file():
            return place / page.path
    problems.add(
        "_quarto.yml",
        page.path,
        "this chapter is listed but there is no such file in " + str(places[0]),
    )
    return None
