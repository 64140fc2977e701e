"""Tables that pandas wrote: a column of words reads from the left, a column of numbers from the
right.
"""

import re

ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
CELL = re.compile(r"<t([dh])\b([^>]*)>(.*?)</t\1>", re.DOTALL)


def marked(html: str) -> str:
    """The same table with class words on the cells of each column of words; other tables stay as
    they are.
    """
    if 'class="dataframe"' not in html and 'class="dataframe ' not in html:
        return html
    return re.sub(
        r"<table\b.*?</table>", lambda table: _table(_one_head(table[0])), html, flags=re.DOTALL
    )


def _one_head(html: str) -> str:
    """The same table with the name of its index, for which pandas takes a row of its own, in the
    first row.
    """
    head = re.search(r"<thead>.*?</thead>", html, re.DOTALL)
    rows = [row[0] for row in ROW.finditer(head[0])] if head else []
    if len(rows) != 2:
        return html
    upper, lower = ([cell[3].strip() for cell in CELL.finditer(row)] for row in rows)
    if upper[0] or any(lower[1:]) or len(upper) != len(lower):
        return html
    named = re.sub(r"<th></th>", lambda _: f"<th>{lower[0]}</th>", rows[0], count=1)
    return html.replace(rows[0], named, 1).replace(rows[1], "", 1)


def _table(html: str) -> str:
    rows = [
        [cell[3] for cell in CELL.finditer(row[0]) if cell[1] == "d"] for row in ROW.finditer(html)
    ]
    columns = list(zip(*filter(None, rows)))
    wordy = {at - len(columns) for at, column in enumerate(columns) if _says_words(column)}
    return ROW.sub(lambda row: _row(row[0], wordy, len(columns)), html) if wordy else html


def _says_words(column: tuple) -> bool:
    """Whether most cells that say anything begin with a letter; what pandas writes for no number
    isn't a word.
    """
    told = [text.strip() for text in column if re.search(r"\w", text)]
    words = [
        text
        for text in told
        if text[0].isalpha() and text not in ("nan", "NaN", "NaT", "None", "inf")
    ]
    return 2 * len(words) > len(told)


def _row(html: str, wordy: set, count: int) -> str:
    """One row, its cells counted from the right, where the index is out of the way; a head that
    spans columns is left.
    """
    cells = list(CELL.finditer(html))
    if len(cells) < count or "colspan" in html:
        return html
    places = {cell.start(): at - len(cells) for at, cell in enumerate(cells)}
    return CELL.sub(lambda cell: _cell(cell, places[cell.start()] in wordy), html)


def _cell(cell: re.Match, wordy: bool) -> str:
    return f'<t{cell[1]} class="words"{cell[2]}>{cell[3]}</t{cell[1]}>' if wordy else cell[0]
