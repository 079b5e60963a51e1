"""What is done about lost nodes, and for how long: more may be lost meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pipeinfer_dask.protocol.messages import AWAY
from pipeinfer_dask.runtime.links.links import LinkError
from pipeinfer_dask.runtime.pipeline.assembled import NodeLostError, Seat
from pipeinfer_dask.runtime.pipeline.peers import Peer
from pipeinfer_dask.runtime.planning.memory import Load

logger = logging.getLogger(__name__)

BREATH_S = 0.2
"""Where a link could not be opened: so much later it's known which end is dead, if one is."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How far to go.

    Attributes
    ----------
    most : int
        Losses in a row, with nothing computed in between, after which a pipeline is given up.
    timeout_s : float
        Seconds for one recovery, however many nodes are lost in its course, and however long
        no worker is there for them.
    move_in_after_s : float
        A node that no free worker has come for in so many seconds moves in with another one.
    loads : tuple of Load
        What each node holds: the stages, and then the drafter where a worker has it. Empty:
        next to nothing.
    """

    most: int = 0
    timeout_s: float = 300.0
    move_in_after_s: float = 0.0
    loads: tuple[Load, ...] = ()


@dataclass(frozen=True, slots=True)
class Former:
    """A pipeline whose head was lost: another one takes its place.

    Attributes
    ----------
    identity : str
        Of its session.
    lost : tuple of str
        Workers that heads were lost on, and that nobody is to wait for.
    """

    identity: str
    lost: tuple[str, ...]


NONE = Recovery()
"""What is lost stays lost."""


class Part:
    """Seats that stand or fall together: all stages, or the drafter.

    Parameters
    ----------
    seats : list of Seat
    recovery : Recovery
    raise_up : callable
        Fills all seats that are empty, and connects them.

    Attributes
    ----------
    generation : int
        Of what stands; `AWAY` while nothing does.
    left : int
        Losses that may still follow.
    tried : bool
        Whether there was an attempt to raise it up.
    lacks : str
        Why no worker is there yet that it waits for; empty if it waits for none.
    """

    def __init__(
        self, seats: list[Seat], recovery: Recovery, raise_up: Callable[[], Awaitable[None]]
    ) -> None:
        self.seats = seats
        self.generation = AWAY
        self.left = recovery.most
        self.tried = False
        self.lacks = ""
        self._recovery = recovery
        self._raise_up = raise_up
        self._attempt: asyncio.Task[None] | None = None
        self._lost: NodeLostError | None = None

    @property
    def peers(self) -> list[Peer]:
        """The nodes that there are, in order."""
        return [seat.peer for seat in self.seats if seat.peer is not None]

    @property
    def empty(self) -> list[Seat]:
        """Seats without a node."""
        return [seat for seat in self.seats if seat.peer is None]

    @property
    def homeless(self) -> list[Seat]:
        """Seats for whose node nobody has chosen a worker."""
        return [seat for seat in self.seats if seat.worker is None]

    def working(self) -> None:
        """Note that something was computed: the last recovery has been worth it."""
        self.left = self._recovery.most

    def lose(self, lost: NodeLostError) -> bool:
        """Break off what is being done, for one more node is lost; False if nothing is."""
        if self._attempt is None or self._attempt.done():
            return False
        self._lost = lost
        self._attempt.cancel()
        return True

    async def stand(self, timeout_s: float | None = None) -> None:
        """Try until all seats are filled and connected.

        Raises
        ------
        NodeLostError
            Too many nodes were lost on the way.
        TimeoutError
            It took too long.
        Exception
            What can't be mended by trying again.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                self._lost = None
                try:
                    await self._try()
                    return
                except (NodeLostError, LinkError) as lost:
                    if self.left <= 0:
                        raise
                    self.left -= 1
                    logger.warning("pipeinfer tries again: %s", lost)
                    await asyncio.sleep(0 if isinstance(lost, NodeLostError) else BREATH_S)

    def reason(self, error: Exception) -> str:
        """Return what `stand` has failed by, in words."""
        if not isinstance(error, TimeoutError):
            return str(error)
        limit = f"{self._recovery.timeout_s:g} s"
        if self.lacks:
            return f"{self.lacks}, and none came within {limit}"
        return f"it took more than {limit}"

    async def _try(self) -> None:
        self.lacks = ""
        attempt = self._attempt = asyncio.ensure_future(self._raise_up())
        try:
            await asyncio.wait([attempt])
            if self._lost is not None:
                raise self._lost
            attempt.result()
        finally:
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)
