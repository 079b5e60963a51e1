"""The check of built pages finds what leads nowhere, and nothing else."""

from pathlib import Path

import pytest

from docs.check_links import broken

GOOD = '<h2 id="there">Here</h2><a href="other.html#there">x</a><a href="#there">y</a>'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("index.html", "other.html"):
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "picture.svg").write_text("<svg/>")
    return tmp_path


@pytest.mark.parametrize(
    "part",
    [
        '<img src="picture.svg">',
        '<a href="https://example.org/a#b">z</a>',
        '<a name="n" href="#n">',
    ],
)
def test_links_that_lead_somewhere_are_fine(tree: Path, part: str) -> None:
    (tree / "index.html").write_text(GOOD + part)
    assert broken(tree) == []


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ('<a href="gone.html">', "gone.html leads nowhere"),
        ('<a href="other.html#gone">', "other.html#gone names no place in that page"),
        ('<a href="#gone">', "#gone names no place in that page"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<a href="http://example.org">', "http://example.org is no https address"),
        ('<a href="https://docs/">', "https://docs/ is no https address"),
    ],
)
def test_what_leads_nowhere_is_told_with_its_page(tree: Path, part: str, told: str) -> None:
    (tree / "index.html").write_text(GOOD + part)
    assert broken(tree) == [f"index.html: {told}"]
