"""How frames cross a connection: over distributed's own comm, or over its bare socket.

A comm reads a message in three steps through as many futures, and turns its wish to
read off and on again in between. That is nothing for a scheduler and most of a hop
for a pipeline. So, once a plain tcp connection stands and both ends have shown who they
are, its socket is taken over: a message is then one read, parsed where it arrives. Other
transports (tls, inproc) stay with the comm.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from functools import partial
from socket import socket
from threading import Lock
from types import coroutine
from typing import Any, Protocol

import numpy as np
from distributed.comm import Comm, CommClosedError
from distributed.comm.tcp import TCP, TLS
from distributed.protocol import Serialized

from pipeinfer_dask.runtime.wire import Buffer, WireError

Take = Callable[[Sequence[Buffer]], None]


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

    async def run(self, take: Take) -> None:
        """Hand each message to ``take`` until the end; what that raises is the end, too."""
        ...

    def abort(self) -> None:
        """Close at once. Can be called twice."""
        ...


async def carry(comm: Comm) -> Carrier:
    """Return the fastest carrier over a connection on which nothing is under way."""
    if isinstance(comm, TCP) and not isinstance(comm, TLS):
        return await SocketCarrier.take_over(comm)
    return CommCarrier(comm)


class CommCarrier:
    """Carries messages over any comm."""

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
        with suppress(RuntimeError):  # The loop has ended, and the comm with it.
            self._loop.call_soon_threadsafe(self.write, frames)

    async def run(self, take: Take) -> None:
        """See `Carrier`."""
        while True:
            try:
                packed = await self._comm.read()
            except CommClosedError:
                return
            if not isinstance(packed, Serialized):
                raise WireError(f"expected a message, got {type(packed).__name__}")
            take(packed.frames)

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


class SocketCarrier(asyncio.BufferedProtocol):
    """Carries messages over the socket of a tcp comm: lengths, header, payload.

    The comm stays open beside it, so that a worker which closes its comms closes this
    one, too.

    A thread that has a message sends it itself, and wakes the loop only for what the
    kernel does not take at once.
    """

    PREFIX = struct.Struct("<IQ")
    """Bytes of the header, and of the payload behind it."""
    CHUNK = 1 << 17
    """A message up to this size is sent and read in one piece."""
    MOST_HEADER = 1 << 26
    MOST_PAYLOAD = 1 << 33
    """Sizes beyond these are nonsense, and must not make us allocate."""

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
        self._take: Take | None = None
        self._early: list[list[Buffer]] = []
        self._buffer = memoryview(bytearray(self.CHUNK))
        self._filled = 0
        self._header = b""
        self._payload: memoryview | None = None
        self._missing = 0

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

    async def run(self, take: Take) -> None:
        """See `Carrier`."""
        self._take = take
        for frames in self._early:
            take(frames)
        self._early.clear()
        await self._over

    def abort(self) -> None:
        """See `Carrier`."""
        self._transport.abort()
        self._comm.abort()

    def _pieces(self, frames: Sequence[Buffer]) -> tuple[Buffer, ...]:
        """Return what to send: in one piece where copying it costs less than a system call."""
        size = len(frames[1]) if len(frames) > 1 else 0
        prefix = self.PREFIX.pack(len(frames[0]), size)
        if size < self.CHUNK:
            return (b"".join((prefix, *frames)),)
        return prefix + frames[0], frames[1]

    def _write_rest(self, piece: memoryview) -> None:
        if not self._transport.is_closing():
            self._transport.write(piece)
        with self._sending:
            self._handed_over -= 1

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        with self._sending:
            self._open = False
        self._comm.abort()
        if not self._over.done():
            self._over.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._payload is not None:
            return self._payload[-self._missing :]
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._payload is None:
                self._filled += nbytes
                self._parse()
                return
            self._missing -= nbytes
            if not self._missing:
                payload, self._payload = self._payload, None
                self._emit([self._header, payload])
        except Exception as error:
            # Left to asyncio this would be logged and lost.
            if not self._over.done():
                self._over.set_exception(error)
            self._transport.abort()

    def _parse(self) -> None:
        """Take apart what is in the buffer, and leave what is not whole yet at its front."""
        start = 0
        while self._payload is None and self._filled - start >= self.PREFIX.size:
            length, size = self.PREFIX.unpack_from(self._buffer, start)
            if length > self.MOST_HEADER or size > self.MOST_PAYLOAD:
                raise WireError(
                    f"expected a message, got one of {length} and {size} bytes: "
                    "the two ends do not speak the same protocol"
                )
            end = start + self.PREFIX.size + length
            if end > self._filled:
                self._reserve(self.PREFIX.size + length)
                break
            header = bytes(self._buffer[start + self.PREFIX.size : end])
            start = end
            if not size:
                self._emit([header])
                continue
            # An array's own memory: aligned, writable, and free of other messages.
            payload = np.empty(size, np.uint8).data
            there = min(size, self._filled - start)
            payload[:there] = self._buffer[start : start + there]
            start += there
            if there == size:
                self._emit([header, payload])
            else:
                self._header, self._payload, self._missing = header, payload, size - there
        if start:
            rest = self._filled - start
            if rest:
                self._buffer[:rest] = bytes(self._buffer[start : self._filled])
            self._filled = rest

    def _reserve(self, size: int) -> None:
        if size > len(self._buffer):
            larger = memoryview(bytearray(size))
            larger[: self._filled] = self._buffer[: self._filled]
            self._buffer = larger

    def _emit(self, frames: list[Buffer]) -> None:
        if self._take is None:
            self._early.append(frames)
        else:
            self._take(frames)
