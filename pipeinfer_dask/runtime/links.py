"""Links: kept-open connections that carry messages, on the workers' own listeners.

A node on a worker adds one handler to the worker's server, named after itself. A
peer connects to the worker's ordinary address, names the handler, proves that it
knows the session's secret, and from then on both ends keep the connection. So there
is no port of our own, and tcp, tls and inproc work alike.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from types import coroutine
from typing import Any

from distributed.comm import Comm, CommClosedError, connect
from distributed.protocol import Serialized

from pipeinfer_dask.runtime.wire import Envelope, Message, WireError, decode, encode

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 30.0
"""How long to wait for a connection, and again for the node's answer."""


class LinkError(ConnectionError):
    """A link could not be opened, or brought what it should not have."""


@dataclass(frozen=True)
class Session:
    """What all nodes of one pipeline share: the secret proves that a peer belongs to it."""

    identity: str
    secret: bytes
    generation: int

    @classmethod
    def new(cls, generation: int = 0) -> Session:
        """Return a session that no other pipeline has."""
        return cls(secrets.token_hex(16), secrets.token_bytes(32), generation)

    def node(self, name: str) -> str:
        """Return the name of a node that is unique on the cluster."""
        return f"pipeinfer-{self.identity}-{self.generation}-{name}"

    def prove(self, *words: str) -> bytes:
        """Return what only one who knows the secret can say about these words."""
        return hmac.digest(self.secret, "\n".join(words).encode(), "sha256")

    def proven(self, proof: object, *words: str) -> bool:
        """Return whether a peer's proof about these words is right, in constant time."""
        return isinstance(proof, bytes) and hmac.compare_digest(self.prove(*words), proof)


class Link:
    """One end of an open connection. Belongs to one event loop.

    `send` never waits: a message is handed to the transport before it returns, or
    queued behind one that the transport has not taken yet. A link that closes is
    noticed by `receive`, which therefore must run at both ends, at the end that
    only sends too.

    Parameters
    ----------
    comm : Comm
    generation : int
        Messages of another generation are dropped and counted.

    Attributes
    ----------
    dropped : int
        Messages that came for another generation.
    """

    def __init__(self, comm: Comm, generation: int) -> None:
        # Payloads are neither unpickled nor copied nor handed to another thread.
        comm.deserialize = False
        comm.allow_offload = False
        self.dropped = 0
        self._comm = comm
        self._generation = generation
        self._sent = 0
        self._received = 0
        self._waiting: deque[Serialized] = deque()
        self._writer: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether this end has closed the link, or noticed that the other one has."""
        return bool(self._comm.closed())

    def send(self, message: Message) -> None:
        """Send a message. On a closed link this does nothing: `receive` tells of the end."""
        frames = encode(Envelope(self._generation, self._sent, message))
        self._sent += 1
        packed = Serialized({}, frames)
        if self._writer is not None:
            self._waiting.append(packed)
            return
        # The transports of distributed take a message without suspending (what the
        # kernel does not take at once, they buffer): a task for each would only cost.
        writing = self._write(packed)
        try:
            suspended = writing.send(None)
        except StopIteration:
            return
        self._writer = asyncio.get_running_loop().create_task(self._drain(writing, suspended))

    async def receive(self, handle: Callable[[Message], None]) -> None:
        """Hand over each message until the link closes; the link is closed afterwards.

        Parameters
        ----------
        handle : callable
            Called with each message, in the order in which they were sent.

        Raises
        ------
        LinkError
            A message was missing or doubled.
        WireError
            Something came that is no message.
        """
        try:
            while True:
                try:
                    packed = await self._comm.read()
                except CommClosedError:
                    return
                if not isinstance(packed, Serialized):
                    raise WireError(f"expected a message, got {type(packed).__name__}")
                envelope = decode(packed.frames)
                if envelope.generation != self._generation:
                    self.dropped += 1
                    continue
                if envelope.sequence != self._received:
                    raise LinkError(
                        f"expected message {self._received} from {self._comm.peer_address}, "
                        f"got {envelope.sequence}: the link has lost or doubled messages"
                    )
                self._received += 1
                handle(envelope.message)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the link at once. Can be called twice."""
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


async def dial(
    address: str,
    node: str,
    role: str,
    session: Session,
    *,
    connection_args: Mapping[str, Any],
) -> Link:
    """Open a link to a node.

    Parameters
    ----------
    address : str
        The worker's address.
    node : str
        The node's name: see `Session.node`.
    role : str
        What the link is for.
    session : Session
    connection_args : mapping
        What the cluster's security asks of one who connects.

    Raises
    ------
    LinkError
        Nobody answers there, or not as a node of this session.
    """
    nonce = secrets.token_hex(16)
    try:
        comm = await connect(address, DIAL_TIMEOUT_S, deserialize=False, **connection_args)
    except OSError as error:
        raise LinkError(f"could not connect to {node} at {address}: {error}") from error
    try:
        comm.allow_offload = False
        await comm.write(
            {
                "op": node,
                "reply": False,
                "role": role,
                "nonce": nonce,
                "proof": session.prove("dial", node, role, nonce),
            }
        )
        answer = await asyncio.wait_for(comm.read(), DIAL_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        comm.abort()
        raise LinkError(
            f"{node} at {address} did not accept a {role} link: it is not there, or it does "
            f"not know this session ({type(error).__name__})"
        ) from error
    except BaseException:
        comm.abort()
        raise
    if not session.proven(answer, "accept", node, role, nonce):
        comm.abort()
        raise LinkError(f"{node} at {address} does not know the secret of this session")
    return Link(comm, session.generation)


async def accept(
    comm: Comm, node: str, role: str, nonce: str, proof: bytes, session: Session
) -> Link | None:
    """Answer one who dials a node; None, with a warning in the log, if it proves nothing."""
    if not session.proven(proof, "dial", node, role, nonce):
        logger.warning("refused a link to %s from %s: wrong secret", node, comm.peer_address)
        comm.abort()
        return None
    await comm.write(session.prove("accept", node, role, nonce))
    return Link(comm, session.generation)
