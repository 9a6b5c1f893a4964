"""Check a built site: every link leads somewhere, and no page fetches from elsewhere.

python docs/site/check_links.py site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, what it fetches, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        self.places |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif "src" in found:
            self.fetched.append(found["src"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.fetched.append(found["href"])


def faults(site: Path) -> list[str]:
    """Return what is wrong, a line each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are for a server
            continue
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data", "mailto") or link.startswith("//"):
                if link in page.fetched and parts.scheme != "data":
                    found.append(f"{path.name}: fetches {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file():
                found.append(f"{path.name}: {link} does not exist")
            elif parts.fragment and target.suffix == ".html":
                other = pages.get(site / target.relative_to(site.resolve()))
                if other is None or unquote(parts.fragment) not in other.places:
                    found.append(f"{path.name}: {link} has no such place")
    return found


if __name__ == "__main__":
    lines = faults(Path(sys.argv[1]))
    print("\n".join(lines) or "every link leads somewhere; nothing is fetched from elsewhere")
    sys.exit(bool(lines))
