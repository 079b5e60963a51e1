"""The floor under a hop: messages relayed by bare asyncio streams, one process for each stage.

Run as a module with a port: relays what comes to the port that it prints on to the given
one, until its own peer leaves. Imports nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress

LENGTH = struct.Struct("<Q")
BUFFER = 1 << 22
"""Bytes that a stream may hold: more than the largest message, so that it never pauses."""
PATIENCE_S = 60.0
"""How long the processes may take to start, and to end."""


async def receive(reader: asyncio.StreamReader) -> bytes:
    """Return the next message.

    Raises
    ------
    asyncio.IncompleteReadError
        The peer has left.
    """
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(size)


async def send(writer: asyncio.StreamWriter, message: bytes) -> None:
    """Send a message, and wait while too much is buffered."""
    writer.writelines((LENGTH.pack(len(message)), message))
    await writer.drain()


async def relay(port: int) -> None:
    """Relay messages to ``port`` on this host until the peer leaves."""
    _, onward = await asyncio.open_connection("127.0.0.1", port, limit=BUFFER)
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await send(onward, await receive(reader))
        writer.close()
        over.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=BUFFER)
    async with server:
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await over.wait()
    onward.close()


class Floor:
    """A chain of relay processes that begins and ends here. Made by `open`."""

    def __init__(
        self,
        processes: list[asyncio.subprocess.Process],
        server: asyncio.Server,
        writer: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
        back: asyncio.StreamWriter,
    ) -> None:
        self._processes = processes
        self._server = server
        self._writer = writer
        self._reader = reader
        self._back = back

    @classmethod
    async def open(cls, stages: int) -> Floor:
        """Start a chain of ``stages`` processes."""
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        arrival = loop.create_future()
        writers: list[asyncio.StreamWriter] = []

        def arrived(reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
            writers.append(back)
            if not arrival.done():  # else nobody waits for it any more
                arrival.set_result((reader, back))

        server = await asyncio.start_server(arrived, "127.0.0.1", 0, limit=BUFFER)
        port = server.sockets[0].getsockname()[1]
        processes: list[asyncio.subprocess.Process] = []
        try:
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(stages):
                    process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        "-m",
                        __name__,
                        str(port),
                        stdout=asyncio.subprocess.PIPE,
                    )
                    processes.append(process)
                    assert process.stdout is not None
                    port = int(await process.stdout.readline())
                _, writer = await asyncio.open_connection("127.0.0.1", port, limit=BUFFER)
                writers.append(writer)
                reader, back = await arrival
        except BaseException:
            server.close()
            await _end(processes)
            for writer in writers:  # one may have arrived meanwhile
                writer.close()
            raise
        return cls(processes, server, writer, reader, back)

    async def pass_on(self, message: bytes) -> bytes:
        """Send a message through the whole chain, and return what comes out."""
        await send(self._writer, message)
        return await receive(self._reader)

    async def close(self) -> None:
        """Let the processes end, one after the other, and wait for them."""
        self._writer.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                for process in self._processes:
                    await process.wait()
        finally:
            await _end(self._processes)
        self._back.close()
        self._server.close()
        await self._server.wait_closed()


async def _end(processes: Iterable[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1])))
