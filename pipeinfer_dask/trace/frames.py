"""A trace as tables for pandas: work, runs, tokens, guesses. See `Trace.to_dataframe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Run
from pipeinfer_dask.trace.record import Rows, Trace
from pipeinfer_dask.trace.tables import Work, node_name, work_of

Row = dict[str, Any]


def dataframe(trace: Trace, rows: Rows) -> Any:
    """Return a table."""
    if rows not in TABLES:
        raise ValueError(f"expected rows of {', '.join(get_args(Rows))}, got {rows!r}: name one")
    try:
        import pandas as pd
    except ImportError:
        raise ImportError(
            "a data frame needs pandas: pip install 'pipeinfer-dask[tables]'"
        ) from None
    read, columns = TABLES[rows]
    frame = pd.DataFrame(list(read(History(trace))), columns=columns.split())
    # Where a value may be missing, all of them would lose their type.
    return frame.astype(
        {name: "float64" for name in frame if name.endswith("_s") or name == "confidence"}
        | {name: "Int64" for name in frame if name == "run"}
    )


def _work(history: History) -> Iterator[Row]:
    for done in history.done:
        for work in work_of(done):
            span = work.span
            yield {
                "node": node_name(work.row),
                "run": done.id,
                "began_s": span.began - history.began,
                "ended_s": span.ended - history.began,
                "layers": span.layers,
                **_of(history, work),
            }


def _of(history: History, work: Work) -> Row:
    if isinstance(work.of, Run):
        run = work.of
        cancelled = run.cancelled is not None
        return {
            "kind": str(run.kind),
            "fate": work.fate and str(work.fate),
            "layers_saved": history.layers[work.row - 1] - work.span.layers if cancelled else 0,
            "tokens": len(run.tokens),
            "tokens_kept": sum(guess.kept for guess in run.tokens),
        }
    return {
        "kind": "draft",
        "fate": "draft",
        "layers_saved": 0,
        "tokens": len(work.of.guesses) + work.of.late,
        "tokens_kept": sum(guess.kept for guess in work.of.guesses),
    }


def _runs(history: History) -> Iterator[Row]:
    for run in history.runs.values():
        yield {
            "run": run.id,
            "kind": str(run.kind),
            "fate": run.fate and str(run.fate),
            "reason": run.reason and str(run.reason),
            "parents": run.parents,
            "started_s": run.started - history.began,
            "done_s": _since(history, run.done),
            "cancelled_s": _since(history, run.cancelled),
            "layers": sum(span.layers for span in run.spans),
            "layers_saved": history.saved(run),
            "tokens": len(run.tokens),
            "guesses": len(run.guesses),
            "guesses_kept": run.kept,
            "left_out": run.left_out,
        }


def _tokens(history: History) -> Iterator[Row]:
    for place, token in enumerate(history.tokens):
        guess = token.guess
        yield {
            "place": place,
            "time_s": token.time - history.began,
            "token": guess.token,
            "text": history.trace.text_of(guess.token),
            "origin": str(token.origin),
            "confidence": None if guess.draft is None else guess.confidence,
            "guess": guess.id,
            "run": token.decided,
        }


def _guesses(history: History) -> Iterator[Row]:
    first = history.tokens[0].guess.position if history.tokens else 0
    for guess in history.guesses:
        if guess.draft is not None:
            assert guess.parent is not None
            yield {
                "guess": guess.id,
                "parent": guess.parent.id,
                "place": guess.position - first,
                "token": guess.token,
                "text": history.trace.text_of(guess.token),
                "confidence": guess.confidence,
                "ahead": guess.ahead,
                "fate": guess.fate,
                "draft": guess.draft,
                "run": guess.run,
                "made_s": guess.made - history.began,
                "placed_s": _since(history, guess.placed),
                "settled_s": _since(history, guess.settled),
            }


def _since(history: History, time: float | None) -> float | None:
    return None if time is None else time - history.began


TABLES: dict[str, tuple[Callable[[History], Iterator[Row]], str]] = {
    "work": (_work, "node run kind fate began_s ended_s layers layers_saved tokens tokens_kept"),
    "runs": (
        _runs,
        "run kind fate reason parents started_s done_s cancelled_s layers layers_saved tokens "
        "guesses guesses_kept left_out",
    ),
    "tokens": (_tokens, "place time_s token text origin confidence guess run"),
    "guesses": (
        _guesses,
        "guess parent place token text confidence ahead fate draft run made_s placed_s settled_s",
    ),
}
"""For each table what reads it, and its columns."""
