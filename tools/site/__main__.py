"""`python -m tools.site [--root DIR] [--build DIR] [--out DIR] [--partial]`: render the book, or
say why not.
"""

import argparse
import sys
import time
from pathlib import Path

from tools.folders import Refused

from .render import render


def main(arguments: list | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.site",
        description="Render the book, without Quarto and network. HTML and scripts in the"
        " outputs of its notebooks go into the pages: render only notebooks that you trust.",
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the folder with _quarto.yml")
    parser.add_argument("--build", type=Path, help="the executed notebooks (default: the sources)")
    parser.add_argument(
        "--out", type=Path, help="where to write the site (default: _site in the root)"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="take what isn't in the build folder from the sources",
    )
    parser.add_argument(
        "--draft", action="store_true", help="write the site although something is wrong with it"
    )
    chosen = parser.parse_args(arguments)
    start = time.perf_counter()
    out = chosen.out or chosen.root / "_site"
    try:
        book, count = render(chosen.root, chosen.build, out, chosen.partial, chosen.draft)
    except (Refused, OSError) as error:
        print(f"{error}\nno site was written; what was there before stays", file=sys.stderr)
        return 1
    if book.problems:
        state = "this is a draft" if chosen.draft else "the book was not published"
        print(f"{book.problems}\n{len(book.problems)} problems; {state}", file=sys.stderr)
        return 1
    print(f"{count} pages in {time.perf_counter() - start:.1f} s: {(out / 'index.html').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
