"""Waiting for workers, with what the queue says meanwhile, and no longer than allowed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distributed import Client
from tqdm.auto import tqdm

from pipeinfer_dask.hpc.jobs import Jobs
from pipeinfer_dask.hpc.queues import ASK_S, JobState
from pipeinfer_dask.runtime.nodes.loading import Loading, in_notebook
from pipeinfer_dask.runtime.planning.scheduler import known_workers

GLANCE_S = 0.1
"""The scheduler is asked for its workers so often."""


class JobError(RuntimeError):
    """A job was refused, or ended before its worker came. The text has the queue's words."""


class StartTimeoutError(TimeoutError):
    """The workers did not come in time. The text has the queue's words."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """How far the jobs are.

    Attributes
    ----------
    workers, wanted : int
        Workers that have come, and those that are waited for.
    seconds : float
        Since waiting began.
    jobs : tuple of JobState
        What the queue last said of jobs without a worker.
    """

    workers: int
    wanted: int
    seconds: float
    jobs: tuple[JobState, ...] = ()

    def __str__(self) -> str:
        words = Counter(state.words for state in self.jobs)
        jobs = ", ".join(f"{count} {word}" for word, count in words.items())
        return f"{self.workers} of {self.wanted} workers" + (f"; jobs: {jobs}" if jobs else "")


Progress = Callable[[Waiting | Loading], None]
"""Told of each step. Called on the cluster's event loop: it must not wait."""


async def wait_for_workers(
    client: Client,
    wanted: int,
    patience: float,
    jobs: Jobs | None = None,
    told: Callable[[Waiting], None] | None = None,
    scales: bool = False,
) -> None:
    """Wait until a cluster has so many workers.

    Parameters
    ----------
    client : Client
        This must run on its loop.
    wanted : int
    patience : float, seconds
    jobs : Jobs, optional
        Those that bring the workers.
    told : callable, optional
    scales : bool
        Whether the cluster scales itself.

    Raises
    ------
    StartTimeoutError
        If they have not come in time.
    JobError
        If a job has ended before its worker came.
    NoSchedulerError
        If there is no scheduler any more, or it does not answer.
    """
    began = time.monotonic()
    asked = -math.inf
    states: tuple[JobState, ...] = ()
    last = ""
    while True:
        seconds = time.monotonic() - began
        here = len(await known_workers(client))
        if here < wanted and jobs is not None and (seconds - asked > ASK_S or seconds > patience):
            states, asked = tuple((await jobs.waiting()).values()), seconds
        now = Waiting(here, wanted, seconds, states if here < wanted else ())
        if told is not None and str(now) != last:
            told(now)
        last = str(now)
        if here >= wanted:
            return
        if ended := [state for state in states if state.ended]:
            raise JobError(_failed(ended))
        if seconds > patience:
            raise StartTimeoutError(_late(now, patience, scales))
        await asyncio.sleep(GLANCE_S)


def _failed(ended: Sequence[JobState]) -> str:
    told = "; ".join(map(str, ended))
    text = f"expected a worker of each job, but {told}, before its worker came"
    if lines := next(filter(None, (state.last_lines() for state in ended)), ""):
        return f"{text}. Its log ends with:\n{lines}"
    where = ended[0].log or "the jobs' logs (log_directory= says where they go to)"
    return f"{text}: see {where}"


def _late(now: Waiting, patience: float, scales: bool) -> str:
    text = f"expected {now.wanted} workers within {patience:g} s, got {now.workers}"
    if not now.jobs:
        return f"{text}: start more workers, or allow more time by start_timeout"
    after = (
        "the cluster scales itself, and cancels those that it does not need"
        if scales
        else "the jobs stay in the queue"
    )
    return (
        f"{text}; of the others the queue says: {'; '.join(map(str, now.jobs))}. Ask for less, "
        f"or allow more time by start_timeout: {after}"
    )


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Callable[[Waiting], None] | None]:
    """Give who is to be told; True shows a bar, None does so in a notebook."""
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not in_notebook()):
        yield None
    else:
        with tqdm(desc="waiting for workers", unit="worker", leave=False) as bar:

            def tell(waiting: Waiting) -> None:
                bar.total = waiting.wanted
                bar.set_postfix_str(str(waiting))
                bar.update(waiting.workers - bar.n)

            yield tell
