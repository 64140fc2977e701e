"""Chapters, sections, figures, tables, equations and theorems get their numbers and their labels,
as Quarto gives them.

A number is the chapter's, a point, and the count of that kind within the chapter. The same walk
turns theorem and callout divs into what the page shows, because their headings must not be counted
as sections.
"""

import re
from dataclasses import dataclass

from .config import Page, Problems
from .tree import attr, div, plain, raw, raw_block, read, span, string, text

THEOREMS = {
    "thm": "Theorem",
    "lem": "Lemma",
    "cor": "Corollary",
    "prp": "Proposition",
    "cnj": "Conjecture",
    "def": "Definition",
    "exm": "Example",
    "exr": "Exercise",
    "sol": "Solution",
    "rem": "Remark",
    "alg": "Algorithm",
}
CALLOUTS = {"note": "nte", "tip": "tip", "warning": "wrn", "important": "imp", "caution": "cau"}
NAMES = {
    "sec": "Section",
    "fig": "Figure",
    "tbl": "Table",
    "eq": "Equation",
    "lst": "Listing",
    **THEOREMS,
    "nte": "Note",
    "tip": "Tip",
    "wrn": "Warning",
    "imp": "Important",
    "cau": "Caution",
}
LABEL = re.compile(r"^({})-[\w.:-]+$".format("|".join(NAMES)))
EQUATION = re.compile(r"^\{#(eq-[\w.:-]+)\}")
LITERAL = re.compile(r"^(:::|```|~~~|\$\$|\\begin\{)")
EXECUTABLE = re.compile(r"^\{=?[a-z]+\}\s")
UNNAMED = {"proof": "Proof", "remark": "Remark", "solution": "Solution"}
UNSUPPORTED = re.compile(
    r"^(panel-|column-(?!page$)|aside$|content-(visible|hidden)|grid$|g-col-|incremental$|hidden$|layout)"
)
SHORTCODE = re.compile(r"\{\{<|\{\{%")


@dataclass
class Label:
    page: Page
    name: str
    kind: str
    number: str
    title: list


class Numbering:
    """Numbers the pages of a book one after the other; `labels` is what references are resolved
    against.
    """

    def __init__(self, problems: Problems):
        self.problems, self.labels, self.chapters, self.appendices = problems, {}, 0, 0
        self.page: Page = None

    def run(self, page: Page, meta: dict) -> None:
        "Number one page in place: its title leaves its blocks, its headings are listed."
        self.page, self.counts, self.levels = page, {}, [0] * 7
        if page.is_notebook and meta:
            self.problem("", f"a YAML block {sorted(meta)} in a notebook counts as a second title")
        title = next((b for b in page.blocks if b["t"] == "Header" and b["c"][0] == 1), None)
        if title is None and "title" in meta:
            title = {"t": "Header", "c": [1, attr(), meta["title"]["c"]]}
            page.blocks.insert(0, title)
        if title is None:
            self.problem("", "no '# Title' heading")
            title = {"t": "Header", "c": [1, attr(), [string(page.path)]]}
        self.chapter(title)
        page.blocks = self.blocks([block for block in page.blocks if block is not title])

    def problem(self, label: str, message: str) -> None:
        self.problems.add(self.page.path, label, message)

    def chapter(self, header: dict) -> None:
        _, (ident, classes, _), inlines = header["c"]
        page = self.page
        if page.path != "index.qmd" and not set(classes) & {"unnumbered", "-"}:
            if page.appendix:
                self.appendices += 1
                page.number = chr(64 + self.appendices)
            else:
                self.chapters += 1
                page.number = str(self.chapters)
        page.title, page.ident = inlines, ident
        if LABEL.match(ident):
            self.label(ident, "sec", page.number, inlines)

    def label(self, name: str, kind: str, number: str, title: list) -> None:
        if name in self.labels:
            self.problem(name, f"this label is already used in {self.labels[name].page.path}")
        self.labels[name] = Label(self.page, name, kind, number, title)

    def count(self, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{self.page.number}.{self.counts[kind]}".lstrip(".")

    # blocks

    def blocks(self, items: list) -> list:
        return [new for item in items for new in self.block(item)]

    def block(self, block: dict) -> list:
        kind = block["t"]
        if kind in ("Header", "Div", "Para", "Plain", "Figure", "Table", "CodeBlock", "RawBlock"):
            return getattr(self, kind.lower())(block)
        if kind == "BlockQuote":
            return [{"t": kind, "c": self.blocks(block["c"])}]
        if kind == "BulletList":
            return [{"t": kind, "c": [self.blocks(item) for item in block["c"]]}]
        if kind == "OrderedList":
            made = {"t": kind, "c": [block["c"][0], [self.blocks(item) for item in block["c"][1]]]}
            return (
                [div([made], "", ("parens",))] if block["c"][0][2]["t"] == "TwoParens" else [made]
            )
        if kind == "DefinitionList":
            return [
                {
                    "t": kind,
                    "c": [
                        [term, [self.blocks(one) for one in meanings]]
                        for term, meanings in block["c"]
                    ],
                }
            ]
        return [block]

    def header(self, block: dict) -> list:
        level, (ident, classes, pairs), inlines = block["c"]
        if level == 1:
            self.problem(text(inlines, False).strip(), "a second level-1 heading on the page")
            return [block]
        number = ""
        self.levels[level] += 1
        self.levels[level + 1 :] = [0] * len(self.levels[level + 1 :])
        if 0 in self.levels[2:level]:
            name = text(inlines, False).strip()
            self.problem(name, f"a level-{level} heading without one of level {level - 1} above it")
        if self.page.number and not set(classes) & {"unnumbered", "-"}:
            number = ".".join([self.page.number, *map(str, self.levels[2 : level + 1])])
        if LABEL.match(ident):
            self.label(ident, "sec", number, inlines)
        if "unlisted" not in classes:
            self.page.outline.append([level, ident, number, inlines])
        shown = [raw(f'<span class="secno">{number}</span> ')] if number and level <= 4 else []
        self.inlines(inlines)
        anchor = raw(f' <a class="anchor" href="#{ident}" aria-label="Link to this section">#</a>')
        return [{"t": "Header", "c": [level, [ident, classes, pairs], shown + inlines + [anchor]]}]

    def para(self, block: dict) -> list:
        """A paragraph; its displayed formulas become blocks of their own, numbered where they are
        labelled.
        """
        out, run, inlines = [], [], block["c"]
        self.inlines(inlines)
        i = 0
        while i < len(inlines):
            item = inlines[i]
            if item["t"] == "Math" and item["c"][0]["t"] == "DisplayMath":
                label, used, rest = _equation_label(inlines[i + 1 :])
                out += self._paragraph(block["t"], run) + [self.equation(item, label)]
                run = [string(rest)] if rest else []
                i += 1 + used
            else:
                if item["t"] == "Str" and (found := EQUATION.match(item["c"])):
                    self.problem(found[1], "this label isn't behind a displayed formula")
                run.append(item)
                i += 1
        return out + self._paragraph(block["t"], run)

    plain = para

    def _paragraph(self, kind: str, inlines: list) -> list:
        while inlines and inlines[0]["t"] in ("Space", "SoftBreak"):
            inlines = inlines[1:]
        while inlines and inlines[-1]["t"] in ("Space", "SoftBreak"):
            inlines = inlines[:-1]
        return [{"t": kind, "c": inlines}] if inlines else []

    def equation(self, item: dict, label: str) -> dict:
        if not label:
            return div([_formula(item)], "", ("equation",))
        number = self.count("eq")
        self.label(label, "eq", number, [])
        shown = plain([raw(f'<span class="eqno">({number})</span>')])
        return div([_formula(item), shown], label, ("equation", "numbered"))

    def inlines(self, items: list) -> None:
        "What no inline may be."
        for before, item in zip([None, *items], items):
            kind = item["t"]
            if kind == "Str" and SHORTCODE.search(item["c"]):
                self.problem(item["c"], "shortcodes aren't supported")
            elif kind == "Str" and LITERAL.match(item["c"]):
                self.problem(
                    text(items)[:40].strip(), f"{item['c']!r} is left open or closes nothing"
                )
            elif kind == "Code" and EXECUTABLE.match(item["c"][1]):
                self.problem(item["c"][1].split()[0], "this kind of code block isn't supported")
            elif kind == "RawInline" and item["c"][0] in ("tex", "latex"):
                self.problem(item["c"][1][:40], "LaTeX outside dollars")
            elif (
                kind == "Str"
                and item["c"] in ("-", "*", "1.")
                and before
                and before["t"] == "SoftBreak"
            ):
                self.problem(text(items)[:40].strip(), "a list needs an empty line above it")
            elif (
                kind == "Image"
                and not text(item["c"][1]).strip()
                and not dict(item["c"][0][2]).get("fig-alt")
            ):
                self.problem(item["c"][2][0], "image without alt text")
            elif kind in ("Emph", "Strong", "Strikeout", "Superscript", "Subscript", "SmallCaps"):
                self.inlines(item["c"])
            elif kind in ("Link", "Span"):
                self.inlines(item["c"][1])
            elif kind == "Note":
                item["c"] = self.blocks(item["c"])

    def rawblock(self, block: dict) -> list:
        if block["c"][0] in ("tex", "latex"):
            self.problem(block["c"][1][:40].replace("\n", " "), "LaTeX outside dollars")
        return [block]

    def codeblock(self, block: dict) -> list:
        (ident, classes, pairs), _ = block["c"]
        if classes and classes[0].startswith("{"):
            self.problem(classes[0], "this kind of code block isn't supported")
        if not ident.startswith("lst-"):
            return [block]
        caption = read(dict(pairs).get("lst-cap", ""))[0]
        block["c"][0] = ["", classes, []]
        return [self.floated("lst", ident, caption, [block], first=True)]

    def figure(self, block: dict) -> list:
        (ident, _, _), (_, caption), content = block["c"]
        for inner in content:
            for item in inner.get("c", []):
                if isinstance(item, dict) and item.get("t") == "Image":
                    ident = ident or item["c"][0][0]
                    item["c"][0][0] = ""
                    alt = dict(item["c"][0][2]).get("fig-alt", "")
                    if not alt.strip():
                        self.problem(
                            ident or item["c"][2][0], 'image without alt text: add fig-alt="…"'
                        )
                    item["c"][0][2] = [pair for pair in item["c"][0][2] if pair[0] != "fig-alt"]
                    item["c"][1] = [string(alt)]
        return [self.floated("fig", ident, caption, content)]

    def table(self, block: dict) -> list:
        (ident, classes, pairs), (_, caption) = block["c"][0], block["c"][1]
        if caption and caption[-1]["t"] in ("Plain", "Para") and not ident:
            tail = caption[-1]["c"]
            if (
                tail
                and tail[-1]["t"] == "Str"
                and (found := re.match(r"^\{#(tbl-[\w.:-]+)\}$", tail[-1]["c"]))
            ):
                ident, caption[-1]["c"] = found[1], tail[:-1]
        block["c"][0], block["c"][1] = ["", classes, pairs], [None, []]
        block["c"][2] = [[align, {"t": "ColWidthDefault"}] for align, _ in block["c"][2]]
        body = div([block], "", ("scroll",))
        return (
            [self.floated("tbl", ident, caption, [body], first=True)]
            if caption or ident
            else [body]
        )

    def floated(
        self, kind: str, ident: str, caption: list, content: list, first: bool = False
    ) -> dict:
        "A figure, table or listing with its caption; numbered where it has a label."
        caption = self.blocks(
            [{"t": "Para", "c": b["c"]} if b["t"] == "Plain" else b for b in caption]
        )
        if ident and not ident.startswith(kind + "-"):
            self.problem(ident, f"a label here must begin with {kind}-")
        if ident:
            number = self.count(kind)
            self.label(ident, kind, number, [])
            lead = [raw(f'<span class="label">{NAMES[kind]} {number}</span> ')]
            caption = _led(lead, caption)
        parts = [
            raw_block(f'<figure class="float {kind}"' + (f' id="{ident}"' if ident else "") + ">")
        ]
        told = [raw_block("<figcaption>"), *caption, raw_block("</figcaption>")] if caption else []
        return div(parts + (told + content if first else content + told) + [raw_block("</figure>")])

    def div(self, block: dict) -> list:
        (ident, classes, pairs), content = block["c"]
        options = dict(pairs)
        for name in [*classes, *options]:
            if UNSUPPORTED.match(name):
                self.problem(ident or name, f"{name!r} isn't supported")
        prefix = ident.split("-")[0]
        callout = next((name[8:] for name in classes if name.startswith("callout-")), "")
        if callout:
            return self.callout(callout, ident, options, content)
        if prefix in THEOREMS and LABEL.match(ident):
            return self.theorem(prefix, ident, options, content)
        if unnamed := next((name for name in classes if name in UNNAMED), ""):
            return self.unnamed(unnamed, ident, options, content)
        if "float" in classes:
            caption = content.pop()["c"][1]
            return [
                self.floated(
                    classes[1], ident, caption, self.blocks(content), first=classes[1] == "tbl"
                )
            ]
        if prefix in ("fig", "tbl", "lst") and LABEL.match(ident):
            caption = [content.pop()] if content and content[-1]["t"] == "Para" else []
            return [
                self.floated(prefix, ident, caption, self.blocks(content), first=prefix == "tbl")
            ]
        return [{"t": "Div", "c": [[ident, classes, pairs], self.blocks(content)]}]

    def theorem(self, kind: str, ident: str, options: dict, content: list) -> list:
        name, content = _name(options, content)
        number = self.count(kind)
        self.label(ident, kind, number, name)
        lead = _title(f"{THEOREMS[kind]} {number}", name, "theorem-title")
        return [div(_led(lead, self.blocks(content)), ident, ("theorem", kind))]

    def unnamed(self, kind: str, ident: str, options: dict, content: list) -> list:
        name, content = _name(options, content)
        lead = _title(UNNAMED[kind], name, "proof-title")
        return [div(_led(lead, self.blocks(content)), ident, ("proof", kind))]

    def callout(self, kind: str, ident: str, options: dict, content: list) -> list:
        if kind not in CALLOUTS:
            self.problem(ident or kind, f"the callout {kind!r} isn't one of {', '.join(CALLOUTS)}")
        name, content = _name(options, content, "title")
        title = name or [string(kind.capitalize())]
        if LABEL.match(ident):
            number = self.count(CALLOUTS.get(kind, kind))
            self.label(ident, CALLOUTS.get(kind, "nte"), number, name)
            title = [string(f"{kind.capitalize()} {number}")] + (
                [string(": "), *name] if name else []
            )
        folded = options.get("collapse", "").lower()
        where = f' id="{ident}"' if ident else ""
        body = div(self.blocks(content), "", ("callout-body",))
        if folded in ("true", "false"):
            opened = " open" if folded == "false" else ""
            begin = f'<details class="callout {kind}"{where}{opened}><summary>'
            return [
                raw_block(begin),
                plain(title),
                raw_block("</summary>"),
                body,
                raw_block("</details>"),
            ]
        begin = f'<div class="callout {kind}"{where} role="note"><p class="callout-title">'
        return [raw_block(begin), plain(title), raw_block("</p>"), body, raw_block("</div>")]


def _formula(item: dict) -> dict:
    return div([plain([item])], "", ("formula",))


def _name(options: dict, content: list, key: str = "name") -> tuple[list, list]:
    """The name of a theorem or callout, from its attribute or from a heading at its top, and the
    rest.
    """
    if options.get(key):
        blocks = read(options[key])[0]
        return (blocks[0]["c"] if blocks else []), content
    if content and content[0]["t"] == "Header":
        return content[0]["c"][2], content[1:]
    return [], content


def _title(words: str, name: list, kind: str) -> list:
    "Theorem 1.2 (its name). in front of what it says."
    named = [{"t": "Space"}, string("("), *name, string(")")] if name else []
    return [span([string(words), *named, string(".")], "", (kind,)), {"t": "Space"}]


def _led(lead: list, blocks: list) -> list:
    "Blocks with `lead` at the start of their first paragraph."
    if blocks and blocks[0]["t"] in ("Para", "Plain"):
        return [{"t": blocks[0]["t"], "c": lead + blocks[0]["c"]}, *blocks[1:]]
    return [{"t": "Para", "c": lead}, *blocks]


def _equation_label(rest: list) -> tuple[str, int, str]:
    "The label behind a displayed formula, how many inlines it takes, and what is glued to its end."
    for used, item in enumerate(rest[:2], 1):
        if item["t"] == "Str" and (found := EQUATION.match(item["c"])):
            return found[1], used, item["c"][found.end() :]
        if item["t"] not in ("Space", "SoftBreak"):
            break
    return "", 0, ""
