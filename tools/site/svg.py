"""Matplotlib's SVG inside the page: its ink and its palette follow the theme, and its identifiers
are the page's own.
"""

import re
from html import escape, unescape

INK = {"#6b6b6b", "#7a7a7a"}
HUES = {
    "#0072b2": "blue",
    "#e69f00": "orange",
    "#009e73": "green",
    "#d55e00": "vermillion",
    "#56b4e9": "sky",
    "#cc79a7": "purple",
    "#7f7f7f": "grey",
    "#a6a61e": "olive",
    "#5b4fc0": "indigo",
}
NUMBER = re.compile(r"-?\d+\.\d{3,}")
UNUSED = re.compile(
    r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->\s*|<!DOCTYPE[^>]*>", re.DOTALL
)


def inline(svg: str, prefix: str, alt: str) -> str:
    "The drawing as an element of the page, with `alt` as its text."
    svg = UNUSED.sub("", svg[svg.index("<svg") :])
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _hue(found[0]), svg, flags=re.IGNORECASE)
    svg = _own(svg, prefix)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: NUMBER.sub(_rounded, path[0]), svg)
    size = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    style = f' style="width: {float(size[1]) / 72:.2f}in"' if size else ""
    head = f'<svg role="img" aria-label="{escape(alt)}"{style}'
    return re.sub(r"<svg\b", lambda _: head, svg, count=1).replace("\n\n", "\n").strip()


def titled(svg: str) -> str:
    "What a drawing says of itself: its `<title>`."
    found = re.search(r"<title>(.*?)</title>", svg, re.DOTALL)
    return unescape(found[1]).strip() if found else ""


def _own(svg: str, prefix: str) -> str:
    "The identifiers that the drawing refers to begin with `prefix`; the others go."
    used = set(re.findall(r'(?:url\(|href=")#([\w.:-]+)', svg))

    def ident(found: re.Match) -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in used else ""

    svg = re.sub(r' id="([\w.:-]+)"', ident, svg)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg).replace("xlink:href", "href")


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.2f}"


def _hue(value: str) -> str:
    "A colour that follows the theme, where it is the ink or of the palette."
    if value.lower() in INK:
        return "currentColor"
    name = HUES.get(value.lower())
    return f"var(--hue-{name}, {value})" if name else value
