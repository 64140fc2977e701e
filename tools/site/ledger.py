"""Claims of the ledger: each row of its table gets a place, and each id behind the word "ledger" or
"claim", as in "ledger A5, C1 to C3", leads there. An id that the ledger hasn't is a problem.
"""

import re

from .config import Book, Page
from .tree import link, string, text

ROW = re.compile(r'<tr class="claim[^"]*"(?: id="claim-\w+")?>(.*?)</tr>', re.DOTALL)
CELL = re.compile(r"<td[^>]*>(.*?)</td>", re.DOTALL)
HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
ID = re.compile(r"(?<![\w.])([A-Z]\d{1,2})(?![\w.]*\w)")
WORD = re.compile(r"^\W*(ledger|claims?)\W*$", re.IGNORECASE)
JOINED = re.compile(r"^(and|or|to|&|[,;–-])$")
NOWHERE = ("Link", "Header", "Code", "CodeBlock", "Cite", "Math", "RawBlock", "RawInline")


def mark(book: Book) -> dict:
    "Give each row of the ledger its place; {id: (page, the row as HTML to show elsewhere)}."
    found: dict = {}
    for page in book.pages:
        for block in _raw(page.blocks):
            if 'class="ledger"' in block["c"][1]:
                names = [name[1] for name in HEAD.finditer(block["c"][1])]
                block["c"][1] = ROW.sub(lambda row: _row(row, names, page, found), block["c"][1])  # noqa: B023
    return found


def _raw(node):
    "The raw HTML blocks of a tree."
    if isinstance(node, list):
        for item in node:
            yield from _raw(item)
    elif isinstance(node, dict) and node.get("t") == "RawBlock":
        yield node
    elif isinstance(node, dict):
        yield from _raw(node.get("c"))


def _row(row: re.Match, names: list, page: Page, found: dict) -> str:
    "The row with its place, remembered in `found`."
    cells = [cell[1] for cell in CELL.finditer(row[1])]
    ident = re.sub(r"<[^>]+>", "", cells[0])
    told = "".join(
        f"<dt>{name}</dt><dd>{cell}</dd>" for name, cell in zip(names[1:], cells[1:]) if cell
    )
    found[ident] = (page, f'<dl class="row">{told}</dl>')
    start = re.sub(r' id="[^"]*"', "", row[0].split(">", 1)[0])
    return f'{start} id="claim-{ident}">{row[1]}</tr>'


def resolve(book: Book, rows: dict) -> None:
    "Link the ids in the text of all pages, in place."
    if rows:
        for page in book.pages:
            _Page(page, rows, book).walk(page.blocks)


class _Page:
    "Links the ids of one page."

    def __init__(self, page: Page, rows: dict, book: Book):
        self.page, self.rows, self.book = page, rows, book

    def walk(self, node, led: str = "") -> None:
        if isinstance(node, dict) and node.get("t") == "Table":
            self.table(node["c"])
        elif isinstance(node, dict) and node.get("t") not in NOWHERE:
            self.walk(node.get("c"), led)
        elif isinstance(node, list):
            if any(isinstance(item, dict) and item.get("t") == "Str" for item in node):
                node[:] = self.run(node, led)
            for item in node:
                self.walk(item, led)

    def table(self, content: list) -> None:
        "A row that begins with the word is about the ledger from there on."
        for body in content[4]:
            for row in body[3]:
                first = text(row[1][0][4]).strip() if row[1] else ""
                self.walk(row[1], first if WORD.match(first) else "")

    def run(self, items: list, led: str) -> list:
        "A run of inlines; `led` is the word that governs it, from before its beginning."
        out = []
        for item in items:
            words = item["c"] if item["t"] == "Str" else ""
            out += self.linked(words, led) if led and ID.search(words) else [item]
            if not words and item["t"] in ("Space", "SoftBreak"):
                continue
            if found := WORD.match(re.split("\u00a0", words)[0]):
                led = found[1]
                if "\u00a0" in words:
                    out[-1:] = self.linked(words, led)
            elif not (ID.search(words) or JOINED.match(words)) or words.endswith((".", ")")):
                led = ""
        return out

    def linked(self, words: str, led: str) -> list:
        "A word with its ids as links."
        out, at = [], 0
        for found in ID.finditer(words):
            ident = found[1]
            if ident in self.rows:
                page = self.rows[ident][0]
                target = ("" if page is self.page else self.page.up + page.url) + f"#claim-{ident}"
                out += [string(words[at : found.start()])] if found.start() > at else []
                out.append(link([string(ident)], target, ("ref", "claim-id"), f"Claim {ident}"))
                at = found.end()
            elif led.lower() == "ledger":
                self.book.problems.add(self.page.path, ident, "the ledger has no such claim")
        return [*out, string(words[at:])] if at < len(words) else out
