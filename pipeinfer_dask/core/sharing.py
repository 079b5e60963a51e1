"""Several requests on one pipeline: whose turn it is to start a run, or a draft.

Each request has a machine of its own, which knows nothing of the others. What they share is
the way in: the first stage, before which one run waits at most, and the drafter, which has one
draft at a time. Both are given by turns:

- a request with fewer runs in flight comes before one with more, so that no request speculates
  deeper while another one has nothing in the pipeline;
- among equals, whoever had its last turn longest ago;
- and where every stage has work already, speculating deeper would only make others wait.

Who declines (its policy has nothing to run, or waits for a draft) is passed over, so a stage
idles only if nobody wants it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from traceback import walk_tb

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.protocol.messages import (
    Command,
    Event,
    Finish,
    PipelineEvent,
    StartDraft,
    StartRun,
    Woken,
)


class Sharing:
    """Drives the machines of all requests that run.

    Attributes
    ----------
    stale : int
        Events of requests that are not here (any more).
    current : int
        The request whose machine was asked last: the one to blame should it raise.
    """

    def __init__(self) -> None:
        self.stale = self.current = 0
        self._machines: dict[int, Machine] = {}
        self._turns = 0
        # When each request had its last turn, counted in turns.
        self._last_run: dict[int, int] = {}
        self._last_draft: dict[int, int] = {}

    @property
    def machines(self) -> Mapping[int, Machine]:
        """The machines of the requests that are not over, by their numbers."""
        return self._machines

    def join(self, machine: Machine) -> None:
        """Take in a request. It begins with its `Begin`."""
        number = machine.request.id
        assert number not in self._machines, "a request's number is its own"
        self._machines[number] = machine
        self._last_run[number] = self._last_draft[number] = -1
        self._count()

    def leave(self, request: int) -> None:
        """Drop a request, whatever is in flight of it; no effect if it is over."""
        if self._machines.pop(request, None) is not None:
            del self._last_run[request], self._last_draft[request]
            self._count()

    def handle(self, event: Event, now: float = 0.0) -> Iterator[Command]:
        """Take an event; yield what is to be done, in order, of whichever requests.

        Whoever drives this carries out each command before it asks for the next one: should a
        machine fail, what others have said is done all the same.

        Parameters
        ----------
        event : Event
        now : float
            Seconds, on any clock that does not go back.

        Raises
        ------
        ProtocolError
            If the event can't have happened.
        RuntimeError
            If a policy raises, or waits for nothing: nobody would ever ask it again.
        """
        if isinstance(event, PipelineEvent):
            concerned = list(self._machines.values())
        elif event.request in self._machines:
            concerned = [self._machines[event.request]]
        else:
            self.stale += 1
            return
        several = len(self._machines) > 1
        for machine in concerned:
            # First they hear, and then all plan, in the order that results.
            machine.may_run = machine.may_draft = not several
            yield from self._handle(machine, event, now)
        if several:
            yield from self.plan(now)

    def plan(self, now: float) -> Iterator[Command]:
        """Give turns, one run or draft at a time, until nobody wants one."""
        declined: set[int] = set()
        while (machine := self._next(declined)) is not None:
            request, turns = machine.request.id, self._turns
            machine.may_run = _may_run(machine, self._deepest)
            machine.may_draft = self._drafter_is_free
            yield from self._handle(machine, Woken(request), now)
            machine.may_run = machine.may_draft = machine.sharers == 1
            # What it has started may be another's chance, or keep it from one.
            declined = {request} if self._turns > turns else declined | {request}

    def _handle(self, machine: Machine, event: Event, now: float) -> Iterator[Command]:
        self.current = machine.request.id
        try:
            commands = machine.handle(event, now)
        except Exception as error:
            policy = machine.policy
            for frame, _ in walk_tb(error.__traceback__):
                if frame.f_locals.get("self") is policy:
                    told = f"{frame.f_code.co_name}: {type(error).__name__}: {error}"
                    raise RuntimeError(f"policy {policy.name!r} failed in {told}") from error
            raise
        for command in commands:
            if isinstance(command, StartRun):
                self._turns += 1
                self._last_run[command.request] = self._turns
            elif isinstance(command, StartDraft):
                self._turns += 1
                self._last_draft[command.request] = self._turns
            yield command
            if isinstance(command, Finish):
                self.leave(command.request)
        if machine.may_run and machine.may_draft and machine.stuck:
            passed = "" if machine.wake is None else f", got {machine.wake:g}, which has passed"
            raise RuntimeError(
                f"policy {machine.policy.name!r} planned nothing while nothing is under way: "
                f"expected a run, a draft, or a time to wake at that is still to come{passed}"
            )

    def _next(self, declined: set[int]) -> Machine | None:
        """Return whose turn it is among those that have not declined; None if there is none."""
        drafter, depth = self._drafter_is_free, self._deepest
        candidates = [
            machine
            for request, machine in self._machines.items()
            if request not in declined and machine.finished is None
            if drafter or _may_run(machine, depth)
        ]
        return min(candidates, key=self._rank, default=None)

    def _rank(self, machine: Machine) -> tuple[int, int, int]:
        request = machine.request.id
        return _depth(machine), self._last_run[request], self._last_draft[request]

    @property
    def _deepest(self) -> float:
        """How many runs a request may have in flight already that starts another one, if any."""
        machines = self._machines.values()
        if any(machine.flight.waiting for machine in machines):
            return -1
        stages = max((machine.flight.stages for machine in machines), default=0)
        idle = len(machines) == 1 or sum(len(machine.runs) for machine in machines) < stages
        return math.inf if idle else 0

    @property
    def _drafter_is_free(self) -> bool:
        return not any(machine.drafting for machine in self._machines.values())

    def _count(self) -> None:
        for machine in self._machines.values():
            machine.sharers = len(self._machines)
            machine.may_run = machine.may_draft = machine.sharers == 1


def _may_run(machine: Machine, deepest: float) -> bool:
    # A prompt is nothing to speculate on: it has to be read.
    return deepest >= (0 if machine.prefilling else _depth(machine))


def _depth(machine: Machine) -> int:
    """Return how many runs in flight may still bring this request tokens."""
    return sum(not run.done() for run in machine.runs.values())
