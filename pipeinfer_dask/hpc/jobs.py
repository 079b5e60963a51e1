"""The jobs of a cluster: submitted, asked about, and given up."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import psutil
from distributed import Client
from distributed.core import Status

from pipeinfer_dask.hpc.queues import SYSTEMS, JobState, states_of

if TYPE_CHECKING:
    from dask_jobqueue import JobQueueCluster

ANSWER_S = 30.0
"""So long may the workers take to say how old they are."""


class SubmitError(RuntimeError):
    """The queue did not take a job. The text is the queue's own."""


class Jobs:
    """The jobs of a cluster of dask-jobqueue. All coroutines are for the cluster's loop.

    Parameters
    ----------
    cluster : JobQueueCluster
    """

    def __init__(self, cluster: JobQueueCluster) -> None:
        self._cluster: Any = cluster
        assert cluster.job_cls is not None
        self._system: str = cluster.job_cls.config_name
        self._workers_per_job = len(self._cluster.new_spec.get("group", [""]))

    @classmethod
    def of(cls, cluster: Any) -> Self | None:
        """Return the jobs of a cluster; None where it has none."""
        jobqueue = sys.modules.get("dask_jobqueue")
        if jobqueue is None or not isinstance(cluster, jobqueue.JobQueueCluster):
            return None
        return cls(cluster)

    def walltime(self) -> float | None:
        """Return how long each job may run, in seconds; None where nothing is set.

        Raises
        ------
        ValueError
            If that can't be read.
        """
        if self._system not in SYSTEMS:
            return None
        return SYSTEMS[self._system].walltime_of(self._cluster.job_script())

    @property
    def running(self) -> bool:
        """Whether the cluster has begun, and has not ended."""
        return bool(self._cluster.status == Status.running)

    @property
    def wanted(self) -> set[str]:
        """The names of all jobs that are wanted."""
        return set(self._cluster.worker_spec)

    @property
    def unsubmitted(self) -> set[str]:
        """Those that are wanted, and that Dask has not submitted, or has given up."""
        return self.wanted - set(self._cluster.workers)

    async def submit(self, workers: int, timeout_s: float) -> None:
        """Have as many jobs in the queue as so many workers need. Those that ended don't count.

        Raises
        ------
        SubmitError
            If the queue does not take one.
        TimeoutError
            If it says nothing for so long.
        """
        async with asyncio.timeout(timeout_s):
            await self.correct()  # or one that is being submitted would count as ended
            ended = {name for name, state in (await self.waiting()).items() if state.ended}
            others = self.refused()  # another engine may still try to have them
            try:
                self.drop(ended | others)
                if ended | others:
                    await self.correct()
                for _ in range(self.short_of(workers)):
                    self.add()
                await self.correct()
            except SubmitError:
                self.drop(list(self.refused())[len(others) :])
                with suppress(SubmitError):
                    await self.correct()
                raise

    def refused(self) -> set[str]:
        """Return those that are wanted, and that the queue did not take."""
        refused = {name for name, job in self._cluster.workers.items() if job.job_id is None}
        for name in refused:
            # Or Dask would submit it once more whenever it looks, and complain of it at the end.
            self._cluster.workers[name].status = Status.failed
        return refused & self.wanted

    def short_of(self, workers: int, lost: Collection[str] = ()) -> int:
        """Return how many more jobs so many workers need, if the lost ones are dropped."""
        jobs = math.ceil(workers / self._workers_per_job)
        return max(0, jobs - len(self.wanted.difference(lost)))

    def add(self) -> str:
        """Want another job, and return its name; `correct` submits it."""
        specs = self._cluster.new_worker_spec()
        self._cluster.worker_spec.update(specs)
        (name,) = specs
        return str(name)

    def drop(self, names: Iterable[str]) -> None:
        """Want some jobs no longer; `correct` cancels what is left of them."""
        for name in names:
            self._cluster.worker_spec.pop(name, None)

    def with_worker(self) -> set[str]:
        """Return the names of all jobs that have a worker now."""
        workers = {str(worker.name) for worker in self._cluster.scheduler.workers.values()}
        if self._workers_per_job == 1:
            return workers & self.wanted
        endings = self._cluster.new_spec["group"]
        return {
            name for name in self.wanted if any(f"{name}{ending}" in workers for ending in endings)
        }

    async def waiting(self) -> dict[str, JobState]:
        """Return what the queue says of all jobs that it took, and that have no worker, by name."""
        here = self.with_worker() | self.refused()
        names = [name for name in self._cluster.worker_spec if name not in here]
        numbers = {
            name: str(job.job_id)
            for name in names
            if (job := self._cluster.workers.get(name)) is not None and job.job_id is not None
        }
        states = dict(
            zip(numbers, await states_of(self._system, list(numbers.values())), strict=True)
        )
        gone = JobState("(none)", "not in the queue", ended=True)
        return {name: states.get(name, gone) for name in names}

    async def correct(self) -> None:
        """Have what is in the queue agree with what is wanted.

        Who gives up waiting for it stops nothing: what is being submitted would be in the queue,
        and nobody would know of it.

        Raises
        ------
        SubmitError
            If the queue does not take a job, which is then one of the `refused`.
        """
        await asyncio.shield(asyncio.ensure_future(self._correct()))

    async def _correct(self) -> None:
        try:
            await self._cluster
        except (RuntimeError, OSError, ValueError) as refused:
            self.refused()
            raise SubmitError(_own_words(str(refused))) from refused


def _own_words(refusal: str) -> str:
    """Return what the queue itself wrote, of all that dask-jobqueue tells of a failed command."""
    _, _, errors = refusal.partition("stderr:\n")
    return " ".join((errors or refusal).split())


def check_runtime(walltime: float, least: float, ages: dict[str, float]) -> None:
    """Check that no job ends too soon.

    Parameters
    ----------
    walltime, least : float, seconds
        How long each job may run, and what it must have left.
    ages : dict of str to float
        By worker, how long its job has been running; empty before any has begun.

    Raises
    ------
    ValueError
        If one does.
    """
    worker, age = max(ages.items(), key=lambda item: item[1], default=("", 0.0))
    if walltime - age >= least:
        return
    ran = f" that has run for {age:.0f} s already ({worker})" if worker else ""
    raise ValueError(
        f"expected jobs with at least {least:.0f} s left to run, got a walltime of "
        f"{walltime:.0f} s{ran}: ask for a longer walltime, or lower least_runtime"
    )


def ages_of(client: Client) -> dict[str, float]:
    """Return how long the job of each worker has been running, in seconds.

    Raises
    ------
    TimeoutError
        If a worker does not answer.
    """

    def age() -> float:
        # Of its nanny, or of the job's shell: a worker itself may have been started anew.
        return time.time() - psutil.Process(os.getppid()).create_time()

    # It travels as its code. By its name, workers would import this module for it, and with that
    # torch and all else that an engine is made of: for seconds, on the loop that is to answer.
    try:
        ages: dict[str, float] = client.run(age, callback_timeout=ANSWER_S)
    except TimeoutError:
        raise TimeoutError(
            f"expected all workers to say within {ANSWER_S:g} s how long their jobs have run, but "
            "one is silent: see the cluster's dashboard, and cancel its job"
        ) from None
    return ages
