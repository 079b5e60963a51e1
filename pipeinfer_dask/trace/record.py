"""The record of one generation: what the machine was told and what it said, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pipeinfer_dask.protocol.messages import Command, Event
from pipeinfer_dask.trace.metrics import Metrics, Tally


@dataclass(slots=True)
class Trace:
    """Events and commands in order, each with the seconds on the driver's clock.

    Everything else about a generation is a fold over it: `metrics`, and
    `pipeinfer_dask.trace.History`. Entries are only ever added, by one thread; any other may
    read meanwhile.

    Attributes
    ----------
    stages : int
    records : list of (float, Event or Command)
    texts : mapping of int to str
        Token ids as text, as far as known: a simulation's tokens have none.
    pieces : list of str
        What each committed token added to the text, empty where it left a character
        incomplete; no entries where that is not known.
    """

    stages: int
    records: list[tuple[float, Event | Command]] = field(default_factory=list)
    texts: Mapping[int, str] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)

    def add(self, time: float, what: Event | Command) -> None:
        """Record an event or a command, at a time in seconds."""
        self.records.append((time, what))

    def text_of(self, token: int) -> str:
        """Return a token as text; its number, if its text is not known."""
        try:
            return self.texts[token]
        except LookupError:
            return f"#{token}"

    def metrics(self) -> Metrics:
        """Return the figures up to now."""
        tally = Tally(self.stages)
        for time, what in self.records:
            tally.add(time, what)
        return tally.metrics()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file, as `load` reads it: JSON lines, nothing is pickled."""
        from pipeinfer_dask.trace.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a trace that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it holds no trace, a damaged one, or one of a later version of this package.
        """
        from pipeinfer_dask.trace.files import load

        return cls(*load(path))

    def to_perfetto(self, path: str | os.PathLike[str]) -> None:
        """Write the trace for https://ui.perfetto.dev (Chrome's trace event format, JSON).

        A track for the drafter and for each stage; arrows follow a run from stage to stage;
        commitments and cancellations are instants on a track of the head's.
        """
        from pipeinfer_dask.trace.perfetto import write_perfetto

        write_perfetto(self, path)

    def to_dataframe(self) -> Any:
        """Return the work of all nodes as a pandas DataFrame, a row for each run on each stage.

        Drafts have the node ``"drafter"``. Columns: ``node``, ``run``, ``kind``, ``fate``,
        ``began_s`` and ``ended_s`` (from the begin), ``layers``, ``layers_saved``, ``tokens``
        and ``tokens_kept``. ``.to_parquet(path)`` of it writes a file.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        from pipeinfer_dask.trace.tables import dataframe

        return dataframe(self)

    def _repr_html_(self) -> str:
        from pipeinfer_dask.trace.picture import trace_html

        return trace_html(self)

    def __repr__(self) -> str:
        return f"<Trace of {self.stages} stages, {len(self.records)} records>"

    def __iter__(self) -> Iterator[tuple[float, Event | Command]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)
