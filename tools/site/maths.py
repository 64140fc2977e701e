"""Formulas become MathML, all of the book's in one run of pandoc; a formula that can't be read is a problem."""
import re

from .config import Book
from .tree import document, each, pandoc, plain, raw, raw_block, transform

MARK = "@@formula@@"


def convert(book: Book) -> dict:
    "Replace every formula by MathML, in place; each distinct formula is converted once."
    where: dict = {}
    for page in book.pages:
        for item in each([page.title, page.outline, page.blocks]):
            if item["t"] == "Math":
                where.setdefault((item["c"][0]["t"] == "DisplayMath", item["c"][1]), page.path)
    made = mathml(list(where))
    for key, html in made.items():
        if not html:
            book.problems.add(where[key], " ".join(key[1].split())[:70], "this formula can't be read")

    def visit(item: dict):
        if item["t"] == "Math":
            return [raw(made[item["c"][0]["t"] == "DisplayMath", item["c"][1]])]
        return None

    for page in book.pages:
        page.title, page.outline, page.blocks = transform([page.title, page.outline, page.blocks], visit)
    return made


def mathml(formulas: list) -> dict:
    "MathML of each (displayed, TeX), '' for one that pandoc can't read."
    if not formulas:
        return {}
    blocks = []
    for display, tex in formulas:
        math = {"t": "Math", "c": [{"t": "DisplayMath" if display else "InlineMath"}, tex]}
        blocks += [plain([math]), raw_block(MARK)]
    pieces = pandoc(document(blocks), "-f", "json", "-t", "html5", "--mathml", "--wrap=none")[0].split(MARK)
    return {key: _polish(piece.strip(), key[0]) for key, piece in zip(formulas, pieces)}


def _polish(html: str, display: bool) -> str:
    "What Chromium, Firefox and Safari need to set pandoc's MathML well."
    if not html.startswith("<math"):
        return ""
    return html
