"""What the build makes of the repository's address: the project's links, and the README's.

The README links to files beside it, which a package index does not have. With an address the links
lead to the repository; without one they are text, and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")
"""A link, or with a mark before it a picture, to a file of the repository."""
PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https?://)[^)]+\)\n(\n\*[^*]+\*\n)?", re.M)
"""A picture that stands by itself, and what stands below it in italics."""
PAGES = {
    "Homepage": "",
    "Documentation": "/blob/HEAD/docs/index.md",
    "Changelog": "/blob/HEAD/CHANGELOG.md",
    "Issues": "/issues",
}


def linked(readme: str, address: str) -> str:
    """Return the README as it can be read elsewhere."""

    def elsewhere(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if not address:
            return text
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return LINK.sub(elsewhere, readme if address else PICTURE.sub("", readme))


class AddressHook(MetadataHookInterface):
    """Fills in what `dynamic` in pyproject.toml leaves open."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README, and the links if there is an address."""
        address = self.config["address"].rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": linked(readme, address)}
        if address:
            metadata["urls"] = {name: address + page for name, page in PAGES.items()}
