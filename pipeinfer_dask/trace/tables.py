"""The work of all nodes as rows, for pictures, data frames and Perfetto."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from pipeinfer_dask.protocol.messages import Span
from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Draft, Fate, Run
from pipeinfer_dask.trace.record import Trace

MACHINE = 16
"""Most characters of a machine's name in that of a row."""


class Work(NamedTuple):
    """What one node did for one run, or the drafter for one draft.

    Attributes
    ----------
    row : int
        0 for the drafter, then the stages.
    of : Run or Draft
    span : Span
    """

    row: int
    of: Run | Draft
    span: Span

    @property
    def fate(self) -> Fate | None:
        """What it came to, as its run did; None while that is open, and for a draft."""
        if not isinstance(self.of, Run):
            return None
        fate = self.of.fate
        return Fate.SAVED if fate is Fate.CANCELLED and self.span.layers == 0 else fate

    def open_at(self, moment: float) -> bool:
        """Whether it was not known then what its run would come to."""
        if not isinstance(self.of, Run):
            return False
        decided = self.of.decided
        return decided is None or decided > moment


def node_name(row: int) -> str:
    """Return what the node of a row is called."""
    return "drafter" if row == 0 else f"stage {row - 1}"


def row_names(trace: Trace) -> list[str]:
    """Return what the rows of a picture are called: on several machines, with the machine."""
    names = [node_name(row) for row in range(trace.stages + 1)]
    machines = [_machine(trace.places.get(name, "")) for name in names]
    if len({machine for machine in machines if machine}) < 2:
        return names
    pairs = zip(names, machines, strict=True)
    return [f"{name} · {machine}" if machine else name for name, machine in pairs]


def _machine(place: str) -> str:
    """Return the machine of a place, without its domain and not longer than a row's name may be."""
    machine = place.partition(", worker ")[0]
    if address := re.fullmatch(r"\w+://\[?([^]/]*?)\]?(:\d+)?(/.*)?", machine):
        machine = address[1]
    if not re.fullmatch(r"[0-9.]+|.*:.*", machine):  # of an address no part says which it is
        machine = machine.partition(".")[0]
    return machine if len(machine) <= MACHINE else f"{machine[: MACHINE - 1]}…"


def work_of(done: Run | Draft) -> Iterator[Work]:
    """Yield what the nodes did for a run or a draft that is done."""
    if isinstance(done, Run):
        for stage, span in enumerate(done.spans):
            yield Work(stage + 1, done, span)
    elif done.span is not None:
        yield Work(0, done, done.span)


def work_until(history: History, moment: float) -> Iterator[Work]:
    """Yield what the nodes had done at a moment: what they did then has no later end."""
    for done in history.done:
        for work in work_of(done):
            if work.span.began <= moment:
                ended = min(work.span.ended, moment)
                yield work._replace(span=replace(work.span, ended=ended))


def legible(history: History, columns: int) -> float:
    """Return in how many seconds single runs can be told apart: a column is half a median run."""
    lengths = sorted(
        work.span.ended - work.span.began
        for done in history.done
        for work in work_of(done)
        if work.row > 0 and work.span.layers and work.span.ended > work.span.began
    )
    return columns * lengths[len(lengths) // 2] / 2 if lengths else history.ended - history.began


def window(history: History, columns: int) -> tuple[float, float]:
    """Return a part of the record, in seconds, in which single runs can be told apart.

    It begins with the first token, and ends with the last one at the latest.
    """
    times = [token.time for token in history.tokens]
    began = times[0] if len(set(times)) > 1 else history.began
    ended = times[-1] if times else history.began + 1.0
    return began, min(ended, began + legible(history, columns))
