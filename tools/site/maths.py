"""Formulas become MathML, all of the book's in one run of pandoc; a formula that can't be read is a
problem.

Pandoc's MathML says what a formula is; `polish` adds what browsers need to set it well: the thin
space beside the name of a function, bars that stand close to what they enclose, accents as accents,
the rows of `aligned` in display style. A long formula within a line may break after a relation.
"""

import re
from copy import deepcopy
from html import escape
from xml.etree import ElementTree as ET

from .config import Book
from .tree import document, each, pandoc, plain, raw, raw_block, span, string, transform

MARK = "@@formula@@"
BOLD = re.compile(r"\\mathbf\s*\{([A-Za-z0-9]+)\}")
FENCES = set("|‖∥∣")
ACCENTS = {
    "\u0302": "^",
    "\u0303": "~",
    "\u0307": "˙",
    "\u0308": "¨",
    "\u20d7": "→",
    "\u203e": "¯",
    "\u0304": "¯",
    "\u030c": "ˇ",
}
RELATIONS = set("=≠<>≤≥∈∉⊂⊆≈≡∼≃∝→↦⟹⇒⇔≪≫:≔")
SCRIPTS = {"msub", "msup", "msubsup", "munder", "mover", "munderover"}
BREAKS = set("+−,;")
ENOUGH = 12


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
            book.problems.add(
                where[key], " ".join(key[1].split())[:70], "this formula can't be read"
            )

    def visit(item: dict):
        if item["t"] == "Math":
            return [raw(made[item["c"][0]["t"] == "DisplayMath", item["c"][1]])]
        return _narrowed(item["c"][1]) if item["t"] == "Span" and "nb" in item["c"][0][1] else None

    for page in book.pages:
        page.blocks = transform(page.blocks, glue)
        page.title, page.outline, page.blocks = transform(
            [page.title, page.outline, page.blocks], visit
        )
    return made


def glue(block: dict) -> list | None:
    "Keep a formula and the punctuation behind it (or the bracket before it) on one line."
    if block["t"] not in ("Para", "Plain"):
        return None
    out: list = []
    for item in block["c"]:
        last = out[-1] if out else {"t": ""}
        if item["t"] == "Str" and last["t"] == "Math" and re.match(r"[^\w\s(]", item["c"]):
            cut = re.match(r"[^\w\s(]+", item["c"]).end()
            out[-1] = span([last, string(item["c"][:cut])], "", ("nb",))
            out += [string(item["c"][cut:])] if item["c"][cut:] else []
        elif (
            item["t"] == "Math" and last["t"] == "Str" and last["c"].endswith(("(", "[", "“", "-"))
        ):
            short = len(item["c"][1]) < 2 * ENOUGH
            out[-1:] = [span([last, item], "", ("nb",))] if short else [last, item]
        else:
            out.append(item)
    return [{"t": block["t"], "c": out}]


def _narrowed(pair: list) -> list | None:
    "Of a formula cut into parts, only the part next to the punctuation is kept on its line."
    at = next(n for n, item in enumerate(pair) if item["t"] == "RawInline")
    html = pair[at]["c"][1]
    if "</math><math" not in html:
        return None
    cut = (html.index("</math><math") if at else html.rindex("</math><math")) + len("</math>")
    first, last = raw(html[:cut]), raw(html[cut:])
    if at:
        return [span([*pair[:at], first], "", ("nb",)), last]
    return [first, span([last, *pair[1:]], "", ("nb",))]


def mathml(formulas: list) -> dict:
    "MathML of each (displayed, TeX), '' for one that pandoc can't read."
    if not formulas:
        return {}
    blocks = []
    for display, tex in formulas:
        math = {
            "t": "Math",
            "c": [{"t": "DisplayMath" if display else "InlineMath"}, BOLD.sub(_bold, tex)],
        }
        blocks += [plain([math]), raw_block(MARK)]
    pieces = pandoc(document(blocks), "-f", "json", "-t", "html5", "--mathml", "--wrap=none")[
        0
    ].split(MARK)
    return {key: polish(piece.strip(), *key) for key, piece in zip(formulas, pieces)}


def _bold(found: re.Match) -> str:
    "Upright bold letters; pandoc would slant them."
    starts = {"A": 0x1D400, "a": 0x1D41A, "0": 0x1D7CE}

    def one(letter: str) -> str:
        first = "0" if letter.isdigit() else "a" if letter.islower() else "A"
        return chr(starts[first] + ord(letter) - ord(first))

    return "{" + "".join(map(one, found[1])) + "}"


def polish(html: str, display: bool, tex: str) -> str:
    "Pandoc's MathML of one formula, ready for a page; '' where there's none."
    if not html.startswith("<math"):
        return ""
    root = ET.fromstring(html.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
    row = root.find("semantics/*")
    if row.tag != "mrow":
        wrapped = ET.Element("mrow")
        wrapped.append(row)
        row = wrapped
    for node in list(row.iter()):
        _mend(node)
    for node in list(row.iter()):
        if node.tag in ("mrow", "mtd", "msqrt"):
            _space(node)
    if display:
        return _html(row, tex, ' display="block"')
    parts = _parts(row) if _size(row) > ENOUGH else [row]
    return "".join(_html(part, tex if len(parts) == 1 else "", "") for part in parts)


def _html(row: ET.Element, tex: str, options: str) -> str:
    told = f' alttext="{escape(" ".join(tex.split()))}"' if tex else ""
    return f"<math{options}{told}>{ET.tostring(row, encoding='unicode', short_empty_elements=False)}</math>"


def _mend(node: ET.Element) -> None:
    "What is wrong with one element by itself."
    if node.get("mathvariant") not in (None, "normal"):
        del node.attrib["mathvariant"]
    if node.tag == "mtext":
        node.attrib.pop("mathvariant", None)
    if node.tag == "mo":
        if node.text in FENCES and node.get("form") in ("prefix", "postfix"):
            node.set("lspace", "0")
            node.set("rspace", "0")
        if node.text and set(node.text) <= set("″‴′"):
            node.text = node.text.replace("″", "′′").replace("‴", "′′′")
    if node.tag in ("mover", "munder") and len(node) == 2 and node[1].get("accent"):
        node.set("accent" if node.tag == "mover" else "accentunder", node[1].attrib.pop("accent"))
        mark = node[1].text or ""
        single = node[0].tag == "mi" and len(node[0].text or "") <= 2
        if node.tag == "mover" and single and mark not in ("¯", "⏞"):
            node[1].text = ACCENTS.get(mark, mark)
            node[1].set("stretchy", "false")
        elif mark in ("¯", "_", "\u0332"):
            _lined(node, "over" if node.tag == "mover" else "under")
    if node.tag == "mtable" and any(
        "padding-right: 0" in (cell.get("style") or "") for cell in node.iter("mtd")
    ):
        node.set("class", "aligned")
    if node.tag == "mtd":
        node.attrib.pop("columnalign", None)
        style = node.get("style", "")
        if (
            "text-align: right" in style
        ):  # a cell's content is a block, which Chromium moves for its own word alone
            node.set(
                "style",
                style.replace("text-align: right", "text-align: right; text-align: -webkit-right"),
            )


def _lined(node: ET.Element, name: str) -> None:
    "An over- or underline as a border, which is as long as what it covers in every font."
    base = node[0]
    node.clear()
    node.tag = "mrow"
    node.set("class", name)
    node.append(base)


def _named(node: ET.Element) -> bool:
    "Whether an element is the name of a function, such as log or max, with or without limits."
    if node.tag == "mi":
        name = (node.text or "").replace("\u2006", "")
        return node.get("mathvariant") == "normal" and len(name) > 1 and name.isalpha()
    if node.tag in SCRIPTS:
        return _named(node[0])
    return node.tag == "mrow" and len(node) == 2 and node[1].text == "\u2061" and _named(node[0])


def _ordinary(node: ET.Element, before: bool) -> bool:
    "Whether a function's name needs a space from this neighbour."
    if node.tag == "mo":
        return before and node.get("form") == "postfix"
    if node.tag == "mrow" and len(node) and node[0].tag == "mo" and not before:
        return node[0].text in FENCES
    return node.tag != "mspace"


def _space(row: ET.Element) -> None:
    "A thin space between the name of a function and what stands beside it."
    children = list(row)
    if row.tag == "mrow" and len(children) == 2 and _named(row):
        return
    for child in reversed(children):
        if not _named(child):
            continue
        at = list(row).index(child)
        if at + 1 < len(row) and (_ordinary(row[at + 1], False) or row[at + 1].text in FENCES):
            row.insert(at + 1, ET.Element("mspace", width="0.167em"))
        if at and _ordinary(row[at - 1], True):
            row.insert(at, ET.Element("mspace", width="0.167em"))


def _parts(row: ET.Element) -> list:
    """A formula cut after its relations, commas and signs outside brackets, so that a line may
    break there.
    """
    parts, depth = [ET.Element("mrow")], 0
    for child in row:
        parts[-1].append(deepcopy(child))
        mark = child[0] if child.tag in SCRIPTS else child
        if mark.tag != "mo":
            continue
        depth += {"prefix": 1, "postfix": -1}.get(mark.get("form"), 0) * (mark.text not in FENCES)
        signs = RELATIONS | BREAKS if _size(parts[-1]) > 8 else RELATIONS
        between = mark is child and mark.get("form") is None and len(parts[-1]) > 1
        if between and depth == 0 and mark.text and mark.text in signs:
            parts[-1][-1].set("form", "infix")
            parts.append(ET.Element("mrow"))
    return [part for part in parts if len(part)]


def _size(row: ET.Element) -> int:
    "How many signs a formula has."
    return sum(node.tag in ("mi", "mn", "mo", "mtext") for node in row.iter())
