import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
import pytest
from distributed import Security
from distributed.comm import Comm
from distributed.core import Server

from pipeinfer_dask.models.stage import Intake
from pipeinfer_dask.runtime.links.framing import PREFIX
from pipeinfer_dask.runtime.links.links import Counts, Link, LinkError, Session, accept, dial
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import Message, Ping, Pong, WireError
from tests.runtime.chain import run_of

SESSION = Session.new()
NODE = SESSION.node("stage-0")
TRANSPORTS = ["tcp", "tls", "inproc"]
INTAKE = Intake(tokens=2000, width=1024)


@asynccontextmanager
async def linked(
    transport: str = "tcp",
    *,
    ours: Session = SESSION,
    theirs: Session = SESSION,
    intake: Intake | None = INTAKE,
) -> AsyncIterator[tuple[Link, Link]]:
    """Two ends of one link: the one that dialled, and the one on a server."""
    security = Security.temporary() if transport == "tls" else Security()
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    closing = asyncio.Event()

    async def handler(comm: Comm, **hello: Any) -> None:
        link = await accept(comm, NODE, hello, theirs, set(), {"input": intake})
        if link is not None:
            accepted.set_result(link)
            await closing.wait()
            link.abort()

    server = Server({NODE: handler})
    address = "inproc://" if transport == "inproc" else f"{transport}://127.0.0.1:0"
    await server.listen(address, **security.get_listen_args("worker"))
    try:
        link = await dial(
            server.address,
            NODE,
            "input",
            ours,
            connection_args=security.get_connection_args("client"),
        )
        try:
            yield link, await accepted
        finally:
            link.abort()
    finally:
        closing.set()
        await server.close()


class Inbox:
    """Reads a link, and lets a test wait for what comes."""

    def __init__(self, link: Link) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.reading = asyncio.create_task(link.receive(self.messages.put_nowait))


def payload_of(tokens: int, number: int) -> RunPass:
    """Return a run of so many tokens, with 4 KiB of hidden states for each."""
    hidden = np.full((tokens, INTAKE.width), number, np.float32)
    return RunPass(run_of(number, *[1] * tokens), hidden)


async def arrive_in_order(inbox: Inbox, sizes: list[int]) -> None:
    for number, tokens in enumerate(sizes):
        message = await inbox.messages.get()
        assert isinstance(message, RunPass)
        assert message.run.run == number
        assert message.hidden is not None
        assert message.hidden.shape == (tokens, INTAKE.width)
        assert message.hidden.flags.aligned
        assert (message.hidden == number).all()


MIXED = [1, 10, 32, 2, 1250, 1, 25, 4] * 4


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_of_all_sizes_arrive_in_order(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):
            inbox, outbox = Inbox(far), Inbox(near)
            for number, tokens in enumerate(MIXED):
                near.send(payload_of(tokens, number))
            far.send(Pong(1, 0.5, 0.0))
            await arrive_in_order(inbox, MIXED)
            assert await outbox.messages.get() == Pong(1, 0.5, 0.0)

    asyncio.run(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_thread_may_send(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):

            def send() -> None:
                for number, tokens in enumerate(MIXED):
                    near.send_from_thread(payload_of(tokens, number))

            inbox, _ = Inbox(far), Inbox(near)
            thread = Thread(target=send)
            thread.start()
            await arrive_in_order(inbox, MIXED)
            thread.join()

    asyncio.run(main())


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_hidden_states_arrive_in_memory_that_may_be_written(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(far)
            for number, tokens in enumerate((2, 250)):
                near.send(payload_of(tokens, number))
                message = await inbox.messages.get()
                assert isinstance(message, RunPass)
                assert message.hidden is not None
                assert message.hidden.flags.writeable

    asyncio.run(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_end_that_only_sends_notices_that_the_other_is_gone(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(near)
            far.abort()
            await inbox.reading
            assert near.closed
            near.send(Ping(1))
            near.send_from_thread(Ping(2))

    asyncio.run(main())


def test_a_peer_without_the_secret_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    stranger = replace(SESSION, secret=b"a guess")

    async def main() -> None:
        with pytest.raises(LinkError, match="did not accept a link"):
            async with linked(ours=stranger):
                pass

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "wrong secret" in caplog.text


def test_a_node_that_does_not_know_the_secret_is_not_trusted() -> None:
    async def impostor(comm: Comm, **hello: Any) -> None:
        await comm.write(b"trust me")

    async def main() -> None:
        server = Server({NODE: impostor})
        await server.listen("tcp://127.0.0.1:0")
        try:
            with pytest.raises(LinkError, match="does not know the secret"):
                await dial(server.address, NODE, "input", SESSION, connection_args={})
        finally:
            await server.close()

    asyncio.run(main())


def test_nobody_at_the_address_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.links.links.DIAL_TIMEOUT_S", 0.2)

    async def main() -> None:
        with pytest.raises(LinkError, match=f"could not connect to {NODE} at tcp://127.0.0.1:9"):
            await dial("tcp://127.0.0.1:9", NODE, "input", SESSION, connection_args={})

    asyncio.run(main())


def test_who_takes_connections_and_says_nothing_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.links.links.DIAL_TIMEOUT_S", 0.2)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            async with asyncio.timeout(20):
                with pytest.raises(LinkError, match=f"{address}: it says nothing for 0.2 s"):
                    await dial(address, NODE, "input", SESSION, connection_args={})

    asyncio.run(main())


def test_messages_of_another_generation_are_dropped_and_counted() -> None:
    async def main() -> None:
        async with linked(ours=replace(SESSION, generation=3)) as (near, far):
            inbox = Inbox(far)
            near.send(Ping(1))
            near.send(Ping(2))
            near.abort()
            await inbox.reading
            assert far.counts == Counts(stale=2)
            assert inbox.messages.empty()

    asyncio.run(main())


def test_a_missing_message_ends_the_link() -> None:
    async def main() -> None:
        async with linked() as (near, far):
            inbox = Inbox(far)
            near._pack(Ping(1))  # gets a number, but is never sent
            near.send(Ping(2))
            with pytest.raises(LinkError, match=r"expected message 0 from .*, got 1"):
                await inbox.reading
            assert far.closed

    asyncio.run(main())


def write_raw(near: Link, *frames: bytes) -> None:
    near._carrier.write(frames)


def announce_too_much(near: Link) -> None:
    carrier: Any = near._carrier
    carrier._transport.write(PREFIX.pack(1, 1 << 62) + b"\0")


@pytest.mark.parametrize(
    "nonsense",
    [lambda near: write_raw(near, b"hello"), announce_too_much],
    ids=["no message", "a payload beyond all bounds"],
)
def test_nonsense_ends_the_link(nonsense: Callable[[Link], None]) -> None:
    async def main() -> None:
        async with linked() as (near, far):
            inbox = Inbox(far)
            nonsense(near)
            with pytest.raises(WireError):
                await inbox.reading
            assert far.closed

    asyncio.run(main())


def test_a_long_header_comes_in_several_pieces() -> None:
    async def main() -> None:
        async with linked() as (near, far):
            inbox = Inbox(far)
            run = run_of(0, *range(60_000))
            near.send(RunPass(run))
            near.send(Ping(1))
            assert await inbox.messages.get() == RunPass(run)
            assert await inbox.messages.get() == Ping(1)

    asyncio.run(main())
