"""The client's end of a head on a worker: requests go there, what becomes of them comes back.

To its callers it is like a `Head`. Its generations hear all that the head records, a way later
and on the client's own clock, so whoever follows them sees what he would see with a head here.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from distributed import Client
from distributed.protocol.pickle import dumps

from pipeinfer_dask.runtime.head.conversation import Conversation
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.head_actor import HeadActor, HeadNode, PipelinePlan
from pipeinfer_dask.runtime.links.links import LinkError, Session
from pipeinfer_dask.runtime.links.wire import (
    Forget,
    Message,
    NodeLoading,
    Recorded,
    RequestEnded,
    RequestStatus,
    StopRequest,
)
from pipeinfer_dask.runtime.nodes.loading import Loading, Progress
from pipeinfer_dask.runtime.pipeline.assembled import Nodes, PipelineError, Seat
from pipeinfer_dask.runtime.pipeline.peers import Peer, Trouble
from pipeinfer_dask.simulation.costs import Costs
from pipeinfer_dask.trace.entries import earlier, read_entry

MEASURE_TIMEOUT_S = 300.0
"""How long the head may take to measure what its pipeline costs."""


@dataclass(frozen=True, slots=True)
class Start:
    """A generation that is to be started, and its policy as bytes: that may be of any class."""

    generation: Generation
    policy: bytes


Asked = Start | StopRequest | Forget


class RemoteHead:
    """Serves generations through a head on a worker. Made by `open`.

    Attributes
    ----------
    loop : asyncio.AbstractEventLoop
        The client's. All methods but `start`, `cancel` and `forget` are called on it.
    lost : Exception or None
        What the head or its pipeline was lost by.
    """

    def __init__(self, client: Client, deadline: float, progress: Progress | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost: Exception | None = None
        self._nodes = Nodes(client, deadline, report=self._heed, lost=self._head_lost)
        self._progress = progress
        # Each with what the head's clock was ahead of ours at its start: a trace keeps one clock.
        self._generations: dict[int, tuple[Generation, float]] = {}
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._asking: asyncio.Task[None] | None = None
        self._peer: Peer
        self._actor: Any

    @classmethod
    async def open(
        cls,
        client: Client,
        plan: PipelinePlan,
        worker: str,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Make the head on a worker, and wait until its pipeline stands.

        Parameters
        ----------
        client : Client
            This must run on its event loop.
        plan : PipelinePlan
        worker : str
            The address. The client needs a route to it, and to no other worker.
        progress : callable, optional
            Told of the loading of each node of the pipeline.

        Raises
        ------
        PipelineError
            The head or a node of its pipeline could not be made, or was lost meanwhile.
        """
        head = cls(client, plan.node_timeout, progress)
        seat = Seat("head", HeadNode, plan, worker, actor=HeadActor)
        try:
            await head._nodes.make(seat, Session.new())
            assert seat.peer is not None
            await seat.peer.find_clock()
            head._peer = seat.peer
            (head._actor,) = await head._nodes.actors()
            if head.lost is not None:
                raise head.lost
        except BaseException as error:
            await head.close()
            if isinstance(error, LinkError):
                raise PipelineError(str(error)) from error
            raise
        head._asking = head.loop.create_task(head._ask())
        return head

    # --- from any thread ----------------------------------------------------------

    def start(self, generation: Generation) -> None:
        """Queue a generation.

        Raises
        ------
        ValueError
            If its policy can't travel.
        """
        try:
            policy = dumps(generation.policy)
        except Exception as error:  # whatever an object raises that is pickled
            raise ValueError(
                f"expected a policy that can be pickled, as head='worker' needs it, got "
                f"{generation.strategy!r}: {error}"
            ) from error
        self.loop.call_soon_threadsafe(self._start, Start(generation, policy))

    def cancel(self, generation: Generation) -> None:
        """Stop a generation, running or queued."""
        # A loop that is closed has failed all generations: there is nothing to stop.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._put, StopRequest(generation.request.id))

    def forget(self, conversation: Conversation) -> None:
        """Give a conversation's KV cache to others, at once or when its generation is over."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._put, Forget(conversation.cache))

    # --- on the loop ----------------------------------------------------------------

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure what each part of the pipeline costs, its hops from the head on: see `Head`."""
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT_S):
                costs: Costs = await self._actor.measure_costs(request, drafter=drafter)
        except TimeoutError:
            raise PipelineError(
                f"expected costs within {MEASURE_TIMEOUT_S:g} s, got none from "
                f"{self._peer.title}: try again once the pipeline is idle"
            ) from None
        return costs

    def end(self, error: Exception) -> None:
        """Fail all generations, and any that is started later."""
        if self.lost is not None:
            return
        self.lost = error
        if self._asking is not None:
            self._asking.cancel()
        failed = list(self._generations.values())
        self._generations.clear()
        for generation, _ in failed:
            generation.fail(error)

    async def close(self) -> None:
        """Release the head, its pipeline and the link."""
        self.end(ConnectionError("the head was closed meanwhile"))
        await self._nodes.close()
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)

    def _start(self, start: Start) -> None:
        generation = start.generation
        if self.lost is not None:
            generation.fail(self.lost)
            return
        self._generations[generation.request.id] = (generation, self._peer.clock.offset)
        self._put(start)

    def _put(self, asked: Asked) -> None:
        self._asked.put_nowait(asked)

    async def _ask(self) -> None:
        """Hand on what is asked for, in order: actor calls and links keep none to each other."""
        try:
            while True:
                asked = await self._asked.get()
                if isinstance(asked, Start):
                    await self._hand_over(asked)
                else:
                    self._peer.send(asked)
        finally:  # the loop ends, as a client's does that is closed
            self.end(ConnectionError("the event loop has ended: was the client closed?"))

    async def _hand_over(self, start: Start) -> None:
        request = start.generation.request
        try:
            await self._actor.start(request, start.policy)
        except Exception as error:  # such as a policy whose class the worker does not know
            if self._generations.pop(request.id, None) is not None:
                start.generation.fail(error)

    # --- what the head says -----------------------------------------------------------

    def _heed(self, message: Message) -> None:
        match message:
            case NodeLoading():
                if self._progress is not None:
                    self._progress(
                        Loading(
                            message.node,
                            message.where,
                            message.nbytes,
                            message.total,
                            message.stands,
                        )
                    )
            case Recorded() | RequestStatus() | RequestEnded():
                if message.request in self._generations:
                    self._tell(message)
            case _:
                raise LinkError(f"expected news of a request, got {type(message).__name__}")

    def _tell(self, message: Recorded | RequestStatus | RequestEnded) -> None:
        generation, ahead = self._generations[message.request]
        match message:
            case Recorded():
                for entry in message.entries:
                    time, what = read_entry(entry)
                    generation.record(time - ahead, earlier(what, ahead))
            case RequestStatus(status="queued"):
                generation.wait_in_line(message.position)
            case RequestStatus(status="recovering"):
                generation.recover()
            case RequestStatus(status="running"):
                generation.begin()
            case RequestStatus():
                raise LinkError(f"expected a status of a request, got {message.status!r}")
            case RequestEnded():
                del self._generations[message.request]
                if message.failed:
                    generation.fail(PipelineError(message.reason))
                else:
                    generation.finish(message.reason)

    def _head_lost(self, seat: Seat, peer: Peer, trouble: Trouble, reason: str) -> None:
        if trouble is Trouble.GONE:  # nobody is to wait for what it would say at its end
            self._nodes.drop(peer.node)
        if trouble is not Trouble.FAILED:  # else the reason says which node it was
            reason = (
                f"{peer.title} is lost: {reason}. What has come of the texts is kept: open another "
                "engine, and go on from there"
            )
        self.end(PipelineError(reason))
