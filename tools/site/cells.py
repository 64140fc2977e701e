"""A notebook as one markdown text, with a numbered place for each code cell, and those places
filled in again.

The markdown cells are joined before pandoc reads them, so that a link definition or a box may span
cells; captions and markdown outputs travel inside the places, so that references and formulas in
them are read with the rest.
"""

import ast
import base64
import json
import re
from dataclasses import dataclass, field

import yaml

from .config import Page, Problems
from .frames import marked
from .svg import inline, titled
from .tree import attr, div, plain, raw_block, read

OPTIONS = {
    "label",
    "fig-cap",
    "fig-alt",
    "tbl-cap",
    "lst-label",
    "lst-cap",
    "echo",
    "output",
    "include",
    "eval",
    "error",
    "warning",
    "code-fold",
    "code-summary",
    "column",
    "export",
    "exporti",
    "default_exp",
    "slow",
    "gpu",
    "hide",
}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NOQA = re.compile(r"[ \t]+# noqa\b.*$", re.MULTILINE)
DIRECTIVE = re.compile(r"^#\|\s?(.*)$")


@dataclass
class Cell:
    "One code cell: its source without directives, its directives and its outputs."

    number: int
    ident: str
    source: str
    options: dict
    outputs: list
    markdown: dict = field(default_factory=dict)

    def says(self, name: str, default: bool = True) -> bool:
        return str(self.options.get(name, default)).lower() not in ("false", "none", "0")


def assemble(page: Page, problems: Problems) -> tuple[str, list, list]:
    "The markdown of a page, the code cells that it shows, and all of them."
    content = page.file.read_text(encoding="utf-8")
    if not page.is_notebook:
        return content, [], []
    parts, cells, every = [], [], []
    for position, entry in enumerate(json.loads(content)["cells"]):
        source = entry["source"]
        if isinstance(source, str) and "\n" in source:
            message = (
                "the source is one long string, not a list of lines: Quarto loses its newlines"
            )
            problems.add(page.path, f"cell {position}", message)
        source = "".join(source)
        if entry["cell_type"] == "markdown":
            parts.append(source)
        elif entry["cell_type"] == "code":
            cell = parse(page, position, entry, source, problems)
            every.append(cell)
            if cell.says("include") and (cell.source.strip() or cell.outputs):
                cells.append(cell)
                parts.append(_place(cell, len(cells) - 1))
        else:
            problems.add(
                page.path, f"cell {position}", "raw cells aren't supported: use a markdown cell"
            )
    return "\n\n".join(parts), cells, every


def parse(page: Page, position: int, entry: dict, source: str, problems: Problems) -> Cell:
    "Split a code cell into directives and source; directives must be YAML and known."
    lines = source.split("\n")
    head = []
    while lines and (match := DIRECTIVE.match(lines[0])):
        head.append(match[1])
        lines.pop(0)
    try:
        options = yaml.safe_load("\n".join(head)) or {}
    except yaml.YAMLError as error:
        options = {}
        problems.add(
            page.path, f"cell {position}", f"its #| lines aren't YAML: {str(error).splitlines()[0]}"
        )
    if not isinstance(options, dict):
        wanted = f"write '#| {head[0]}' as YAML, such as '#| {head[0].split()[0]}: true'"
        problems.add(page.path, f"cell {position}", wanted)
        options = {}
    for name in sorted(set(options) - OPTIONS):
        problems.add(page.path, f"cell {position}", f"the cell option {name!r} isn't supported")
    ident = entry.get("id") or str(position)
    shown = NOQA.sub("", "\n".join(lines).strip("\n"))
    return Cell(position, ident, shown, options, entry.get("outputs", []))


def _place(cell: Cell, index: int) -> str:
    "The place of a cell in the markdown: a div that carries its captions and markdown outputs."
    inner = []
    for name in ("fig-cap", "tbl-cap", "lst-cap"):
        if cell.options.get(name):
            inner.append(f"::::::::::: {{.lora-{name}}}\n{cell.options[name]}\n:::::::::::")
    for k, output in enumerate(cell.outputs):
        words = None
        if (
            output.get("output_type") in ("display_data", "execute_result")
            and _kind(output["data"]) == "text/markdown"
        ):
            words = "".join(output["data"]["text/markdown"])
        elif output.get("output_type") == "stream" and cell.options.get("output") == "asis":
            words = "".join(output["text"])
        if words is not None:
            inner.append(f"::::::::::: {{.lora-output k={k}}}\n{words}\n\n:::::::::::")
    body = "\n\n".join(inner)
    return f":::::::::::: {{.lora-cell n={index}}}\n{body}\n::::::::::::"


def _kind(data: dict) -> str:
    "The richest representation of an output that a page can show."
    for mime in (
        "text/html",
        "text/markdown",
        "image/svg+xml",
        "image/png",
        "image/jpeg",
        "text/latex",
        "text/plain",
    ):
        if mime in data:
            return mime
    return ""


def fill(
    page: Page, blocks: list, cells: list, book_fold: str, problems: Problems
) -> tuple[list, dict]:
    "Put the code cells into their places; also the image files that the page needs, by address."
    files, seen = {}, set()

    def one(block: dict) -> list:
        if block["t"] == "Div" and "lora-cell" in block["c"][0][1]:
            index = int(dict(block["c"][0][2])["n"])
            seen.add(index)
            return [_Filler(page, cells[index], block["c"][1], files, book_fold, problems).block()]
        return [_within(block, one)]

    filled = [new for block in blocks for new in one(block)]
    for index in set(range(len(cells))) - seen:
        where = f"cell {cells[index].number}"
        problems.add(
            page.path, where, "swallowed by the text above it: is a fence or a comment left open?"
        )
    return filled, files


def _within(block: dict, one) -> dict:
    "The same block with `one` applied to the blocks inside a div or a quote."
    if block["t"] == "Div":
        return {
            "t": "Div",
            "c": [block["c"][0], [new for inner in block["c"][1] for new in one(inner)]],
        }
    if block["t"] == "BlockQuote":
        return {"t": "BlockQuote", "c": [new for inner in block["c"] for new in one(inner)]}
    return block


class _Filler:
    "Makes the block of one code cell."

    def __init__(
        self, page: Page, cell: Cell, inner: list, files: dict, book_fold: str, problems: Problems
    ):
        self.page, self.cell, self.files, self.fold, self.problems = (
            page,
            cell,
            files,
            book_fold,
            problems,
        )
        self.pictures = 0
        self.captions = {}
        for (_, (name,), pairs), content in (block["c"] for block in inner):
            if name == "lora-output":
                cell.markdown[int(dict(pairs)["k"])] = content
            else:
                self.captions[name.removeprefix("lora-")] = content

    def problem(self, message: str) -> None:
        self.problems.add(
            self.page.path,
            str(self.cell.options.get("label") or f"cell {self.cell.number}"),
            message,
        )

    def block(self) -> dict:
        cell = self.cell
        label = str(cell.options.get("label", ""))
        content = self.code() if cell.says("echo") and cell.source.strip() else []
        shown = self.wrapped(label, self.outputs()) if cell.says("output") else []
        content = shown + content if shown and self.folded() else content + shown
        wide = ("column-page",) if "column" in cell.options else ()
        if cell.options.get("column", "page") != "page":
            self.problem(f"#| column: {cell.options['column']} isn't supported: page is")
        return div(content, f"cell-{cell.ident}", ("cell", *wide))

    def code(self) -> list:
        options = self.cell.options
        exported = any(self.cell.says(name, False) for name in ("export", "exporti"))
        language = "bash" if self.cell.source.startswith("%%bash") else "python"
        classes = (language, "exported") if exported else (language,)
        block = {"t": "CodeBlock", "c": [attr("", classes), self.cell.source]}
        if options.get("lst-label"):
            block["c"][0][0] = str(options["lst-label"])
            block["c"][0][2] = [["lst-cap", str(options.get("lst-cap", ""))]]
        if not self.folded():
            return [block]
        words = self.summary()
        kind = "fold check" if words.startswith("✓") else "fold"
        state = " open" if self.folded() == "show" else ""
        begin = f'<details class="{kind}"{state}><summary>'
        shown = plain([{"t": "Str", "c": words}])
        return [raw_block(begin), shown, raw_block("</summary>"), block, raw_block("</details>")]

    def folded(self) -> str:
        "true, show, or nothing for a cell that isn't folded."
        fold = str(self.cell.options.get("code-fold", self.fold)).lower()
        return fold if fold in ("true", "show") else ""

    def summary(self) -> str:
        "A folded cell's one line, which must say what is inside; with a tick it's a check."
        words = str(self.cell.options.get("code-summary") or "").strip()
        if "code-fold" in self.cell.options and words in ("", "Code"):
            self.problem('a folded cell needs #| code-summary: "what is inside"')
        elif self.is_bare_check() and not words.startswith("✓"):
            self.problem('a folded cell of asserts needs #| code-summary: "✓ what was checked"')
        return words or "Code"

    def is_bare_check(self) -> bool:
        "Whether the cell is nothing but asserts."
        try:
            body = ast.parse(self.cell.source).body
        except SyntaxError:  # IPython's own lines
            return False
        return bool(body) and all(isinstance(node, ast.Assert) for node in body)

    def wrapped(self, label: str, outputs: list) -> list:
        """Pictures (or tables) of a labelled cell become one numbered figure (or table); printed
        text stays outside it.
        """
        name = "tbl-cap" if label.startswith("tbl-") else "fig-cap"
        wanted = "tabular" if name == "tbl-cap" else "picture"
        if not label.startswith(("fig-", "tbl-")) and name not in self.captions:
            return [block for _, block in outputs]
        inside = [block for kind, block in outputs if kind == wanted]
        inside = inside or [block for kind, block in outputs if kind != "printed"]
        outside = [block for kind, block in outputs if block not in inside]
        if not inside:
            self.problem("this cell is labelled as a figure or table but shows none")
        elif label.startswith(("fig-", "tbl-")) and any(
            _kind(output.get("data", {})) == "text/plain" for output in self.cell.outputs
        ):
            self.problem(
                "this cell returns a value beside its figure or table, which Quarto would number as"
                " another one: print it"
            )
        if label.startswith(("fig-", "tbl-")) and name not in self.captions:
            self.problem(f"a labelled figure or table needs #| {name}")
        classes = ("float", "tbl" if wanted == "tabular" else "fig")
        return outside + [
            div(inside + [div(self.captions.get(name, []), "", ("caption",))], label, classes)
        ]

    def outputs(self) -> list:
        "Each output as (printed | picture | tabular | other, block)."
        found = []
        for k, output in enumerate(self.cell.outputs):
            kind = output.get("output_type")
            if k in self.cell.markdown:
                tabular = any(block["t"] == "Table" for block in self.cell.markdown[k])
                shown = div(self.cell.markdown[k], "", ("output", "markdown"))
                found.append(("tabular" if tabular else "other", shown))
            elif kind == "stream":
                if output.get("name") == "stderr" and not self.cell.says("warning"):
                    continue
                found.append(
                    ("printed", _text("".join(output["text"]), output.get("name", "stdout")))
                )
            elif kind == "error":
                if not self.cell.says("error", False):
                    self.problem(f"a stored error: {output.get('ename')}")
                found.append(("printed", _text("\n".join(output.get("traceback", [])), "error")))
            elif kind in ("display_data", "execute_result"):
                found += self.rich(k, output)
        return _merged(found)

    def rich(self, k: int, output: dict) -> list:
        data, mime = output["data"], _kind(output["data"])
        if mime in ("image/png", "image/jpeg", "image/svg+xml"):
            return [("picture", self.image(k, mime, output))]
        if mime == "text/html":
            html = marked(
                re.sub(r"<style scoped>.*?</style>", "", "".join(data[mime]), flags=re.DOTALL)
            )
            tabular = "<table" in html
            return [
                (
                    (
                        "tabular"
                        if tabular
                        else "picture"
                        if "<svg" in html or "<script" in html
                        else "other"
                    ),
                    div(
                        [raw_block(html)],
                        "",
                        ("output", "html", "scroll") if tabular else ("output", "html"),
                    ),
                )
            ]
        if mime == "text/latex":
            return [("other", div(read("".join(data[mime]))[0], "", ("output",)))]
        return [("printed", _text("".join(data[mime]), "result"))] if mime else []

    def image(self, k: int, mime: str, output: dict) -> dict:
        "The image as a file beside the page; its alt text is the cell's #| fig-alt."
        body = "".join(output["data"][mime])
        extension = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}[mime]
        alts = self.cell.options.get("fig-alt", "")
        alts = alts if isinstance(alts, list) else [alts]
        self.pictures += 1
        alt = str(alts[min(self.pictures, len(alts)) - 1]) if alts else ""
        alt = alt or (titled(body) if extension == "svg" else "")
        if not alt.strip():
            self.problem("image without alt text: add #| fig-alt")
        if extension == "svg":
            drawn = raw_block(inline(body, f"{self.cell.ident}-{k}", alt))
            return div([drawn], "", ("output", "image"))
        name = f"{self.page.url.removesuffix('.html')}_files/{self.cell.ident}-{k}.{extension}"
        self.files[name] = base64.b64decode(body)
        size = output.get("metadata", {}).get(mime, {})
        pairs = [[key, str(size[key])] for key in ("width", "height") if key in size] or _pixels(
            self.files[name]
        )
        image = {
            "t": "Image",
            "c": [["", ["plot"], pairs], [{"t": "Str", "c": alt}], [self.page.up + name, ""]],
        }
        return div([plain([image])], "", ("output", "image"))


def _pixels(content: bytes) -> list:
    "Width and height of a PNG, so that the page doesn't jump while it loads."
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return []
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return [["width", str(width)], ["height", str(height)]]


def _text(words: str, kind: str) -> dict:
    "Printed text; a line that was overwritten (a progress bar) shows its last state."
    lines = [
        line.rstrip("\r").rsplit("\r", 1)[-1]
        for line in ANSI.sub("", words).rstrip("\n").split("\n")
    ]
    return {"t": "CodeBlock", "c": [attr("", ("printed", kind)), "\n".join(lines)]}


def _merged(outputs: list) -> list:
    "Neighbouring pieces of the same stream as one."
    merged = []
    for kind, block in outputs:
        last = merged[-1][1] if merged else None
        if (
            kind == "printed"
            and last
            and last["t"] == "CodeBlock"
            and last["c"][0] == block["c"][0]
        ):
            last["c"][1] += "\n" + block["c"][1]
        else:
            merged.append((kind, block))
    return merged
