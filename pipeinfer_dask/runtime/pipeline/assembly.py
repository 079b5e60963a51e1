"""The nodes of a pipeline: filled seats, and what is done when one is empty again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from distributed import Client

from pipeinfer_dask.protocol.messages import (
    AWAY,
    DrafterBack,
    DrafterLost,
    PipelineEvent,
    StageLost,
    StagesBack,
)
from pipeinfer_dask.runtime.links.links import LinkError, Session
from pipeinfer_dask.runtime.links.wire import Message
from pipeinfer_dask.runtime.nodes.loading import Progress
from pipeinfer_dask.runtime.pipeline.assembled import (
    CLIENT_CLOSED,
    CLOSED,
    NO_SCHEDULER,
    NodeLostError,
    Nodes,
    PipelineError,
    Seat,
)
from pipeinfer_dask.runtime.pipeline.peers import Peer, Trouble
from pipeinfer_dask.runtime.pipeline.recovery import Former, Part, Recovery
from pipeinfer_dask.runtime.pipeline.replacement import (
    LOOK_S,
    Suspects,
    end_strays,
)
from pipeinfer_dask.runtime.planning.memory import Load
from pipeinfer_dask.runtime.planning.scheduler import NoSchedulerError, NoWorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 2.0
"""While there is no worker for a lost node, and after the drafter could not be replaced, try
again so much later: the cluster may have got another worker."""


_WORDS = {Trouble.CUT: "is cut off", Trouble.FULL: "has run out of memory"}


class Assembly:
    """Stages and a drafter on workers, and their replacements. Belongs to the client's loop.

    Parameters
    ----------
    client : Client
    session : Session
        Its generation is that of all nodes at first.
    stages, drafter : list of Seat
        The drafter's is empty where no worker is to hold one.
    deadline : float, seconds
    recovery : Recovery
    progress : callable, optional
        Told of each node's loading, until all stand for the first time.
    report : callable
        Told of each message of a node that is not its peer's own affair.
    tell : callable
        Told what is lost, and what is back.
    fail : callable
        Told what can't be mended.
    connect : callable
        Lays the links between client and stages: called with the session.
    disconnect : callable
        Gives them up.

    Attributes
    ----------
    stages, drafter : Part
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        stages: list[Seat],
        drafter: list[Seat],
        *,
        deadline: float,
        recovery: Recovery,
        progress: Progress | None,
        report: Callable[[Message], None],
        tell: Callable[[PipelineEvent], None],
        fail: Callable[[PipelineError], None],
        connect: Callable[[Session], Awaitable[None]],
        disconnect: Callable[[], None],
    ) -> None:
        self.nodes = Nodes(client, deadline, report=report, lost=self.lose)
        self.stages = Part(stages, recovery, self._raise_stages)
        self.drafter = Part(drafter, recovery, self._raise_drafter)
        self._client = client
        self._session = session
        self._generations = itertools.count(session.generation + 1)
        self._recovery = recovery
        self._progress = progress
        self._tell = tell
        self._fail = fail
        self._connect = connect
        self._disconnect = disconnect
        self._suspects = Suspects(client, recovery.move_in_after_s)
        self._choosing = asyncio.Lock()
        self._opened = self._stopped = False
        self._recovering: set[asyncio.Task[None]] = set()

    async def open(self, former: Former | None = None) -> None:
        """Have all nodes stand for the first time.

        In place of a former pipeline it is enough that the stages do: its texts are waiting.
        """
        if self._recovery.most:
            await self._suspects.note_nannies()
        if former is None:
            await together([part.stand() for part in (self.stages, self.drafter)])
        else:
            await end_strays(self._client, former.identity, but=former.lost)
            await self._suspects.inherit(former.lost)
            await self.stages.stand()
            self._recover_soon(self.drafter, NodeLostError("the head was lost, and the drafter"))
        self._opened = True

    async def stop(self) -> None:
        """Recover no more, whatever is lost."""
        self._stopped = True
        for task in self._recovering:
            task.cancel()
        await asyncio.gather(*self._recovering, return_exceptions=True)

    # --- filling seats --------------------------------------------------------------

    async def _raise_stages(self) -> None:
        session = self._next_session(self.stages)
        empty = self.stages.empty
        standing = [peer.renew(session.generation) for peer in self.stages.peers]
        await together([*standing, self._fill(self.stages, session)])
        await together([one.dial_next(other) for one, other in pairwise(self.stages.peers)])
        await self._connect(session)
        await together([seat.peer.find_clock() for seat in empty if seat.peer is not None])
        self.stages.generation = session.generation
        self._tell(StagesBack(session.generation))

    async def _raise_drafter(self) -> None:
        session = self._next_session(self.drafter)
        await self._fill(self.drafter, session)
        await together([peer.find_clock() for peer in self.drafter.peers])
        self.drafter.generation = session.generation
        self._tell(DrafterBack(session.generation))

    def _next_session(self, part: Part) -> Session:
        """Return our session with a generation that no node of this part has had."""
        if part.tried:
            return replace(self._session, generation=next(self._generations))
        part.tried = True
        return self._session

    async def _fill(self, part: Part, session: Session) -> None:
        empty = part.empty
        if part.homeless:
            await self._find_workers(part)
        await together([self._make(part, seat, session) for seat in empty])

    async def _find_workers(self, part: Part) -> None:
        """Choose a worker for each seat that has none, or wait until there is one to choose."""
        while True:
            if part is self.drafter and self.stages.homeless:
                # A text can do without the drafter, but not without a stage.
                await asyncio.sleep(LOOK_S)
                continue
            try:
                async with self._choosing:
                    await self._choose_workers(part.homeless)
            except NoWorkerError as lack:
                if isinstance(lack, NoSchedulerError) or not self._opened:
                    raise
                if all(seat.short for seat in part.homeless):
                    raise  # nobody replaces a worker that lives: none will come
                if not part.lacks:
                    limit = f"up to {self._recovery.timeout_s:g} s"
                    logger.warning("pipeinfer waits %s for a worker to come: %s", limit, lack)
                part.lacks = str(lack)
            else:
                part.lacks = ""
                return
            await asyncio.sleep(RETRY_S)

    async def _choose_workers(self, homeless: Sequence[Seat]) -> None:
        seats = [*self.stages.seats, *self.drafter.seats]
        loads = self._recovery.loads or tuple(Load(seat.title) for seat in seats)
        workers = await self._suspects.choose(
            [replace(loads[seats.index(seat)], barred=frozenset(seat.full)) for seat in homeless],
            Counter(seat.worker for seat in seats if seat.worker is not None),
        )
        for seat, worker in zip(homeless, workers, strict=True):
            seat.worker = worker

    async def _make(self, part: Part, seat: Seat, session: Session) -> None:
        try:
            await self.nodes.make(seat, session, self._progress)
        except (PipelineError, LinkError) as error:
            if isinstance(error, NodeLostError):
                seat.note_memory(short=False)
            self._leave(seat)
            # Where a model does not load, another worker may do better, and is tried at once; for
            # the drafter there is time, as texts go on without it.
            at_once = part is self.stages if self._opened else self._recovery.most > 0
            if isinstance(error, NodeLostError) or not at_once:
                raise
            raise NodeLostError(str(error)) from error

    # --- what is lost ---------------------------------------------------------------

    def lose(self, seat: Seat, peer: Peer, trouble: Trouble, reason: str) -> None:
        """Take note that a seat's node can't go on, and have done about it what can be.

        Parameters
        ----------
        seat : Seat
        peer : Peer
            Its node: nothing is done if it has another one by now.
        trouble : Trouble
        reason : str
        """
        if self._stopped or seat.peer is not peer:
            return
        if self._client.status in CLOSED:  # with it went all nodes, one by one
            self._fail(NodeLostError(CLIENT_CLOSED))
            return
        lost = NodeLostError(f"{peer.title} {_WORDS.get(trouble, 'is lost')}: {reason}")
        part = self.drafter if seat in self.drafter.seats else self.stages
        seat.note_memory(short=trouble is Trouble.FULL)
        if trouble in (Trouble.GONE, Trouble.FULL) or part is self.drafter:
            self._leave(seat)
        if trouble is Trouble.FAILED and part is self.stages:
            self._fail(lost)
        elif part.generation == AWAY:
            part.lose(lost)
        elif part.left > 0 and trouble is not Trouble.FAILED and self._client.status == "running":
            part.left -= 1
            self._begin_recovery(part, lost)
        elif part is self.stages:
            if self._client.status != "running":
                lost = NodeLostError(f"{lost}; {NO_SCHEDULER}")
            self._fail(lost)
        else:
            self.give_up_drafter(str(lost))

    def give_up_drafter(self, reason: str) -> None:
        """Do without a drafter from now on: texts need none."""
        generation, self.drafter.generation = self.drafter.generation, AWAY
        logger.warning("pipeinfer goes on without drafts: %s", reason)
        self._tell(DrafterLost(generation, reason))

    def _leave(self, seat: Seat) -> None:
        """Give up a seat's node, and do without its worker if that can be."""
        peer, seat.peer = seat.peer, None
        if peer is not None:
            self.nodes.drop(peer.node)
        if seat.worker is not None:
            self._suspects.add(seat.worker)
            seat.worker = None

    def _begin_recovery(self, part: Part, lost: NodeLostError) -> None:
        generation, part.generation = part.generation, AWAY
        if part is self.stages:
            self._disconnect()
            self._tell(StageLost(generation, str(lost)))
        else:
            self._tell(DrafterLost(generation, str(lost)))
        self._recover_soon(part, lost)

    def _recover_soon(self, part: Part, lost: NodeLostError) -> None:
        task = asyncio.create_task(self._recover(part, lost))
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    async def _recover(self, part: Part, lost: NodeLostError) -> None:
        began, without = time.monotonic(), False
        logger.warning("pipeinfer recovers, and goes on with all texts: %s", lost)
        while True:
            try:
                await part.stand(self._recovery.timeout_s)
                break
            except Exception as error:
                reason = part.reason(error)
                failure = PipelineError(f"{lost}; it could not be replaced: {reason}")
                failure.__cause__ = error
                if part is self.stages:
                    self._fail(failure)
                    return
                if not without:
                    logger.warning("pipeinfer goes on without drafts: %s", failure)
                without = True
                if isinstance(error, NodeLostError):
                    return  # too many in a row: a model that ends its workers must not end all
            await asyncio.sleep(RETRY_S)
        took, where = time.monotonic() - began, ", ".join(peer.title for peer in part.peers)
        logger.info("pipeinfer has recovered within %.1f s: %s", took, where)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, or the first error once all the rest is cancelled and over."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
