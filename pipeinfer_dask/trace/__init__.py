"""What happened in one generation: its record, the figures and the story that follow from it."""

from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.metrics import Metrics
from pipeinfer_dask.trace.parts import Draft, Fate, Guess, Loss, Run, Token, Wave
from pipeinfer_dask.trace.record import Trace

__all__ = [
    "Draft",
    "Fate",
    "Guess",
    "History",
    "Loss",
    "Metrics",
    "Run",
    "Token",
    "Trace",
    "Wave",
]
