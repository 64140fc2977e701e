"""The last look at the pages as written: links, anchors, identifiers, alt texts, and nothing
fetched from elsewhere.
"""

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from .config import Problems

FETCHING = {
    **dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed"), "src"),
    "object": "data",
    "image": "href",
    "use": "href",
}
REMOTE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)
IN_CSS = re.compile(r"(?:url\(\s*['\"]?|@import\s*['\"])([^)'\"]+)")


class Seen(NamedTuple):
    "What a page defines, what it points to, what it fetches, and its pictures without a text."

    ids: list
    links: list
    fetched: list
    blind: list


class _Page(HTMLParser):
    "Collects what `Seen` has."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.fetched, self.blind = [], [], [], []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        options = dict(attributes)
        if options.get("id"):
            self.ids.append(options["id"])
        if tag == "a" and options.get("href"):
            self.links.append(options["href"])
        if tag == "link" and options.get("rel") != "canonical":
            self.fetched.append(options.get("href", ""))
        if FETCHING.get(tag) in options:
            self.fetched.append(options[FETCHING[tag]] or "")
        if tag == "img" and not (options.get("alt") or "").strip():
            self.blind.append(options.get("src") or "")
        for css in re.findall(r"url\(\s*['\"]?([^)'\"]+)", options.get("style") or ""):
            self.fetched.append(css)

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.fetched += IN_CSS.findall(data)


def look(html: str) -> Seen:
    "What is on a page."
    page = _Page()
    page.feed(html)
    return Seen(page.ids, page.links, page.fetched, page.blind)


def audit(site: Path, pages: dict, sources: dict, problems: Problems) -> None:
    """Judge every page by what was seen on it, both by address; `sources` has the files named in
    messages.
    """
    for url, page in pages.items():
        where = sources[url]
        for name in sorted({name for name in page.ids if page.ids.count(name) > 1}):
            problems.add(where, name, "this identifier is on the page twice")
        for name in page.blind:
            problems.add(where, name[:60], "image without alt text")
        for target in page.fetched:
            if REMOTE.match(target):
                problems.add(where, target[:80], "the page would fetch this from elsewhere")
            elif (
                target
                and not target.startswith(("data:", "#"))
                and not (site / _path(url, target)).is_file()
            ):
                problems.add(where, target[:80], "dead link: no such file")
        for target in page.links:
            _follow(site, url, target, pages, where, problems)


def elsewhere(site: Path) -> list:
    """What the pages and the styles of a site that another renderer wrote would fetch from other
    hosts, a line each.
    """
    found = set()
    for path in (path for kind in ("*.html", "*.css") for path in site.rglob(kind)):
        text = path.read_text(encoding="utf-8")
        fetched = look(text).fetched if path.suffix == ".html" else IN_CSS.findall(text)
        found |= {
            f"{path.relative_to(site).as_posix()}: {target[:80]}: would be fetched from elsewhere"
            for target in fetched
            if REMOTE.match(target)
        }
    return sorted(found)


def _path(url: str, target: str) -> str:
    return posixpath.normpath(
        posixpath.join(posixpath.dirname(url), unquote(re.split("[?#]", target)[0]))
    )


def _follow(site: Path, url: str, target: str, pages: dict, where: str, problems: Problems) -> None:
    if re.match(r"^(https?|mailto):", target) or REMOTE.match(target):
        return
    path, _, anchor = target.partition("#")
    goal = _path(url, path) if path else url
    if goal not in pages and not (site / goal).is_file():
        problems.add(where, target, "dead link: no such page")
    elif anchor and goal in pages and unquote(anchor) not in pages[goal].ids:
        problems.add(where, target, "dead link: no such place on that page")
