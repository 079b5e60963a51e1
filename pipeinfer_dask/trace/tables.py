"""The work of all nodes as rows, for tables, data frames and Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeinfer_dask.protocol.messages import Span
from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Draft, Run
from pipeinfer_dask.trace.record import Trace


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


def node_name(row: int) -> str:
    """Return what the node of a row is called."""
    return "drafter" if row == 0 else f"stage {row - 1}"


def work_of(done: Run | Draft) -> Iterator[Work]:
    """Yield what the nodes did for a run or a draft that is done."""
    if isinstance(done, Run):
        for stage, span in enumerate(done.spans):
            yield Work(stage + 1, done, span)
    elif done.span is not None:
        yield Work(0, done, done.span)


def window(history: History, columns: int) -> tuple[float, float]:
    """Return a part of the record, in seconds, in which single runs can be told apart.

    It begins with the first token, and a column is half as long as the median run on a stage.
    """
    times = [token.time for token in history.tokens]
    began = times[0] if len(set(times)) > 1 else history.began
    ended = times[-1] if times else history.began + 1.0
    lengths = sorted(
        work.span.ended - work.span.began
        for done in history.done
        for work in work_of(done)
        if work.row > 0 and work.span.ended > work.span.began
    )
    column = lengths[len(lengths) // 2] / 2 if lengths else (ended - began) / columns
    return began, min(ended, began + columns * column)


def dataframe(trace: Trace) -> Any:
    """Return a row for each run on each stage, and for each draft. See `Trace.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError:
        raise ImportError("a data frame needs pandas: pip install pandas") from None
    history = History(trace)
    rows = [
        _run_row(history, row, of, span)
        if isinstance(of, Run)
        else {
            "node": node_name(row),
            "run": of.id,
            "kind": "draft",
            "fate": "draft",
            "began_s": span.began - history.began,
            "ended_s": span.ended - history.began,
            "layers": span.layers,
            "layers_saved": 0,
            "tokens": len(of.guesses) + of.late,
            "tokens_kept": sum(guess.kept for guess in of.guesses),
        }
        for done in history.done
        for row, of, span in work_of(done)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "node",
    "run",
    "kind",
    "fate",
    "began_s",
    "ended_s",
    "layers",
    "layers_saved",
    "tokens",
    "tokens_kept",
]


def _run_row(history: History, row: int, run: Run, span: Span) -> dict[str, object]:
    saved = history.layers[row - 1] - span.layers if run.cancelled is not None else 0
    return {
        "node": node_name(row),
        "run": run.id,
        "kind": str(run.kind),
        "fate": None if run.fate is None else str(run.fate),
        "began_s": span.began - history.began,
        "ended_s": span.ended - history.began,
        "layers": span.layers,
        "layers_saved": saved,
        "tokens": len(run.tokens),
        "tokens_kept": sum(guess.kept for guess in run.tokens),
    }
