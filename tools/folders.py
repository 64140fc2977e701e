"""Folders that the tools may replace: a site goes where there's nothing, or where a site of the
book is, and takes that one's place in one step.

A site is known by the file `.lora_book_site` in it, which lists what was written: with any other
file in it, it isn't replaced. A site made before there was such a file has pages, styles, scripts
and pictures alone, and it is known by its search index or lies in the book's own `_site`, where
_quarto.yml has Quarto write. `python -m tools.folders DIR` removes a site, and nothing else.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARK = ".lora_book_site"
TOLD = "The files of a site that the book's tools wrote, and may replace:"
LITTER = {".DS_Store", "Thumbs.db"}
INDEX = b"window.BOOK_INDEX="
KINDS = {
    *(".html", ".ipynb", ".css", ".js", ".map", ".json", ".xml", ".txt"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".ico"),
    *(".woff", ".woff2", ".ttf", ".eot"),
}
AT_FDCWD, EXCHANGE = -100, 2  # of renameat2, in Linux's fcntl.h and fs.h


class Refused(ValueError):
    "A folder isn't one that the tools may replace; the message says what to do."


def inside(folder: Path) -> set:
    "Everything in a folder that isn't a folder, as paths relative to it; links aren't followed."
    return {
        (Path(place) / name).relative_to(folder).as_posix()
        for place, folders, files in os.walk(folder)
        for name in [*files, *(one for one in folders if (Path(place) / one).is_symlink())]
        if name not in LITTER
    }


def is_old_site(folder: Path, root: Path) -> bool:
    "Whether a folder without the mark holds a site that an earlier version wrote."
    names, index = inside(folder), folder / "assets/search.js"
    if "index.html" not in names or any(Path(name).suffix not in KINDS for name in names):
        return False
    if folder.resolve() == (root / "_site").resolve():
        return True
    return index.is_file() and index.read_bytes().startswith(INDEX)


def fault(folder: Path, root: Path) -> str:
    "Why a site of the book in `root` may not take the place of `folder`; nothing if it may."
    if folder.is_symlink():
        return "is a link: name the folder that it leads to"
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return "is a file: name a folder that is empty or not there yet"
    if os.path.ismount(folder):
        return "is a mounted volume, which can't be replaced in one step: name a folder inside it"
    found = inside(folder)
    if not any(folder.iterdir()):
        return ""
    if MARK not in found:
        advice = "name a folder that is empty or not there yet, or move its files away"
        return "" if is_old_site(folder, root) else f"holds files that aren't a site's: {advice}"
    written = set((folder / MARK).read_text(encoding="utf-8").splitlines())
    strange = sorted(found - written - {MARK})
    return f"holds {strange[0]}, which the tools didn't write: move it away" if strange else ""


def check(folder: Path, root: Path) -> None:
    "Refuse a folder that a site may not go into; nothing is written."
    if reason := fault(folder, root):
        raise Refused(f"{folder} {reason}")


@contextlib.contextmanager
def replacing(folder: Path, root: Path) -> Iterator[Path]:
    """Inside, a path beside `folder` for the new site to be written to; behind, that site is marked
    and takes the place of `folder` in one step. If anything fails, what is in `folder` stays.
    """
    check(folder, root)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as beside:
        whole = Path(beside) / "site"
        yield whole
        names = sorted(inside(whole))
        (whole / MARK).write_text("\n".join([TOLD, *names, ""]), encoding="utf-8")
        check(folder, root)
        swap(whole, folder)


def swap(new: Path, old: Path) -> None:
    "`new` becomes `old`; what was there is left beside `new`, for the caller to remove."
    if not old.exists() or (not any(old.iterdir()) and os.name == "posix"):
        os.rename(new, old)
    elif not exchanged(new, old):
        aside = new.with_name("before")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise


def exchanged(one: Path, other: Path) -> bool:
    "Exchange two folders in one step, where the system can; whether it did."
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    names = os.fsencode(one), os.fsencode(other)
    return bool(call) and call(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0


def main(names: list, root: Path = Path()) -> int:
    "Remove sites."
    for folder in map(Path, names):
        if reason := fault(folder, root):
            print(f"{folder} stays: it {reason}", file=sys.stderr)
            return 1
        if folder.exists():
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
