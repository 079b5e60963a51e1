"""A pipeline on Dask workers: it places the nodes, connects them, and speaks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Self, TypeVar

from distributed import Client
from distributed import Future as DaskFuture
from distributed.comm import Comm, connect

from pipeinfer_dask.protocol.messages import (
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
from pipeinfer_dask.runtime.actors import (
    CONTROL,
    INPUT,
    OUTPUT,
    DrafterNode,
    DraftSpec,
    NodeActor,
    StageNode,
    StageSpec,
)
from pipeinfer_dask.runtime.compute import DrafterThread, RunPass
from pipeinfer_dask.runtime.links import Link, LinkError, Session, dial
from pipeinfer_dask.runtime.loading import HERE, Progress, Steps
from pipeinfer_dask.runtime.peers import SUSPICION_S, LoadError, Peer
from pipeinfer_dask.runtime.pipeline import PipelineCommand
from pipeinfer_dask.runtime.wire import Message, WireError

T = TypeVar("T")

CLOSE_TIMEOUT_S = 15.0
"""How long to wait for a node that is asked to end: longer than it waits for its thread."""

LOADING_PING_S = 1.0
"""While a worker loads a node, ask it for a sign of life so often."""


class PipelineError(RuntimeError):
    """A node of the pipeline could not be made, or is lost. The text says which, and where."""


class DaskPipeline:
    """Stages and a drafter on Dask workers. Made by `open`.

    Everything here belongs to the client's event loop, and so do the callbacks.

    Attributes
    ----------
    stages : int
    """

    stage_node: ClassVar[type[StageNode]] = StageNode
    """What holds a stage on its worker."""

    def __init__(self, client: Client, session: Session, stages: int) -> None:
        self.stages = stages
        self._client = client
        self._session = session
        self._futures: list[DaskFuture[Any]] = []
        self._peers: list[Peer] = []
        self._stages: list[Peer] = []
        self._drafter: Peer | DrafterThread | None = None
        self._links: list[Link] = []
        self._tasks: list[asyncio.Task[None]] = []
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
        generation: int = 0,
        deadline: float = 30.0,
    ) -> Self:
        """Load all nodes at once, and connect them.

        Parameters
        ----------
        client : Client
            This must run on its event loop.
        stage_specs : sequence of StageSpec, [stages]
        stage_workers : sequence of str, [stages]
            Address of the worker for each stage. One worker may hold several nodes.
        draft_spec : DraftSpec, optional
            Without it there is no drafter, and no draft may be started.
        draft_worker : str, optional
            Without it the drafter is a thread of this process: for what computes next to nothing.
        progress : callable, optional
            Told of each node's loading.
        generation : int
            Counts the pipelines that were built for one engine.
        deadline : float, seconds
            A node that answers no ping for so long is lost, and so is a worker that loads one.

        Raises
        ------
        ValueError
            The specs and workers do not fit together, there is no such worker, or the
            client is closed.
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
        known = (await client.scheduler.identity())["workers"]
        for address in workers:
            if address not in known:
                raise ValueError(
                    f"there is no worker {address}: this cluster has {', '.join(known) or 'none'}"
                )
        pipeline = cls(client, Session.new(generation), len(stage_specs))
        opening = asyncio.create_task(
            pipeline._open(stage_specs, stage_workers, draft_spec, draft_worker, progress, deadline)
        )

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

    def listen(self, report: Callable[[Event], None], lost: Callable[[Exception], None]) -> None:
        """Set who is told of each event, and, once, of the pipeline's end."""
        self._report = report
        self._lost = lost
        if self._loss is not None:
            asyncio.get_running_loop().call_soon(lost, self._loss)

    def send(self, command: PipelineCommand) -> None:
        """Carry out a command. Once the pipeline is lost or closed this does nothing.

        Raises
        ------
        RuntimeError
            A draft is to be started, but there is no drafter.
        """
        match command:
            case StartRun():
                self.feed(RunPass(command))
            case CancelRuns() | Prune():
                for stage in self._stages:
                    stage.send(command)
            case Release():
                # Nothing of the request is on the data links, so this overtakes nothing of it.
                for node in (*self._stages, *([self._drafter] if self._drafter else [])):
                    node.send(command)
            case StartDraft() | CancelDraft():
                if self._drafter is None:
                    raise RuntimeError("expected no draft: this pipeline has no drafter")
                self._drafter.send(command)

    def feed(self, job: RunPass) -> None:
        """Send a run to the first stage, with hidden states where that stage expects some."""
        self._links[0].send(job)

    async def stats(self) -> list[dict[str, int]]:
        """Return the open links and the dropped stale messages of each node."""
        actors = await asyncio.gather(*self._futures)
        return list(await asyncio.gather(*(actor.stats() for actor in actors)))

    async def close(self) -> None:
        """Release every node, thread and link, whatever has become of client and cluster."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _open(
        self,
        stage_specs: Sequence[StageSpec],
        stage_workers: Sequence[str],
        draft_spec: DraftSpec | None,
        draft_worker: str | None,
        progress: Progress | None,
        deadline: float,
    ) -> None:
        placing = [
            self._place(self.stage_node, f"stage-{index}", spec, worker, progress, deadline)
            for index, (spec, worker) in enumerate(zip(stage_specs, stage_workers, strict=True))
        ]
        if draft_spec is not None and draft_worker is not None:
            placing.append(
                self._place(DrafterNode, "drafter", draft_spec, draft_worker, progress, deadline)
            )
        elif draft_spec is not None:
            self._drafter = self._drafter_here(draft_spec, progress)
            await asyncio.wrap_future(self._drafter.loaded)
        peers = await _all(placing)
        self._stages = peers[: len(stage_specs)]
        if draft_worker is not None:
            self._drafter = peers[-1]
        await self._connect()
        await _all([peer.find_clock() for peer in peers])

    async def _place(
        self,
        kind: type[StageNode] | type[DrafterNode],
        name: str,
        spec: StageSpec | DraftSpec,
        worker: str,
        progress: Progress | None,
        deadline: float,
    ) -> Peer:
        node = self._session.node(name)
        node_title = f"{name.replace('-', ' ')} ({spec.name})"
        title = f"{node_title} on worker {worker}"
        # A task that may run on one worker only waits for ever once that worker is dead.
        # A connection of our own tells of its death, and of its silence.
        try:
            tripwire = await connect(worker, **self._client.connection_args)
        except OSError as lost:
            raise PipelineError(f"{title}: could not connect to the worker: {lost}") from lost
        future = self._client.submit(
            NodeActor,
            kind,
            self._session,
            name,
            spec,
            actor=True,
            key=node,
            workers=[worker],
            allow_other_workers=False,
        )
        self._futures.append(future)
        steps = Steps(node_title, worker, progress)
        loading = asyncio.create_task(self._load(future, title, node, worker, steps))
        death = asyncio.create_task(_death(tripwire, deadline))
        try:
            await asyncio.wait([loading, death], return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and isinstance(loading.exception(), LinkError):
                # What closes a link is told better by the tripwire, maybe a moment later.
                await asyncio.wait([death], timeout=SUSPICION_S)
            died = death.result() if death.done() else None
        finally:
            loading.cancel()
            death.cancel()
            tripwire.abort()
            await asyncio.gather(loading, death, return_exceptions=True)
        if died is not None:
            for peer in self._peers:
                if peer.address == worker:
                    peer.abandon()
            raise PipelineError(f"{title}: {died}")
        peer = loading.result()
        steps.stands()
        self._tasks.append(asyncio.create_task(peer.watch(deadline)))
        return peer

    async def _load(
        self, future: DaskFuture[Any], title: str, node: str, worker: str, steps: Steps
    ) -> Peer:
        """Wait until a node can be dialled, and then until its model stands."""
        error = await future.exception()
        if error is not None:
            raise PipelineError(
                f"{title} could not be made: {type(error).__name__}: {error}"
            ) from error
        if future.status != "finished":
            raise PipelineError(f"{title} could not be made: its actor is {future.status}")
        link = await self._dial(worker, node, CONTROL)
        peer = Peer(
            title,
            node,
            worker,
            link,
            report=self._heed,
            read=steps.read,
            lost=partial(self._lose, title),
        )
        self._peers.append(peer)
        try:
            await peer.loaded()
        except LoadError as refused:
            raise PipelineError(f"{title} could not load: {refused}") from refused
        return peer

    def _drafter_here(self, spec: DraftSpec, progress: Progress | None) -> DrafterThread:
        loop = asyncio.get_running_loop()
        steps = Steps(f"drafter ({spec.name})", HERE, progress)

        def post(callback: Callable[..., None], *arguments: object) -> None:
            # Nobody is left to be told on a loop that is closed.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(callback, *arguments)

        return DrafterThread(
            steps.counted(spec.load, post),
            deliver=partial(post, self._tell),
            failed=lambda error: post(self._lose, "drafter", f"{type(error).__name__}: {error}"),
            name=self._session.node("drafter"),
        )

    async def _connect(self) -> None:
        """Lay the data links: client, first stage, ..., last stage, client."""
        await _all([one.dial_next(other) for one, other in pairwise(self._stages)])
        for peer, role, handle in (
            (self._stages[0], INPUT, self._nothing_expected),
            (self._stages[-1], OUTPUT, self._fetch),
        ):
            link = await self._dial(peer.address, peer.node, role)
            self._links.append(link)
            self._tasks.append(asyncio.create_task(self._keep(link, peer, role, handle)))

    async def _dial(self, worker: str, node: str, role: str) -> Link:
        return await dial(
            worker, node, role, self._session, connection_args=self._client.connection_args
        )

    async def _keep(
        self, link: Link, peer: Peer, role: str, handle: Callable[[Message], None]
    ) -> None:
        reason = f"its {role} link to the client has closed"
        try:
            await link.receive(handle)
        except (LinkError, WireError) as error:
            reason = f"its {role} link to the client: {error}"
        self._lose(peer.title, reason)

    def _fetch(self, message: Message) -> None:
        if not isinstance(message, RunPass):
            raise LinkError(f"expected a run, got {type(message).__name__}")
        if len(message.spans) != self.stages:
            raise LinkError(f"expected {self.stages} stages' spans, got {len(message.spans)}")
        run = message.run
        spans = tuple(
            stage.localize(span) for stage, span in zip(self._stages, message.spans, strict=True)
        )
        done = RunDone(
            run.request, run.generation, run.run, message.tokens, spans, message.logprobs
        )
        self._tell(done)

    def _heed(self, message: Message) -> None:
        match message:
            case RunTaken():
                self._tell(message)
            case Drafted(span=span):
                if span is not None and isinstance(self._drafter, Peer):
                    message = replace(message, span=self._drafter.localize(span))
                self._tell(message)
            case _:
                raise LinkError(f"expected an event, got {type(message).__name__}")

    def _nothing_expected(self, message: Message) -> None:
        raise LinkError(f"expected nothing here, got {type(message).__name__}")

    def _tell(self, event: Event) -> None:
        if self._report is not None and self._closing is None:
            self._report(event)

    def _lose(self, title: str, reason: str) -> None:
        if self._loss is not None or self._closing is not None:
            return
        self._loss = PipelineError(f"{title} is lost: {reason}")
        if self._lost is not None:
            self._lost(self._loss)

    async def _close(self) -> None:
        await asyncio.gather(*(peer.close(CLOSE_TIMEOUT_S) for peer in self._peers))
        if isinstance(self._drafter, DrafterThread):
            await asyncio.to_thread(self._drafter.close)
        for link in self._links:
            link.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client.status == "running":
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.cancel(self._futures), CLOSE_TIMEOUT_S)
        self._futures.clear()


async def _death(tripwire: Comm, deadline: float) -> str:
    """Ask a worker for signs of life until it gives none for ``deadline`` seconds: why."""
    try:
        while True:
            await tripwire.write({"op": "echo", "data": "", "reply": True})
            await asyncio.wait_for(tripwire.read(), deadline)
            await asyncio.sleep(min(LOADING_PING_S, deadline / 3))
    except TimeoutError:
        return f"the worker gave no sign of life for {deadline:g} s while it was loading"
    except OSError:
        return "the worker died while it was loading"


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, or the first error once all the rest is cancelled and over."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
