"""References, citations and links between pages: each `@label` becomes a numbered link, each
`[@key]` an entry.
"""

import json
import posixpath
import re
from pathlib import PurePosixPath

from .config import Book, Page
from .numbering import LABEL, NAMES, Label
from .tree import div, document, each, link, pandoc, span, string, text, transform, unlinked

CROSS = re.compile(LABEL.pattern, re.IGNORECASE)


def resolve(book: Book, labels: dict) -> None:
    "Resolve everything in place, page by page; the reference page is the one with a #refs div."
    waiting = []
    for page in book.pages:

        def visit(item: dict, page: Page = page):
            if item["t"] == "Cite":
                return _cite(item, page, labels, waiting, book)
            if item["t"] == "Link":
                return [_link(item, page, book)]
            return None

        page.blocks = transform(page.blocks, visit)
        page.title, page.outline = transform(page.title, visit), transform(page.outline, visit)
    _cited(book, waiting)


def _cite(item: dict, page: Page, labels: dict, waiting: list, book: Book) -> list | None:
    entries = item["c"][0]
    names = [_lower(entry["citationId"]) for entry in entries]
    crossed = [bool(CROSS.match(name)) for name in names]
    if not any(crossed):
        place = span([], "", ("citation",))
        waiting.append((place, item, page))
        return [place]
    if not all(crossed):
        message = (
            "a citation and a cross reference share one bracket, or stand side by side; put a word"
            " between them"
        )
        book.problems.add(page.path, "; ".join(names), message)
        return [string("; ".join(names))]
    out = []
    for entry, name in zip(entries, names):
        out += ([string(", ")] if out else []) + _reference(entry, name, page, labels, book)
    return out


def _lower(name: str) -> str:
    "`Fig-x` is `fig-x`."
    return name[:1].lower() + name[1:] if CROSS.match(name) else name


def _reference(entry: dict, name: str, page: Page, labels: dict, book: Book) -> list:
    target: Label | None = labels.get(name)
    if target is None:
        near = [
            label
            for label in labels
            if label.split("-")[0] == name.split("-")[0] and name.split("-")[-1] in label
        ]
        hint = f"; nearest: {', '.join(near[:3])}" if near else ""
        book.problems.add(page.path, name, "unresolved reference" + hint)
        return [string("@" + name)]
    prefix, suppressed = entry["citationPrefix"], entry["citationMode"]["t"] == "SuppressAuthor"
    word = _word(target)
    if not target.number:
        words = target.title or [string(word)]
    elif target.kind == "sec" and target.title and not prefix and not suppressed:
        return [*_titled(target, page), *entry["citationSuffix"]]
    elif prefix:
        words = [*prefix, string("\u00a0" + target.number)]
    else:
        words = [string(target.number if suppressed else f"{word}\u00a0{target.number}")]
    title = "" if target.kind == "eq" else text(target.title, False).strip()
    return [link(words, address(page, target), ("ref",), title), *entry["citationSuffix"]]


def _titled(target: Label, page: Page) -> list:
    "A chapter or a section by its title, with its number as a small mark behind it."
    named = f"{_word(target)} {target.number}"
    mark = span([string(target.number)], "", ("chno",))
    words = [*unlinked(target.title), string("\u00a0"), mark]
    return [link(words, address(page, target), ("ref",), named)]


def _word(target: Label) -> str:
    if target.kind == "sec" and target.name == target.page.ident:
        return "Appendix" if target.page.appendix else "Chapter"
    return NAMES[target.kind]


def address(page: Page, target: Label) -> str:
    "From a page to a label."
    if target.page is page:
        return "#" + target.name
    whole = target.name == target.page.ident
    return page.up + target.page.url + ("" if whole else "#" + target.name)


def _link(item: dict, page: Page, book: Book) -> dict:
    """A link to another chapter's source leads to its page; other files of the repository aren't
    part of the site.
    """
    target = item["c"][2][0]
    if re.match(r"^[a-z][a-z0-9+.-]*:", target) or target.startswith(("#", "//")):
        return item
    path, _, anchor = target.partition("#")
    folder = posixpath.dirname(page.path)
    whole = (
        posixpath.normpath(posixpath.join(folder, path))
        if not path.startswith("/")
        else path.lstrip("/")
    )
    found = next((other for other in book.pages if whole in (other.path, other.url)), None)
    if found is None:
        book.problems.add(page.path, target, "dead link: no chapter of the book")
        return item
    item["c"][2] = [page.up + found.url + ("#" + anchor if anchor else ""), item["c"][2][1]]
    return item


def _cited(book: Book, waiting: list) -> None:
    """One run of citeproc over all citations of the book, so that (2021a) and (2021b) mean the same
    on every page.
    """
    refs = next(
        (page for page in book.pages if any(_is_refs(item) for item in each(page.blocks))), None
    )
    known = _keys(book)
    for _, item, page in waiting:
        for entry in item["c"][0]:
            if entry["citationId"] not in known:
                book.problems.add(page.path, "@" + entry["citationId"], "unknown citation")
    if not waiting:
        return
    if refs is None:
        book.problems.add(
            "_quarto.yml", "#refs", "there are citations but no page with a '::: {#refs}' div"
        )
        return
    files = [str(book.root / name) for name in book.bibliography]
    meta = {
        "link-citations": {"t": "MetaBool", "c": True},
        "bibliography": {"t": "MetaList", "c": [{"t": "MetaString", "c": name} for name in files]},
    }
    blocks = [{"t": "Para", "c": [item]} for _, item, _ in waiting]
    made = pandoc(
        document([*blocks, div([], "refs")], meta), "-f", "json", "-t", "json", "--citeproc"
    )[0]
    done = json.loads(made)["blocks"]
    used: dict = {}
    for (place, item, page), para in zip(waiting, done):
        for entry in item["c"][0]:
            used.setdefault(entry["citationId"], {})[page.path] = page

        def visit(inner: dict, page: Page = page):
            if inner["t"] == "Cite":
                return inner["c"][1]
            if inner["t"] == "Link" and inner["c"][2][0].startswith("#ref-"):
                inner["c"][2][0] = ("" if page is refs else page.up + refs.url) + inner["c"][2][0]
                return [inner]
            return None

        place["c"][1] = transform(para["c"], visit)
    entries = done[-1]["c"][1]
    for entry in entries:
        where = used.get(entry["c"][0][0].removeprefix("ref-"), {})
        entry["c"][1].append(_back(where.values(), refs))
    refs.blocks = transform(refs.blocks, lambda block: [done[-1]] if _is_refs(block) else None)


def _is_refs(block: dict) -> bool:
    return block["t"] == "Div" and block["c"][0][0] == "refs"


def _back(pages, refs: Page) -> dict:
    "Where a reference is cited."
    links = []
    for page in pages:
        words = [string(page.number)] if page.number else page.title
        links += [string(", ")] if links else []
        links.append(link(words, refs.up + page.url, (), text(page.title, False).strip()))
    return div([{"t": "Plain", "c": [string("Cited in: "), *links]}], "", ("cited-in",))


def _keys(book: Book) -> set:
    keys = set()
    for name in book.bibliography:
        if not (book.root / name).is_file():
            book.problems.add("_quarto.yml", name, "no such bibliography")
            continue
        kind = {".bib": "biblatex", ".json": "csljson"}.get(PurePosixPath(name).suffix, "biblatex")
        entries = json.loads(
            pandoc((book.root / name).read_text(encoding="utf-8"), "-f", kind, "-t", "csljson")[0]
        )
        found = [entry["id"] for entry in entries]
        for key in found:
            if key in keys or found.count(key) > 1:
                book.problems.add(name, key, "this key is there twice")
        keys.update(found)
    return keys
