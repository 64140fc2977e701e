"""Pandoc's document tree as plain JSON, and the few things that the other steps do with it."""

import json
import re
import subprocess
from pathlib import Path

import pypandoc

READER = "markdown"


def pandoc(text: str, *args: str) -> tuple[str, str]:
    "Run pandoc on `text`: its output and its warnings."
    done = subprocess.run(
        [_binary(), *args],
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"pandoc {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout, done.stderr


def _binary() -> str:
    if not _binary.path:
        _binary.path = pypandoc.get_pandoc_path()
    return _binary.path


_binary.path = ""


def document(blocks: list, meta: dict | None = None) -> str:
    return json.dumps({"pandoc-api-version": [1, 23, 1], "meta": meta or {}, "blocks": blocks})


def read(markdown: str) -> tuple[list, dict]:
    "The blocks and the metadata of a markdown text."
    return read_aloud(markdown)[:2]


def read_aloud(markdown: str) -> tuple[list, dict, list]:
    """The blocks and the metadata of a markdown text, and pandoc's complaints, each with the line
    that it is about.
    """
    out, warnings = pandoc(markdown, "-f", READER, "-t", "json")
    tree, lines, complaints = json.loads(out), markdown.split("\n"), []
    for message in re.findall(r"^\[WARNING\] (.*(?:\n  .*)*)", warnings, re.MULTILINE):
        at = re.search(r"line (\d+)", message)
        line = lines[int(at[1]) - 1].strip()[:50] if at and int(at[1]) <= len(lines) else ""
        complaints.append(
            (line, " ".join(re.sub(r" ?(at )?line \d+( column \d+)?", "", message).split()))
        )
    return tree["blocks"], tree["meta"], complaints


def write(blocks: list) -> str:
    return pandoc(document(blocks), "-f", "json", "-t", "html5", "--wrap=none")[0]


def write_many(pieces: list) -> list:
    "HTML of many lists of inlines with one call of pandoc."
    if not pieces:
        return []
    mark = "@@piece@@"
    blocks = [block for piece in pieces for block in (plain(piece), raw_block(mark))]
    return [part.strip() for part in write(blocks).split(mark)[:-1]]


def transform(node, visit):
    """Rebuild a tree from the leaves up: `visit(element)` gives None to keep an element or the list
    to put in its place.
    """
    if isinstance(node, dict):
        return {key: transform(value, visit) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    out = []
    for item in node:
        item = transform(item, visit)
        new = visit(item) if isinstance(item, dict) and "t" in item else None
        out.extend([item] if new is None else new)
    return out


def each(node):
    "Every element of a tree, outer before inner, in the order of the text."
    if isinstance(node, dict):
        if "t" in node:
            yield node
        for value in node.values():
            yield from each(value)
    elif isinstance(node, list):
        for item in node:
            yield from each(item)


def text(node, mathematics: bool = True) -> str:
    "The words of a tree; formulas as their TeX; footnotes and raw HTML left out."
    if isinstance(node, list):
        return "".join(text(item, mathematics) for item in node)
    if not isinstance(node, dict):
        return ""
    kind, content = node.get("t"), node.get("c")
    if kind == "Str":
        return content
    if kind in ("Space", "SoftBreak", "LineBreak"):
        return " "
    if kind == "Code":
        return content[1]
    if kind == "Math":
        return content[1] if mathematics else ""
    if kind in ("Note", "RawInline", "RawBlock", "CodeBlock"):
        return ""
    if kind in ("Para", "Plain", "Header"):
        return text(content, mathematics) + "\n"
    if kind == "Quoted":
        return "“" + text(content[1], mathematics) + "”"
    return text(content, mathematics) if content is not None else ""


def unlinked(inlines: list) -> list:
    "A title without the links and notes in it, to stand inside a link."
    return transform(
        inlines,
        lambda item: item["c"][1] if item["t"] == "Link" else [] if item["t"] == "Note" else None,
    )


def attr(ident: str = "", classes: tuple = (), **pairs) -> list:
    return [
        ident,
        list(classes),
        [[key.replace("_", "-"), str(value)] for key, value in pairs.items()],
    ]


def string(value: str) -> dict:
    return {"t": "Str", "c": value}


def plain(inlines: list) -> dict:
    return {"t": "Plain", "c": inlines}


def div(blocks: list, ident: str = "", classes: tuple = (), **pairs) -> dict:
    return {"t": "Div", "c": [attr(ident, classes, **pairs), blocks]}


def span(inlines: list, ident: str = "", classes: tuple = (), **pairs) -> dict:
    return {"t": "Span", "c": [attr(ident, classes, **pairs), inlines]}


def raw(html: str) -> dict:
    return {"t": "RawInline", "c": ["html", html]}


def raw_block(html: str) -> dict:
    return {"t": "RawBlock", "c": ["html", html]}


def link(inlines: list, target: str, classes: tuple = (), title: str = "") -> dict:
    return {"t": "Link", "c": [attr("", classes), inlines, [target, title]]}


def save(path: Path, content: str | bytes) -> None:
    "Write a file, making its folder."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
