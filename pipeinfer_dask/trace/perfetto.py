"""A trace as Perfetto's UI opens it: Chrome's trace event format, the JSON object form."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any

from pipeinfer_dask.trace.files import open_file
from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Run, Token
from pipeinfer_dask.trace.record import Trace
from pipeinfer_dask.trace.tables import Work, node_name, work_of

Entry = dict[str, Any]
Place = tuple[int, float]
"""The beginning of a slice: its thread and its time in microseconds."""

PROCESS = 1
TEXT = 0
"""The text's thread; the drafter's is 1, the stages' follow."""


def write_perfetto(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the trace. See `Trace.to_perfetto`."""
    document = {"traceEvents": list(trace_events(trace)), "displayTimeUnit": "ms"}
    with open_file(path, "w") as file:
        file.write(json.dumps(document))


def trace_events(trace: Trace) -> Iterator[Entry]:
    """Yield the events, times in microseconds from the begin."""
    history = History(trace)
    nodes = [node_name(row) for row in range(trace.stages + 1)]
    places = trace.places
    names = ["text", *(f"{node} on {places[node]}" if node in places else node for node in nodes)]
    yield _event("M", "process_name", TEXT, args={"name": "pipeinfer_dask"})
    for thread, name in enumerate(names):
        yield _event("M", "thread_name", thread, args={"name": name})
        yield _event("M", "thread_sort_index", thread, args={"sort_index": thread})
    sheet = _Sheet(history)
    for done in history.done:
        for work in work_of(done):
            yield sheet.work(work)
    groups = [list(group) for _, group in groupby(history.tokens, key=lambda token: token.time)]
    ends = [*(group[0].time for group in groups), history.ended][1:]
    for tokens, end in zip(groups, ends, strict=True):
        yield sheet.text(tokens, end)
    yield from sheet.arrows()
    for wave in history.waves:
        args = {"runs": [run.id for run in wave.runs]}
        yield sheet.mark(f"cancel ({wave.reason})", wave.time, "p", args)
    for loss in history.losses:
        yield sheet.mark(f"lost: {loss.reason}", loss.time, "g", {})
        if loss.back is not None:
            yield sheet.mark("back", loss.back, "g", {})
    yield from sheet.counters()


class _Sheet:
    """What was written, and where: arrows are bound to slices that are there."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._ends = [0.0] * (history.trace.stages + 2)  # of the last slice, by thread
        self._runs: dict[int, list[Place]] = {}
        self._drafts: dict[int, Place] = {}
        self._texts: list[tuple[int, Place]] = []  # with the run that they came by
        self._arrows = 0

    def work(self, work: Work) -> Entry:
        """Return the slice of a node's work."""
        thread = work.row + 1
        # A thread's slices may not overlap, or they are shown as nested; clocks may say so by a
        # little, for what is known of them changes.
        began = max(self._at(work.span.began), self._ends[thread])
        ended = self._ends[thread] = max(self._at(work.span.ended), began)
        args: Entry = {"layers": work.span.layers}
        if isinstance(run := work.of, Run):
            name = f"run {run.id}: {work.fate}"
            args |= {
                "fate": work.fate,
                "kind": run.kind,
                "parents": run.parents,
                "tokens": "".join(self._say(guess.token) for guess in run.tokens),
                "guesses": len(run.guesses),
                "guesses kept": run.kept,
            }
            if run.cancelled is not None:
                args["layers saved"] = self._history.layers[work.row - 1] - work.span.layers
            if ended > began:  # an arrow is bound to what takes time
                self._runs.setdefault(run.id, []).append((thread, began))
        else:
            name = f"draft {work.of.id}"
            args["guesses"] = {
                f"{guess.id}: {self._say(guess.token)}": {
                    "confidence": guess.confidence,
                    "fate": guess.fate,
                }
                for guess in work.of.guesses
            }
            if ended > began:
                self._drafts[work.of.id] = (thread, began)
        return _slice(name, thread, began, ended, "work", args)

    def text(self, tokens: list[Token], end: float) -> Entry:
        """Return the slice of what came to the text at once; it lasts until there is more."""
        began = max(self._at(tokens[0].time), self._ends[TEXT])
        ended = self._ends[TEXT] = max(self._at(end), began + 1.0)
        args = {
            "tokens": [
                {"text": self._say(token.guess.token), "origin": token.origin, "run": token.decided}
                for token in tokens
            ]
        }
        for run in dict.fromkeys(token.decided for token in tokens):
            if run is not None:
                self._texts.append((run, (TEXT, began)))
        name = "".join(self._say(token.guess.token) for token in tokens)
        return _slice(name, TEXT, began, ended, "text", args)

    def mark(self, name: str, time: float, scope: str, args: Entry) -> Entry:
        """Return a moment: of the process (``scope`` p) or of everything (g)."""
        return _event("i", name, TEXT, ts=self._at(time), s=scope, args=args)

    def arrows(self) -> Iterator[Entry]:
        """Yield what leads from slice to slice, as far as both are there."""
        for number, places in self._runs.items():
            guesses = self._history.runs[number].guesses
            for draft in dict.fromkeys(guess.draft for guess in guesses):
                if draft in self._drafts:
                    yield from self._arrow("guesses", self._drafts[draft], places[0])
            for before, after in pairwise(places):
                yield from self._arrow("run", before, after)
        for run, place in self._texts:
            if run in self._runs:
                yield from self._arrow("tokens", self._runs[run][-1], place)

    def _arrow(self, name: str, start: Place, end: Place) -> Iterator[Entry]:
        if start[1] <= end[1]:
            self._arrows += 1
            more: Entry = {"cat": name, "id": self._arrows}
            yield _event("s", name, start[0], ts=start[1], **more)
            yield _event("f", name, end[0], ts=end[1], bp="e", **more)

    def counters(self) -> Iterator[Entry]:
        """Yield what is in flight, and the counts so far."""
        history = self._history
        for time, level in _levels((run.started, run.done) for run in history.runs.values()):
            yield self._count("runs in flight", time, {"runs": level})
        guesses = [guess for guess in history.guesses if guess.draft is not None]
        for time, level in _levels((guess.placed, guess.settled) for guess in guesses):
            yield self._count("guesses in flight", time, {"guesses": level})
        for figures in history.figures:
            counts = {"generated": figures.generated, "accepted": figures.accepted}
            yield self._count("tokens", figures.time, counts)
            counts = {"computed": figures.computed, "in vain": figures.wasted}
            yield self._count("layers", figures.time, counts)

    def _count(self, name: str, time: float, values: dict[str, int]) -> Entry:
        return _event("C", name, TEXT, ts=self._at(time), args=values)

    def _at(self, time: float) -> float:
        return round(max(0.0, time - self._history.began) * 1e6, 3)

    def _say(self, token: int) -> str:
        return self._history.trace.text_of(token)


def _levels(spans: Iterable[tuple[float | None, float | None]]) -> Iterator[tuple[float, int]]:
    """Yield when the number of open spans changes, and to what. What never began is none."""
    steps: Counter[float] = Counter()
    for began, ended in spans:
        if began is not None:
            steps[began] += 1
            if ended is not None:
                steps[ended] -= 1
    return zip(sorted(steps), accumulate(steps[time] for time in sorted(steps)), strict=True)


def _slice(name: str, thread: int, began: float, ended: float, kind: str, args: Entry) -> Entry:
    return _event("X", name, thread, ts=began, dur=round(ended - began, 3), cat=kind, args=args)


def _event(phase: str, name: str, thread: int, **more: Any) -> Entry:
    return {"ph": phase, "name": name, "pid": PROCESS, "tid": thread, **more}
