"""What a reference leads to, as HTML by label, for the box that opens on hover."""

import json

from .config import Book
from .tree import attr, each, raw_block, transform, write

MARK = "@@preview@@"
LARGE = ("fig", "tbl", "lst", "sec")


def script(book: Book, labels: dict, rows: dict) -> str:
    """assets/previews.js: each labelled equation and statement, each entry of the references, the
    claim of each chapter by its address, and the rows of the ledger.
    """
    shown: dict = {}
    for page in book.pages:
        if page.is_notebook and page.blocks[:1] and page.blocks[0]["t"] == "Para":
            shown["page:" + page.url] = page.blocks[0]
        for item in each(page.blocks):
            ident = item["c"][0][0] if item["t"] == "Div" else ""
            if ident.startswith("ref-") or (ident in labels and labels[ident].kind not in LARGE):
                shown.setdefault(ident, item)
    found = dict(zip(shown, _html(list(shown.values()))))
    found |= {f"claim-{ident}": row for ident, (_, row) in rows.items()}
    told = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return f"window.BOOK_PREVIEWS={told};\n"


def _html(blocks: list) -> list:
    "Each block as HTML, without identifiers, links and notes: it stands on other pages."
    bare = [part for block in blocks for part in (*transform([block], _bare), raw_block(MARK))]
    return [part.strip() for part in write(bare).split(MARK)[:-1]] if blocks else []


def _bare(item: dict) -> list | None:
    if item["t"] == "Link":
        return [] if "anchor" in item["c"][0][1] else item["c"][1]
    if item["t"] == "Note":
        return []
    if item["t"] in ("Div", "Span"):
        (_, classes, _), content = item["c"]
        return (
            [] if "cited-in" in classes else [{"t": item["t"], "c": [attr("", classes), content]}]
        )
    return None
