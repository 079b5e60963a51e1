"""How much a node is given to hold: no more than an honest head ever asks for.

A head has so many requests at once, each with a KV cache; conversations between two turns count
among them. Runs come over other links than the word that a cache is free, so that a run may be
ahead of that word: it waits here until there is room, with what is behind it. Where a head keeps
to its own bounds this ends, and what goes beyond them all ends the link.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeinfer_dask.protocol.messages import Release, StartDraft, StartRun, most_runs
from pipeinfer_dask.runtime.links.links import LinkError
from pipeinfer_dask.runtime.links.runs import RunPass

if TYPE_CHECKING:
    from pipeinfer_dask.runtime.nodes.compute import ComputeThread

JobT = TypeVar("JobT", bound=RunPass | StartDraft)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that an honest head has a node hold.

    Attributes
    ----------
    requests : int
        Requests of which something is under way, and KV caches.
    jobs : int
        Runs or drafts under way.
    """

    requests: int
    jobs: int

    @classmethod
    def of_stage(cls, max_concurrent: int, stages: int) -> Bounds:
        """Return those of each of so many stages, for so many requests at once."""
        return cls(max_concurrent, max_concurrent * most_runs(stages))

    @classmethod
    def of_drafter(cls, max_concurrent: int) -> Bounds:
        """Return those of a drafter: a request has one draft at a time."""
        return cls(max_concurrent, max_concurrent)

    @property
    def waiting(self) -> int:
        """What may wait before the thread that computes: jobs, and what frees their caches.

        Of every request it is told once that it is over, and once of a conversation's cache that
        gives way. A head that measures has one job more.
        """
        return self.jobs + 2 * self.requests + 1


class Room(Generic[JobT]):
    """Passes jobs on to a thread while there is room for them. Belongs to the node's loop.

    Parameters
    ----------
    bounds : Bounds
    thread : ComputeThread
    """

    def __init__(self, bounds: Bounds, thread: ComputeThread[Any, JobT]) -> None:
        self._bounds = bounds
        self._thread = thread
        self._early: deque[JobT] = deque()
        # Those that the thread has been given, and not been told to let go of.
        self._requests: set[int] = set()
        # Each with the last request that named it.
        self._caches: dict[int, int] = {}

    def take(self, job: JobT) -> None:
        """Pass a job on, now or when there is room.

        Raises
        ------
        LinkError
            There are more than can be under way.
        """
        self._check(self._bounds.waiting)
        self._early.append(job)
        self._pass_on()

    def release(self, told: Release) -> None:
        """Have the thread let go of a request, and of its cache, that nobody needs any more.

        A cache that a later request has by now stays: a conversation gave way, and goes on already.
        """
        cache, known = told.cache, told.request in self._requests
        self._requests.discard(told.request)
        if cache is not None and self._caches.get(cache, math.inf) <= told.request:
            del self._caches[cache]
        else:
            cache = None
        if known or cache is not None:
            self._thread.submit(replace(told, cache=cache))
        else:  # nothing to wait for, and so nothing that could pile up
            self._thread.cancelled.over(told.request)
        self._pass_on()

    def renew(self) -> None:
        """Forget all: the thread is told to let go of it.

        Raises
        ------
        LinkError
            It has been told too often, and does not get there.
        """
        # What was there before may be before it, too.
        self._check(2 * self._bounds.waiting)
        self._early.clear()
        self._requests.clear()
        self._caches.clear()

    def _check(self, most: int) -> None:
        if len(self._early) + self._thread.waiting >= most:
            raise LinkError(
                f"expected at most {self._bounds.jobs} runs or drafts under way, of "
                f"{self._bounds.requests} requests, got more"
            )

    def _pass_on(self) -> None:
        while self._early:
            job = self._early[0]
            asked = job.run if isinstance(job, RunPass) else job
            if not self._has_room(asked):
                return
            self._requests.add(asked.request)
            self._caches[asked.cache] = asked.request
            self._thread.submit(self._early.popleft())

    def _has_room(self, asked: StartRun | StartDraft) -> bool:
        most = self._bounds.requests
        return (asked.request in self._requests or len(self._requests) < most) and (
            asked.cache in self._caches or len(self._caches) < most
        )
