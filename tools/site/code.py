"""Source code and printed text as HTML: Pygments' classes, a box that scrolls, no scripts."""

from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .tree import raw_block, transform

FORMAT = HtmlFormatter(nowrap=True)


def colour(blocks: list) -> list:
    "The same blocks with each code block as HTML."
    return transform(
        blocks, lambda block: [raw_block(_html(block))] if block["t"] == "CodeBlock" else None
    )


def _html(block: dict) -> str:
    (_, classes, _), source = block["c"]
    if classes[:1] == ["printed"]:
        kind = classes[1]
        name = {"stderr": "Messages", "error": "Error"}.get(kind, "Output")
        return (
            f'<pre class="output printed {kind}"'
            f' aria-label="{name}">{escape(source, quote=False)}</pre>'
        )
    language = next(iter(classes), "")
    marks = " exported" if "exported" in classes else ""
    return (
        f'<div class="code{marks}"><pre'
        f' aria-label="Code"><code>{_coloured(source, language)}</code></pre></div>'
    )


def _coloured(source: str, language: str) -> str:
    name = {"python": "ipython3" if source.lstrip().startswith(("%", "!")) else "python"}.get(
        language, language
    )
    try:
        lexer = get_lexer_by_name(name, stripnl=False)
    except ClassNotFound:
        return escape(source, quote=False)
    return highlight(source, lexer, FORMAT).rstrip("\n")
