"""As many jobs as are wanted, however often one is lost, and what the queue says meanwhile."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping

from pipeinfer_dask.hpc.jobs import Jobs, SubmitError
from pipeinfer_dask.hpc.queues import ASK_S, JobState
from pipeinfer_dask.hpc.scaling import Floor

logger = logging.getLogger(__name__)

GLANCE_S = 1.0
"""Lost workers are looked for so often."""
LONGEST_PAUSE_S = 60.0
"""Where job after job is refused or fails, the next one is submitted so much later at most."""
SUBMIT_S = 120.0
"""A queue that takes longer to take a job is told of."""


class Keeper:
    """Submits a job anew for each one that is lost. Belongs to the cluster's loop.

    Parameters
    ----------
    jobs : Jobs
    patience : float, seconds
        A worker may come back in its job, by its nanny, for so long. One whose job has ended
        is replaced at once.
    floor : Floor
        What its engine needs of the cluster, if that scales itself.
    """

    def __init__(self, jobs: Jobs, patience: float, floor: Floor) -> None:
        self._jobs = jobs
        self._patience = patience
        self._floor = floor
        self._seen: set[str] = set()  # jobs that have had a worker
        self._since: dict[str, float] = {}  # when they lost it
        self._waiting: tuple[JobState, ...] = ()
        self._told: dict[str, str] = {}
        self._asked = -math.inf
        self._owed = 0  # jobs that were lost, and for which none has been submitted yet
        self._untaken = 0  # jobs that were submitted, and that the queue has not taken yet
        self._pause = GLANCE_S
        self._ready = -math.inf
        self._refusal = ""
        self._refused = ""  # the same, until a job is taken

    @property
    def lacking(self) -> tuple[JobState, ...]:
        """What the queue last said of jobs that have no worker, those that it refused included."""
        state = JobState("(none)", f"refused ({self._refused})", ended=True)
        refused = self._owed + self._untaken if self._refused else 0
        return (*self._waiting, *[state] * refused)

    async def keep(self) -> None:
        """Look after the jobs until the cluster is closed, whatever one look at them ends in."""
        said = ""
        while self._jobs.running:
            words = ""
            try:
                await self._glance(time.monotonic())
            except Exception as error:  # dask-jobqueue's, or a queue's that nobody has thought of
                words = f"{type(error).__name__}: {error}"
                if words != said:
                    logger.warning("jobs could not be looked after, tries again: %s", words)
            said = words
            await asyncio.sleep(GLANCE_S)

    async def _glance(self, now: float) -> None:
        lost = await self._lost(now)
        refused = self._jobs.refused()  # until now they were wanted, or a scaling would want others
        if refused:
            words = self._refusal or "it has not told us why"
            logger.warning("the queue takes no job, %g s later again: %s", self._pause, words)
            self._refused = words
        if refused or lost - self._seen:
            self._ready = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        lost |= refused
        # Dask itself gives up a job whose worker stays away for long.
        new = self._jobs.unsubmitted
        self._owed, self._untaken = self._owed + len(lost), 0
        if self._floor.scales:  # what is more than it needs is for the cluster to say
            self._owed = min(self._owed, self._jobs.short_of(self._floor.workers, lost))
        if now >= self._ready:
            # Before the lost ones are dropped, or one might get the name of one of them.
            new |= {self._jobs.add() for _ in range(self._owed)}
            self._untaken, self._owed = self._owed, 0
        self._jobs.drop(lost)
        self._floor.hold(paused=now < self._ready)
        if new or lost:
            await self._submit()

    async def _lost(self, now: float) -> set[str]:
        """Return the jobs that are lost, in the sense that others have to take their place."""
        here, wanted = self._jobs.with_worker(), self._jobs.wanted
        submitted = wanted - self._jobs.unsubmitted - self._jobs.refused()
        if here - self._seen:
            self._pause = GLANCE_S  # what is submitted now runs
        self._seen = (self._seen | here) & submitted
        away = self._seen - here
        news = away - self._since.keys()
        self._since = {name: self._since.get(name, now) for name in away}
        if not submitted - here:
            self._waiting = ()
            return set()
        if not news and now - self._asked < ASK_S:
            return set()
        self._asked = now
        states = await self._jobs.waiting()
        self._waiting = tuple(states.values())
        lost = {
            name
            for name, state in states.items()
            # Another engine on this cluster may have replaced it meanwhile.
            if name in submitted & self._jobs.wanted
            and (state.ended or now - self._since.get(name, now) > self._patience)
        }
        self._tell(lost, states)
        return lost

    async def _submit(self) -> None:
        self._refusal = ""
        try:
            async with asyncio.timeout(SUBMIT_S):
                await self._jobs.correct()
        except SubmitError as refused:
            self._refusal = self._refused = str(refused)
        except TimeoutError:
            logger.warning("the queue has not taken a job within %g s", SUBMIT_S)
        else:
            if self._untaken:
                self._refused = ""
        self._untaken = len(self._jobs.refused())

    def _tell(self, lost: set[str], states: Mapping[str, JobState]) -> None:
        """Tell the user what is lost, and what the queue says of what is to take its place."""
        for name in lost:
            logger.warning("%s is lost (%s): another job is submitted", name, states[name])
        told = {name: str(states[name]) for name in states.keys() - lost - self._seen}
        for name, words in told.items():
            if self._told.get(name) != words:
                logger.warning("waits for the worker of %s: %s", name, words)
        self._told = told
