"""Tables in Markdown, and the places in a page where programs put them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def fill(page: str, name: str, made: str) -> str:
    """Return a page with what stands at ``<!-- table: NAME -->``, up to the end, made anew.

    Raises
    ------
    ValueError
        If the page has no such place.
    """
    before, opened, rest = page.partition(f"<!-- table: {name} -->\n")
    _, closed, after = rest.partition("<!-- end -->")
    if not opened or not closed:
        raise ValueError(f"the page has no place for the table {name}")
    return f"{before}{opened}\n{made}\n\n{closed}{after}"
