"""The code blocks of a Markdown page: what language each is in, and where it stands."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if "generated" not in path.parts
]
FENCE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)\s*$", re.M | re.S
)


class Block(NamedTuple):
    language: str
    code: str
    line: int
    """Of its first line of code, from 1."""
    on_a_cluster: bool
    """Whether it needs what no test has as it stands, such as nodes of these names."""


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"].strip(),
            found["code"],
            text[: found.start("code")].count("\n") + 1,
            text[: found.start()].endswith("<!-- on a cluster -->\n"),
        )
        for found in FENCE.finditer(text)
    ]


def block_with(page: Path, part: str) -> str:
    """Return the code of the page's one block of Python in which this stands."""
    (found,) = [b.code for b in blocks(page) if b.language == "python" and part in b.code]
    return found
