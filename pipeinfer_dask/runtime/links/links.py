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
import operator
import secrets
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from distributed.comm import Comm, CommClosedError

from pipeinfer_dask.models.stage import Intake
from pipeinfer_dask.runtime.links.bounds import MOST_HEADER
from pipeinfer_dask.runtime.links.carriers import Carrier, carry
from pipeinfer_dask.runtime.links.framing import Deliver
from pipeinfer_dask.runtime.links.reaching import reach
from pipeinfer_dask.runtime.links.reading import Header, read_header
from pipeinfer_dask.runtime.links.wire import Buffer, Envelope, Message, WireError, encode

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
        return f"{self.prefix(self.identity)}{self.generation}-{name}"

    @staticmethod
    def prefix(identity: str) -> str:
        """Return what the names of all nodes of a session begin with."""
        return f"pipeinfer-{identity}-"

    def prove(self, *words: str) -> bytes:
        """Return what only one who knows the secret can say about these words."""
        return hmac.digest(self.secret, "\n".join(words).encode(), "sha256")

    def proven(self, proof: object, *words: object) -> bool:
        """Return whether a peer's proof about these words is right, in constant time."""
        if not isinstance(proof, bytes):
            return False
        said = [word for word in words if isinstance(word, str)]
        return len(said) == len(words) and hmac.compare_digest(self.prove(*said), proof)


@dataclass
class Counts:
    """What came over a link, or to a node, and was not acted upon.

    Attributes
    ----------
    stale : int
        Messages of another generation. They are dropped.
    doubled : int
        Messages that had come already. They are dropped.
    gaps : int
        Messages before which others are missing. The link ends.
    malformed : int
        What is no message, or one that may not come here. The link ends.
    refused : int
        Peers that did not prove that they belong to the session.
    """

    stale: int = 0
    doubled: int = 0
    gaps: int = 0
    malformed: int = 0
    refused: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(other)))


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
    intake : Intake, optional
        What hidden states may come; by default none.

    Attributes
    ----------
    counts : Counts
    """

    def __init__(
        self, carrier: Carrier, peer: str, generation: int, intake: Intake | None = None
    ) -> None:
        self.counts = Counts()
        self._carrier = carrier
        self._peer = peer
        self._generation = generation
        self._intake = intake
        self._sent = 0
        self._received = 0
        self._most_header = MOST_HEADER

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

    def expect(self, nbytes: int) -> None:
        """Take headers of so many bytes from now on: see `bounds`."""
        self._most_header = max(self._most_header, nbytes)

    async def receive(self, handle: Callable[[Message], None]) -> None:
        """Hand over each message until the link closes; the link is closed afterwards.

        Parameters
        ----------
        handle : callable
            Called with each message, in the order in which they were sent.

        Raises
        ------
        LinkError
            A message was missing, or ``handle`` failed.
        WireError
            Something came that is no message, or may not come here.
        """

        def open(frame: Buffer, nbytes: int) -> Deliver:
            header = read_header(frame, nbytes, self._intake)
            return partial(self._take, header, handle)

        try:
            await self._carrier.run(open, lambda: self._most_header)
        except WireError:
            self.counts.malformed += 1
            raise
        except LinkError:
            raise
        except Exception as error:
            # Whoever receives reports how the link ended: nothing may end it unsaid.
            raise LinkError(f"{type(error).__name__}: {error}") from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the link at once. Can be called twice."""
        self._carrier.abort()

    def _take(
        self, header: Header, handle: Callable[[Message], None], payload: Buffer | None
    ) -> None:
        if header.generation != self._generation:
            self.counts.stale += 1
        elif header.sequence < self._received:
            self.counts.doubled += 1
        elif header.sequence > self._received:
            self.counts.gaps += 1
            raise LinkError(
                f"expected message {self._received} from {self._peer}, got {header.sequence}: "
                "the link has lost messages"
            )
        else:
            self._received += 1
            message = header.complete(payload)
            try:
                handle(message)
            except Exception:
                self.counts.malformed += 1
                raise

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
    intake: Intake | None = None,
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
    intake : Intake, optional
        What hidden states may come back; by default none.

    Raises
    ------
    LinkError
        Nobody answers there, or not as a node of this session.
    """
    nonce = secrets.token_hex(16)
    try:
        comm = await reach(address, DIAL_TIMEOUT_S, deserialize=False, **connection_args)
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
        return Link(await carry(comm), address, session.generation, intake)
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
    comm: Comm,
    node: str,
    hello: Mapping[str, Any],
    session: Session,
    shown: set[str],
    intakes: Mapping[str, Intake | None],
) -> Link | None:
    """Answer one who dials a node; None, with a warning in the log, if it proves nothing.

    Parameters
    ----------
    comm : Comm
    node : str
    hello : mapping
        What the peer says: ``role``, ``nonce``, ``proof``.
    session : Session
    shown : set of str
        Nonces of the proofs that the node has been shown: each is good once.
    intakes : mapping
        What hidden states a link of each role may bring.

    The answer is the last that is sent before both ends turn the connection into a link.
    Who accepts must not be the first to send on it: the dialler may not have done so yet.
    """
    role, nonce = hello.get("role", ""), hello.get("nonce", "")
    if not session.proven(hello.get("proof"), "dial", node, role, nonce):
        why = "wrong secret"
    elif nonce in shown:
        why = "this proof has been shown before"
    else:
        shown.add(nonce)
        await comm.write(session.prove("accept", node, role, nonce))
        carrier = await carry(comm)
        return Link(carrier, comm.peer_address, session.generation, intakes.get(role))
    logger.warning("refused a link to %s from %s: %s", node, comm.peer_address, why)
    comm.abort()
    return None
