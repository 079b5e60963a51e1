"""The head: drives the machines of all requests that run over one pipeline.

It lives on one event loop and decides nothing. Events come in, the machines answer with
commands, the pipeline carries them out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.sharing import Sharing
from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import (
    AWAY,
    Begin,
    Command,
    Commit,
    DrafterLost,
    Event,
    Finish,
    PipelineEvent,
    StageLost,
    Stop,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.runtime.head.conversation import Caches, Conversation
from pipeinfer_dask.runtime.head.measuring import measure_costs
from pipeinfer_dask.runtime.pipeline.interface import Pipeline, PipelineCommand
from pipeinfer_dask.simulation.costs import Costs

MAX_CONCURRENT = 4
"""Generations that share a pipeline, unless somebody says otherwise."""


class PipelineBusyError(RuntimeError):
    """Something was asked for that needs an idle pipeline."""


class Served(Protocol):
    """What a head serves: a `Generation`, or what stands for one of a client elsewhere."""

    request: Request
    policy: Policy
    stops: Callable[[int], bool] | None
    conversation: Conversation | None

    def wait_in_line(self, position: int) -> None:
        """Note that so many come before it, itself included."""
        ...

    def begin(self) -> None:
        """Note that the head has turned to it."""
        ...

    def recover(self) -> None:
        """Note that a lost node is being replaced."""
        ...

    def record(self, time: float, what: Event | Command) -> None:
        """Note what happened, and when."""
        ...

    def finish(self, reason: str) -> None:
        """Note that no token comes any more."""
        ...

    def fail(self, error: BaseException) -> None:
        """Note that no token comes any more, though more were to come."""
        ...


class Head:
    """Serves generations, some at once and the others in the order in which they were started.

    Parameters
    ----------
    pipeline : Pipeline
    loop : asyncio.AbstractEventLoop
        All methods but `start`, `cancel` and `forget` are called on it.
    max_concurrent : int
        Most generations that run at once, and most KV caches that each stage holds.
    failed : callable, optional
        Told, once, what the pipeline is lost by.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        loop: asyncio.AbstractEventLoop,
        max_concurrent: int = MAX_CONCURRENT,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.loop = loop
        self.max_concurrent = max_concurrent
        self.lost: Exception | None = None
        self.sharing = Sharing()
        self._queue: deque[Served] = deque()
        self._running: dict[int, Served] = {}
        self._alarms: dict[int, asyncio.TimerHandle] = {}
        self._caches = Caches(max_concurrent, pipeline.send)
        self._borrower: Callable[[Exception], None] | None = None
        self._failed = failed
        self._guard = loop.create_task(self._outlive())
        pipeline.listen(self._report, self._lost)

    # --- from any thread ----------------------------------------------------------

    def start(self, generation: Served) -> None:
        """Queue a generation."""
        self.loop.call_soon_threadsafe(self._start, generation)

    def cancel(self, generation: Served) -> None:
        """Stop a generation, running or queued."""
        # A loop that is closed has failed all generations: there is nothing to stop.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop, generation)

    def forget(self, conversation: Conversation) -> None:
        """Give a conversation's KV cache to others, at once or when its generation is over."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._caches.close, conversation)

    # --- on the loop ----------------------------------------------------------------

    def end(self, error: Exception) -> None:
        """Fail all generations, and any that is started later."""
        self._lost(error)
        self._guard.cancel()

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure what each part of the pipeline costs: see `measure_costs`."""
        drafts = drafter and self.pipeline.draft_generation != AWAY
        return await measure_costs(self, request, drafter=drafts)

    def send(self, command: PipelineCommand) -> None:
        """Have the pipeline carry out a command, and take note of what is to come of it."""
        self.pipeline.send(command)
        self._caches.sent(command)

    def drop(self, request: int, cache: int) -> None:
        """Give up a cache, once nothing of this request is under way."""
        self._caches.drop(request, cache)

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
            Told of the loss of a node, of the pipeline's end, or of ours.

        Raises
        ------
        PipelineBusyError
            If a generation runs or waits, or somebody has it already.
        Exception
            What the pipeline was lost by.
        """
        if self.lost is not None:
            raise self.lost
        if self._running or self._queue or self._borrower is not None:
            raise PipelineBusyError(
                "expected an idle pipeline, got a busy one: wait for what runs, or cancel it"
            )
        if self.pipeline.generation == AWAY:
            raise PipelineBusyError(
                "expected an idle pipeline, got one that recovers from a loss: wait, and try again"
            )

        def hear(event: Event) -> None:
            self._caches.heard(event)
            if isinstance(event, StageLost | DrafterLost):
                lost(ConnectionError(event.reason))
            elif not isinstance(event, PipelineEvent):
                report(event)

        # On a GPU there may be no memory for one cache more.
        self._caches.make_room(self.max_concurrent - 1)
        self._borrower = lost
        self.pipeline.listen(hear, self._lost)
        try:
            yield
        finally:
            self._borrower = None
            self.pipeline.listen(self._report, self._lost)
            self._admit()

    async def _outlive(self) -> None:
        """Fail what is left when the loop ends, as a client's does that is closed."""
        try:
            await self.loop.create_future()
        finally:
            self._lost(
                ConnectionError("the event loop has ended, as when your Dask client was closed")
            )

    def _start(self, generation: Served) -> None:
        if self.lost is not None:
            generation.fail(self.lost)
            return
        self._queue.append(generation)
        self._admit()

    def _stop(self, generation: Served) -> None:
        if generation.request.id in self._running:
            self._report(Stop(generation.request.id))
        elif generation in self._queue:
            self._queue.remove(generation)
            generation.finish("stopped")
            self._admit()

    def _admit(self) -> None:
        """Let those at the front of the queue begin while there is room."""
        while self._queue and self._borrower is None:
            generation, running = self._queue[0], len(self._running)
            request = generation.request
            if not self._caches.has_room(running, request.cache_id):
                break
            self._queue.popleft()
            self._running[request.id] = generation
            held = self._caches.take(
                generation.conversation,
                running=running,
                generation=self.pipeline.generation,
                draft_generation=self.pipeline.draft_generation,
            )
            machine = Machine(
                request,
                generation.policy,
                generation=self.pipeline.generation,
                draft_generation=self.pipeline.draft_generation,
                stops=generation.stops,
                held=held,
            )
            self.sharing.join(machine)
            self._show_status(generation)
            self._report(Begin(request.id))
        for place, generation in enumerate(self._queue, 1):
            generation.wait_in_line(place)

    def _show_status(self, generation: Served) -> None:
        if self.pipeline.generation == AWAY:
            generation.recover()
        else:
            generation.begin()

    def _report(self, event: Event) -> None:
        now = time.monotonic()
        for request, generation in self._running.items():
            if isinstance(event, PipelineEvent) or event.request == request:
                if isinstance(event, PipelineEvent):
                    self._show_status(generation)
                generation.record(now, event)
        over, room = len(self._running), self._caches.heard(event)
        self._carry_out(self.sharing.handle(event, now), now)
        if room or len(self._running) < over:
            self._admit()

    def _carry_out(self, commands: Iterator[Command], now: float) -> None:
        try:
            for command in commands:
                generation = self._running[command.request]
                generation.record(now, command)
                match command:
                    case Commit():
                        pass  # the generation has taken it
                    case Finish():
                        self._finish(generation, command)
                    case WakeAt():
                        self._wake_at(command)
                    case _:
                        self.send(command)
        except Exception as error:  # a bug, but the caller must not wait for ever
            failed = self._running[self.sharing.current]
            self._drop(failed)
            self.drop(failed.request.id, failed.request.cache_id)
            failed.fail(error)  # even if its machine has ended: the last of it may not be there
            self._carry_out(self.sharing.plan(now), now)

    def _drop(self, generation: Served) -> str | None:
        """Give up a request that runs; return why its text has ended, None if it has not."""
        request = generation.request.id
        del self._running[request]
        self._silence(request)
        reason = self.sharing.machines[request].finished
        self.sharing.leave(request)
        return reason

    def _finish(self, generation: Served, command: Finish) -> None:
        del self._running[command.request]
        self._silence(command.request)
        machine = self.sharing.machines[command.request]
        self._caches.give_back(machine, generation.conversation)
        generation.finish(command.reason)

    def _silence(self, request: int) -> None:
        if (alarm := self._alarms.pop(request, None)) is not None:
            alarm.cancel()

    def _wake_at(self, command: WakeAt) -> None:
        """Set a request's one alarm; a loop's clock is the monotonic one, as ours is."""
        self._silence(command.request)
        self._alarms[command.request] = self.loop.call_at(
            command.time, self._report, Woken(command.request)
        )

    def _lost(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        running, queued = [*self._running.values()], [*self._queue]
        self._queue.clear()
        for generation, reason in [(one, self._drop(one)) for one in running]:
            if reason is None:
                generation.fail(error)
            else:  # its text is whole: only for what is in flight was still waited
                generation.record(time.monotonic(), Finish(generation.request.id, reason))
                generation.finish(reason)
        for generation in queued:
            generation.fail(error)
        if self._borrower is not None:
            self._borrower(error)
        if self._failed is not None:
            self._failed(error)
