"""A trace as a picture of characters: which node worked on what, and when it was idle.

One row for the drafter and one for each stage, one column for each moment. What a run has
come to is told by its sign, and by its colour besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from rich.text import Text

from pipeinfer_dask.protocol.messages import Span
from pipeinfer_dask.trace import Fate, History, Run, Trace, tables
from pipeinfer_dask.trace.tables import node_name, work_of


class Sign(Enum):
    """What a moment of a node is drawn as: its character, its style and what it means."""

    PREFILL = ("=", "blue", Fate.PREFILL.meaning)
    SINGLE = ("#", "cyan", Fate.SINGLE.meaning)
    ACCEPTED = ("+", "green", Fate.ACCEPTED.meaning)
    REJECTED = ("-", "yellow", Fate.REJECTED.meaning)
    CANCELLED = ("x", "red", Fate.CANCELLED.meaning)
    DRAFT = ("~", "magenta", "drafting")
    IDLE = (".", "dim", "idle")

    def __init__(self, character: str, style: str, meaning: str) -> None:
        self.character = character
        self.style = style
        self.meaning = meaning

    @classmethod
    def of(cls, fate: Fate | None) -> Sign:
        """Return the sign of a run; of one whose guesses are open, as if they were right."""
        return cls.ACCEPTED if fate is None else cls[fate.name]


def window(trace: Trace, columns: int) -> tuple[float, float]:
    """Return a part of a trace, in seconds, in which single runs can be told apart."""
    return tables.window(History(trace), columns)


def draw(trace: Trace, columns: int, part: tuple[float, float] | None = None) -> Text:
    """Return the picture.

    Parameters
    ----------
    trace : Trace
    columns : int
        Signs in a row, at least 1.
    part : (float, float), seconds, optional
        What to show; by default what `window` says.
    """
    history = History(trace)
    began, ended = part if part is not None else tables.window(history, columns)
    width = max(ended - began, 1e-12) / columns
    rows: list[list[tuple[Span, Sign]]] = [[] for _ in range(trace.stages + 1)]
    for done in history.done:
        sign = Sign.of(done.fate) if isinstance(done, Run) else Sign.DRAFT
        for work in work_of(done):
            rows[work.row].append((work.span, sign))
    commits = [0] * columns
    for token in history.tokens:
        if began <= token.time < ended:
            commits[min(columns - 1, int((token.time - began) / width))] += 1
    picture = Text()
    label = max(len(node_name(row)) for row in range(len(rows))) + 1
    for row, spans in enumerate(rows):
        picture.append(node_name(row).ljust(label))
        for sign in _cells(spans, began, width, columns):
            picture.append(sign.character, sign.style)
        picture.append("\n")
    picture.append("tokens".ljust(label))
    for count in commits:
        picture.append(" " if count == 0 else str(count) if count < 10 else "*", "bold")
    return picture


def legend() -> Text:
    """Return what the signs mean."""
    return Text("  ").join(
        Text.assemble((sign.character, sign.style), " ", sign.meaning) for sign in Sign
    )


def _cells(
    row: Sequence[tuple[Span, Sign]], began: float, width: float, columns: int
) -> list[Sign]:
    """Return for each column what took most of it."""
    shares: list[dict[Sign, float]] = [{} for _ in range(columns)]
    for span, sign in row:
        first = max(0, int((span.began - began) / width))
        for column in range(first, columns):
            left = began + column * width
            if span.ended <= left:
                break
            share = min(span.ended, left + width) - max(span.began, left)
            if share > 0:
                shares[column][sign] = shares[column].get(sign, 0.0) + share
    return [
        max(cell, key=lambda sign: cell[sign])
        if cell and sum(cell.values()) >= width / 2
        else Sign.IDLE
        for cell in shares
    ]
