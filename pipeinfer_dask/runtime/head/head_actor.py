"""A head on a worker, next to its pipeline: it serves a client that may be far away.

It is a node like those that it drives, and lives and dies as they do. In a thread and on a
loop of its own it is a client of the cluster, opens the pipeline, and drives it as a head in
the user's process would. Requests come by the actor, as policies may be of any class; all that
becomes of them goes over the control link, and so does whatever has to be fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from dataclasses import astuple, dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

from distributed import Client, Security, Worker
from distributed.protocol.pickle import loads

from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import Command, Event
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.runtime.head.conversation import Conversation
from pipeinfer_dask.runtime.head.head import Head
from pipeinfer_dask.runtime.head.text import text_of
from pipeinfer_dask.runtime.links.links import Session
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.wire import (
    AwaitLoaded,
    Failed,
    Forget,
    Message,
    NodeLoading,
    Recorded,
    RequestEnded,
    RequestStatus,
    StopRequest,
)
from pipeinfer_dask.runtime.nodes.actors import Node, NodeActor
from pipeinfer_dask.runtime.nodes.loading import HERE, Loading, Progress
from pipeinfer_dask.runtime.nodes.pauses import short_collections
from pipeinfer_dask.runtime.nodes.specs import DraftSpec, StageSpec
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.recovery import Former, Recovery
from pipeinfer_dask.simulation.costs import Costs
from pipeinfer_dask.trace.entries import written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ENTRIES = 1 << 17
"""Entries of a trace travel together up to so many characters, and the one that is beyond."""
CLOSE_TIMEOUT_S = 20.0
"""How long to wait for the end of a pipeline, which waits for its own nodes."""


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What is to be opened, and how it is to be driven: by a head here, or on a worker.

    Attributes
    ----------
    stages : tuple of StageSpec
    stage_workers : tuple of str
    drafter : DraftSpec or None
    draft_worker : str or None
    recovery : Recovery
    node_timeout : float, seconds
    max_concurrent : int
    tokenizer : PreTrainedTokenizerBase or None
        For stop strings; without it no request may have any.
    session : Session or None
        Of the pipeline; by default a new one.
    former : Former or None
        What the pipeline takes the place of.
    """

    stages: tuple[StageSpec, ...]
    stage_workers: tuple[str, ...]
    drafter: DraftSpec | None
    draft_worker: str | None
    recovery: Recovery
    node_timeout: float
    max_concurrent: int
    tokenizer: PreTrainedTokenizerBase | None = None
    session: Session | None = None
    former: Former | None = None

    @property
    def name(self) -> str:
        """A short name for people to read."""
        return f"of {len(self.stages)} stages"

    def moved(self, places: Mapping[str, str], session: Session, former: Former | None) -> Self:
        """Return the plan of what is to take this one's place.

        Parameters
        ----------
        places : mapping of str to str
            Where nodes have got to meanwhile: workers by ``stage 0`` and so on, and ``drafter``.
        session : Session
        former : Former, optional
        """
        stages = enumerate(self.stage_workers)
        drafter = self.draft_worker
        return replace(
            self,
            stage_workers=tuple(places.get(f"stage {n}", worker) for n, worker in stages),
            draft_worker=drafter and places.get("drafter", drafter),
            session=session,
            former=former,
        )

    async def open(self, client: Client, progress: Progress | None) -> DaskPipeline:
        """Open the pipeline: see `DaskPipeline.open`."""
        return await DaskPipeline.open(
            client,
            self.stages,
            self.stage_workers,
            self.drafter,
            self.draft_worker,
            progress=progress,
            deadline=self.node_timeout,
            recovery=self.recovery,
            max_concurrent=self.max_concurrent,
            session=self.session,
            former=self.former,
        )


class Outbox:
    """What is to be told to the client: once in each turn of the loop, all that has come up.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        To which all methods belong.
    send : callable
        Sends a message, in order.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[Message], None]) -> None:
        self._loop = loop
        self._send = send
        self._messages: list[Message] = []
        # Entries that go into one message, as long as they are of one request.
        self._request = 0
        self._entries: list[str] = []
        self._length = 0
        self._closed = False

    def close(self) -> None:
        """Tell nothing any more: what ends with its worker does not end for the client."""
        self._closed = True

    def put(self, message: Message) -> None:
        """Send a message behind all that was put here before."""
        self._wake()
        self._close_entries()
        self._messages.append(message)

    def record(self, request: int, entry: str) -> None:
        """Send an entry of a request's trace."""
        self._wake()
        if request != self._request:
            self._close_entries()
        self._request = request
        self._entries.append(entry)
        self._length += len(entry)
        if self._length > MOST_ENTRIES:
            self._close_entries()

    def _close_entries(self) -> None:
        if self._entries:
            self._messages.append(Recorded(self._request, tuple(self._entries)))
            self._entries, self._length = [], 0

    def _wake(self) -> None:
        if not (self._messages or self._entries):
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._close_entries()
        messages, self._messages = self._messages, []
        for message in messages if not self._closed else ():
            self._send(message)


class Relayed:
    """A generation as a head on a worker has it: all that it is told goes to the client.

    Parameters
    ----------
    request, policy, stops, conversation
        As of a `Generation`.
    outbox : Outbox
    over : callable
        Called at its end.
    """

    def __init__(
        self,
        request: Request,
        policy: Policy,
        stops: Callable[[int], bool] | None,
        conversation: Conversation | None,
        outbox: Outbox,
        over: Callable[[], object],
    ) -> None:
        self.request = request
        self.policy = policy
        self.stops = stops
        self.conversation = conversation
        self._outbox = outbox
        self._over = over
        self._status = RequestStatus(request.id, "queued", 0)

    def wait_in_line(self, position: int) -> None:
        self._tell(RequestStatus(self.request.id, "queued", position))

    def begin(self) -> None:
        self._tell(RequestStatus(self.request.id, "running", 0))

    def recover(self) -> None:
        self._tell(RequestStatus(self.request.id, "recovering", 0))

    def record(self, time: float, what: Event | Command) -> None:
        self._outbox.record(self.request.id, written(time, what))

    def finish(self, reason: str) -> None:
        self._end(reason, failed=False)

    def fail(self, error: BaseException) -> None:
        self._end(str(error), failed=True)

    def _tell(self, status: RequestStatus) -> None:
        if status != self._status:
            self._status = status
            self._outbox.put(status)

    def _end(self, reason: str, *, failed: bool) -> None:
        self._over()
        self._outbox.put(RequestEnded(self.request.id, reason, failed))


class HeadThread:
    """The thread of a head on a worker. Methods may be called from any thread.

    Parameters
    ----------
    worker : Worker
        Whose cluster it is.
    spec : PipelinePlan
    send : callable
        Sends a message to the client, in order, from the thread.
    name : str

    Attributes
    ----------
    loaded : Future
        Done when the pipeline stands, or with the reason why it does not.
    ended : Future
        Done when all is released.
    stalled : float
        0: it computes nothing.
    """

    stalled = 0.0

    def __init__(
        self, worker: Worker, spec: PipelinePlan, *, send: Callable[[Message], None], name: str
    ) -> None:
        self.loaded: Future[None] = Future()
        # Who awaits it may give up, and must not be able to cancel it for the thread.
        self.loaded.set_running_or_notify_cancel()
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self._worker = worker
        self._spec = spec
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._outbox = Outbox(self._loop, send)
        self._wanted, self._over = asyncio.Event(), asyncio.Event()
        self._served: dict[int, Relayed] = {}
        self._conversations: dict[int, Conversation] = {}
        self._head: Head
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Begin to load the pipeline: there is somebody who hears of it."""
        self._post(self._wanted.set)

    def start(self, request: Request, policy: Policy) -> None:
        """Queue a request."""
        self._post(self._start, request, policy)

    def stop(self, request: int) -> None:
        """Stop a request; no effect on one that is over."""
        self._post(self._stop, request)

    def forget(self, cache: int) -> None:
        """End the conversation that has this cache."""
        self._post(self._forget, cache)

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure the pipeline: see `Head.measure_costs`."""
        measuring = self._head.measure_costs(request, drafter=drafter)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(measuring, self._loop))

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Release the pipeline and all its nodes, and wait for that."""
        self._post(self._over.set)
        with suppress(TimeoutError):
            self.ended.result(timeout)

    def _post(self, callback: Callable[..., object], *arguments: object) -> None:
        post(self._loop, callback, *arguments)

    # --- in the thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._runner:
                self._runner.run(self._live())
        finally:
            self.ended.set_result(None)

    async def _live(self) -> None:
        serving = asyncio.create_task(self._serve())
        await self._over.wait()
        self._outbox.close()
        serving.cancel()
        await asyncio.wait([serving])

    async def _serve(self) -> None:
        await self._wanted.wait()
        spec = self._spec
        async with AsyncExitStack() as resources:
            try:
                client = Client(
                    self._worker.scheduler.address,
                    security=_security_of(self._worker),
                    asynchronous=True,
                    set_as_default=False,
                )
                # Before it is connected: given up meanwhile, it is to be closed all the same.
                resources.push_async_callback(client.close)
                await client
                pipeline = await spec.open(client, self._tell_loading)
            except Exception as error:
                self.loaded.set_exception(error)
                return
            resources.push_async_callback(pipeline.close)
            resources.enter_context(short_collections())
            self._head = Head(pipeline, self._loop, spec.max_concurrent, failed=self._tell_failed)
            resources.callback(self._head.end, ConnectionError("the head was closed meanwhile"))
            self.loaded.set_result(None)
            await self._loop.create_future()

    def _tell_loading(self, step: Loading) -> None:
        if step.where == HERE:
            step = replace(step, where=self._worker.address)
        self._outbox.put(NodeLoading(*astuple(step)))

    def _tell_failed(self, error: Exception) -> None:
        self._outbox.put(Failed(str(error)))

    def _start(self, request: Request, policy: Policy) -> None:
        stops = None
        if request.stop_strings and self._spec.tokenizer is not None:
            _, stops = text_of(request, self._spec.tokenizer)
        conversation = None
        if request.cache is not None:
            new = Conversation(request.cache)
            conversation = self._conversations.setdefault(request.cache, new)

        def over() -> None:
            self._served.pop(request.id, None)

        relayed = Relayed(request, policy, stops, conversation, self._outbox, over)
        self._served[request.id] = relayed
        self._head.start(relayed)

    def _stop(self, request: int) -> None:
        if (relayed := self._served.get(request)) is not None:
            self._head.cancel(relayed)

    def _forget(self, cache: int) -> None:
        if (conversation := self._conversations.pop(cache, None)) is not None:
            self._head.forget(conversation)


class HeadNode(Node[HeadThread]):
    """A head on a worker, and the control link to its client."""

    def __init__(self, worker: Worker, session: Session, name: str, spec: PipelinePlan) -> None:
        super().__init__(worker, session, name)
        self.thread = HeadThread(worker, spec, send=self._send, name=self.identity)

    def _send(self, message: Message) -> None:
        self._post(self._tell, message)

    async def _end_thread(self) -> None:
        # Not by `offload`, which has one thread: nodes on this worker need that to end.
        self.thread.close(timeout=0)
        await asyncio.wait([asyncio.wrap_future(self.thread.ended)], timeout=CLOSE_TIMEOUT_S)
        if self.thread.ended.done():  # but for its last step
            self.thread._thread.join()

    def _heed(self, message: Message) -> None:
        match message:
            case StopRequest():
                self.thread.stop(message.request)
            case Forget():
                self.thread.forget(message.cache)
            case _:
                if isinstance(message, AwaitLoaded):
                    self.thread.open()
                super()._heed(message)


class HeadActor(NodeActor):
    """Holds a head for as long as Dask holds the actor."""

    _node: Node[Any]

    async def start(self, request: Request, policy: bytes) -> None:
        """Queue a request. Who calls awaits this before the next one, so that order is kept."""
        self._node.thread.start(request, loads(policy))

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure the pipeline: see `Head.measure_costs`."""
        costs: Costs = await self._node.thread.measure_costs(request, drafter=drafter)
        return costs


def _security_of(worker: Worker) -> Security:
    """Return what a client needs to connect as the worker itself does."""
    tls = worker.security.get_tls_config_for_role("worker")
    return Security(
        require_encryption=worker.security.require_encryption,
        tls_ca_file=tls["ca_file"],
        tls_ciphers=tls["ciphers"],
        tls_client_cert=tls["cert"],
        tls_client_key=tls["key"],
    )
