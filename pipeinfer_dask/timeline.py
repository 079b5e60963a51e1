"""A trace as a picture of characters: which node worked on what, and when it was idle.

One row for the drafter and one for each stage, one column for each moment; below them, how many
runs were called off and how many tokens became text. What a run has come to is told by its sign,
and by its colour besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from pipeinfer_dask.protocol.messages import Span
from pipeinfer_dask.trace import Fate, History, Run, Trace, tables
from pipeinfer_dask.trace.picture import LOOKS
from pipeinfer_dask.trace.record import trace_of
from pipeinfer_dask.trace.tables import work_of

__all__ = ["draw", "legend", "window"]

LABEL = 10
"""Columns that the names of rows take, if no machine is among them."""


class Sign(Enum):
    """What a moment of a node is drawn as: its character, its style and what it means."""

    PREFILL = ("=", "blue", Fate.PREFILL.meaning)
    SINGLE = ("#", "cyan", Fate.SINGLE.meaning)
    ACCEPTED = ("+", "green", Fate.ACCEPTED.meaning)
    REJECTED = ("-", "yellow", Fate.REJECTED.meaning)
    CANCELLED = ("x", "red", Fate.CANCELLED.meaning)
    SAVED = ("o", "red", Fate.SAVED.meaning)
    DRAFT = ("~", "magenta", LOOKS["draft"].meaning)
    OPEN = ("?", "bold", LOOKS["open"].meaning)
    IDLE = (".", "dim", "idle")

    def __init__(self, character: str, style: str, meaning: str) -> None:
        self.character = character
        self.style = style
        self.meaning = meaning

    @classmethod
    def of(cls, fate: Fate | None) -> Sign:
        """Return the sign of a run's work."""
        return cls.OPEN if fate is None else cls[fate.name]


def window(source: Any, columns: int) -> tuple[float, float]:
    """Return a part of a trace in which single runs can be told apart.

    Parameters
    ----------
    source : Trace, or a generation, result or simulation
        One that may still go on.
    columns : int
        Signs in a row.

    Returns
    -------
    (float, float), seconds
        From and to.

    Raises
    ------
    ValueError
        If the source has no trace.
    """
    return tables.window(History(trace_of(source)), columns)


MOST_ROWS = 32
"""Of a longer pipeline the picture shows both ends."""


def draw(source: Any, columns: int, part: tuple[float, float] | None = None) -> Text:
    """Return a picture of characters: which node worked on what, and when.

    Parameters
    ----------
    source : Trace, or a generation, result or simulation
        What to draw.
    columns : int
        Most characters in a row, names included; there is at least one sign, however few.
    part : (float, float), seconds, optional
        What to show; by default what `window` says.

    Returns
    -------
    rich.text.Text
        A line for each node, and two for cancels and tokens; ``str`` of it is plain.

    Raises
    ------
    ValueError
        If the source has no trace, there is no column, or the part is none.
    """
    trace = trace_of(source)
    given: Any = columns
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"expected columns as a whole number of at least 1, got {columns!r}")
    match part:
        case None | (float() | int(), float() | int()):
            pass
        case _:
            raise ValueError(f"expected part as two times in seconds, (from, to), got {part!r}")
    signs = max(1, columns - _label(trace))
    return _picture(trace, signs, tables.window(History(trace), signs) if part is None else part)


def _label(trace: Trace) -> int:
    """Return how many characters the names of rows take."""
    return max(map(len, tables.row_names(trace))) + 1


def _picture(trace: Trace, columns: int, part: tuple[float, float]) -> Text:
    """Return a picture with so many signs in a row."""
    history = History(trace)
    began, ended = part
    width = max(ended - began, 1e-12) / columns
    rows: list[list[tuple[Span, Sign]]] = [[] for _ in range(trace.stages + 1)]
    for done in history.done:
        for work in work_of(done):
            sign = Sign.of(work.fate) if isinstance(done, Run) else Sign.DRAFT
            rows[work.row].append((work.span, sign))
    picture = Text()
    names = tables.row_names(trace)
    label = _label(trace)
    first, left_out = MOST_ROWS // 2, max(0, len(rows) - MOST_ROWS)
    for row, spans in enumerate(rows):
        if first <= row < first + left_out:
            if row == first:
                picture.append(f"({left_out} stages more)\n", "dim")
            continue
        picture.append(names[row].ljust(label))
        for sign in _cells(spans, began, width, columns):
            picture.append(sign.character, sign.style)
        picture.append("\n")
    waves = [(wave.time, len(wave.runs)) for wave in history.waves]
    tokens = [(token.time, 1) for token in history.tokens]
    for name, moments, style in (("cancels", waves, "red"), ("tokens", tokens, "bold")):
        counts = [0] * columns
        for time, number in moments:
            if began <= time < ended:
                counts[min(columns - 1, int((time - began) / width))] += number
        picture.append(name.ljust(label))
        for count in counts:
            picture.append(" " if count == 0 else str(count) if count < 10 else "*", style)
        picture.append("\n")
    picture.right_crop(1)
    return picture


def show(console: Console, traces: Sequence[tuple[str, Trace]]) -> None:
    """Print a picture of each trace, as wide as the console and all on one scale.

    Parameters
    ----------
    console : Console
    traces : sequence of (str, Trace)
        Each with its title.
    """
    if not traces:
        return
    label = max(_label(trace) for _, trace in traces)
    columns = max(20, console.width - max(LABEL, label))
    parts = [window(trace, columns) for _, trace in traces]
    # Those of the first one, or they could not be compared.
    seconds = parts[0][1] - parts[0][0]
    still_open = False
    for (title, trace), (began, _) in zip(traces, parts, strict=True):
        console.rule(title, align="left")
        picture = _picture(trace, columns, (began, began + seconds))
        console.print(picture, no_wrap=True)
        still_open |= Sign.OPEN.character in picture.plain
    console.print(Columns(_signs(among_open=still_open), padding=(0, 2)))
    longest = max(History(trace).ended - History(trace).began for _, trace in traces)
    console.print(
        f"Each picture begins with the first token and shows {1e3 * seconds:.0f} ms; the longest "
        f"text took {1e3 * longest:.0f} ms. A sign is {1e3 * seconds / columns:.3g} ms. Figures "
        f"tell how many runs were called off, and how many tokens became text.\n"
    )


def legend(columns: int = 80) -> Text:
    """Return what the signs mean.

    Parameters
    ----------
    columns : int
        Most characters in a line, unless one meaning takes more.

    Returns
    -------
    rich.text.Text
        As many lines as it takes.
    """
    lines: list[Text] = []
    for sign in _signs(among_open=True):
        if lines and len(lines[-1]) + 2 + len(sign) <= columns:
            lines[-1].append("  ").append_text(sign)
        else:
            lines.append(sign)
    return Text("\n").join(lines)


def _signs(*, among_open: bool) -> list[Text]:
    signs = [sign for sign in Sign if among_open or sign is not Sign.OPEN]
    return [Text.assemble((sign.character, sign.style), " ", sign.meaning) for sign in signs]


def _cells(
    row: Sequence[tuple[Span, Sign]], began: float, width: float, columns: int
) -> list[Sign]:
    """Return for each column what took most of it."""
    shares: list[dict[Sign, float]] = [{} for _ in range(columns)]
    idle = [Sign.IDLE] * columns
    for span, sign in row:
        first = max(0, int((span.began - began) / width))
        if sign is Sign.SAVED and span.began >= began and first < columns:
            idle[first] = sign  # it took no time: it is seen where nothing else is
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
        else empty
        for cell, empty in zip(shares, idle, strict=True)
    ]
