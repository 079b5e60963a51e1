"""How frames cross a connection: over distributed's own comm, or over its bare socket.

A comm reads a message in three steps through as many futures, and turns its wish to
read off and on again in between. That is nothing for a scheduler and most of a hop
for a pipeline. So, once a plain tcp connection stands and both ends have shown who they
are, its socket is taken over: a message is then one read, parsed where it arrives. A tls
connection is read and written below the comm, which would unpickle what it is told to.
Inproc stays with the comm, and never leaves the process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from functools import partial
from socket import socket
from threading import Lock
from types import coroutine
from typing import Any, Protocol

from distributed.comm import Comm, CommClosedError
from distributed.comm.inproc import InProc
from distributed.comm.tcp import TCP, TLS
from distributed.protocol import Serialized
from tornado.iostream import StreamClosedError

from pipeinfer_dask.runtime.links.framing import (
    CHUNK,
    PREFIX,
    Inflow,
    Most,
    Open,
    pack,
    room,
    unpack,
)
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.wire import Buffer, WireError


class Carrier(Protocol):
    """Carries messages, each of one or two frames, in order. Belongs to one event loop."""

    @property
    def closed(self) -> bool:
        """Whether this end has closed, or noticed that the other one has."""
        ...

    def write(self, frames: Sequence[Buffer]) -> None:
        """Send a message without waiting. After the end this does nothing."""
        ...

    def write_from_thread(self, frames: Sequence[Buffer]) -> None:
        """As `write`, but for one other thread, which then must be the only one that sends."""
        ...

    async def run(self, open: Open, most: Most) -> None:
        """Open each message until the end, none with a longer header. Nothing is read before."""
        ...

    def abort(self) -> None:
        """Close at once. Can be called twice."""
        ...


async def carry(comm: Comm) -> Carrier:
    """Return the fastest carrier over a connection on which nothing is under way.

    Raises
    ------
    CommClosedError
        If it has closed, or is of a kind over which distributed unpickles what comes.
    """
    if isinstance(comm, TCP) and not isinstance(comm, TLS):
        return await SocketCarrier.take_over(comm)
    if isinstance(comm, TLS):
        return StreamCarrier(comm)
    if isinstance(comm, InProc):
        return CommCarrier(comm)
    raise CommClosedError(f"expected a connection over tcp, tls or inproc, got {comm!r}")


class CommCarrier:
    """Carries messages over a comm."""

    def __init__(self, comm: Comm) -> None:
        # Payloads are neither unpickled nor copied nor handed to another thread.
        comm.deserialize = False
        comm.allow_offload = False
        self._comm = comm
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Serialized] = deque()
        self._writer: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """See `Carrier`."""
        return bool(self._comm.closed())

    def write(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        # A bytearray, since distributed gives the frame behind it a buffer of its own,
        # aligned for arithmetic; behind bytes it would be a slice of a larger one.
        packed = Serialized({}, [bytearray(frames[0]), *frames[1:]])
        if self._writer is not None:
            self._waiting.append(packed)
            return
        # Most comms take a message without suspending (what the kernel does not take at
        # once they buffer): a task for each message would only cost.
        writing = self._write(packed)
        try:
            suspended = writing.send(None)
        except StopIteration:
            return
        self._writer = self._loop.create_task(self._drain(writing, suspended))

    def write_from_thread(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        post(self._loop, self.write, frames)

    async def run(self, open: Open, most: Most) -> None:
        """See `Carrier`."""
        while True:
            try:
                packed = await self._comm.read()
            except CommClosedError:
                return
            if not isinstance(packed, Serialized):
                raise WireError(f"expected a message, got {type(packed).__name__}")
            if not 1 <= len(packed.frames) <= 2:
                raise WireError(f"expected 1 or 2 frames, got {len(packed.frames)}")
            header, *rest = packed.frames
            payload = rest[0] if rest else None
            open(header, 0 if payload is None else memoryview(payload).nbytes)(payload)

    def abort(self) -> None:
        """See `Carrier`."""
        self._comm.abort()
        self._waiting.clear()

    async def _write(self, packed: Serialized) -> None:
        try:
            await self._comm.write(packed)
        except CommClosedError:
            self._waiting.clear()

    async def _drain(self, writing: Coroutine[Any, Any, None], suspended: object) -> None:
        try:
            await _resume(writing, suspended)
            while self._waiting:
                await self._write(self._waiting.popleft())
        finally:
            self._writer = None


@coroutine
def _resume(running: Coroutine[Any, Any, None], suspended: Any) -> Generator[Any, Any, None]:
    """Go on with a coroutine that was started by hand and is waiting for ``suspended``."""
    while True:
        step: Callable[[], Any]
        try:
            value = yield suspended
        except BaseException as error:
            step = partial(running.throw, error)
        else:
            step = partial(running.send, value)
        try:
            suspended = step()
        except StopIteration:
            return


class StreamCarrier:
    """Carries messages over the stream of a tls comm: lengths, header, payload.

    Tornado encrypts and buffers; distributed's own protocol has no part in it.
    """

    PIECE = 1 << 24
    """TLS takes so many bytes at a time."""

    def __init__(self, comm: TCP) -> None:
        if comm.stream is None:
            raise CommClosedError(f"{comm!r} closed while it was being opened")
        self._comm = comm
        self._stream = comm.stream
        self._loop = asyncio.get_running_loop()

    @property
    def closed(self) -> bool:
        """See `Carrier`."""
        return bool(self._stream.closed())

    def write(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        head, size = pack(frames)
        payload = memoryview(frames[1]).cast("B") if size else memoryview(b"")
        with suppress(StreamClosedError):  # Whoever reads hears of it.
            self._stream.write(head + payload[: self.PIECE])
            for start in range(self.PIECE, size, self.PIECE):
                self._stream.write(payload[start : start + self.PIECE])

    def write_from_thread(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        post(self._loop, self.write, frames)

    async def run(self, open: Open, most: Most) -> None:
        """See `Carrier`."""
        try:
            while True:
                length, size = unpack(await self._stream.read_bytes(PREFIX.size), most())
                deliver = open(await self._stream.read_bytes(length), size)
                payload = room(size) if size else None
                if payload is not None:
                    await self._stream.read_into(payload)  # type: ignore[arg-type]
                deliver(payload)
        except StreamClosedError:
            return

    def abort(self) -> None:
        """See `Carrier`."""
        self._comm.abort()


class SocketCarrier(asyncio.BufferedProtocol):
    """Carries messages over the socket of a tcp comm: lengths, header, payload.

    The comm stays open beside it, so that a worker which closes its comms closes this
    one, too.

    A thread that has a message sends it itself, and wakes the loop only for what the
    kernel does not take at once.
    """

    def __init__(self, comm: TCP, connection: socket) -> None:
        self._comm = comm
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        # Held while a thread sends, so that the descriptor is not closed under it, and
        # around what both threads write.
        self._sending = Lock()
        self._open = True
        self._handed_over = 0
        self._inflow: Inflow

    @classmethod
    async def take_over(cls, comm: TCP) -> SocketCarrier:
        """Return a carrier over the comm's own connection; the comm no longer reads it."""
        stream = comm.stream
        if stream is None:
            raise CommClosedError(f"{comm!r} closed while it was being opened")
        stream.io_loop.remove_handler(stream.fileno())
        connection = stream.socket.dup()
        carrier = cls(comm, connection)
        try:
            await asyncio.get_running_loop().create_connection(lambda: carrier, sock=connection)
        except BaseException:
            connection.close()
            raise
        return carrier

    @property
    def closed(self) -> bool:
        """See `Carrier`."""
        return self._transport.is_closing()

    def write(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        if self._transport.is_closing():
            return
        for piece in self._pieces(frames):
            self._transport.write(piece)

    def write_from_thread(self, frames: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        with self._sending, suppress(RuntimeError):  # The loop has ended: nobody listens.
            if not self._open:
                return
            for piece in self._pieces(frames):
                sent = 0
                if not self._handed_over and not self._transport.get_write_buffer_size():
                    try:
                        sent = self._connection.send(piece)
                    except BlockingIOError:
                        pass
                    except OSError:
                        return  # The loop sees the connection end.
                if sent < len(piece):
                    self._handed_over += 1
                    self._loop.call_soon_threadsafe(self._write_rest, memoryview(piece)[sent:])

    async def run(self, open: Open, most: Most) -> None:
        """See `Carrier`."""
        self._inflow = Inflow(open, most)
        self._transport.resume_reading()
        await self._over

    def abort(self) -> None:
        """See `Carrier`."""
        self._transport.abort()
        self._comm.abort()

    def _pieces(self, frames: Sequence[Buffer]) -> tuple[Buffer, ...]:
        """Return what to send: in one piece where copying it costs less than a system call."""
        head, size = pack(frames)
        if size < CHUNK:
            return (b"".join((head, *frames[1:])),)
        return head, frames[1]

    def _write_rest(self, piece: memoryview) -> None:
        if not self._transport.is_closing():
            self._transport.write(piece)
        with self._sending:
            self._handed_over -= 1

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # Nobody says yet what may come.
        transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        with self._sending:
            self._open = False
        self._comm.abort()
        if not self._over.done():
            self._over.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inflow.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._inflow.filled(nbytes)
        except Exception as error:
            # Left to asyncio this would be logged and lost.
            if not self._over.done():
                self._over.set_exception(error)
            self._transport.abort()
