"""The record of one generation: what the machine was told and what it said, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pipeinfer_dask.protocol.messages import Command, Event
from pipeinfer_dask.trace.metrics import Metrics, Tally

Rows = Literal["work", "runs", "tokens", "guesses"]
"""What a row of a table is."""


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
    places : mapping of str to str
        Machine and worker of each node when the request began, by the node's name, such as
        ``stage 0``; as far as known.
    """

    stages: int
    records: list[tuple[float, Event | Command]] = field(default_factory=list)
    texts: Mapping[int, str] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    places: Mapping[str, str] = field(default_factory=dict)

    def add(self, time: float, what: Event | Command) -> None:
        """Record an event or a command.

        Parameters
        ----------
        time : float, seconds
            Not before that of the entry before it.
        what : Event or Command
            What the machine was told, or said.
        """
        self.records.append((time, what))

    def text_of(self, token: int) -> str:
        """Return a token as text.

        Parameters
        ----------
        token : int
            Its id.

        Returns
        -------
        str
            ``#`` and its id, if its text is not known.
        """
        try:
            return self.texts[token]
        except LookupError:
            return f"#{token}"

    def metrics(self) -> Metrics:
        """Return the figures up to now.

        Returns
        -------
        Metrics
            Of a generation that goes on, those of its text so far.
        """
        tally = Tally(self.stages)
        for time, what in self.records:
            tally.add(time, what)
        return tally.metrics()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file, as `load` reads it: JSON lines, nothing is pickled.

        Parameters
        ----------
        path : str or path
            Replaced, if it is there.

        Raises
        ------
        ValueError
            If the path is none, or a directory's.
        OSError
            If it can't be written there.
        """
        from pipeinfer_dask.trace.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a trace that `save` wrote.

        Parameters
        ----------
        path : str or path
            The file.

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

        A track for the text, one for the drafter and one for each stage, with its machine and
        worker where they are known; a slice tells what its
        run held and came to. Arrows lead from a draft to the runs that hold its guesses, from
        stage to stage, and from a run to the text that it decided on. Cancellations and losses are
        marks; guesses, runs and layers are counted over time.

        Parameters
        ----------
        path : str or path
            Replaced, if it is there.

        Raises
        ------
        ValueError
            If the path is none, or a directory's.
        OSError
            If it can't be written there.
        """
        from pipeinfer_dask.trace.perfetto import write_perfetto

        write_perfetto(self, path)

    def to_dataframe(self, rows: Rows = "work") -> Any:
        """Return a table as a pandas DataFrame.

        ``.to_parquet(path)`` of it writes a file that keeps the types; both need
        ``pip install 'pipeinfer-dask[tables]'``.

        Parameters
        ----------
        rows : {"work", "runs", "tokens", "guesses"}
            What a row is. All have times in seconds from the begin, missing where there are none.

            - ``"work"``: what a node did for a run; the drafter, for a draft. ``node``, ``run``,
              ``kind``, ``fate`` (its run's, or saved: it was called off before any layer),
              ``began_s``, ``ended_s``, ``layers``, ``layers_saved``, ``tokens`` and
              ``tokens_kept``.
            - ``"runs"``: ``run``, ``kind``, ``fate``, ``reason`` (of its cancelling), ``parents``
              (runs), ``started_s``, ``done_s``, ``cancelled_s``, ``layers``, ``layers_saved``,
              ``tokens``, ``guesses``, ``guesses_kept`` and ``left_out`` (pruned on the way).
            - ``"tokens"``: of the text. ``place``, ``time_s``, ``token``, ``text``, ``origin``,
              ``confidence`` (of the draft model, if it was accepted), ``guess``, and ``run``, the
              one that decided on it.
            - ``"guesses"``: of the draft model. ``guess``, ``parent`` (a guess), ``place``,
              ``token``, ``text``, ``confidence``, ``ahead`` (of the text), ``fate`` (accepted,
              rejected, or unused: in no run), ``draft``, ``run``, ``made_s``, ``placed_s`` (in a
              run) and ``settled_s``.

        Returns
        -------
        pandas.DataFrame
            With the columns named above.

        Raises
        ------
        ImportError
            If pandas is not installed.
        ValueError
            If there is no such table.
        """
        from pipeinfer_dask.trace.frames import dataframe

        return dataframe(self, rows)

    def _repr_html_(self) -> str:
        from pipeinfer_dask.trace.picture import trace_html

        return trace_html(self)

    def __repr__(self) -> str:
        return f"<Trace of {self.stages} stages, {len(self.records)} records>"

    def __iter__(self) -> Iterator[tuple[float, Event | Command]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def trace_of(source: Any) -> Trace:
    """Return the trace of a generation, a result or a simulation, or one as it is.

    Raises
    ------
    ValueError
        If the source has no trace.
    """
    trace = source if isinstance(source, Trace) else getattr(source, "trace", None)
    if not isinstance(trace, Trace):
        raise ValueError(
            f"expected a trace, or a generation, result or simulation that has one, got "
            f"{source!r:.60}"
        )
    return trace
