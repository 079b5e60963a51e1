"""What is in flight: runs on their way through the pipeline, and whether it has room for more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeinfer_dask.core.drafts import ProtocolError
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.protocol.messages import CancelReason, Kind, most_runs


class Flight:
    """The runs of one request, from their start until they have left the pipeline.

    Attributes
    ----------
    runs : dict of int to RunFuture
        In the order in which they were started, the cancelled ones too.
    waiting : set of int
        Runs that the first stage has not turned to yet.
    stages : int
        Of the pipeline, as far as runs have told.
    """

    def __init__(self) -> None:
        self.runs: dict[int, RunFuture] = {}
        self.waiting: set[int] = set()
        self.stages = 1
        self._started = 0

    @property
    def has_room(self) -> bool:
        """Whether the pipeline can take a run: one waits at most, and not too many are on the way.

        More than two for each stage are queueing somewhere: before a slow stage, or a slow link.
        """
        return not self.waiting and len(self.runs) < most_runs(self.stages) - 1

    @property
    def full(self) -> bool:
        """Whether a run more, whoever wants it, would be more than stages take of a request."""
        return len(self.runs) >= most_runs(self.stages)

    def start(self, kind: Kind, nodes: Sequence[Node], picks: int, now: float) -> RunFuture:
        """Return a new run of these nodes, parents first."""
        number = self._started
        self._started += 1
        for node in nodes:
            node.run = number
        parents = runs_before(number, nodes, self.runs)
        run = RunFuture(number, kind, tuple(nodes), parents=parents, picks=picks, started=now)
        self.runs[number] = run
        self.waiting.add(number)
        return run

    def taken(self, number: int) -> RunFuture | None:
        """Note that the first stage has turned to a run; return it, if it is in flight."""
        self.waiting.discard(number)
        return self.runs.get(number)

    def done(self, number: int, *, stages: int) -> RunFuture:
        """Return a run that has left the pipeline, so many stages of which told of their work.

        Raises
        ------
        ProtocolError
            If it is not in flight.
        """
        run = self.runs.pop(number, None)
        if run is None:
            raise ProtocolError(f"run {number} is not in flight")
        self.waiting.discard(number)
        self.stages = max(self.stages, stages)
        return run

    def cancel(self, runs: Sequence[RunFuture], reason: CancelReason) -> tuple[int, ...]:
        """Cancel runs and, with each, the chain that builds on it; return those, by number."""
        pending = [run for run in self.runs.values() if not run.done()]
        for run in runs:
            run.cancel(reason)
        cancelled = tuple(run.id for run in pending if run.cancelled())
        self.waiting.difference_update(cancelled)
        return cancelled

    def lose(self) -> tuple[int, ...]:
        """Give up all runs: they will not leave the pipeline. Return those cancelled by it."""
        lost = self.cancel(list(self.runs.values()), CancelReason.LOST)
        self.runs.clear()
        self.waiting.clear()
        return lost


def runs_before(
    run: int, nodes: Sequence[Node], in_flight: Mapping[int, RunFuture]
) -> tuple[RunFuture, ...]:
    """Return the runs that hold the prefix of a new run's nodes.

    None if it lies (in part) in finished runs: then no cancellation of others can make the
    new run invalid.

    Raises
    ------
    ProtocolError
        If no run evaluates the token before one of them.
    """
    prefix: dict[int, RunFuture] = {}
    chained = True
    for node in nodes:
        if node.parent is None:
            continue
        holder = node.parent.run
        if holder is None:
            raise ProtocolError(
                f"token {node.token} at position {node.position} was chosen for run {run}, but no "
                f"run evaluates the token before it"
            )
        if holder in in_flight:
            prefix[holder] = in_flight[holder]
        elif holder != run:
            chained = False
    return tuple(prefix.values()) if chained else ()
