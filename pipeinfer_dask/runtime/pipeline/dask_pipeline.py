"""A pipeline on Dask workers: it connects the nodes, speaks for them, and replaces lost ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from distributed import Client

from pipeinfer_dask.models.stage import Intake
from pipeinfer_dask.protocol.messages import (
    AWAY,
    CancelDraft,
    CancelRuns,
    Drafted,
    Event,
    Prune,
    Release,
    RunDone,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.links.bounds import of_answer
from pipeinfer_dask.runtime.links.links import Link, LinkError, Session
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.reading import is_answer
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import Message, WireError
from pipeinfer_dask.runtime.nodes.actors import (
    INPUT,
    OUTPUT,
    DrafterNode,
    StageNode,
)
from pipeinfer_dask.runtime.nodes.compute import DrafterThread
from pipeinfer_dask.runtime.nodes.loading import HERE, Progress, Steps
from pipeinfer_dask.runtime.nodes.room import Bounds
from pipeinfer_dask.runtime.nodes.specs import DraftSpec, StageSpec
from pipeinfer_dask.runtime.pipeline.assembled import PipelineError, Seat
from pipeinfer_dask.runtime.pipeline.assembly import Assembly
from pipeinfer_dask.runtime.pipeline.interface import DEADLINE_S, PipelineCommand
from pipeinfer_dask.runtime.pipeline.peers import SUSPICION_S, Peer, Trouble
from pipeinfer_dask.runtime.pipeline.recovery import NONE, Former, Recovery
from pipeinfer_dask.runtime.planning.memory import MOST_CONCURRENT
from pipeinfer_dask.runtime.planning.scheduler import known_workers

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DaskPipeline:
    """Stages and a drafter on Dask workers. Made by `open`.

    Everything here belongs to the client's event loop, and so do the callbacks.

    Attributes
    ----------
    stages : int
    """

    stage_node: ClassVar[type[StageNode]] = StageNode
    """What holds a stage on its worker."""
    output_intake: ClassVar[Intake | None] = None
    """What hidden states the last stage may send: none, it picks tokens."""

    def __init__(
        self,
        client: Client,
        session: Session,
        stages: list[Seat],
        drafter: list[Seat],
        recovery: Recovery,
        deadline: float,
        progress: Progress | None,
    ) -> None:
        self.stages = len(stages)
        self._assembly = Assembly(
            client,
            session,
            stages,
            drafter,
            deadline=deadline,
            recovery=recovery,
            progress=progress,
            report=self._heed,
            tell=self._tell,
            fail=self._fail,
            connect=self._connect,
            disconnect=self._disconnect,
        )
        self._session = session
        self._deadline = deadline
        self._progress = progress
        self._drafter_here: DrafterThread | None = None
        self._links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # What stages and drafter have been asked for, so that nothing else is taken from them: runs
        # by request and number, each with its picks, and drafts by request, generation and number.
        self._runs: dict[tuple[int, int], int] = {}
        self._drafts: dict[tuple[int, int, int], StartDraft] = {}
        self._heard = time.monotonic()
        self._report: Callable[[Event], None] | None = None
        self._lost: Callable[[Exception], None] | None = None
        self._loss: PipelineError | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        client: Client,
        stage_specs: Sequence[StageSpec],
        stage_workers: Sequence[str],
        draft_spec: DraftSpec | None = None,
        draft_worker: str | None = None,
        *,
        progress: Progress | None = None,
        session: Session | None = None,
        former: Former | None = None,
        deadline: float = DEADLINE_S,
        recovery: Recovery = NONE,
        max_concurrent: int = MOST_CONCURRENT,
    ) -> Self:
        """Load all nodes at once, and connect them.

        Parameters
        ----------
        client : Client
            This must run on its event loop.
        stage_specs : sequence of StageSpec, [stages]
        stage_workers : sequence of str, [stages]
            Address of the worker for each stage. One worker may hold several nodes. Where there
            was a former pipeline, its workers: one that is gone is replaced.
        draft_spec : DraftSpec, optional
            Without it there is no drafter, and no draft may be started.
        draft_worker : str, optional
            Without it the drafter is a thread of this process: for what computes next to nothing.
        progress : callable, optional
            Told of each node's loading.
        session : Session, optional
            By default a new one. Nodes that replace lost ones have later generations.
        former : Former, optional
            What this takes the place of. What is left of that is ended, and the drafter may come
            later than the stages.
        deadline : float, seconds
            A node that answers no ping for so long, or whose computing does not move, is lost,
            and so is a worker that loads one.
        recovery : Recovery
            How far to go to replace what is lost. By default nothing is.
        max_concurrent : int
            Requests at once: nodes refuse what would be more.

        Raises
        ------
        ValueError
            The specs and workers do not fit together, there is no such worker, or the
            client is closed.
        NoSchedulerError
            The scheduler does not name its workers.
        PipelineError
            A node could not load, was lost meanwhile, or can't be reached.
        """
        workers = [*stage_workers, *([draft_worker] if draft_worker is not None else [])]
        if not stage_specs or len(stage_specs) != len(stage_workers):
            raise ValueError(
                f"expected one worker for each stage and at least one stage, got "
                f"{len(stage_specs)} stages and {len(stage_workers)} workers"
            )
        if draft_spec is None and draft_worker is not None:
            raise ValueError(f"expected a draft spec for the worker {draft_worker}, got none")
        if client.scheduler is None:
            raise ValueError("expected a client that is connected to a cluster, got a closed one")
        known = await known_workers(client)
        if former is not None:
            known = {worker: known[worker] for worker in known if worker not in former.lost}
        for address in workers:
            if former is None and address not in known:
                raise ValueError(
                    f"there is no worker {address}: this cluster has {', '.join(known) or 'none'}"
                )
        bounds = Bounds.of_stage(max_concurrent, len(stage_specs))
        kind = partial(cls.stage_node, bounds=bounds)
        stages = [
            Seat(f"stage-{index}", kind, spec, worker if worker in known else None)
            for index, (spec, worker) in enumerate(zip(stage_specs, stage_workers, strict=True))
        ]
        drafter = []
        if draft_spec is not None and draft_worker is not None:
            where = draft_worker if draft_worker in known else None
            drafting = partial(DrafterNode, bounds=Bounds.of_drafter(max_concurrent))
            drafter.append(Seat("drafter", drafting, draft_spec, where))
        session = session or Session.new()
        pipeline = cls(client, session, stages, drafter, recovery, deadline, progress)
        here = draft_spec if draft_worker is None else None
        opening = asyncio.create_task(pipeline._open(here, former))

        def give_up(loss: Exception) -> None:
            # The others would wait for what the lost node was to do.
            opening.cancel()

        pipeline._lost = give_up
        try:
            await asyncio.wait([opening])
            if pipeline._loss is not None:
                raise pipeline._loss
            opening.result()
        except BaseException as error:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await pipeline.close()
            if isinstance(error, LinkError):
                raise PipelineError(str(error)) from error
            raise
        finally:
            pipeline._lost = None
        return pipeline

    @property
    def generation(self) -> int:
        """Of the stages; `AWAY` while they are being recovered."""
        return self._assembly.stages.generation

    @property
    def draft_generation(self) -> int:
        """Of the drafter; `AWAY` while it is being recovered."""
        return self._assembly.drafter.generation

    @property
    def under_way(self) -> int:
        """Runs that were sent to the first stage, and have not left the last one."""
        return len(self._runs)

    def listen(self, report: Callable[[Event], None], lost: Callable[[Exception], None]) -> None:
        """Set who is told of each event, and, once, of the pipeline's end."""
        self._report = report
        self._lost = lost
        if self._loss is not None:
            asyncio.get_running_loop().call_soon(lost, self._loss)

    def send(self, command: PipelineCommand) -> None:
        """Carry out a command. To what is lost or closed this does nothing.

        Raises
        ------
        RuntimeError
            A draft is to be started, but there is no drafter.
        """
        match command:
            case StartRun():
                self.feed(RunPass(command))
            case CancelRuns() | Prune():
                for stage in self._assembly.stages.peers:
                    stage.send(command)
            case Release():
                # Nothing of the request is on the data links, so this overtakes nothing of it.
                for node in (*self._assembly.stages.peers, *self._drafters()):
                    node.send(command)
            case StartDraft() | CancelDraft():
                if not self._assembly.drafter.seats and self._drafter_here is None:
                    raise RuntimeError("expected no draft: this pipeline has no drafter")
                if isinstance(command, StartDraft):
                    now = command.generation  # who was asked before is lost
                    self._drafts = {one: it for one, it in self._drafts.items() if one[1] == now}
                    self._drafts[command.request, now, command.draft] = command
                for drafter in self._drafters():
                    drafter.send(command)

    def feed(self, job: RunPass) -> None:
        """Send a run to the first stage, with hidden states where that stage expects some."""
        if job.run.generation == self.generation:
            self._runs[job.run.request, job.run.run] = job.run.picks
            self._heard = time.monotonic()
            self._links[-1].expect(of_answer(job.run))
            self._links[0].send(job)

    async def stats(self) -> list[dict[str, int]]:
        """Return each node's open links, and what came over them that was not acted upon."""
        return await self._assembly.nodes.stats()

    async def close(self) -> None:
        """Release every node, thread and link, whatever has become of client and cluster."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    # --- building -----------------------------------------------------------------

    async def _open(self, drafter_here: DraftSpec | None, former: Former | None) -> None:
        if drafter_here is not None:
            self._drafter_here = self._new_drafter_here(drafter_here)
            await asyncio.wrap_future(self._drafter_here.loaded)
        await self._assembly.open(former)
        self._keep(self._watch_runs())

    async def _connect(self, session: Session) -> None:
        """Lay the data links between client, first stage and last stage."""
        self._disconnect()  # what an attempt may have left
        seats, nodes = self._assembly.stages.seats, self._assembly.nodes
        for seat, role, handle in (
            (seats[0], INPUT, self._nothing_expected),
            (seats[-1], OUTPUT, self._fetch),
        ):
            peer = seat.peer
            assert peer is not None
            intake = self.output_intake if role == OUTPUT else None
            link = await nodes.dial(peer.address, peer.node, role, session, intake)
            self._links.append(link)
            self._keep(self._receive(link, seat, peer, role, handle))

    def _disconnect(self) -> None:
        self._runs.clear()
        given_up, self._links = self._links, []
        for link in given_up:
            link.abort()

    def _new_drafter_here(self, spec: DraftSpec) -> DrafterThread:
        here = partial(post, asyncio.get_running_loop())
        steps = Steps(f"drafter ({spec.name})", HERE, self._progress)

        def failed(error: Exception) -> None:
            reason = f"drafter is lost: {type(error).__name__}: {error}"
            here(self._assembly.give_up_drafter, reason)

        return DrafterThread(
            steps.counted(spec.load, here),
            deliver=partial(here, self._tell),
            failed=failed,
            name=self._session.node("drafter"),
        )

    async def _watch_runs(self) -> None:
        """Notice runs that are nowhere: links that swallow them look as if they lived."""
        while True:
            await asyncio.sleep(self._deadline / 3)
            silence = time.monotonic() - self._heard
            peers = self._assembly.stages.peers
            idle = not any(peer.stalled for peer in peers)
            if self._runs and self._links and silence > self._deadline and idle:
                seat = self._assembly.stages.seats[0]
                reason = f"no run has come through for {self._deadline:g} s, and none is computed"
                if seat.peer is not None:
                    self._assembly.lose(seat, seat.peer, Trouble.CUT, reason)

    def _fail(self, loss: PipelineError) -> None:
        """Give the pipeline up."""
        if self._loss is not None or self._closing is not None:
            return
        self._loss = loss
        if self._lost is not None:
            self._lost(loss)

    # --- what nodes say ---------------------------------------------------------------

    async def _receive(
        self, link: Link, seat: Seat, peer: Peer, role: str, handle: Callable[[Message], None]
    ) -> None:
        reason = f"its {role} link to the client has closed"
        try:
            await link.receive(handle)
            if link in self._links:
                # If the node is gone, its control link tells, maybe a moment later.
                await asyncio.sleep(SUSPICION_S)
        except (LinkError, WireError) as error:
            reason = f"its {role} link to the client: {error}"
        if link in self._links:
            self._assembly.lose(seat, peer, Trouble.CUT, reason)

    def _fetch(self, message: Message) -> None:
        if not isinstance(message, RunPass):
            raise LinkError(f"expected a run, got {type(message).__name__}")
        if len(message.spans) != self.stages:
            raise LinkError(f"expected {self.stages} stages' spans, got {len(message.spans)}")
        run, peers = message.run, self._assembly.stages.peers
        picks = self._runs.pop((run.request, run.run), None)
        if picks is None or run.generation != self.generation:
            raise LinkError(f"expected a run that is under way, got {run.run} of {run.request}")
        if message.tokens is not None and len(message.tokens) != picks:
            raise LinkError(f"expected {picks} picks, got {len(message.tokens)}")
        if len(message.logprobs) not in (0, picks):
            raise LinkError(f"expected log-probabilities of {picks}, got {len(message.logprobs)}")
        spans = tuple(peer.localize(span) for peer, span in zip(peers, message.spans, strict=True))
        self._heard = time.monotonic()
        done = RunDone(
            run.request, run.generation, run.run, message.tokens, spans, message.logprobs
        )
        self._tell(done)
        if message.tokens:
            self._assembly.stages.working()

    def _heed(self, message: Message) -> None:
        match message:
            case RunTaken():
                self._heard = time.monotonic()
                self._tell(message)
            case Drafted(span=span):
                draft = (message.request, message.generation, message.draft)
                asked = self._drafts.pop(draft, None)
                if asked is None or not is_answer(asked, message):
                    raise LinkError(f"expected a draft that was asked for, got {message.draft}")
                self._assembly.drafter.working()
                for drafter in self._assembly.drafter.peers:
                    if span is not None:
                        message = replace(message, span=drafter.localize(span))
                self._tell(message)
            case _:
                raise LinkError(f"expected an event, got {type(message).__name__}")

    def _nothing_expected(self, message: Message) -> None:
        raise LinkError(f"expected nothing here, got {type(message).__name__}")

    def _tell(self, event: Event) -> None:
        if self._report is None or self._closing is not None:
            return
        try:
            self._report(event)
        except Exception as error:  # a bug of ours: no other node would do better
            loss = PipelineError(f"the head is lost: {type(error).__name__}: {error}")
            loss.__cause__ = error
            self._fail(loss)

    def _drafters(self) -> list[Peer | DrafterThread]:
        there = self._assembly.drafter
        if self._drafter_here is None:
            return [*there.peers]
        return [] if there.generation == AWAY else [self._drafter_here]

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        await self._assembly.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._assembly.nodes.close()
        if self._drafter_here is not None:
            await asyncio.to_thread(self._drafter_here.close)
        for link in self._links:
            link.abort()
