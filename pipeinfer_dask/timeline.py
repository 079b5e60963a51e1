"""A trace as a picture of characters: which node worked on what, and when it was idle.

One row for the drafter and one for each stage, one column for each moment. What a run has
come to is told by its sign, and by its colour besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from rich.text import Text

from pipeinfer_dask.core.messages import (
    CancelRuns,
    Commit,
    Drafted,
    Kind,
    RunDone,
    Span,
    StartRun,
)
from pipeinfer_dask.trace import Trace


class Fate(Enum):
    """What a run has come to: its sign, its style and what it means."""

    PREFILL = ("=", "blue", "the prompt")
    SINGLE = ("#", "cyan", "one token, plain")
    SPECULATIVE = ("+", "green", "speculation")
    CANCELLED = ("x", "red", "cancelled")
    DRAFT = ("~", "magenta", "drafting")
    IDLE = (".", "dim", "idle")

    def __init__(self, sign: str, style: str, meaning: str) -> None:
        self.sign = sign
        self.style = style
        self.meaning = meaning


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of work of one node, and what it came to."""

    span: Span
    fate: Fate


def bars(trace: Trace) -> tuple[list[Bar], list[list[Bar]]]:
    """Return the work of the drafter, and of each stage, in order."""
    kinds: dict[int, Kind] = {}
    cancelled: set[int] = set()
    drafter: list[Bar] = []
    done: list[RunDone] = []
    for _, what in trace:
        match what:
            case StartRun():
                kinds[what.run] = what.kind
            case CancelRuns():
                cancelled.update(what.runs)
            case RunDone():
                done.append(what)
            case Drafted(span=Span() as span):
                drafter.append(Bar(span, Fate.DRAFT))
    stages: list[list[Bar]] = [[] for _ in range(trace.stages)]
    for run in done:
        fate = Fate.CANCELLED if run.run in cancelled else _FATES[kinds[run.run]]
        for stage, span in zip(stages, run.spans, strict=False):
            stage.append(Bar(span, fate))
    return drafter, stages


_FATES: Mapping[Kind, Fate] = {
    Kind.PREFILL: Fate.PREFILL,
    Kind.SINGLE: Fate.SINGLE,
    Kind.SPECULATIVE: Fate.SPECULATIVE,
}


def window(trace: Trace, columns: int) -> tuple[float, float]:
    """Return a part of the trace, in seconds, in which single runs can be told apart.

    It begins with the first token, and a column is half as long as the median run on a stage.
    """
    commits = [time for time, what in trace if isinstance(what, Commit)]
    began = commits[0] if len(set(commits)) > 1 else 0.0
    ended = commits[-1] if commits else 1.0
    lengths = sorted(
        span.ended - span.began
        for _, what in trace
        if isinstance(what, RunDone)
        for span in what.spans
        if span.ended > span.began
    )
    column = lengths[len(lengths) // 2] / 2 if lengths else (ended - began) / columns
    return began, min(ended, began + columns * column)


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
    began, ended = part if part is not None else window(trace, columns)
    width = max(ended - began, 1e-12) / columns
    drafter, stages = bars(trace)
    commits = [0] * columns
    for time, what in trace:
        if isinstance(what, Commit) and began <= time < ended:
            commits[min(columns - 1, int((time - began) / width))] += len(what.tokens)
    picture = Text()
    rows = [("drafter", drafter), *((f"stage {i}", stage) for i, stage in enumerate(stages))]
    label = max(len(name) for name, _ in rows) + 1
    for name, row in rows:
        picture.append(name.ljust(label))
        for fate in _cells(row, began, width, columns):
            picture.append(fate.sign, fate.style)
        picture.append("\n")
    picture.append("tokens".ljust(label))
    for count in commits:
        picture.append(" " if count == 0 else str(count) if count < 10 else "*", "bold")
    return picture


def legend() -> Text:
    """Return what the signs mean."""
    return Text("  ").join(
        Text.assemble((fate.sign, fate.style), " ", fate.meaning) for fate in Fate
    )


def _cells(row: Sequence[Bar], began: float, width: float, columns: int) -> list[Fate]:
    """Return for each column what took most of it."""
    shares: list[dict[Fate, float]] = [{} for _ in range(columns)]
    for bar in row:
        first = max(0, int((bar.span.began - began) / width))
        for column in range(first, columns):
            left = began + column * width
            if bar.span.ended <= left:
                break
            share = min(bar.span.ended, left + width) - max(bar.span.began, left)
            if share > 0:
                shares[column][bar.fate] = shares[column].get(bar.fate, 0.0) + share
    return [
        max(cell, key=lambda fate: cell[fate])
        if cell and sum(cell.values()) >= width / 2
        else Fate.IDLE
        for cell in shares
    ]
