"""A node as the client sees it: its control link, its clock, and whether it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Any

from pipeinfer_dask.models.stage import CountBytes
from pipeinfer_dask.protocol.messages import Span, StartDraft
from pipeinfer_dask.runtime.links.bounds import of_answer
from pipeinfer_dask.runtime.links.links import Link, LinkError
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
from pipeinfer_dask.runtime.pipeline.clocks import PeerClock

CLOCK_PINGS = 50
"""Pings to find a node's clock at first; those of the watch keep to it."""

CLOCK_S = 1.0
"""Over a long way there are fewer pings: no more than begin within so many seconds."""

SUSPICION_S = 0.5
"""Where a stage misses its neighbour, wait this long for the neighbour's own link to close."""


class Trouble(StrEnum):
    """What may be wrong with a node."""

    FAILED = "failed"
    """Its model has raised: another one would, too."""
    FULL = "full"
    """It was refused memory: another worker may have enough."""
    GONE = "gone"
    """It is dead, or as good as that."""
    CUT = "cut"
    """A link between it and a neighbour is broken; the node itself may well live."""


class LoadError(RuntimeError):
    """A node's model could not be loaded. The text is the worker's own reason.

    Attributes
    ----------
    memory : bool
        Whether memory was refused.
    """

    def __init__(self, reason: str, memory: bool) -> None:
        super().__init__(reason)
        self.memory = memory


class Peer:
    """The client's end of one node. Belongs to the client's loop.

    Parameters
    ----------
    title : str
        What to call the node in errors.
    node, address : str
        Where other nodes can dial it.
    link : Link
        The control link.
    generation : int
        Of its data links.
    report : callable
        Called with each message that is not the peer's own affair.
    read : callable
        Called with the bytes that the node has read while it loads, and with all.
    lost : callable
        Called with the trouble and a reason when a node that has loaded can't go on. May be
        called more than once.

    Attributes
    ----------
    stalled : float, seconds
        For so long its computing had not moved at the last ping; 0 if it had nothing to do.
    clock : PeerClock
        The node's, against the client's; every ping tells of it.
    """

    def __init__(
        self,
        title: str,
        node: str,
        address: str,
        link: Link,
        generation: int,
        *,
        report: Callable[[Message], None],
        read: CountBytes,
        lost: Callable[[Trouble, str], None],
    ) -> None:
        self.title = title
        self.node = node
        self.address = address
        self.clock = PeerClock()
        self.stalled = 0.0
        self._link = link
        self._generation = generation
        self._report = report
        self._read_bytes = read
        self._lost = lost
        self._pings = 0
        self._pongs: dict[int, asyncio.Future[tuple[float, float]]] = {}
        self._dialled: asyncio.Future[Any] | None = None
        self._renewed: asyncio.Future[Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._reading = self._loop.create_task(self._read())

    def send(self, message: Message) -> None:
        """Send a message to the node, without waiting."""
        if isinstance(message, StartDraft):
            self.expect(of_answer(message))
        self._link.send(message)

    def expect(self, nbytes: int) -> None:
        """Take so long headers from the node: see `Link.expect`."""
        self._link.expect(nbytes)

    async def loaded(self) -> None:
        """Wait until the node's model stands.

        Raises
        ------
        LoadError
            It could not be loaded.
        LinkError
            The control link has closed meanwhile.
        """
        self._link.send(AwaitLoaded())
        await self._loaded

    async def ping(self) -> None:
        """Wait for a sign of life, and learn from it what `clock` and `stalled` say.

        Raises
        ------
        LinkError
            The control link has closed.
        """
        self._pings += 1
        number = self._pings
        pong = self._wait()
        self._pongs[number] = pong
        sent = time.monotonic()
        self._link.send(Ping(number))
        try:
            arrived, clock = await pong
        finally:
            self._pongs.pop(number, None)
        self.clock.hear(sent, clock, arrived)

    async def find_clock(self) -> None:
        """Ping often, so that one of the pings meets nothing on its way."""
        ends = time.monotonic() + CLOCK_S
        for _ in range(CLOCK_PINGS):
            await self.ping()
            if time.monotonic() > ends:
                break

    async def dial_next(self, peer: Peer) -> None:
        """Have this stage open its data link to the next one.

        Raises
        ------
        LinkError
            It could not.
        """
        self._dialled = self._wait()
        self._link.send(DialNext(peer.address, peer.node))
        await self._dialled

    async def renew(self, generation: int) -> None:
        """Have this stage give up its data links, and what came over them.

        Raises
        ------
        LinkError
            The control link has closed.
        """
        self._generation = generation
        self._renewed = self._wait()
        self._link.send(Renew(generation))
        await self._renewed

    async def watch(self, deadline: float) -> None:
        """Ping until the node is lost: within ``deadline`` seconds it has to give a sign of life.

        Its computing must not stand still for so long, either.
        """
        while True:
            try:
                await asyncio.wait_for(self.ping(), 2 / 3 * deadline)
            except TimeoutError:
                self._lost(Trouble.GONE, f"gave no sign of life for {deadline:g} s")
                return
            except LinkError:
                return
            if self.stalled > deadline:
                self._lost(Trouble.GONE, f"its computing has not moved for {deadline:g} s")
                return
            await asyncio.sleep(deadline / 3)

    def localize(self, span: Span) -> Span:
        """Return a span of this node's clock on the client's clock."""
        ahead = self.clock.offset
        return replace(span, began=span.began - ahead, ended=span.ended - ahead)

    def abandon(self) -> None:
        """Close the link without a word, to a node that would not answer."""
        self._link.abort()

    async def close(self, patience: float) -> None:
        """Ask the node to end, wait ``patience`` seconds until it has, and close the link."""
        self._link.send(Close())
        await asyncio.wait([self._reading], timeout=patience)
        self._link.abort()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        reason = "its control link has closed: the worker, or the actor on it, is gone"
        try:
            await self._link.receive(self._heed)
        except (LinkError, WireError) as error:
            reason = str(error)
        finally:
            self._end(reason)

    def _heed(self, message: Message) -> None:
        if isinstance(message, Pong):
            if self._answer(self._pongs.get(message.number), (time.monotonic(), message.clock)):
                self.stalled = message.stalled
        elif isinstance(message, Dialled):
            self._answer(self._dialled)
        elif isinstance(message, Renewed):
            self._answer(self._renewed if message.generation == self._generation else None)
        elif isinstance(message, BytesRead):
            self._read_bytes(message.nbytes, message.total)
        elif isinstance(message, Loaded):
            self._answer(self._loaded)
        elif isinstance(message, Failed):
            if self._loaded.done():
                self._lost(Trouble.FULL if message.memory else Trouble.FAILED, message.reason)
            else:
                self._loaded.set_exception(LoadError(message.reason, message.memory))
        elif isinstance(message, PeerLost):
            self._suspect(message)
        else:
            self._report(message)

    def _answer(self, waiting: asyncio.Future[Any] | None, result: object = None) -> bool:
        """Give an answer to whoever waits for it; one that nobody waits for is stale."""
        if waiting is None or waiting.done():
            self._link.counts.stale += 1
            return False
        waiting.set_result(result)
        return True

    def _suspect(self, told: PeerLost) -> None:
        if self._dialled is not None and not self._dialled.done():
            self._dialled.set_exception(LinkError(told.reason))

        def report() -> None:
            if told.generation == self._generation:
                self._lost(Trouble.CUT, told.reason)

        # A neighbour that is gone is named better by the end of its own control link,
        # which may be noticed a moment later.
        self._loop.call_later(SUSPICION_S, report)

    def _end(self, reason: str) -> None:
        for waiting in (*self._pongs.values(), self._dialled, self._renewed):
            if waiting is not None and not waiting.done():
                waiting.set_exception(LinkError(f"{self.title}: {reason}"))
        if self._loaded.done():
            self._lost(Trouble.GONE, reason)
        else:
            self._loaded.set_exception(LinkError(f"{self.title}: {reason}"))
            self._loaded.exception()  # maybe nobody waits for it any more

    def _wait(self) -> asyncio.Future[Any]:
        if self._reading.done():
            raise LinkError(f"{self.title}: the control link has closed")
        return self._loop.create_future()
