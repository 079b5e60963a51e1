"""The threads that compute: one for each stage, one for the draft model.

Runs and drafts are computed in a thread of their own, in the order in which they
came, and never on an event loop: a loop that is busy computing could not hear a
cancellation. The threads are the same for every driver; drivers differ only in
where results are delivered.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, Protocol, TypeVar

from pipeinfer_dask.drafting.expansion import expansion_of
from pipeinfer_dask.models.stage import DraftModel, Stage, StageOutput
from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    CancelDraft,
    CancelRuns,
    Drafted,
    Prune,
    Release,
    Span,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.links.runs import RunPass

ModelT = TypeVar("ModelT", bound="Caching")
JobT = TypeVar("JobT")
T = TypeVar("T")

NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED"),
    "can't start new thread",
)
"""What errors of torch say, of CPUs, of GPUs and of the libraries that it calls there; and what
Python says where there is no room for a stack."""


MOST_CANCELLED = 1 << 16
"""Runs, and places in runs, that may wait to be skipped: more than can be in flight."""


class Caching(Protocol):
    """What a stage and a draft model have in common."""

    def release(self, cache: int) -> None:
        """Let go of a KV cache."""
        ...


class Cancellations:
    """Numbers of runs (or drafts), and places in runs, that nobody waits for any more.

    Written by whoever hears the control link, read by the compute thread before
    each layer. Keys are (generation, request, number): within a request they only grow,
    so that an entry which can't be met any more is recognised and dropped.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._keys: set[tuple[int, int, int]] = set()
        self._places: dict[tuple[int, int, int], set[int]] = {}
        self._passed: dict[int, tuple[int, int, int]] = {}

    def add(self, generation: int, request: int, numbers: tuple[int, ...]) -> None:
        """Skip these runs. A `ValueError` if that is more than can be in flight."""
        with self._lock:
            keys = {(generation, request, number) for number in numbers} - self._keys
            self._check(new := {key for key in keys if self._to_come(key)})
            self._keys |= new

    def prune(self, generation: int, request: int, number: int, places: Iterable[int]) -> None:
        """Leave out these places of a run's batch. A `ValueError` if these are too many."""
        key = (generation, request, number)
        with self._lock:
            if self._to_come(key):
                self._check(new := {*places})
                self._places.setdefault(key, set()).update(new)

    def pruned(self, key: tuple[int, int, int]) -> frozenset[int]:
        """Return the places of a run's batch that nobody waits for."""
        with self._lock:
            return frozenset(self._places.get(key, ()))

    def passed(self, key: tuple[int, int, int]) -> None:
        with self._lock:
            self._passed[key[1]] = key
            self._keys = {other for other in self._keys if self._to_come(other)}
            self._places = {other: p for other, p in self._places.items() if self._to_come(other)}

    def over(self, request: int) -> None:
        """Forget a request of which nothing comes any more."""
        with self._lock:
            self._passed.pop(request, None)
            self._keys = {key for key in self._keys if key[1] != request}
            self._places = {key: p for key, p in self._places.items() if key[1] != request}

    def clear(self) -> None:
        """Forget all requests: nothing comes of any."""
        with self._lock:
            self._passed.clear()
            self._keys = set()
            self._places = {}

    def _check(self, new: Sized) -> None:
        """Keep no more than runs can be in flight: what a client makes up would pile up here."""
        held = len(self._keys) + sum(map(len, self._places.values())) + len(self._places)
        if held + len(new) > MOST_CANCELLED:
            raise ValueError(f"expected at most {MOST_CANCELLED} runs and tokens to skip, got more")

    def _to_come(self, key: tuple[int, int, int]) -> bool:
        return key > self._passed.get(key[1], (-1, -1, -1))

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys) + len(self._places)


@dataclass(frozen=True, slots=True)
class _Renewal:
    """Stands behind all runs of before a generation."""

    done: Callable[[], None]


class ComputeThread(ABC, Generic[ModelT, JobT]):
    """A thread that loads a model, then works off jobs in order.

    Parameters
    ----------
    load : callable
        Makes the model. Called in the thread itself, so that settings which belong
        to a thread, such as torch's thread count, are those of the one that computes.
    failed : callable
        Called in the thread with the exception that ended it.
    name : str
        The thread's name.
    """

    def __init__(
        self, load: Callable[[], ModelT], *, failed: Callable[[Exception], None], name: str
    ) -> None:
        # Only the thread itself holds the model: what is closed takes no memory.
        self.loaded: Future[None] = Future()
        """Done when the model stands, or with what kept it from it."""
        # Who awaits it may give up, and must not be able to cancel it for the thread.
        self.loaded.set_running_or_notify_cancel()
        self.cancelled = Cancellations()
        self.caches: set[int] = set()
        """KV caches that the model holds. Only the thread itself changes them."""
        self._load = load
        self._failed = failed
        self._jobs: SimpleQueue[JobT | Release | _Renewal | None] = SimpleQueue()
        self._closing = False
        self._moved: float | None = None
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: JobT | Release) -> None:
        self._jobs.put(job)

    @property
    def waiting(self) -> int:
        """Jobs that it has not turned to yet."""
        return self._jobs.qsize()

    @property
    def moved(self) -> float | None:
        """When it last moved, from layer to layer, by `time.monotonic`; None while it is idle."""
        return self._moved

    @property
    def stalled(self) -> float:
        """Seconds for which it has not moved; 0 while there is no job."""
        moved = self._moved
        return 0.0 if moved is None else max(1e-9, time.monotonic() - moved)

    def close(self, timeout: float | None = 10.0) -> None:
        """End the thread at its next layer, and wait for it."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            model = self._load()
        except BaseException as error:
            self.loaded.set_exception(_reportable(error))
            return
        self.loaded.set_result(None)
        while (job := self._jobs.get()) is not None and not self._closing:
            self._moved = time.monotonic()
            try:
                if isinstance(job, Release):
                    self._release(model, job)
                elif isinstance(job, _Renewal):
                    self._renew(model)
                    job.done()
                else:
                    self._compute(model, job)
                self._moved = None
            except BaseException as error:
                self._failed(_reportable(error))
                return

    def _release(self, model: ModelT, job: Release) -> None:
        self.cancelled.over(job.request)
        if job.cache is not None:
            self.caches.discard(job.cache)
            model.release(job.cache)

    def _renew(self, model: ModelT) -> None:
        """Let go of all that belongs to runs of before.

        A run that came after its request's release has made a cache that nobody would release.
        """
        self.cancelled.clear()
        for cache in self.caches:
            model.release(cache)
        self.caches.clear()

    @abstractmethod
    def _compute(self, model: ModelT, job: JobT) -> None: ...


def lacks_memory(error: BaseException) -> bool:
    """Return whether memory was refused, that another worker may have."""
    # Libraries say so in words alone, but for some on GPUs.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def _reportable(error: BaseException) -> Exception:
    """Return an error that ends neither the loop nor the worker that it is reported to."""
    if isinstance(error, Exception):
        return error
    report = RuntimeError(f"{type(error).__name__}: {error}")
    report.__cause__ = error
    return report


class StageThread(ComputeThread[Stage, RunPass]):
    """Computes runs on one stage.

    Parameters
    ----------
    deliver : callable
        Called in the thread with each run, computed or skipped, in order.
    taken : callable, optional
        Called in the thread when it turns to a run.

    Attributes
    ----------
    stale : int
        Runs dropped that came after they had been given up.
    """

    def __init__(
        self,
        load: Callable[[], Stage],
        *,
        deliver: Callable[[RunPass], None],
        taken: Callable[[StartRun], None] | None = None,
        failed: Callable[[Exception], None],
        name: str,
    ) -> None:
        self._deliver = deliver
        self._taken = taken
        self._generation = 0
        self.stale = 0
        super().__init__(load, failed=failed, name=name)

    def renew(self, generation: int, done: Callable[[], None]) -> None:
        """Drop all runs of before a generation, the one that is being computed too.

        ``done`` is called in the thread when the last of them is gone.
        """
        self._generation = generation
        self._jobs.put(_Renewal(done))

    def cancel(self, command: CancelRuns) -> None:
        self.cancelled.add(command.generation, command.request, command.runs)

    def prune(self, command: Prune) -> None:
        for run, places in zip(command.runs, command.tokens, strict=True):
            self.cancelled.prune(command.generation, command.request, run, places)

    def _compute(self, model: Stage, job: RunPass) -> None:
        run = job.run
        key = (run.generation, run.request, run.run)

        def dropped() -> bool:
            return self._closing or run.generation < self._generation

        def stopped() -> bool:
            self._moved = time.monotonic()
            return key in self.cancelled or dropped()

        if dropped():
            self.stale += 1
            return
        if self._taken is not None:
            self._taken(run)
        began = time.monotonic()
        output = StageOutput(None, None, 0)
        if not job.skipped and not stopped():
            job = job.without(self.cancelled.pruned(key))
            # Only a run that picks after each of its tokens is ever pruned.
            picks = run.picks - len(job.left_out)
            self.caches.add(run.cache)
            output = model.run(
                job.batch,
                job.hidden,
                picks=picks,
                stopped=stopped,
                sampling=run.sampling,
                cache=run.cache,
            )
        if dropped():
            return  # nobody has cancelled this run: it must not look as if
        self.cancelled.passed(key)
        span = Span(began, time.monotonic(), output.layers)
        tokens = output.tokens
        self._deliver(
            replace(
                job,
                hidden=output.hidden,
                tokens=tokens if tokens is None else job.whole(tokens, LEFT_OUT),
                spans=(*job.spans, span),
                skipped=output.hidden is None and tokens is None,
                logprobs=job.whole(output.logprobs, None),
            )
        )


class DrafterThread(ComputeThread[DraftModel, StartDraft]):
    """Grows drafts on the draft model.

    Parameters
    ----------
    deliver : callable
        Called in the thread with the answer to each draft.
    """

    def __init__(
        self,
        load: Callable[[], DraftModel],
        *,
        deliver: Callable[[Drafted], None],
        failed: Callable[[Exception], None],
        name: str,
    ) -> None:
        self._deliver = deliver
        super().__init__(load, failed=failed, name=name)

    def send(self, command: StartDraft | CancelDraft | Release) -> None:
        """Carry out a command."""
        if isinstance(command, CancelDraft):
            self.cancelled.add(command.generation, command.request, (command.draft,))
        else:
            self.submit(command)

    def _compute(self, model: DraftModel, job: StartDraft) -> None:
        key = (job.generation, job.request, job.draft)

        def stopped() -> bool:
            self._moved = time.monotonic()
            return self._closing or key in self.cancelled

        began = time.monotonic()
        self.caches.add(job.cache)
        expansion = expansion_of(job)
        passes = 0
        while (step := expansion.next_batch()) is not None:
            batch, frontier = step
            candidates = model.candidates(
                batch,
                frontier,
                width=expansion.width,
                stopped=stopped,
                sampling=job.sampling,
                cache=job.cache,
            )
            if candidates is None:
                break
            passes += 1
            expansion.grow(candidates)
        self.cancelled.passed(key)
        self._deliver(
            Drafted(
                job.request,
                job.generation,
                job.draft,
                tuple(expansion.proposals),
                tuple(expansion.evaluated),
                Span(began, time.monotonic(), passes),
            )
        )
