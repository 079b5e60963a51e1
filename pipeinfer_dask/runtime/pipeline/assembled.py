"""How a node comes to be on a worker, and how it goes: an actor, and the control link to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from distributed import Client
from distributed import Future as DaskFuture
from distributed.comm import Comm

from pipeinfer_dask.models.stage import Intake
from pipeinfer_dask.runtime.links.links import Link, LinkError, Session, dial
from pipeinfer_dask.runtime.links.reaching import reach
from pipeinfer_dask.runtime.links.wire import Message
from pipeinfer_dask.runtime.nodes.actors import (
    CONTROL,
    NodeActor,
    NodeKind,
)
from pipeinfer_dask.runtime.nodes.compute import lacks_memory
from pipeinfer_dask.runtime.nodes.loading import Progress, Steps
from pipeinfer_dask.runtime.pipeline.peers import SUSPICION_S, LoadError, Peer, Trouble

T = TypeVar("T")

CLOSE_TIMEOUT_S = 15.0
"""How long to wait for a node that is asked to end: longer than it waits for its thread."""

LOADING_PING_S = 1.0
"""While a worker loads a node, ask it for a sign of life so often."""


STANDSTILL_S = 600.0
"""A worker that reads nothing more of its model for so long, and has not loaded it, never will."""

ANSWER_TIMEOUT_S = 30.0
"""How long nodes that live may take to say something of themselves."""


CLOSED = ("closing", "closed")
"""States of a client that its user, or the end of its cluster, has closed."""

CLIENT_CLOSED = "your Dask client was closed"

NO_SCHEDULER = "the connection to the cluster's scheduler is, too"
"""Said of a lost node. Workers end when their scheduler does, and the client hears of it first."""


class PipelineError(RuntimeError):
    """A node of the pipeline could not be made, or is lost. The text says which, and where."""


class NodeLostError(PipelineError):
    """A node is lost, or was before it stood: another worker may do better."""


class NodeSpec(Protocol):
    """Says what a node is to be. Travels to its worker by pickle."""

    @property
    def name(self) -> str:
        """A short name for people to read."""
        ...


@dataclass(slots=True, eq=False)
class Seat:
    """A place in the pipeline, and the node that fills it.

    Attributes
    ----------
    name : str
        Such as ``stage-0``.
    kind : NodeKind
    spec : NodeSpec
        What its node loads.
    worker : str or None
        Where its node is, or is to be; None while nobody has chosen.
    peer : Peer or None
        Its node, once that stands.
    actor : type of NodeActor
        What holds its node.
    full : set of str
        Workers that had too little memory for its node.
    short : bool
        Whether it was for that that its last node was lost.
    """

    name: str
    kind: NodeKind
    spec: NodeSpec
    worker: str | None = None
    peer: Peer | None = None
    actor: type[NodeActor] = NodeActor
    full: set[str] = field(default_factory=set)
    short: bool = False

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return f"{self.name.replace('-', ' ')} ({self.spec.name})"

    def note_memory(self, *, short: bool) -> None:
        """Note whether it is for want of memory that its worker can't go on with its node."""
        self.short = short
        if short and self.worker is not None:
            self.full.add(self.worker)


class Nodes:
    """Makes nodes and ends them. Belongs to the client's loop.

    Parameters
    ----------
    client : Client
    deadline : float, seconds
        A worker that gives no sign of life for so long while it loads is lost.
    report : callable
        Told of each message of a node that is not its peer's own affair.
    lost : callable
        Called with seat, peer, trouble and reason when a node that has loaded can't go on.
    """

    def __init__(
        self,
        client: Client,
        deadline: float,
        *,
        report: Callable[[Message], None],
        lost: Callable[[Seat, Peer, Trouble, str], None],
    ) -> None:
        self._client = client
        self._deadline = deadline
        self._report = report
        self._lost = lost
        self._futures: dict[str, DaskFuture[Any]] = {}
        self._peers: dict[str, Peer] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self._dropping: set[asyncio.Task[None]] = set()

    async def dial(
        self, worker: str, node: str, role: str, session: Session, intake: Intake | None = None
    ) -> Link:
        """Open a link to a node. Raises a `LinkError` if that can't be done."""
        arguments = self._client.connection_args
        return await dial(worker, node, role, session, connection_args=arguments, intake=intake)

    async def make(self, seat: Seat, session: Session, progress: Progress | None = None) -> None:
        """Make a seat's node on its worker, and wait until its model stands.

        Raises
        ------
        NodeLostError
            The worker was lost, can't be reached, or does not get on with loading.
        PipelineError
            The node could not be made, or its model not be loaded.
        LinkError
            The link to it has closed.
        """
        assert seat.worker is not None
        node, worker = session.node(seat.name), seat.worker
        title = f"{seat.title} on worker {worker}"
        # A task that may run on one worker only waits for ever once that worker is dead.
        # A connection of our own tells of its death, and of its silence.
        try:
            tripwire = await reach(worker, self._deadline, **self._client.connection_args)
        except OSError as lost:
            raise NodeLostError(f"{title}: could not connect to the worker: {lost}") from lost
        try:
            self._futures[node] = self._client.submit(
                seat.actor,
                seat.kind,
                session,
                seat.name,
                seat.spec,
                actor=True,
                key=node,
                workers=[worker],
                allow_other_workers=False,
            )
        except BaseException:  # the client was closed just now, or so
            tripwire.abort()
            raise
        steps = Steps(seat.title, worker, progress)
        loading = asyncio.create_task(self._load(seat, title, node, session, steps))
        death = asyncio.create_task(_death(tripwire, self._deadline, steps))
        try:
            await asyncio.wait([loading, death], return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and isinstance(loading.exception(), LinkError):
                # What closes a link is told better by the tripwire, maybe a moment later.
                await asyncio.wait([death], timeout=SUSPICION_S)
            if death.done():
                raise NodeLostError(f"{title}: {death.result()}")
            seat.peer = loading.result()
        except BaseException:
            self.drop(node)
            raise
        finally:
            loading.cancel()
            death.cancel()
            tripwire.abort()
            await asyncio.gather(loading, death, return_exceptions=True)
        steps.stands()
        _keep(self._watching, seat.peer.watch(self._deadline))

    def drop(self, node: str) -> None:
        """Let go of a node that is lost, or that nobody wants: without a word, for none answers."""
        peer, future = self._peers.pop(node, None), self._futures.pop(node, None)
        if peer is not None:
            peer.abandon()
        if future is not None:
            _keep(self._dropping, self._cancel([future]))

    async def actors(self) -> list[Any]:
        """Return what holds the nodes.

        Raises
        ------
        PipelineError
            They do not arrive.
        """
        # An actor binds itself to whichever client is the current one when it arrives.
        with self._client.as_current():
            return await _answers(self._futures.values())

    async def stats(self) -> list[dict[str, int]]:
        """Return what each node says of itself.

        Raises
        ------
        PipelineError
            One does not answer.
        """
        return await _answers([actor.stats() for actor in await self.actors()])

    async def close(self) -> None:
        """End all nodes, whatever has become of client and cluster."""
        await asyncio.gather(*(peer.close(CLOSE_TIMEOUT_S) for peer in self._peers.values()))
        await self._cancel(list(self._futures.values()))
        self._futures.clear()
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, *self._dropping, return_exceptions=True)

    async def _load(
        self, seat: Seat, title: str, node: str, session: Session, steps: Steps
    ) -> Peer:
        """Wait until a node can be dialled, and then until its model stands."""
        assert seat.worker is not None
        future = self._futures[node]
        error = await future.exception()
        if error is not None:
            seat.note_memory(short=lacks_memory(error))
            raise PipelineError(
                f"{title} could not be made: {type(error).__name__}: {error}"
            ) from error
        if future.status != "finished":
            raise PipelineError(f"{title} could not be made: its actor is {future.status}")
        link = await self.dial(seat.worker, node, CONTROL, session)

        def report(message: Message) -> None:
            steps.note()
            self._report(message)

        def lost(trouble: Trouble, reason: str) -> None:
            self._lost(seat, peer, trouble, reason)

        peer = Peer(
            title,
            node,
            seat.worker,
            link,
            session.generation,
            report=report,
            read=steps.read,
            lost=lost,
        )
        self._peers[node] = peer
        try:
            await peer.loaded()
        except LoadError as refused:
            seat.note_memory(short=refused.memory)
            raise PipelineError(f"{title} could not load: {refused}") from refused
        return peer

    async def _cancel(self, futures: list[DaskFuture[Any]]) -> None:
        if self._client.status == "running":
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.cancel(futures), CLOSE_TIMEOUT_S)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Have something done, and hold it as long as that takes: a loop does not."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def _answers(asked: Iterable[Awaitable[T]]) -> list[T]:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return list(await asyncio.gather(*asked))
    except TimeoutError:
        raise PipelineError(
            f"expected all nodes to answer within {ANSWER_TIMEOUT_S:g} s, but one does not: see "
            "whether its worker is busy with tasks of others"
        ) from None


async def _death(tripwire: Comm, deadline: float, steps: Steps) -> str:
    """Ask a worker for signs of life until it gives none, or gets no further: why."""
    try:
        while steps.quiet < STANDSTILL_S:
            await tripwire.write({"op": "echo", "data": "", "reply": True})
            await asyncio.wait_for(tripwire.read(), deadline)
            await asyncio.sleep(min(LOADING_PING_S, deadline / 3))
        return f"the worker lives, but has got no further with loading for {STANDSTILL_S:g} s"
    except TimeoutError:
        return f"the worker gave no sign of life for {deadline:g} s while it was loading"
    except OSError:
        return "the worker died while it was loading"
