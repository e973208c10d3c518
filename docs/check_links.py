"""Find dead links in the built pages: ``python docs/check_links.py build/docs``. Nothing is fetched.

Sphinx checks the links that it makes. This also checks what the theme, tables of contents and pictures refer to.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_REFERRING = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "object": "data"}
"""An element -> its attribute that leads somewhere."""


class _Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := found.get(name)))
        if (target := found.get(_REFERRING.get(tag, ""))) is not None:
            self.targets.add(target)


def dead_links(directory: Path) -> list[str]:
    """Return a line for each link inside a directory of HTML pages that leads nowhere."""
    pages = {path.resolve(): _Page(path) for path in sorted(directory.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        for target in sorted(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            lost = anchor and place in pages and anchor not in pages[place].anchors
            if not place.exists() or lost:
                faults.append(f"{path.relative_to(directory.resolve())}: {target}")
    return faults


def main() -> int:
    """Print the dead links, and return 1 if there are some or if there is no page."""
    directory = Path(sys.argv[1])
    if not any(directory.rglob("*.html")):
        sys.stderr.write(f"{directory}: no pages\n")
        return 1
    faults = dead_links(directory)
    sys.stderr.write("".join(f"dead link: {fault}\n" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
