"""The search index: one entry a section, made from the text of the pages before they are rendered."""

import json
import re

from .config import Book
from .tree import each, text, transform

NAMES = re.compile(r"^\s*(?:def|class)\s+(\w+)|^([A-Za-z]\w*)(?:\s*:[^=\n]+)? = ", re.MULTILINE)


def entries(book: Book) -> list:
    "[address, page title, section title, words] for each section of each page."
    found = []
    for page in book.pages:
        name = _clean(text(page.title))
        shown = f"{page.number} {name}".strip()
        section, words = ["", ""], []
        for block in _flat(page.blocks):
            if block["t"] == "Header":
                found.append([page.url + section[0], shown, section[1], _clean(" ".join(words))])
                section, words = ["#" + block["c"][1][0], _clean(text(block["c"][2]))], []
            else:
                words.append(_words(block))
        found.append([page.url + section[0], shown, section[1], _clean(" ".join(words))])
    return found


def _flat(blocks: list):
    "The blocks of a page with those inside boxes taken out one by one."
    for block in blocks:
        if block["t"] == "Div":
            yield from _flat(block["c"][1])
        else:
            yield block


def _words(block: dict) -> str:
    "The words of a block, and of its code the names that it defines."
    if block["t"] == "CodeBlock":
        return " ".join(name for pair in NAMES.findall(block["c"][1]) for name in pair if name)
    if block["t"] == "RawBlock":
        return ""
    return " ".join(
        text(transform([item], _readable)) for item in each(block) if item["t"] in ("Para", "Plain")
    )


def _readable(item: dict) -> list | None:
    "A formula stays in the index where it reads as words, like r = 8."
    return [] if item["t"] == "Math" and re.search(r"[\\^_{]", item["c"][1]) else None


def _clean(words: str) -> str:
    "Words without TeX's signs; an underscore within a name stays."
    return re.sub(r"\s+", " ", re.sub(r"[\\{}$&^]+|(?<!\w)_+|_+(?!\w)", " ", words)).strip()


def script(book: Book) -> str:
    "The index as a script, because a page opened from disk may load a script but not a JSON file."
    return (
        "window.BOOK_INDEX="
        + json.dumps(entries(book), ensure_ascii=False, separators=(",", ":"))
        + ";\n"
    )
