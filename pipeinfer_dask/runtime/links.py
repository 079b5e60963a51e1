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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed.comm import Comm, CommClosedError, connect

from pipeinfer_dask.runtime.carriers import Carrier, carry
from pipeinfer_dask.runtime.wire import Buffer, Envelope, Message, WireError, decode, encode

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

    `send` never waits. A link that closes is noticed by `receive`, which therefore must
    run at both ends, at the end that only sends too.

    Parameters
    ----------
    carrier : Carrier
    peer : str
        The other end's address, for error texts.
    generation : int
        Messages of another generation are dropped and counted.

    Attributes
    ----------
    dropped : int
        Messages that came for another generation.
    """

    def __init__(self, carrier: Carrier, peer: str, generation: int) -> None:
        self.dropped = 0
        self._carrier = carrier
        self._peer = peer
        self._generation = generation
        self._sent = 0
        self._received = 0

    @property
    def closed(self) -> bool:
        """Whether this end has closed the link, or noticed that the other one has."""
        return self._carrier.closed

    def send(self, message: Message) -> None:
        """Send a message. On a closed link this does nothing: `receive` tells of the end."""
        self._carrier.write(self._pack(message))

    def send_from_thread(self, message: Message) -> None:
        """As `send`, but for one other thread, which then must be the only one that sends."""
        self._carrier.write_from_thread(self._pack(message))

    async def receive(self, handle: Callable[[Message], None]) -> None:
        """Hand over each message until the link closes; the link is closed afterwards.

        Parameters
        ----------
        handle : callable
            Called with each message, in the order in which they were sent.

        Raises
        ------
        LinkError
            A message was missing or doubled, or ``handle`` failed.
        WireError
            Something came that is no message.
        """

        def take(frames: Sequence[Buffer]) -> None:
            envelope = decode(frames)
            if envelope.generation != self._generation:
                self.dropped += 1
                return
            if envelope.sequence != self._received:
                raise LinkError(
                    f"expected message {self._received} from {self._peer}, got "
                    f"{envelope.sequence}: the link has lost or doubled messages"
                )
            self._received += 1
            handle(envelope.message)

        try:
            await self._carrier.run(take)
        except (LinkError, WireError):
            raise
        except Exception as error:
            # Whoever receives reports how the link ended: nothing may end it unsaid.
            raise LinkError(f"{type(error).__name__}: {error}") from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the link at once. Can be called twice."""
        self._carrier.abort()

    def _pack(self, message: Message) -> list[Buffer]:
        frames = encode(Envelope(self._generation, self._sent, message))
        self._sent += 1
        return frames


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
    except Exception as error:  # Not OSError only: wrong security settings raise others.
        raise LinkError(f"could not connect to {node} at {address}: {error}") from error
    try:
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
        if not session.proven(answer, "accept", node, role, nonce):
            raise LinkError(f"{node} at {address} does not know the secret of this session")
        return Link(await carry(comm), address, session.generation)
    except BaseException as error:
        comm.abort()
        if isinstance(error, CommClosedError | TimeoutError):
            raise LinkError(
                f"{node} at {address} did not accept a link for {role}: it is not there, or it "
                f"does not know this session ({type(error).__name__})"
            ) from error
        if isinstance(error, LinkError) or not isinstance(error, Exception):
            raise
        raise LinkError(
            f"could not open a link to {node} at {address}: {type(error).__name__}: {error}"
        ) from error


async def accept(
    comm: Comm, node: str, role: str, nonce: str, proof: bytes, session: Session
) -> Link | None:
    """Answer one who dials a node; None, with a warning in the log, if it proves nothing.

    The answer is the last that is sent before both ends turn the connection into a link.
    Who accepts must not be the first to send on it: the dialler may not have done so yet.
    """
    if not session.proven(proof, "dial", node, role, nonce):
        logger.warning("refused a link to %s from %s: wrong secret", node, comm.peer_address)
        comm.abort()
        return None
    await comm.write(session.prove("accept", node, role, nonce))
    return Link(await carry(comm), comm.peer_address, session.generation)
