"""The head: drives the machine over a pipeline, one request at a time.

It lives on one event loop and decides nothing. Events come in, the machine
answers with commands, the pipeline carries them out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.protocol.messages import (
    AWAY,
    Begin,
    Commit,
    Event,
    Finish,
    PipelineEvent,
    Release,
    StageLost,
    Stop,
    WakeAt,
    Woken,
)
from pipeinfer_dask.runtime.generation import Generation
from pipeinfer_dask.runtime.pipeline import Pipeline


class PipelineBusyError(RuntimeError):
    """Something was asked for that needs an idle pipeline."""


class Head:
    """Serves generations in the order in which they were started.

    Parameters
    ----------
    pipeline : Pipeline
    loop : asyncio.AbstractEventLoop
        All methods but `start` and `cancel` are called on it.
    """

    def __init__(self, pipeline: Pipeline, loop: asyncio.AbstractEventLoop) -> None:
        self.pipeline = pipeline
        self.loop = loop
        self.lost: Exception | None = None
        self.stale = 0
        self._queue: deque[Generation] = deque()
        self._current: Generation | None = None
        self._machine: Machine | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._borrower: Callable[[Exception], None] | None = None
        self._guard = loop.create_task(self._outlive())
        pipeline.listen(self._report, self._lost)

    # --- from any thread ----------------------------------------------------------

    def start(self, generation: Generation) -> None:
        """Queue a generation."""
        self.loop.call_soon_threadsafe(self._start, generation)

    def cancel(self, generation: Generation) -> None:
        """Stop a generation, running or queued."""
        # A loop that is closed has failed all generations: there is nothing to stop.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop, generation)

    # --- on the loop ----------------------------------------------------------------

    def end(self, error: Exception) -> None:
        """Fail all generations, and any that is started later."""
        self._lost(error)
        self._guard.cancel()

    @contextmanager
    def lend(
        self, report: Callable[[Event], None], lost: Callable[[Exception], None]
    ) -> Iterator[None]:
        """Let somebody else use the pipeline; generations that are started meanwhile wait.

        Parameters
        ----------
        report : callable
            Told of the pipeline's events instead of us.
        lost : callable
            Told of the loss of a stage, of the pipeline's end, or of ours.

        Raises
        ------
        PipelineBusyError
            If a generation runs or waits, or somebody has it already.
        Exception
            What the pipeline was lost by.
        """
        if self.lost is not None:
            raise self.lost
        if self._current is not None or self._queue or self._borrower is not None:
            raise PipelineBusyError(
                "expected an idle pipeline, got a busy one: wait for what runs, or cancel it"
            )
        if self.pipeline.generation == AWAY:
            raise PipelineBusyError(
                "expected an idle pipeline, got one that recovers from a loss: wait, and try again"
            )

        def hear(event: Event) -> None:
            if isinstance(event, StageLost):
                lost(ConnectionError(event.reason))
            elif not isinstance(event, PipelineEvent):
                report(event)

        self._borrower = lost
        self.pipeline.listen(hear, self._lost)
        try:
            yield
        finally:
            self._borrower = None
            self.pipeline.listen(self._report, self._lost)
            self._next()

    async def _outlive(self) -> None:
        """Fail what is left when the loop ends, as a client's does that is closed."""
        try:
            await self.loop.create_future()
        finally:
            self._lost(ConnectionError("the event loop has ended: was the client closed?"))

    def _start(self, generation: Generation) -> None:
        if self.lost is not None:
            generation.fail(self.lost)
            return
        self._queue.append(generation)
        self._next()

    def _stop(self, generation: Generation) -> None:
        if generation is self._current:
            self._report(Stop(generation.request.id))
        elif generation in self._queue:
            self._queue.remove(generation)
            generation.finish("stopped")

    def _next(self) -> None:
        if self._current is None and self._queue and self._borrower is None:
            self._current = generation = self._queue.popleft()
            self._machine = Machine(
                generation.request,
                generation.policy,
                generation=self.pipeline.generation,
                draft_generation=self.pipeline.draft_generation,
                stops=generation.stops,
            )
            self._show_status(generation)
            self._report(Begin(generation.request.id))

    def _show_status(self, generation: Generation) -> None:
        if self.pipeline.generation == AWAY:
            generation.recover()
        else:
            generation.begin()

    def _report(self, event: Event) -> None:
        machine, generation = self._machine, self._current
        if machine is None or generation is None:
            self.stale += not isinstance(event, PipelineEvent)
            return
        if isinstance(event, PipelineEvent):
            self._show_status(generation)
        try:
            now = time.monotonic()
            generation.record(now, event)
            for command in machine.handle(event, now):
                generation.record(now, command)
                match command:
                    case Commit():
                        pass  # the generation has taken it
                    case Finish():
                        self._current = self._machine = None
                        self._silence()
                        request = generation.request
                        over = Release(request.id, machine.generation, request.cache_id)
                        self.pipeline.send(over)
                        generation.finish(command.reason)
                        self._next()
                    case WakeAt():
                        self._wake_at(command)
                    case _:
                        self.pipeline.send(command)
        except Exception as error:  # a bug, but the caller must not wait for ever
            self._current = self._machine = None
            generation.fail(error)
            self._next()

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _wake_at(self, command: WakeAt) -> None:
        """Set the one alarm; a loop's clock is the monotonic one, as ours is."""
        self._silence()
        self._alarm = self.loop.call_at(command.time, self._report, Woken(command.request))

    def _lost(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._silence()
        failed = [self._current] if self._current is not None else []
        failed.extend(self._queue)
        self._current = self._machine = None
        self._queue.clear()
        for generation in failed:
            generation.fail(error)
        if self._borrower is not None:
            self._borrower(error)
