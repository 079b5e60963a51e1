"""A trace as Perfetto's UI opens it: Chrome's trace event format, the JSON object form."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Run
from pipeinfer_dask.trace.record import Trace
from pipeinfer_dask.trace.tables import Work, node_name, work_of

PROCESS = 1
HEAD = 0
"""The head's thread; the drafter's is 1, the stages' follow."""


def write_perfetto(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the trace. See `Trace.to_perfetto`."""
    document = {"traceEvents": list(trace_events(trace)), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(document), encoding="ascii")


def trace_events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the events, times in microseconds from the begin."""
    history = History(trace)
    names = ["head", *(node_name(row) for row in range(trace.stages + 1))]
    yield _event("M", "process_name", 0, args={"name": "pipeinfer_dask"})
    for thread, name in enumerate(names):
        yield _event("M", "thread_name", thread, args={"name": name})
        yield _event("M", "thread_sort_index", thread, args={"sort_index": thread})

    def at(time: float) -> float:
        return round(max(0.0, time - history.began) * 1e6, 3)

    for done in history.done:
        works = list(work_of(done))
        for work in works:
            yield _slice(trace, work, at)
        # An arrow is bound to the slices around its ends: what took no time has none.
        for before, after in pairwise(w for w in works if w.span.ended > w.span.began):
            arrow = {"cat": "run", "id": done.id * (trace.stages + 1) + before.row}
            yield _event("s", "run", before.row + 1, ts=at(before.span.began), **arrow)
            yield _event("f", "run", after.row + 1, ts=at(after.span.began), bp="e", **arrow)
    for token in history.tokens:
        args = {"text": trace.text_of(token.guess.token), "origin": str(token.origin)}
        yield _event("i", f"token {args['text']}", HEAD, ts=at(token.time), s="t", args=args)
    for wave in history.waves:
        args = {"runs": str([run.id for run in wave.runs])}
        yield _event("i", f"cancel ({wave.reason})", HEAD, ts=at(wave.time), s="p", args=args)
    for loss in history.losses:
        yield _event("i", f"lost: {loss.reason}", HEAD, ts=at(loss.time), s="g")
        if loss.back is not None:
            yield _event("i", "back", HEAD, ts=at(loss.back), s="g")


def _slice(trace: Trace, work: Work, at: Callable[[float], float]) -> dict[str, Any]:
    row, of, span = work
    began, ended = at(span.began), at(span.ended)
    args: dict[str, Any] = {"layers": span.layers}
    if isinstance(of, Run):
        name = f"run {of.id}: {of.fate}"
        args["tokens"] = "".join(trace.text_of(guess.token) for guess in of.tokens)
    else:
        name = f"draft {of.id}"
        args["guesses"] = {
            f"{guess.id}: {trace.text_of(guess.token)}": guess.confidence for guess in of.guesses
        }
    return _event("X", name, row + 1, ts=began, dur=round(ended - began, 3), cat="work", args=args)


def _event(phase: str, name: str, thread: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": PROCESS, "tid": thread, **more}
