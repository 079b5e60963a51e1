"""What lives on the workers: one node for each stage, and one for the drafter.

Dask owns a node's life and death: it is made by an actor, which returns once the node
can be dialled, and it ends when the actor is dropped. Everything else goes over links,
how its model loads too, since actor calls are slow and are not kept in order. A node
also ends when its control link closes, for then its client is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from distributed import Worker, get_worker
from distributed.comm import Comm, CommClosedError
from distributed.utils import offload

from pipeinfer_dask.models.stage import Intake
from pipeinfer_dask.protocol.messages import (
    CancelDraft,
    CancelRuns,
    Drafted,
    Prune,
    Release,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.links.bounds import MOST_HEADER, of_text
from pipeinfer_dask.runtime.links.links import Counts, Link, LinkError, Session, accept, dial
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import (
    AwaitLoaded,
    BytesRead,
    Close,
    Dialled,
    DialNext,
    Failed,
    Loaded,
    Message,
    PeerLost,
    Ping,
    Pong,
    Renew,
    Renewed,
    WireError,
)
from pipeinfer_dask.runtime.nodes.compute import DrafterThread, StageThread, lacks_memory
from pipeinfer_dask.runtime.nodes.room import Bounds, Room
from pipeinfer_dask.runtime.nodes.specs import DraftSpec, StageSpec

logger = logging.getLogger(__name__)


class NodeThread(Protocol):
    """What a node does, in a thread of its own."""

    @property
    def loaded(self) -> Future[None]:
        """Done when it stands, or with the reason why it does not."""
        ...

    @property
    def stalled(self) -> float:
        """For so many seconds its computing has not moved; 0 if it has nothing to do."""
        ...

    def close(self, timeout: float = ...) -> None:
        """End it, and wait so many seconds until it has."""
        ...


ThreadT = TypeVar("ThreadT", bound=NodeThread)

CONTROL = "control"
"""Role of the link between the client and a node: commands, pings, answers."""
INPUT = "input"
"""Role of a link that brings runs to a stage."""
OUTPUT = "output"
"""Role of the link over which the client fetches runs from the last stage."""


FIRST_STAGE = "stage-0"
"""Name of the node that the client feeds."""


class Node(Generic[ThreadT]):
    """A compute thread on a worker, and the links that lead to it.

    Parameters
    ----------
    worker : Worker
    session : Session
    name : str
        The node's name in its session, such as ``stage-0``.
    intake : Intake, optional
        What hidden states its runs bring.
    """

    thread: ThreadT
    _longest = MOST_HEADER
    """Bytes of the longest header of a command."""

    def __init__(
        self, worker: Worker, session: Session, name: str, intake: Intake | None = None
    ) -> None:
        self.identity = session.node(name)
        self._worker = worker
        self._session = session
        self._intakes = {INPUT: intake}
        self._shown: set[str] = set()
        self._loop: asyncio.AbstractEventLoop = worker.loop.asyncio_loop  # type: ignore[attr-defined]
        self._control: Link | None = None
        self._links: list[Link] = []
        self._counts = Counts()  # of links that are gone, and of peers that got none
        self._stopped = False
        self._read: BytesRead | None = None
        self._telling: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Let peers dial, while the model loads."""
        self._worker.handlers[self.identity] = _handler(self)

    def stop(self) -> None:
        """Let go of everything, without waiting. From any thread, any number of times."""
        self._stopped = True
        self._worker.handlers.pop(self.identity, None)
        self.thread.close(timeout=0)
        self._post(self._end)

    def stats(self) -> dict[str, int]:
        """Return how many links are open, and what came that was not acted upon."""
        came = sum((link.counts for link in self._links), self._counts)
        return {"links": sum(not link.closed for link in self._links), **asdict(came)}

    async def accept(self, comm: Comm, hello: Mapping[str, Any]) -> None:
        """Keep a connection that a peer has opened until it closes: the worker's handler."""
        link = None
        try:
            link = await accept(
                comm, self.identity, hello, self._session, self._shown, self._intakes
            )
            if link is None:
                self._counts.refused += 1
            elif not self._stopped:
                self._links.append(link)
                await self._serve(hello["role"], link)
        except CommClosedError:
            pass  # The peer left while it was being answered.
        finally:
            comm.abort()
            if link is not None:  # It may have a descriptor of its own.
                link.abort()

    async def _serve(self, role: str, link: Link) -> None:
        if role != CONTROL or self._control is not None:
            logger.warning("%s refused a second or unknown link: %r", self.identity, role)
            return
        self._control = link
        link.expect(self._longest)
        try:
            await link.receive(self._heed)
        except (LinkError, WireError) as error:
            logger.warning("%s closes: %s", self.identity, error)
        finally:
            self.stop()
            await self._end()

    def _heed(self, message: Message) -> None:
        if isinstance(message, Ping):
            self._tell(Pong(message.number, time.monotonic(), self.thread.stalled))
        elif isinstance(message, AwaitLoaded):
            self._telling = self._loop.create_task(self._tell_loaded())
        elif isinstance(message, Close):
            self.stop()
        else:
            raise LinkError(f"expected a command, got {type(message).__name__}")

    async def _tell_loaded(self) -> None:
        if self._read is not None:
            self._tell(self._read)
        try:
            await asyncio.wrap_future(self.thread.loaded)
        except Exception as error:
            self._tell(_failure(error))
        else:
            self._tell(Loaded())

    def _count(self, nbytes: int, total: int) -> None:
        self._post(self._tell_read, BytesRead(nbytes, total))

    def _tell_read(self, read: BytesRead) -> None:
        self._read = read
        if self._telling is not None:
            self._tell(read)

    def _end(self) -> asyncio.Task[None]:
        if self._ending is None:
            self._ending = self._loop.create_task(self._finish())
        return self._ending

    async def _finish(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        for link in self._links:
            if link is not self._control:
                link.abort()
        await self._end_thread()
        # Last, for it tells the client that nothing is left here.
        if self._control is not None:
            self._control.abort()

    async def end(self) -> None:
        """Let go of everything, and wait until that is done. On the worker's loop."""
        self.stop()
        await self._end()

    async def _end_thread(self) -> None:
        await offload(self.thread.close)

    def _tell(self, message: Message) -> None:
        if self._control is not None:
            self._control.send(message)

    def _failed(self, error: Exception) -> None:
        self._post(self._tell, _failure(error))

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        post(self._loop, callback, *args)


def _failure(error: Exception) -> Failed:
    return Failed(f"{type(error).__name__}: {error}", lacks_memory(error))


def _handler(node: Node[Any]) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return a worker's handler that does not keep the node: distributed remembers handlers."""
    alive = weakref.ref(node)

    async def accept(comm: Comm, **hello: Any) -> None:
        if (node := alive()) is not None:
            await node.accept(comm, hello)
        else:
            comm.abort()

    return accept


class StageNode(Node[StageThread]):
    """One stage: runs come in over one link, and leave over another."""

    def __init__(
        self, worker: Worker, session: Session, name: str, spec: StageSpec, bounds: Bounds
    ) -> None:
        super().__init__(worker, session, name, spec.intake)
        self._next: Link | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._first = name == FIRST_STAGE
        self.thread = StageThread(
            partial(spec.load, self._count),
            deliver=self._deliver,
            # Only the first stage's taking of a run tells that the pipeline has room.
            taken=self._taken if self._first else None,
            failed=self._failed,
            name=self.identity,
        )
        self._room = Room(bounds, self.thread)

    async def _serve(self, role: str, link: Link) -> None:
        if role == INPUT:
            await self._keep(link, self._run, "the link that brings runs")
        elif role == OUTPUT:
            self._next = link
            await self._keep(link, _nothing_expected, "the link that takes runs")
        else:
            await super()._serve(role, link)

    async def _keep(self, link: Link, handle: Callable[[Message], None], what: str) -> None:
        reason = f"{what} has closed"
        try:
            await link.receive(handle)
        except (LinkError, WireError) as error:
            reason = f"{what}: {error}"
        # One that is no longer among them was given up at the client's own wish.
        if not self._stopped and link in self._links:
            self._tell(PeerLost(self._session.generation, reason))

    def _heed(self, message: Message) -> None:
        if isinstance(message, CancelRuns):
            self.thread.cancel(message)
        elif isinstance(message, Prune):
            self.thread.prune(message)
        elif isinstance(message, Release):
            self._room.release(message)
        elif isinstance(message, Renew):
            self._room.renew()
            self._renew(message.generation)
        elif isinstance(message, DialNext):
            self._dialling = self._loop.create_task(self._dial(message))
        else:
            super()._heed(message)

    def _renew(self, generation: int) -> None:
        """Begin a new generation: other links, and no run of before."""
        self._session = replace(self._session, generation=generation)
        if self._dialling is not None:
            self._dialling.cancel()
        self._next = None
        for link in [link for link in self._links if link is not self._control]:
            self._links.remove(link)
            self._counts += link.counts
            link.abort()
        self.thread.renew(generation, lambda: self._post(self._tell, Renewed(generation)))

    async def _dial(self, command: DialNext) -> None:
        try:
            self._next = await dial(
                command.address,
                command.node,
                INPUT,
                self._session,
                connection_args=self._worker.connection_args,
            )
        except LinkError as error:
            self._tell(PeerLost(self._session.generation, str(error)))
            return
        self._links.append(self._next)
        self._tell(Dialled())
        await self._keep(self._next, _nothing_expected, "the link to the next stage")

    async def _finish(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        await super()._finish()

    def _run(self, message: Message) -> None:
        if not isinstance(message, RunPass):
            raise LinkError(f"expected a run, got {type(message).__name__}")
        if message.hidden is None and not message.skipped and not self._first:
            raise LinkError("expected a run with hidden states, got one without")
        self._room.take(message)

    def _taken(self, run: StartRun) -> None:
        self._post(self._tell, RunTaken(run.request, run.generation, run.run))

    def _deliver(self, job: RunPass) -> None:
        if self._next is not None:
            self._next.send_from_thread(job)


class DrafterNode(Node[DrafterThread]):
    """The drafter: its few, small messages all go over its control link."""

    def __init__(
        self, worker: Worker, session: Session, name: str, spec: DraftSpec, bounds: Bounds
    ) -> None:
        super().__init__(worker, session, name)
        self._longest = of_text(spec.capacity)  # it reads a prompt at once
        self.thread = DrafterThread(
            partial(spec.load, self._count),
            deliver=self._deliver,
            failed=self._failed,
            name=self.identity,
        )
        self._room = Room(bounds, self.thread)

    def _heed(self, message: Message) -> None:
        if isinstance(message, StartDraft):
            self._room.take(message)
        elif isinstance(message, Release):
            self._room.release(message)
        elif isinstance(message, CancelDraft):
            self.thread.send(message)
        else:
            super()._heed(message)

    def _deliver(self, drafted: Drafted) -> None:
        self._post(self._tell, drafted)


def _nothing_expected(message: Message) -> None:
    raise LinkError(f"expected nothing on a link that only sends, got {type(message).__name__}")


NodeKind = Callable[[Worker, Session, str, Any], Node[Any]]
"""Makes a node of its worker, its session, its name there and its spec."""


class NodeActor:
    """Holds a node for as long as Dask holds the actor.

    Parameters
    ----------
    kind : NodeKind
        Such as a `StageNode` with its bounds.
    session : Session
    name : str
    spec : StageSpec or DraftSpec, or what else such a node is made by
    """

    def __init__(self, kind: NodeKind, session: Session, name: str, spec: Any) -> None:
        self._node = kind(get_worker(), session, name, spec)
        # Dask drops an actor without telling it. A finalizer on the actor hears of that.
        self._finalizer = weakref.finalize(self, self._node.stop)
        self._finalizer.atexit = False
        self._node.open()

    def stats(self) -> dict[str, int]:
        """Return how many links are open, and what came that was not acted upon."""
        return self._node.stats()

    async def end(self, identity: str) -> None:
        """End the node, if it is of this session."""
        if self._node.identity.startswith(Session.prefix(identity)):
            await self._node.end()
