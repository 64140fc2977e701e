"""Where a site may go, and that it takes the place of the one before whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import book, folders
from tools.folders import MARK, Refused, replacing
from tools.site import render as offline
from tools.site.__main__ import main as site_main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path) -> Path:
    "A book of one page, beside other people's files."
    place = tmp_path / "checkout"
    (place / "docs").mkdir(parents=True)
    (place / "docs/page.png").write_bytes(b"picture")
    (place / "mine.py").write_text("precious")
    (place / "index.qmd").write_text("# Home {.unnumbered}\n\nText.\n")
    (place / "_quarto.yml").write_text(
        "project: {type: book}\nbook:\n  title: T\n  chapters: [index.qmd]\n"
    )
    shutil.copy(ROOT / "settings.ini", place)
    return place


def everything(folder: Path) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def built(root: Path, out: str) -> int:
    return book.main(["--render-only", "--renderer", "offline", "--out", out], root)


@pytest.mark.parametrize("out", ["_site", "new", "a/b/new", "empty", "../beside"])
def test_a_site_goes_into_a_folder_that_is_absent_or_empty_and_again_into_itself(root, out):
    (root / "empty").mkdir()
    assert built(root, out) == 0 and (root / out / MARK).is_file()
    (root / "index.qmd").write_text("# Home {.unnumbered}\n\nOther words.\n")
    assert built(root, out) == 0
    assert "Other words." in (root / out / "index.html").read_text()
    assert not list((root / out).parent.glob("*.part-*"))
    assert (root / out).stat().st_mode & 0o777 == (root / "docs").stat().st_mode & 0o777


@pytest.mark.parametrize(
    "out, told",
    [
        (".", "holds files that aren't a site's"),
        ("", "holds files that aren't a site's"),
        ("..", "holds files that aren't a site's"),
        ("docs", "holds files that aren't a site's"),
        ("mine.py", "is a file"),
        ("linked", "is a link"),
        ("dangling", "is a link"),
        pytest.param(
            "/proc",
            "is a mounted volume",
            marks=pytest.mark.skipif(not os.path.ismount("/proc"), reason="no such volume here"),
        ),
    ],
)
@pytest.mark.parametrize("run", ["book", "offline", "site"])
def test_any_other_folder_is_refused_and_nothing_is_executed_or_written(
    root, monkeypatch, capsys, out, told, run
):
    (root / "linked").symlink_to("docs")
    (root / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(book.Run, "chapters", lambda *given: pytest.fail("executed"))
    before = everything(root.parent)
    if run == "site":
        code = site_main(["--root", str(root), "--out", str(root / out)])
    else:
        render_only = [] if run == "book" else ["--render-only", "--renderer", "offline"]
        code = book.main([*render_only, "--out", out], root)
    assert code == 1 and told in capsys.readouterr().err
    assert everything(root.parent) == before


def test_a_file_that_someone_put_into_a_site_is_not_removed(root, capsys):
    assert built(root, "_site") == 0
    (root / "_site/CNAME").write_text("book.example")
    (root / "_site/.DS_Store").write_text("litter")
    assert built(root, "_site") == 1
    assert "holds CNAME, which the tools didn't write: move it away" in capsys.readouterr().err
    (root / "_site/CNAME").unlink()
    (root / "_site/assets/link").symlink_to(root / "docs")
    assert built(root, "_site") == 1 and (root / "docs/page.png").exists()
    (root / "_site/assets/link").unlink()
    assert built(root, "_site") == 0


@pytest.mark.parametrize(
    "place, files, accepted",
    [
        ("site", {"index.html": "", "assets/search.js": "window.BOOK_INDEX=[]"}, True),
        ("site", {"index.html": "", "assets/search.js": "other"}, False),
        ("site", {"index.html": "", "assets/search.js": "window.BOOK_INDEX=[]", "a.py": ""}, False),
        ("site", {"index.html": "", "site_libs/quarto.js": ""}, False),
        ("_site", {"index.html": "", "site_libs/quarto.js": ""}, True),
        ("_site", {"index.html": "", "notes.md": ""}, False),
        ("_site", {"notes.html": ""}, False),
    ],
)
def test_sites_from_before_the_mark_are_known(root, place, files, accepted):
    for name, content in files.items():
        (root / place / name).parent.mkdir(parents=True, exist_ok=True)
        (root / place / name).write_text(content)
    assert (built(root, place) == 0) == accepted
    assert accepted == (root / place / MARK).exists()


@pytest.mark.parametrize("failing", ["copytree", "rename"])
def test_the_last_good_site_stays_when_the_disk_is_full(root, monkeypatch, capsys, failing):
    assert built(root, "_site") == 0
    before = everything(root)

    def full(one, other, **options):
        Path(other).mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "exchanged", lambda *names: False)
    monkeypatch.setattr(shutil if failing == "copytree" else os, failing, full)
    assert built(root, "_site") == 1
    assert "No space left" in capsys.readouterr().err and everything(root) == before


@pytest.mark.parametrize("at", ["copytree", "exchanged"])
def test_the_last_good_site_stays_when_the_renderer_is_killed(root, at):
    assert built(root, "_site") == 0
    before = everything(root / "_site")
    module = "shutil" if at == "copytree" else "tools.folders"
    code = (
        "import os, sys, pathlib, shutil, tools.folders; from tools.site import render;"
        f" {module}.{at} = lambda *given: os._exit(9); root = pathlib.Path(sys.argv[1]);"
        " render.render(root, None, root / '_site')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=ROOT, check=False)
    assert done.returncode == 9 and everything(root / "_site") == before
    assert built(root, "_site") == 0


@pytest.mark.parametrize("one_step", [True, False])
def test_a_reader_finds_a_whole_site_where_folders_are_exchanged(root, monkeypatch, one_step):
    if not one_step:
        monkeypatch.setattr(folders, "exchanged", lambda *names: False)
    for words in ("first", "second"):
        with replacing(root / "_site", root) as place:
            place.mkdir()
            (place / "index.html").write_text(words)
        assert (root / "_site/index.html").read_text() == words
    assert sorted(path.name for path in (root / "_site").iterdir()) == [MARK, "index.html"]
    assert not list(root.glob("_site.*"))


def test_what_is_put_there_meanwhile_is_not_removed(root):
    with pytest.raises(Refused, match="mine.txt"), replacing(root / "_site", root) as place:
        place.mkdir()
        (root / "_site").mkdir()
        (root / "_site" / MARK).write_text("index.html\n")
        (root / "_site/mine.txt").write_text("precious")
    assert (root / "_site/mine.txt").read_text() == "precious"


def test_clean_removes_a_site_and_nothing_else(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert folders.main(["_site"]) == 0
    assert built(root, "_site") == 0
    assert folders.main(["_site"]) == 0 and not (root / "_site").exists()
    assert folders.main(["docs"]) == 1 and "docs stays: it holds" in capsys.readouterr().err
    assert (root / "docs/page.png").exists()


def test_offline_renderer_refuses_before_it_reads_a_chapter(root, monkeypatch):
    monkeypatch.setattr(offline.config, "load", lambda *given: pytest.fail("read"))
    with pytest.raises(Refused):
        offline.render(root, None, root)
