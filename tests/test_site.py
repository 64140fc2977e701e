"""The offline renderer on small books: what it shows, and what it refuses."""

import base64
import json
import os
import re
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_book.lab.figures import INK, PALETTE
from lora_book.registry import METHODS
from lora_book.sheet import chapter
from tools.site import config, home
from tools.site.__main__ import main
from tools.site.audit import FETCHING, REMOTE
from tools.site.frames import marked
from tools.site.maths import mathml
from tools.site.pages import ASSETS
from tools.site.render import render
from tools.site.spread import FORKS, spread
from tools.site.svg import HUES
from tools.site.svg import INK as SVG_INK

PNG = base64.b64encode(
    base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
).decode()
BIB = """
@article{hu, author={Hu, Edward}, title={Low ranks}, journal={J}, year={2021}}
@article{hu2, author={Hu, Edward}, title={More ranks}, journal={J}, year={2021}}
@article{li, author={Li, Ann}, title={Never cited}, journal={J}, year={2020}}
"""
REFS = "# References {.unnumbered}\n\n::: {#refs}\n:::\n"


def lines(text: str) -> list:
    return text.splitlines(keepends=True)


def md(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(textwrap.dedent(text).strip())}


def code(text: str, *outputs: dict) -> dict:
    return {
        "cell_type": "code",
        "metadata": {},
        "source": lines(textwrap.dedent(text).strip()),
        "outputs": list(outputs),
        "execution_count": None,
    }


def shown(**data: str) -> dict:
    names = {
        "png": "image/png",
        "svg": "image/svg+xml",
        "html": "text/html",
        "plain": "text/plain",
        "markdown": "text/markdown",
    }
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {names[kind]: value for kind, value in data.items()},
    }


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": lines(text)}


def write(
    root: Path, chapters: dict, config: str = "", index: str = "# Home {.unnumbered}\n\nHello.\n"
) -> Path:
    "A book of notebooks (lists of cells) and pages (texts), in two parts."
    root.mkdir(parents=True, exist_ok=True)
    (root / "references.bib").write_text(BIB)
    (root / "index.qmd").write_text(index)
    (root / "references.qmd").write_text(REFS)
    for path, content in chapters.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (root / path).write_text(textwrap.dedent(content))
        else:
            cells = [{"id": f"c{n:02d}", **cell} for n, cell in enumerate(content)]
            (root / path).write_text(
                json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
            )
    half = (len(chapters) + 1) // 2
    parts = "".join(
        f"    - part: Part {n}\n      chapters: {json.dumps(paths)}\n"
        for n, paths in enumerate((list(chapters)[:half], list(chapters)[half:]), 1)
        if paths
    )
    (root / "_quarto.yml").write_text(
        f"project:\n  type: book\nbook:\n  title: Small\n  chapters:\n    - index.qmd\n{parts}"
        f"    - references.qmd\nbibliography: references.bib\n{config}"
    )
    return root


def problems(root: Path) -> str:
    """Render and give back what was wrong; with a problem the site isn't there and the exit status
    is 1.
    """
    book, _ = render(root, None, root / "_site")
    assert (root / "_site/index.html").exists() == (not book.problems)
    return str(book.problems)


def page(root: Path, name: str) -> str:
    return (root / "_site" / name).read_text()


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    "A book with one of everything."
    first = [
        md("# First $x^2$ {#sec-first}\n\nThe claim."),
        code("#| default_exp: core.first\n#| include: false"),
        code(
            "#| export: true\ndef doubled(x):\n    return 2 * x\n\n\ndef _hidden(x):\n    return x"
        ),
        md("""
           ## Setting {#sec-first-set}

           $$ a = b $$ {#eq-first-a}

           and then $$ \\begin{aligned} a &= b \\\\ &= c \\end{aligned} $$ {#eq-first-b}

           ::: {#thm-first-one name="Of $x$"}
           Text.

           $$ c = d $$ {#eq-first-c}
           :::

           ::: {.proof}
           By @eq-first-a.
           :::

           ### Deeper {#sec-first-deep}
           """),
        code(
            "#| label: fig-first-plot\n#| fig-cap: 'A *plot* of $y$, as in @eq-first-b, after"
            " [@hu].'\n#| fig-alt: Rising line\nprint(1)",
            printed("said\n"),
            shown(png=PNG, plain="<Figure>"),
        ),
        code(
            "#| label: tbl-first-frame\n#| tbl-cap: A frame.\n#| code-fold: true\n#| code-summary: 'Code: the frame'\nframe",
            shown(html="<table><tr><td>7</td></tr></table>", plain="7"),
        ),
        code("#| echo: false\n'hidden source'", shown(plain="'only output'")),
        code("#| output: false\nquiet = 'only source'", shown(plain="'hidden output'")),
        code("#| include: false\nsecret = 'never shown'", shown(plain="'never shown'")),
        md(
            '::: {.callout-tip collapse="true" title="Solution"}\nFolded.\n:::\n\n:::'
            " {.callout-warning}\n## Mind\nOpen.\n:::"
        ),
        code(
            "loop()", printed("10%\r90%\r100%\n"), printed("more\n"), printed("careful\n", "stderr")
        ),
        code("view()", shown(html="<svg role='img'></svg><script>var own = 1;</script>")),
        code("words()", shown(markdown="Result **bold**, see @fig-first-plot.")),
    ]
    second = [
        md("# Second {#sec-second}\n\nClaim."),
        md("""
           See @fig-first-plot, @tbl-first-frame, @eq-first-c, @thm-first-one, @sec-first, @sec-first-deep and [-@eq-first-a].
           Both [@fig-first-plot; @tbl-second-x]. As [Figs. @fig-first-plot]. Cited: @hu, [@hu2, p. 3] and [@hu; @hu2].
           A [link](first.ipynb#sec-first-set).

           ::: {#thm-second-one}
           One.
           :::

           ::: {#def-second-one}
           Two.
           :::

           ::: {#thm-second-two}
           Three.
           :::

           $$ a $$ {#eq-second-a}

           | a | b |
           |---|---|
           | 1 | 2 |

           : Numbers. {#tbl-second-x}

           ```{.python #lst-second-x lst-cap="A listing."}
           x = 1
           ```

           By @lst-second-x and @def-second-one.
           """),
    ]
    root = write(
        tmp_path_factory.mktemp("book"),
        {"nbs/first.ipynb": first, "nbs/second.ipynb": second},
        index=(
            "# Home {.unnumbered}\n\nBegin with @sec-first, then [the second](nbs/second.ipynb).\n"
        ),
    )
    assert problems(root) == ""
    return root


# What is shown


@pytest.mark.parametrize(
    "text",
    [
        "1.1 Setting",
        "1.1.1 Deeper",
        "(1.1)",
        "(1.2)",
        "(1.3)",
        "Theorem 1.1 (Of",
        "Figure 1.1 A plot of",
        "Table 1.1 A frame.",
        "Chapter 1",
    ],
)
def test_the_first_chapter_is_numbered(book, text):
    assert text in words(page(book, "nbs/first.html"))


@pytest.mark.parametrize(
    "text",
    [
        "Theorem 2.1.",
        "Definition 2.1.",
        "Theorem 2.2.",
        "(2.1)",
        "Table 2.1 Numbers.",
        "Listing 2.1 A listing.",
        "By Listing 2.1 and Definition 2.1",
    ],
)
def test_counting_begins_again_in_each_chapter(book, text):
    assert text in words(page(book, "nbs/second.html"))


@pytest.mark.parametrize(
    "text, target",
    [
        ("Figure 1.1", "../nbs/first.html#fig-first-plot"),
        ("Table 1.1", "../nbs/first.html#tbl-first-frame"),
        ("Equation 1.3", "../nbs/first.html#eq-first-c"),
        ("Theorem 1.1", "../nbs/first.html#thm-first-one"),
        ("First x2 1", "../nbs/first.html"),
        ("Deeper 1.1.1", "../nbs/first.html#sec-first-deep"),
        ("1.1", "../nbs/first.html#eq-first-a"),
        ("Table 2.1", "#tbl-second-x"),
        ("Figs. 1.1", "../nbs/first.html#fig-first-plot"),
    ],
)
def test_references_lead_across_pages(book, text, target):
    found = re.findall(
        r'<a href="([^"]*)"[^>]*class="ref"[^>]*>(.*?)</a>',
        page(book, "nbs/second.html"),
        re.DOTALL,
    )
    assert (target, text) in [(to, words(inner)) for to, inner in found]


def test_links_between_sources_become_links_between_pages(book):
    assert 'href="../nbs/first.html#sec-first-set"' in page(book, "nbs/second.html")
    assert 'href="nbs/second.html"' in page(book, "index.html")
    assert "Begin with First x2 1" in words(page(book, "index.html"))


def test_citations_are_told_apart_over_the_whole_book(book):
    first, second, refs = (
        page(book, name) for name in ("nbs/first.html", "nbs/second.html", "references.html")
    )
    assert "2021a" in words(first) and "2021b" in words(second)
    assert 'href="../references.html#ref-hu"' in first
    assert 'id="ref-hu"' in refs and 'id="ref-li"' not in refs
    assert "Cited in: 1, 2" in words(refs)


def test_cell_options_are_honoured(book):
    html = page(book, "nbs/first.html")
    assert "only output" in html and "hidden source" not in html
    assert "only source" in html and "hidden output" not in html
    assert "never shown" not in html
    assert "#|" not in html
    assert re.search(r'<details class="fold"><summary>\s*Code: the frame\s*</summary>', html)


def test_exported_cells_are_marked_and_named(book):
    html = page(book, "nbs/first.html")
    assert 'class="code exported"' in html
    assert (
        re.search(r'<a href="#cell-c02"><code>doubled</code></a>', html)
        and "_hidden</code></a>" not in html
    )
    assert 'href="first.ipynb" download' in html and (book / "_site/nbs/first.ipynb").is_file()


def test_figures_keep_their_alt_text_and_files(book):
    html = page(book, "nbs/first.html")
    source = re.search(r'<img src="([^"]+)"[^>]*alt="Rising line"', html)[1]
    assert (book / "_site/nbs" / source).is_file()
    assert html.index("said") < html.index("<img")


def test_outputs_of_every_kind(book):
    html = page(book, "nbs/first.html")
    assert "<td>7</td>" in html and "var own = 1;" in html and "<strong>bold</strong>" in html
    assert "100%\nmore" in html and "90%" not in html
    assert 'class="output printed stderr"' in html and "&lt;Figure" not in html


@given(
    st.lists(
        st.tuples(
            st.text("abc xyz", min_size=1).map(lambda text: "w" + text),
            st.floats(-1e3, 1e3),
            st.sampled_from(["0.5 ± 0.1", "6 of 27", "-", "nan"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_columns_of_words_read_from_the_left(rows):
    frame = pd.DataFrame(rows, columns=["method", "loss", "share"]).assign(
        share=lambda frame: ["1 of 2", *frame["share"][1:]]
    )
    for one in (frame, frame.T):
        html = one.to_html()
        assert marked(html).replace(' class="words"', "") == html
    named = marked(frame.set_index("loss").to_html())
    assert re.findall(r"<th>(\w+)</th>", named)[0] == "loss"
    assert named.count("<tr") == len(rows) + 1
    html = marked(frame.to_html())
    assert html.count('<td class="words">w') == len(rows) == html.count('<td class="words">')
    assert re.findall(r'<th class="words">(\w+)', html) == ["method"]
    assert marked(html.replace("dataframe", "other")) == html.replace("dataframe", "other")


def test_heads_that_span_columns_stay_where_they_are():
    columns = pd.MultiIndex.from_product([["left", "right"], ["verdict", "gap"]])
    html = marked(pd.DataFrame([["none", 0.1, "better", 0.2]], columns=columns).to_html())
    assert (
        re.findall(r'class="words">(\w+)', html) == ["verdict", "verdict", "none", "better"]
        and "colspan" in html
    )


def test_callouts_fold_or_stand_open(book):
    html = page(book, "nbs/first.html")
    assert re.search(r'<details class="callout tip"><summary>\s*Solution', html)
    assert re.search(r'<div class="callout warning"[^>]*><p class="callout-title">\s*Mind', html)
    assert "Mind" not in words(
        re.search(r'<nav class="contents wide".*?</nav>', html, re.DOTALL)[0]
    )


def test_search_index_has_every_section_and_exported_name(book):
    script = page(book, "assets/search.js")
    entries = json.loads(script.removeprefix("window.BOOK_INDEX=").rstrip().rstrip(";"))
    by_address = {entry[0]: entry for entry in entries}
    assert {
        "index.html",
        "nbs/first.html",
        "nbs/first.html#sec-first-set",
        "nbs/second.html",
    } <= set(by_address)
    assert "doubled" in by_address["nbs/first.html"][3]
    assert "Folded" in by_address["nbs/first.html#sec-first-deep"][3]
    assert "<" not in script and "2x" not in script


def previews(root: Path) -> dict:
    return json.loads(page(root, "assets/previews.js").split("=", 1)[1].rstrip().rstrip(";"))


def test_references_have_previews_without_links_and_identifiers(book):
    shown = previews(book)
    assert {"eq-first-a", "thm-first-one", "ref-hu", "page:nbs/first.html"} <= set(shown)
    assert "<math" in shown["eq-first-a"] and "(1.1)" in shown["eq-first-a"]
    assert "The claim." in shown["page:nbs/first.html"] and "Low Ranks" in shown["ref-hu"]
    assert not {"fig-first-plot", "sec-first"} & set(shown)
    assert not any(re.search(r"<a\b| id=|Cited in", html) for html in shown.values())


def test_folded_code_stands_behind_its_output_and_a_check_is_one_line(tmp_path):
    folded = "#| code-fold: true\n#| code-summary: "
    cells = [
        md("# A {#sec-a}\n\nClaim."),
        code(folded + "'Code: the sum'\n1 + 1", shown(plain="two")),
        code(folded + "'✓ the sum is even'\nassert 2 % 2 == 0\nassert True"),
        code(folded + "'Imports'\n%matplotlib inline\nimport re"),
        code("1 + 2", shown(plain="three")),
    ]
    assert problems(write(tmp_path, {"a.ipynb": cells})) == ""
    html = page(tmp_path, "a.html")
    assert html.index("two") < html.index("Code: the sum") < html.index("✓ the sum is even")
    assert re.search(r'<details class="fold check"><summary>\s*✓ the sum is even', html)
    assert html.count('class="fold"') == 2 and html.index("three") > html.rindex("</details>")


SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt" viewBox="0 0 72 36">
 <metadata><rdf/></metadata>
 <defs><path id="glyph" d="M 0.123456 1"/><clipPath id="clip"><path/></clipPath></defs>
 <g id="axes_1" style="fill: #6b6b6b"><use xlink:href="#glyph"/></g>
 <path d="M 1.23456 2" clip-path="url(#clip)" style="stroke: #0072B2; fill: #123456"/>
</svg>
"""


def test_vector_figures_are_part_of_the_page_and_follow_its_theme(tmp_path):
    cells = [md("# A {#sec-a}\n\nClaim.")]
    cells += [code(f"#| fig-alt: 'A < {n}'\nplot()", shown(svg=SVG)) for n in "bc"]
    assert problems(write(tmp_path, {"a.ipynb": cells})) == ""
    html = page(tmp_path, "a.html")
    assert html.count("<svg role=") == 2 and "A &lt; b" in html and "<img" not in html
    assert "fill: currentColor" in html and "stroke: var(--hue-blue, #0072B2)" in html
    assert "fill: #123456" in html and "width: 1.00in" in html and "M 1.23 2" in html
    for ident in ("c01-0-glyph", "c02-0-glyph", "c01-0-clip"):
        assert html.count(f'id="{ident}"') == 1
        assert f'href="#{ident}"' in html or f"url(#{ident})" in html
    assert "axes_1" not in html and "metadata" not in html and "DOCTYPE svg" not in html


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))


def test_every_colour_of_text_and_figures_has_contrast_in_both_themes():
    style = (ASSETS / "style.css").read_text()
    pairs = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", style))
    inks = {name: value for name, value in pairs.items() if name.startswith("hue-")}
    assert set(inks) == {f"hue-{name}" for name in HUES.values()} == {f"hue-{n}" for n in PALETTE}
    assert set(HUES) == {value.lower() for value in PALETTE.values()} and INK.lower() in SVG_INK
    inks |= {name: pairs[name] for name in ("ink", "soft", "accent", "tip", "warning", "important")}
    for theme in (0, 1):
        paper = luminance(pairs["paper"].split(", ")[theme])
        for name, value in inks.items():
            bright, dim = sorted((paper, luminance(value.split(", ")[theme])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, theme)


def ledger(*ids: str, output: str = "") -> dict:
    rows = "".join(
        f'<tr class="claim typo"><td><a href="second.html">{ident}</a></td><td>Says {ident}</td></tr>'
        for ident in ids
    )
    head = "<thead><tr><th>id</th><th>claim</th></tr></thead>"
    return shown(html=f'<div class="ledger"><table>{head}<tbody>{rows}</tbody></table></div>')


def test_ids_of_the_ledger_are_links_that_show_their_row(tmp_path):
    text = """
        # A {#sec-a}

        Claim.

        By ledger A1, A2 and B10, and (ledger A2). The F1 and A1 of a test; claims A1 to B10 hold.

        | Paper | none; A1 |
        |---|---|
        | Ledger | A1, B10 |
        """
    pages = {
        "a.ipynb": [md(text)],
        "second.ipynb": [md("# B {#sec-b}\n\nClaim."), code("rows", ledger("A1", "A2", "B10"))],
    }
    assert problems(write(tmp_path, pages)) == ""
    html = page(tmp_path, "a.html")
    found = re.findall(r'<a href="second.html#claim-(\w+)"[^>]*claim-id[^>]*>(\w+)</a>', html)
    assert found == [(name, name) for name in "A1 A2 B10 A2 A1 B10 A1 B10".split()]
    assert page(tmp_path, "second.html").count('<tr class="claim typo" id="claim-A1">') == 1
    assert "Says B10" in previews(tmp_path)["claim-B10"]


def test_an_id_that_the_ledger_has_not_is_refused(tmp_path):
    pages = {
        "a.ipynb": [md("# A {#sec-a}\n\nClaim, by ledger A7.")],
        "second.ipynb": [md("# B {#sec-b}\n\nClaim."), code("rows", ledger("A1"))],
    }
    assert "a.ipynb: A7: the ledger has no such claim" in problems(write(tmp_path, pages))


@pytest.mark.parametrize("name", ["n_trainable", "mi_bound", "TABLE_OF", "method_of"])
def test_search_finds_names_with_underscores(tmp_path, name):
    cells = [
        md("# A {#sec-a}\n\nCount `n_trainable`, _emphasis_ and $x_i$."),
        code("#| export: true\nTABLE_OF: dict = {}\ndef mi_bound(): pass"),
        code("class One:\n    def method_of(self): pass"),
    ]
    assert problems(write(tmp_path, {"a.ipynb": cells})) == ""
    index = page(tmp_path, "assets/search.js")
    assert re.search(rf"\b{name}\b", index) and "_emphasis" not in index


@pytest.mark.parametrize("repository", ["", "https://github.com/who/book", "https://example.org/x"])
def test_buttons_and_cards(tmp_path, repository):
    cells = [md('# A {#sec-a}\n\nA claim with $r\\le m$ & "quotes".')]
    root = write(tmp_path, {"nbs/a.ipynb": cells})
    config = (root / "_quarto.yml").read_text()
    given = f"book:\n  repo-url: {repository}\n" if repository else "book:\n"
    (root / "_quarto.yml").write_text(config.replace("book:\n", given, 1))
    assert problems(root) == ""
    html = page(root, "nbs/a.html")
    on = "github.com" in repository
    assert ("colab.research.google.com/github/who/book/blob/HEAD/nbs/a.ipynb" in html) == on
    assert ("mybinder.org/v2/gh/who/book/HEAD?labpath=nbs%2Fa.ipynb" in html) == on
    assert '<a href="a.ipynb" download>Download notebook</a>' in html
    told = 'content="A claim with r ≤ m &amp; “quotes”."'
    assert f'name="description" {told}' in html and f'property="og:description" {told}' in html
    assert 'property="og:title" content="A"' in html and "assets/favicon.svg" in html
    assert html.index("Source of this chapter") > html.index('class="claim"')


def test_a_wide_cell_takes_the_page_and_no_other_column_is_known(tmp_path):
    cells = [md("# A {#sec-a}\n\nClaim."), code("#| column: page\n1", shown(plain="1"))]
    assert problems(write(tmp_path / "one", {"a.ipynb": cells})) == ""
    assert 'class="cell column-page"' in page(tmp_path / "one", "a.html")
    cells[1] = code("#| column: margin\n1")
    assert "column: margin isn't supported" in problems(write(tmp_path / "two", {"a.ipynb": cells}))


def test_the_way_through_the_book(book):
    html = page(book, "nbs/second.html")
    assert (
        'rel="prev" href="../nbs/first.html"' in html
        and 'rel="next" href="../references.html"' in html
    )
    assert '<a class="skip" href="#main">' in html and '<html lang="en">' in html
    assert re.search(r'<details open><summary>Part 2</summary>.*aria-current="page"', html)


def test_pages_fetch_nothing_from_elsewhere(book):
    for file in (book / "_site").rglob("*.html"):
        html = file.read_text()
        for tag, name in [*FETCHING.items(), ("link", "href")]:
            for value in re.findall(rf"<{tag}\b[^>]*\b{name}=\"([^\"]*)\"", html):
                assert not REMOTE.match(value), value
    for file in [*(book / "_site").rglob("*.css"), book / "_site/assets/book.js"]:
        assert not re.search(r"@import|https?://|//[a-z]+\.[a-z]", file.read_text())


def test_rendering_twice_gives_the_same_bytes(book):
    before = {file: file.read_bytes() for file in (book / "_site").rglob("*") if file.is_file()}
    assert problems(book) == ""
    assert before == {
        file: file.read_bytes() for file in (book / "_site").rglob("*") if file.is_file()
    }


# Formulas


def test_formulas_are_mathml_with_their_source_as_text():
    html = mathml([(True, r"\frac{a}{b}")])[True, r"\frac{a}{b}"]
    assert html.startswith('<math display="block" alttext="\\frac{a}{b}">') and "<mfrac>" in html


@pytest.mark.parametrize(
    "tex, expected",
    [
        (r"\mathbf{Ab}", "<mi>𝐀</mi><mi>𝐛</mi>"),
        (r"s\log n", '<mspace width="0.167em">'),
        (r"\lVert x \rVert", 'lspace="0"'),
        (r"f''", "′′"),
        (r"\hat x", 'accent="true"'),
        (r"\overline{AB}", 'class="over"'),
        (r"\begin{aligned} a &= b \end{aligned}", 'class="aligned"'),
        (r"\begin{aligned} a &= b \end{aligned}", "text-align: right; text-align: -webkit-right"),
    ],
)
def test_formulas_are_mended(tex, expected):
    assert expected in mathml([(True, tex)])[True, tex]


def test_a_long_formula_in_a_line_may_break_after_its_relations():
    tex = r"f(W_{t+1}) \le f(W_t) + g(a, b) = h(W_0, W_1, W_2)"
    assert mathml([(False, tex)])[False, tex].count("<math") == 3
    assert mathml([(True, tex)])[True, tex].count("<math") == 1


# What is refused


@pytest.mark.parametrize(
    "text, label, message",
    [
        ("See @fig-nowhere.", "fig-nowhere", "unresolved reference"),
        ("See @sec-nowhere.", "sec-nowhere", "unresolved reference"),
        ("As [@nobody] says.", "@nobody", "unknown citation"),
        ("Both [@hu; @sec-a].", "hu; sec-a", "share one bracket"),
        ("A [link](other.ipynb).", "other.ipynb", "dead link"),
        ("A [link](#nowhere).", "#nowhere", "dead link"),
        ("![Text](no.png)", "no.png", "dead link"),
        ("$$ \\frac{a $$", "\\frac{a", "formula can't be read"),
        ("Inline $\\nosuchthing{a}{b}$.", "\\nosuchthing", "formula can't be read"),
        ("::: {#thm-a}\nA\n:::\n\n::: {#thm-a}\nB\n:::", "thm-a", "already used"),
        ("$$ a $$ {#eq-a}\n\n$$ b $$ {#eq-a}", "eq-a", "already used"),
        ("## One {#sec-b-x}", "sec-b-x", "already used"),
        ("Text {#eq-a}.", "eq-a", "isn't behind a displayed formula"),
        ("![Caption](x.png){#fig-a}", "fig-a", "without alt text"),
        ("Text ![](x.png) text.", "x.png", "without alt text"),
        ("{{< video x.mp4 >}}", "{{<", "shortcodes"),
        ("::: {.panel-tabset}\n## A\n:::", "panel-tabset", "isn't supported"),
        ("::: {layout-ncol=2}\nA\n:::", "layout-ncol", "isn't supported"),
        ("::: {.callout-danger}\nA\n:::", "danger", "isn't one of"),
        ("```{mermaid}\ngraph TD\n```", "{mermaid}", "isn't supported"),
        ("::: {.callout-note}\nnever closed", "::: {.callout-note}", "unclosed"),
        ("closes nothing\n:::", "closes nothing", "left open or closes nothing"),
        ("```python\nnever closed", "```python", "left open"),
        ("$$ a", "$$ a", "left open"),
        ("# Again", "Again", "second level-1 heading"),
        ("#### Too deep", "Too deep", "without one of level 3"),
        ("Outside \\emph{dollars}.", "\\emph", "LaTeX outside dollars"),
        ("A list:\n- one\n- two", "A list:", "empty line above"),
        (
            "<img src='https://example.org/x.png' alt='x'>",
            "https://example.org/x.png",
            "from elsewhere",
        ),
        ("<script src='//example.org/x.js'></script>", "//example.org/x.js", "from elsewhere"),
        ("<div id='a-b'></div>\n\n<div id='a-b'></div>", "a-b", "twice"),
    ],
)
def test_a_page_with_a_fault_is_refused(tmp_path, text, label, message):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/x.png").write_bytes(base64.b64decode(PNG))
    root = write(
        tmp_path,
        {
            "nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim."), md(text)],
            "nbs/b.ipynb": [md("# B {#sec-b}\n\nClaim.\n\n## X {#sec-b-x}")],
        },
    )
    found = [line for line in problems(root).split("\n") if label in line and message in line]
    assert found and found[0].startswith(("nbs/a.ipynb: ", "nbs/b.ipynb: "))


@pytest.mark.parametrize(
    "cell, label, message",
    [
        (code("plot()", shown(png=PNG)), "cell 1", "without alt text"),
        (code("#| label: fig-a\n#| fig-cap: C\n#| fig-alt: A\nplot()"), "fig-a", "shows none"),
        (
            code("#| label: fig-a\n#| fig-alt: A\nplot()", shown(png=PNG)),
            "fig-a",
            "needs #| fig-cap",
        ),
        (
            code(
                "#| label: fig-a\n#| fig-cap: C\n#| fig-alt: A\nplot()",
                shown(plain="3"),
                shown(png=PNG),
            ),
            "fig-a",
            "print it",
        ),
        (code("#| code-fold: true\nx = 1"), "cell 1", "needs #| code-summary"),
        (
            code("#| label: tbl-a\n#| code-fold: show\n#| code-summary: Code\nx = 1"),
            "tbl-a",
            "needs #| code-summary",
        ),
        (
            code("#| code-fold: true\n#| code-summary: 'Code: it'\nassert 1\nassert (\n  2\n)"),
            "cell 1",
            "✓ what was checked",
        ),
        (code("#| export\nx = 1"), "cell 1", "as '#| export: true'"),
        (code("#| layout-ncol: 2\nx = 1"), "cell 1", "'layout-ncol' isn't supported"),
        (code("#| label: fig-a: b\nx = 1"), "cell 1", "aren't YAML"),
        (
            code(
                "1 / 0",
                {
                    "output_type": "error",
                    "ename": "ZeroDivisionError",
                    "evalue": "",
                    "traceback": [],
                },
            ),
            "cell 1",
            "stored error",
        ),
        (
            code("view()", shown(html="<script src='https://example.org/d3.js'></script>")),
            "example.org",
            "from elsewhere",
        ),
        (
            {"cell_type": "raw", "metadata": {}, "source": ["---\n", "title: x\n", "---"]},
            "cell 1",
            "raw cells",
        ),
        (
            {"cell_type": "markdown", "metadata": {}, "source": "one\nlong string"},
            "cell 1",
            "one long string",
        ),
        (md("<!-- never closed"), "cell 2", "swallowed"),
    ],
)
def test_a_cell_with_a_fault_is_refused(tmp_path, cell, label, message):
    root = write(
        tmp_path,
        {"nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim."), cell, code("1 + 1"), md("<!-- x -->")]},
    )
    assert [
        line
        for line in problems(root).split("\n")
        if line.startswith("nbs/a.ipynb: ") and label in line and message in line
    ]


def test_a_missing_chapter_is_refused(tmp_path):
    root = write(tmp_path, {"nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim.")]})
    (root / "nbs/a.ipynb").unlink()
    assert "_quarto.yml: nbs/a.ipynb: this chapter is listed but" in problems(root)


def test_a_second_title_is_refused(tmp_path):
    assert "counts as a second title" in problems(
        write(tmp_path, {"nbs/a.ipynb": [md("---\ntitle: A\n---"), md("# A {#sec-a}\n\nClaim.")]})
    )


def test_problems_are_printed_and_the_last_good_site_stays(tmp_path, capsys):
    root = write(tmp_path, {"nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim.")]})
    assert main(["--root", str(root)]) == 0
    assert str(root / "_site/index.html") in capsys.readouterr().out
    write(root, {"nbs/a.ipynb": [md("# A {#sec-a}\n\nSee @sec-b and @sec-c.")]})
    assert main(["--root", str(root)]) == 1
    errors = capsys.readouterr().err
    assert "nbs/a.ipynb: sec-b: unresolved" in errors and "nbs/a.ipynb: sec-c: unresolved" in errors
    assert "Claim." in page(root, "nbs/a.html")
    assert main(["--root", str(root), "--draft"]) == 1
    assert "See @sec-b" in words(page(root, "nbs/a.html")) and not list(root.glob("_site?*"))


def test_a_book_of_many_pages_is_shared_out_and_judged_as_a_whole(tmp_path, monkeypatch):
    chapters = {
        f"nbs/p{n}.ipynb": [
            md(
                f"# Page {n} {{#sec-p{n}}}\n\nClaim {n}, after"
                f" @sec-p{(n + 1) % 12}.\n\n```python\ndef f{n}(): return {n}\n```"
            )
        ]
        for n in range(12)
    }
    root = write(tmp_path, chapters)
    assert main(["--root", str(root)]) == 0
    shared = {
        file.relative_to(root / "_site"): file.read_bytes()
        for file in (root / "_site").rglob("*")
        if file.is_file()
    }
    assert all(f"Claim {n}" in words(page(root, f"nbs/p{n}.html")) for n in range(12))
    monkeypatch.setattr("tools.site.spread.FEW", 99)
    assert main(["--root", str(root)]) == 0
    assert shared == {
        file.relative_to(root / "_site"): file.read_bytes()
        for file in (root / "_site").rglob("*")
        if file.is_file()
    }
    monkeypatch.undo()
    faults = {3: "[away](p4.ipynb#nowhere)", 10: "[gone](p99.html)", 11: "[]{#twice} []{#twice}"}
    found = problems(
        write(
            tmp_path / "faulty",
            chapters
            | {
                f"nbs/p{n}.ipynb": [md(f"# Page {n} {{#sec-p{n}}}\n\n{text}")]
                for n, text in faults.items()
            },
        )
    )
    assert (
        "nbs/p3.ipynb" in found
        and "nbs/p10.ipynb" in found
        and "nbs/p11.ipynb: twice" in found
        and "nbs/p5.ipynb" not in found
    )


def test_work_is_shared_out_in_order_and_a_failure_comes_back():
    assert spread(lambda n: (n * n, os.getpid()), [3, 1, 2]) == [
        (n * n, os.getpid()) for n in (3, 1, 2)
    ]
    found = spread(lambda n: (n * n, os.getpid()), list(range(30)))
    assert [square for square, _ in found] == [n * n for n in range(30)]
    if FORKS and len(os.sched_getaffinity(0)) > 1:
        assert os.getpid() not in {who for _, who in found}
    with pytest.raises(ZeroDivisionError):
        spread(lambda n: 1 // (n - 17), list(range(30)))


def test_executed_notebooks_come_from_the_build_folder(tmp_path):
    root = write(tmp_path, {"nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim."), code("1")]})
    build = write(
        tmp_path / "_build",
        {"nbs/a.ipynb": [md("# A {#sec-a}\n\nClaim."), code("1", shown(plain="executed"))]},
    )
    assert main(["--root", str(root), "--build", str(build)]) == 0
    assert "executed" in page(root, "nbs/a.html")
    (build / "nbs/a.ipynb").unlink()
    assert main(["--root", str(root), "--build", str(build)]) == 1
    assert main(["--root", str(root), "--build", str(build), "--partial"]) == 0


# The pages that are made from the package


ROOT = Path(__file__).resolve().parent.parent
DEFINES = re.compile(
    r"(?:\bcalled|\bis an?) \*([a-z][a-z -]+)\*|\b[Aa]n? \*([a-z][a-z -]+)\* (?:is|has)\b"
)


def chapters() -> dict:
    "{label: all markdown of a chapter}, of the book's own sources."
    found = {}
    for part in config.load(ROOT).pages:
        content = part.file.read_text(encoding="utf-8")
        if part.is_notebook:
            content = "\n".join("".join(cell["source"]) for cell in json.loads(content)["cells"])
        if label := re.search(r"^# .*?\{#(sec-[\w-]+)", content, re.MULTILINE):
            found[label[1]] = content
    return found


def glossary() -> dict:
    "{term: (what it means, the label of its chapter)}."
    content = (ROOT / "glossary.qmd").read_text(encoding="utf-8")
    entries = re.findall(r"^(.+)\n: (.+) @(sec-[\w-]+)$", content, re.MULTILINE)
    assert content.count("\n: ") == len(entries)
    return {term: (meaning, label) for term, meaning, label in entries}


def test_the_glossary_has_one_sentence_and_a_chapter_for_each_term():
    texts, entries = chapters(), glossary()
    assert list(entries) == sorted(entries, key=str.lower)
    for term, (meaning, label) in entries.items():
        assert re.fullmatch(r"[^.]*\.", meaning), term
        for word in term.lower().split():
            stem = word.removesuffix("ing").removesuffix("s")
            assert stem in texts[label].lower(), f"{term} isn't in {label}"


def test_the_glossary_has_every_word_that_a_chapter_defines():
    defined = {
        (one or other).strip()
        for text in chapters().values()
        for one, other in DEFINES.findall(text)
    }
    assert defined and not {term.removesuffix("s") for term in defined} - {
        term.removesuffix("s") for term in glossary()
    }


@pytest.mark.parametrize(
    "text, term",
    [("A *site* is here", "site"), ("It is called *sharp* when", "sharp"), ("the *last* link", "")],
)
def test_a_definition_is_seen(text, term):
    assert ["".join(found) for found in DEFINES.findall(text)] == ([term] if term else [])


@pytest.mark.parametrize("notebook", ["nbs/sheet.ipynb", "nbs/choose.ipynb"])
def test_every_method_is_on_the_pages_of_all_methods(notebook):
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    outputs = json.dumps([cell.get("outputs") for cell in cells], ensure_ascii=False)
    for name, own in METHODS.items():
        assert outputs.count(own.title) >= 1, name
        assert notebook != "nbs/sheet.ipynb" or f"]({chapter(name)}.ipynb)" in outputs, name


def test_the_home_page_says_what_the_stored_runs_say():
    assert home.sentence(home.runs()) in (ROOT / "index.qmd").read_text(encoding="utf-8")


def test_few_words_stand_before_lora():
    pages = config.load(ROOT).pages
    number = next(n for n, page in enumerate(pages) if page.path == "nbs/past/lora.ipynb")
    assert number <= 5
    words = 0
    for page in pages[:number]:
        content = page.file.read_text(encoding="utf-8")
        if page.is_notebook:
            content = "\n".join("".join(cell["source"]) for cell in json.loads(content)["cells"])
        words += len(content.split())
    assert words <= 8000


def test_what_a_page_marks_as_missing_is_a_problem(tmp_path):
    cells = [md("# A {#sec-a}\n\nText."), code("x", shown(markdown="[No picture]{#m-x .missing}"))]
    assert "a.ipynb: m-x: No picture" in problems(write(tmp_path, {"a.ipynb": cells}))


def test_a_drawing_may_carry_its_own_words(tmp_path):
    svg = '<svg width="9pt" viewBox="0 0 9 9"><title>W &amp; B</title><path d="M 0 0"/></svg>'
    cells = [md("# A {#sec-a}\n\nText."), code("draw()", shown(svg=svg))]
    assert problems(write(tmp_path, {"a.ipynb": cells})) == ""
    html = page(tmp_path, "a.html")
    assert 'aria-label="W &amp; B"' in html and "<title>W" not in html


def test_vector_pictures_of_the_book_follow_the_theme(tmp_path):
    root = write(tmp_path, {}, index="# Home {.unnumbered}\n\n![](docs/a.svg){fig-alt='A line'}\n")
    (root / "docs").mkdir()
    (root / "docs/a.svg").write_text('<svg width="9pt"><path style="stroke: #6b6b6b"/></svg>')
    assert problems(root) == ""
    html = page(root, "index.html")
    assert 'aria-label="A line"' in html and "currentColor" in html and "<img" not in html
