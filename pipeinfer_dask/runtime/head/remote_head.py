"""The client's end of a head on a worker: requests go there, what becomes of them comes back.

To its callers it is like a `Head`. Its generations hear all that the head records, a way later
and on the client's own clock, so whoever follows them sees what he would see with a head here.
A head that is lost is replaced like any node, and its generations go on with what came of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Self

from distributed import Client
from distributed.protocol.pickle import dumps

from pipeinfer_dask.protocol.messages import AWAY, Commit, DrafterLost, StageLost
from pipeinfer_dask.runtime.head.conversation import Conversation
from pipeinfer_dask.runtime.head.followed import Followed
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.head import PipelineBusyError
from pipeinfer_dask.runtime.head.head_actor import HeadActor, HeadNode, PipelinePlan
from pipeinfer_dask.runtime.links.bounds import of_record
from pipeinfer_dask.runtime.links.links import LinkError, Session
from pipeinfer_dask.runtime.links.wire import (
    Forget,
    Message,
    NodeLoading,
    Recorded,
    RequestEnded,
    RequestStatus,
    StopRequest,
)
from pipeinfer_dask.runtime.nodes.loading import Loading, Progress
from pipeinfer_dask.runtime.pipeline.assembled import (
    CLIENT_CLOSED,
    CLOSED,
    NO_SCHEDULER,
    NodeLostError,
    Nodes,
    PipelineError,
    Seat,
)
from pipeinfer_dask.runtime.pipeline.assembly import RETRY_S
from pipeinfer_dask.runtime.pipeline.peers import Peer, Trouble
from pipeinfer_dask.runtime.pipeline.recovery import Former, Part
from pipeinfer_dask.runtime.pipeline.replacement import first_able
from pipeinfer_dask.runtime.planning.scheduler import NoSchedulerError, NoWorkerError, known_workers
from pipeinfer_dask.simulation.costs import Costs
from pipeinfer_dask.trace.entries import read_entry

logger = logging.getLogger(__name__)

GENERATIONS = 10**6
"""No pipeline comes to so many: the next one counts on from there."""

KEPT = "what has come of the texts is kept: open another engine, and go on from there"

MEASURE_TIMEOUT_S = 300.0
"""How long the head may take to measure what its pipeline costs."""


@dataclass(frozen=True, slots=True)
class Start:
    """A generation that is to be started, or gone on with."""

    followed: Followed


Asked = Start | StopRequest | Forget


class RemoteHead:
    """Serves generations through a head on a worker. Made by `open`.

    Attributes
    ----------
    loop : asyncio.AbstractEventLoop
        The client's. All methods but `start`, `cancel` and `forget` are called on it.
    lost : Exception or None
        What the pipeline was lost by, for good.
    max_concurrent : int
    """

    def __init__(
        self, client: Client, plan: PipelinePlan, worker: str, progress: Progress | None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost: Exception | None = None
        self.max_concurrent = plan.max_concurrent
        self._client = client
        self._session = Session.new()
        self._plan = plan.moved({}, self._session, None)
        self._seat = Seat("head", HeadNode, self._plan, worker, actor=HeadActor)
        self._part = Part([self._seat], plan.recovery, self._raise_again)
        self._nodes = Nodes(client, plan.node_timeout, report=self._heed, lost=self._head_lost)
        self._progress = progress
        self._places: dict[str, str] = {}
        self._lost_on: list[str] = []  # workers, in the order in which heads were lost there
        self._losses: deque[StageLost | DrafterLost] = deque(maxlen=4)
        self._followed: dict[int, Followed] = {}
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._asking: asyncio.Task[None] | None = None
        self._recovering: set[asyncio.Task[None]] = set()
        self._guard = self.loop.create_task(self._outlive())
        self._actor: Any

    @classmethod
    async def open(
        cls,
        client: Client,
        plan: PipelinePlan,
        worker: str,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Make the head on a worker, and wait until its pipeline stands.

        Parameters
        ----------
        client : Client
            This must run on its event loop.
        plan : PipelinePlan
            Its recovery is the head's own, too.
        worker : str
            The address. The client needs a route to it, and to no other worker.
        progress : callable, optional
            Told of the loading of each node of the pipeline.

        Raises
        ------
        PipelineError
            The head or a node of its pipeline could not be made, or was lost meanwhile.
        """
        head = cls(client, plan, worker, progress)
        try:
            await head._raise_up()
            if head.lost is not None:
                raise head.lost
        except BaseException as error:
            await head.close()
            if isinstance(error, LinkError):
                raise PipelineError(str(error)) from error
            raise
        return head

    # --- from any thread ----------------------------------------------------------

    def start(self, generation: Generation) -> None:
        """Queue a generation.

        Raises
        ------
        ValueError
            If its policy can't travel.
        """
        try:
            policy = dumps(generation.policy)
        except Exception as error:  # whatever an object raises that is pickled
            raise ValueError(
                f"expected a policy that can be pickled, as head='worker' needs it, got "
                f"{generation.strategy!r}: {error}"
            ) from error
        self.loop.call_soon_threadsafe(self._start, Followed(generation, policy))

    def cancel(self, generation: Generation) -> None:
        """Stop a generation, running or queued."""
        # A loop that is closed has failed all generations: there is nothing to stop.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop, generation.request.id)

    def forget(self, conversation: Conversation) -> None:
        """Give a conversation's KV cache to others, at once or when its generation is over."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._put, Forget(conversation.cache))

    # --- on the loop ----------------------------------------------------------------

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure what each part of the pipeline costs, its hops from the head on: see `Head`."""
        recovers = PipelineBusyError(
            "expected an idle pipeline, got one that recovers from a loss: wait, and try again"
        )
        if not self._stands:
            raise recovers
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT_S):
                costs: Costs = await self._actor.measure_costs(request, drafter=drafter)
        except TimeoutError:
            raise PipelineError(
                f"expected costs within {MEASURE_TIMEOUT_S:g} s, got none from "
                f"{self._seat.title}: try again once the pipeline is idle"
            ) from None
        except OSError as error:  # its worker is gone, which the link tells in a moment
            raise recovers from error
        return costs

    def end(self, error: Exception) -> None:
        """Fail all generations, and any that is started later."""
        if self.lost is not None:
            return
        self.lost = error
        self._guard.cancel()
        for task in self._tasks:
            task.cancel()
        failed = list(self._followed.values())
        self._followed.clear()
        for followed in failed:
            if not followed.over(self._plan.tokenizer):
                followed.generation.fail(error)

    async def close(self) -> None:
        """Release the head, its pipeline and the link."""
        self.end(ConnectionError("the head was closed meanwhile"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._nodes.close()

    @property
    def _stands(self) -> bool:
        return self._part.generation != AWAY

    @property
    def _tasks(self) -> list[asyncio.Task[None]]:
        asking = [] if self._asking is None else [self._asking]
        return [*self._recovering, *asking]

    async def _outlive(self) -> None:
        """Fail what is left when the loop ends, as a client's does that is closed."""
        try:
            await self.loop.create_future()
        finally:
            self.end(
                ConnectionError("the event loop has ended, as when your Dask client was closed")
            )

    def _start(self, followed: Followed) -> None:
        if self.lost is not None:
            followed.generation.fail(self.lost)
            return
        self._followed[followed.generation.request.id] = followed
        self._put(Start(followed))

    def _stop(self, request: int) -> None:
        if (followed := self._followed.get(request)) is not None:
            followed.stopping = True
            if not self._stands:
                self._drop_those_over()
            self._put(StopRequest(request))

    def _put(self, asked: Asked) -> None:
        if self._stands:  # else the next head is asked for all that is not over by then
            self._asked.put_nowait(asked)

    async def _ask(self) -> None:
        """Hand on what is asked for, in order: actor calls and links keep none to each other."""
        while True:
            asked = await self._asked.get()
            if isinstance(asked, Start):
                await self._hand_over(asked.followed)
            elif self._seat.peer is not None:
                self._seat.peer.send(asked)

    async def _hand_over(self, followed: Followed) -> None:
        peer = self._seat.peer
        assert peer is not None
        request = followed.begin(peer.clock.offset, self._session.generation)
        peer.expect(of_record(request))
        try:
            await self._actor.start(request, followed.policy)
        except OSError as error:
            self._head_lost(self._seat, peer, Trouble.GONE, f"it can't be asked: {error}")
        except Exception as error:  # such as a policy whose class the worker does not know
            if self._followed.pop(request.id, None) is not None:
                followed.generation.fail(error)

    # --- a head, and another one when it is lost ----------------------------------------

    async def _raise_up(self) -> None:
        """Make the head, and ask it for all that is not over."""
        seat = self._seat
        await self._nodes.make(seat, Session.new())
        assert seat.peer is not None
        await seat.peer.find_clock()
        (self._actor,) = await self._nodes.actors()
        self._part.generation = self._session.generation
        self._asked = asyncio.Queue()
        self._drop_those_over()
        for followed in self._followed.values():
            self._put(Start(followed))
        self._asking = self.loop.create_task(self._ask())

    async def _raise_again(self) -> None:
        """Make another head; while its pipeline can't be opened, try on: workers may come."""
        while True:
            try:
                await self._move()
                await self._raise_up()
            except NodeLostError:
                self._leave_worker()
                raise
            except (PipelineError, NoWorkerError) as error:
                if isinstance(error, NoSchedulerError):
                    raise
                if not self._part.lacks:
                    logger.warning("pipeinfer tries on to recover: %s", error)
                self._part.lacks = str(error)
            else:
                return
            await asyncio.sleep(RETRY_S)

    async def _move(self) -> None:
        """Choose the next head's worker, and plan a pipeline in place of what there was."""
        seat = self._seat
        if seat.peer is not None:  # what an attempt has left
            self._nodes.drop(seat.peer.node)
            seat.peer = None
        known = await known_workers(self._client)
        if seat.worker not in known:
            # A spare first; of the others one with little to do, as the drafter's has.
            held, drafter = Counter(self._places.values()), self._places.get("drafter")
            ranked = sorted(
                known,
                key=lambda worker: (worker in self._lost_on, held[worker], worker != drafter),
            )
            seat.worker = await first_able(self._client, ranked, HeadActor)
        former = Former(self._session.identity, tuple(self._lost_on))
        session = Session.new(self._session.generation + GENERATIONS)
        self._session = replace(session, identity=former.identity)
        seat.spec = self._plan = self._plan.moved(self._places, self._session, former)

    def _leave_worker(self) -> None:
        """Give up the head's node, and do without its worker."""
        seat = self._seat
        if seat.peer is not None:
            self._nodes.drop(seat.peer.node)
        if seat.worker is not None:
            self._lost_on.append(seat.worker)
        seat.peer = seat.worker = None

    def _head_lost(self, seat: Seat, peer: Peer, trouble: Trouble, reason: str) -> None:
        if self.lost is not None or seat.peer is not peer:
            return
        if self._client.status in CLOSED:
            self.end(PipelineError(CLIENT_CLOSED))
            return
        if trouble is Trouble.FAILED:  # its pipeline is lost, and the reason says by what
            self.end(PipelineError(reason))
            return
        self._leave_worker()
        lost = NodeLostError(f"{peer.title} is lost: {reason}")
        if not self._stands:
            if not self._part.lose(lost):
                self.end(lost)
        elif self._part.left > 0 and self._client.status == "running":
            self._part.left -= 1
            self._begin_recovery(lost)
        else:
            also = "" if self._client.status == "running" else f"; {NO_SCHEDULER}"
            self.end(PipelineError(f"{lost}{also}; {KEPT}"))

    def _begin_recovery(self, lost: NodeLostError) -> None:
        self._part.generation = AWAY
        if self._asking is not None:
            self._asking.cancel()
        for followed in self._followed.values():
            followed.lose(monotonic(), str(lost))
        self._drop_those_over()
        task = self.loop.create_task(self._recover(lost))
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    async def _recover(self, lost: NodeLostError) -> None:
        began = monotonic()
        logger.warning("pipeinfer recovers, and goes on with all texts: %s", lost)
        try:
            await self._part.stand(self._plan.recovery.timeout_s)
        except Exception as error:
            reason = self._part.reason(error)
            self.end(PipelineError(f"{lost}; it could not be replaced: {reason}; {KEPT}"))
        else:
            where = self._seat.worker
            assert where is not None
            if self._progress is not None:
                self._progress(Loading("head", where, 0, 0, stands=True))
            logger.info("pipeinfer has recovered within %.1f s: %s", monotonic() - began, where)

    def _drop_those_over(self) -> None:
        """Finish the generations of which a lost head had nothing to say but that they are over."""
        for request, followed in list(self._followed.items()):
            if followed.over(self._plan.tokenizer):
                del self._followed[request]

    # --- what the head says -----------------------------------------------------------

    def _heed(self, message: Message) -> None:
        match message:
            case NodeLoading():
                if message.stands:
                    self._places[message.node.partition(" (")[0]] = message.where
                if self._progress is not None:
                    self._progress(
                        Loading(
                            message.node,
                            message.where,
                            message.nbytes,
                            message.total,
                            message.stands,
                        )
                    )
            case Recorded() | RequestStatus() | RequestEnded():
                if message.request in self._followed:
                    self._tell(message)
            case _:
                raise LinkError(f"expected news of a request, got {type(message).__name__}")

    def _tell(self, message: Recorded | RequestStatus | RequestEnded) -> None:
        followed = self._followed[message.request]
        generation = followed.generation
        match message:
            case Recorded():
                for entry in message.entries:
                    time, what = read_entry(entry)
                    followed.note(time, what)
                    if isinstance(what, Commit):
                        self._part.working()
                    elif isinstance(what, StageLost | DrafterLost) and what not in self._losses:
                        # Each request tells of it, and the head has warned on its worker.
                        self._losses.append(what)
                        logger.warning("pipeinfer recovers: %s", what.reason)
            case RequestStatus(status="queued"):
                generation.wait_in_line(message.position)
            case RequestStatus(status="recovering"):
                generation.recover()
            case RequestStatus(status="running"):
                generation.begin()
            case RequestStatus():
                raise LinkError(f"expected a status of a request, got {message.status!r}")
            case RequestEnded():
                del self._followed[message.request]
                if message.failed:
                    generation.fail(PipelineError(message.reason))
                else:
                    generation.finish(message.reason)
