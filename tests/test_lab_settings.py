"How the book runs: defaults, the file, the environment, refusals, atomic files."

import configparser
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_book.core.errors import BadValue, LoraBookError, MissingFile, UnknownName
from lora_book.lab import settings as book

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> Path:
    (folder / "settings.ini").write_text(text)
    return folder / "settings.ini"


def test_the_packages_defaults_say_what_settings_ini_says():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    assert {name: book.own_keys(parser, name) for name in parser.sections()} == book.DEFAULTS


def test_settings_ini_and_nbdev_agree_on_what_they_share():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = project["tool"]["nbdev"] | {"lib_name": project["project"]["name"]}
    assert parser.defaults() and all(
        known[key] == value for key, value in parser.defaults().items()
    )


@given(
    key=st.sampled_from(sorted(book.LEAST)),
    number=st.integers(-3, 10**6),
    space=st.sampled_from(["", " "]),
)
@settings(max_examples=40, deadline=None)
def test_every_count_can_be_overridden_and_its_range_holds(key, number, space):
    environ = {f"LORA_BOOK_{key.upper()}": f"{space}{number}{space}"}
    if number >= book.LEAST[key]:
        assert getattr(book.load_settings(ROOT / "settings.ini", environ), key) == number
    else:
        with pytest.raises(BadValue, match=key):
            book.load_settings(ROOT / "settings.ini", environ)


@pytest.mark.parametrize("profile", ["smoke", "laptop", "gpu"])
def test_a_profile_brings_its_own_sizes(profile):
    found = book.load_settings(ROOT / "settings.ini", {"LORA_BOOK_PROFILE": profile})
    assert found.profile == profile and found.dtype == book.DEFAULTS[f"profile.{profile}"]["dtype"]
    assert found.examples == int(book.DEFAULTS[f"profile.{profile}"]["examples"])


def test_an_empty_variable_is_an_absent_one():
    plain = book.load_settings(ROOT / "settings.ini", {})
    assert (
        book.load_settings(ROOT / "settings.ini", {"LORA_BOOK_PROFILE": "", "LORA_BOOK_SEEDS": " "})
        == plain
    )


@pytest.mark.parametrize(
    "environ, error, told",
    [
        ({"LORA_BOOK_PROFILE": "labtop"}, UnknownName, "laptop"),
        ({"LORA_BOOK_SEEDS": "three"}, BadValue, "seeds.*three"),
        ({"LORA_BOOK_DTYPE": "float8"}, BadValue, "float16"),
        ({"LORA_BOOK_WORKERS": "1.5"}, BadValue, "workers"),
    ],
)
def test_a_wrong_variable_is_named(environ, error, told):
    with pytest.raises(error, match=told):
        book.load_settings(ROOT / "settings.ini", environ)


@pytest.mark.parametrize(
    "text, error, told",
    [
        ("[book]\nworker = 3\n", UnknownName, "worker"),
        ("[book]\n[profil.big]\nseeds = 2\n", UnknownName, "profile"),
        ("[profile.smoke]\nexample = 2\n", UnknownName, "examples"),
        ("no section\n", BadValue, "settings.ini"),
        ("[book]\nprofile = big\n", UnknownName, "big"),
        ("[book]\nworkers =\n", BadValue, "workers"),
        ("[book]\na\n[book]\n", BadValue, "settings.ini"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, error, told):
    with pytest.raises(error, match=told):
        book.load_settings(write(tmp_path, text), {})


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.ini", tmp_path):
        with pytest.raises(MissingFile) as caught:
            book.load_settings(path, {})
        assert isinstance(caught.value, LoraBookError) and isinstance(
            caught.value, FileNotFoundError
        )


def test_folders_start_at_the_file_and_absolute_ones_stay(tmp_path):
    found = book.load_settings(
        write(tmp_path, f"[book]\ncache_dir = a/../b\nresults_dir = {tmp_path / 'r'}\n"), {}
    )
    assert (found.cache_dir, found.results_dir) == (tmp_path / "b", tmp_path / "r")
    assert found.source == tmp_path / "settings.ini"


def test_a_file_may_bring_a_profile_of_its_own(tmp_path):
    path = write(tmp_path, "[book]\nprofile = big\n[profile.big]\nexamples = 9\n")
    found = book.load_settings(path, {})
    assert (found.examples, found.batch_size) == (
        9,
        int(book.DEFAULTS["profile.laptop"]["batch_size"]),
    )


def test_the_nearest_file_with_a_book_section_is_found(tmp_path, monkeypatch):
    ours = write(tmp_path, "[book]\nworkers = 2\n")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write(tmp_path / "a", "[DEFAULT]\nlib_name = other\n")
    assert book.find_settings(inner) == ours
    monkeypatch.chdir(inner)
    assert book.load_settings(environ={}).source == ours


def test_without_a_file_the_defaults_hold_under_home(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "find_settings", lambda: None)
    found = book.load_settings(environ={})
    assert found.source is None and found.cache_dir.is_relative_to(Path.home().resolve())
    assert found.profile == "laptop"


@given(st.binary(max_size=200), st.binary(max_size=200))
@settings(max_examples=20, deadline=None)
def test_write_atomic_replaces_whole_files(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("w") / "deep" / "file"
    for content in (old, new):
        assert book.write_atomic(path, content).read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = book.write_atomic(tmp_path / "file", b"old")

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(book.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        book.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "profile, given, wanted",
    [
        ("smoke", None, 2),
        ("laptop", None, 3),
        ("workstation", None, 3),
        ("laptop", "1", 2),
        ("smoke", "7", 7),
    ],
)
def test_a_chapters_experiments_repeat_with_the_profiles_seeds_and_never_once(
    profile, given, wanted, monkeypatch
):
    monkeypatch.setenv("LORA_BOOK_PROFILE", profile)
    monkeypatch.delenv("LORA_BOOK_SEEDS", raising=False)
    if given:
        monkeypatch.setenv("LORA_BOOK_SEEDS", given)
    assert list(book.repeats()) == list(range(wanted))


@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), min_size=2, max_size=4))
def test_ranges_overlap_where_one_value_lies_in_all(groups):
    common = [
        value
        for value in range(-9, 10)
        if all(min(group) <= value <= max(group) for group in groups)
    ]
    assert (
        book.ranges(*groups)
        == ("ranges overlap" if common else "ranges are apart")
        == book.ranges(*map(iter, groups))
    )
