"""Checks a built page tree without the network: links, anchors and pictures.

    python docs/check_links.py build/docs

What points into the tree must be there; what points out of it must be a whole https address.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKS = {"a": "href", "img": "src", "link": "href", "script": "src"}


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if LINKS.get(tag) in found:
            self.links.append(found[LINKS[tag]])


def broken(root: Path) -> list[str]:
    """Return what is wrong in a tree of pages, a line for each link."""
    made = [path for path in root.rglob("*.html") if "_static" not in path.parts]  # the theme's own
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in made}
    anchors = {path: page.anchors for path, page in pages.items()}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or parts.netloc:
                if parts.scheme != "https" or "." not in parts.netloc:
                    wrong.append(f"{path.name}: {link} is no https address")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{path.name}: {link} leads nowhere")
            elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, ()):
                wrong.append(f"{path.name}: {link} names no place in that page")
    return wrong


def main(root: str) -> None:
    if not (wrong := broken(Path(root))):
        return
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
