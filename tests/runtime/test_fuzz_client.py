"""Whatever nodes say to the client: it goes on, or ends the link; nothing else comes of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from math import inf
from typing import Any, TypeVar

import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeinfer_dask.protocol.messages import (
    NO_PARENT,
    NO_SLOT,
    Batch,
    Drafted,
    DrafterBack,
    DrafterLost,
    DraftPlan,
    Event,
    Proposal,
    RunDone,
    RunTaken,
    Span,
    StageLost,
    StagesBack,
    StartDraft,
)
from pipeinfer_dask.runtime.links.links import Link, LinkError
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import (
    BytesRead,
    Dialled,
    Envelope,
    Failed,
    Loaded,
    Message,
    PeerLost,
    Ping,
    Pong,
    Renewed,
    encode,
)
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.peers import Peer, Trouble
from pipeinfer_dask.runtime.pipeline.recovery import Recovery
from tests.clusters import local_cluster
from tests.runtime.chain import SLOW, CountingSpec, EchoingSpec, run_of
from tests.runtime.test_fuzz import almost, said, say
from tests.runtime.test_links import linked
from tests.runtime.test_wire import messages

T = TypeVar("T")

PEERS_OWN = (Pong, Dialled, Renewed, BytesRead, Loaded, Failed, PeerLost)


@settings(max_examples=150)
@given(st.lists(said | almost(), min_size=1, max_size=5))
def test_a_peer_outlives_nonsense_or_ends_its_link(what: list[Message | list[bytes]]) -> None:
    reported: list[Message] = []
    losses: list[Trouble] = []

    async def main() -> None:
        async with linked() as (node, link):
            peer = Peer(
                *("stage 0", "node", "address", link, 0),
                report=reported.append,
                read=lambda nbytes, total: None,
                lost=lambda trouble, reason: losses.append(trouble),
            )

            def answer_whatever_was_taken(message: Message) -> None:
                for sequence in range(len(what) + 1):
                    pong = Envelope(0, sequence, Pong(1, 0.0, 0.0))
                    node._carrier.write(encode(pong))

            answering = asyncio.create_task(node.receive(answer_whatever_was_taken))
            say(node, what)
            async with asyncio.timeout(20):
                answered = True
                try:
                    await peer.ping()  # one of what is made up may be its answer
                except LinkError:
                    answered = False
                assert answered or link.closed
                if link.closed:
                    await asyncio.wait([peer._reading])
                assert link.counts.malformed + link.counts.gaps == link.closed
                assert link.closed or Trouble.GONE not in losses
            peer.abandon()
            await asyncio.gather(answering, peer._reading, return_exceptions=True)

    asyncio.run(main())
    assert not any(isinstance(message, PEERS_OWN) for message in reported)


def answer(link: Link, message: Message) -> None:
    if isinstance(message, Ping):
        link.send(Pong(message.number, 0.0, 0.0))


@pytest.mark.parametrize("message", [Pong(7, 0.0, 1e6), Dialled(), Renewed(0), Loaded()], ids=repr)
def test_an_answer_that_nobody_waits_for_is_counted_and_changes_nothing(message: Message) -> None:
    async def main() -> None:
        async with linked() as (node, link):
            heard: list[object] = []
            peer = Peer(
                *("stage 0", "node", "address", link, 0),
                report=heard.append,
                read=lambda nbytes, total: heard.append(nbytes),
                lost=lambda trouble, reason: heard.append(trouble),
            )
            answering = asyncio.create_task(node.receive(lambda message: answer(node, message)))
            node.send(Loaded())
            node.send(message)
            await peer.ping()
            assert (link.counts.stale, peer.stalled, heard) == (1, 0.0, [])
            answering.cancel()
            peer.abandon()
            await asyncio.gather(answering, peer._reading, return_exceptions=True)

    asyncio.run(main())


class Living:
    """A pipeline of two stages and a drafter on workers of this process, and what it reports."""

    def __init__(self) -> None:
        self.numbers = count()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.losses: list[Exception] = []
        self.cluster: Any
        self.client: Any
        self.pipeline: DaskPipeline

    async def open(self) -> None:
        self.cluster = await local_cluster(
            n_workers=3, protocol="tcp", silence_logs=logging.CRITICAL, asynchronous=True
        )
        self.client = await Client(self.cluster, asynchronous=True)
        *stages, drafter = self.cluster.scheduler.workers
        specs = [CountingSpec("first"), CountingSpec("last", last=True)]
        self.pipeline = await DaskPipeline.open(
            *(self.client, specs, stages, EchoingSpec(), drafter), recovery=Recovery(most=9)
        )
        self.pipeline.listen(self.events.put_nowait, self.losses.append)

    async def close(self) -> None:
        await self.pipeline.close()
        await self.client.close()
        await self.cluster.close()

    def node(self, name: str) -> Any:
        """Return the node of this name that was made last."""
        found = {
            str(key): actor._node
            for worker in self.cluster.workers.values()
            for key, actor in worker.state.actors.items()
            if str(key).endswith(name)
        }
        return found[max(found, key=lambda key: int(key.split("-")[2]))]

    async def stands(self) -> bool:
        """Whether the pipeline does not recover; what has changed is known a moment later."""
        await asyncio.sleep(0)
        return self.pipeline.generation >= 0 and self.pipeline.draft_generation >= 0

    async def next(self, kind: type[T]) -> T:
        """Return the next event, which is of this kind."""
        event = await self.events.get()
        assert isinstance(event, kind)
        return event

    async def compute(self) -> list[Event]:
        """Have a run computed, by a later generation if need be; return what is reported."""
        reported: list[Event] = []
        while True:
            while not await self.stands():
                reported.append(await self.events.get())
            run, generation = next(self.numbers), self.pipeline.generation
            self.pipeline.send(replace(run_of(run, 7), generation=generation))
            while True:
                reported.append(event := await self.events.get())
                if isinstance(event, RunDone) and event.run == run:
                    return reported
                if isinstance(event, StageLost):
                    break


@pytest.fixture(scope="module")
def living() -> Iterator[tuple[asyncio.Runner, Living]]:
    with asyncio.Runner() as runner:
        living = Living()
        runner.run(living.open())
        yield runner, living
        runner.run(living.close())


SPANS = (Span(0.0, 1.0, 2), Span(1.0, 2.0, 2))

made_up = st.one_of(
    messages.filter(lambda message: not isinstance(message, RunPass)),
    st.builds(lambda run: RunPass(run_of(10**6 + run, 1), None, (1,), SPANS), st.integers(0, 9)),
    almost(),
)
"""What the last stage may say where runs are expected, none of which anybody has asked for."""


@pytest.mark.cluster
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(made_up, min_size=1, max_size=3))
def test_a_pipeline_reports_no_run_that_it_was_not_asked_for(
    living: tuple[asyncio.Runner, Living], what: list[Message | list[bytes]]
) -> None:
    runner, pipeline = living

    async def main() -> None:
        async with asyncio.timeout(30):
            say(pipeline.node("stage-1")._next, what)
            reported = await pipeline.compute()
            assert pipeline.pipeline.under_way == 0
        assert all(isinstance(e, RunDone | RunTaken | StageLost | StagesBack) for e in reported)
        assert all(event.run < 10**6 for event in reported if isinstance(event, RunDone))
        assert pipeline.losses == []

    runner.run(main())


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("later", "picks", "logprobs"),
    [(0, (1, 2), ()), (0, (), ()), (0, (1,), (None, None)), (1, (1,), ())],
    ids=["too many picks", "no picks", "too many log-probabilities", "another generation"],
)
def test_a_run_that_comes_back_with_what_nobody_has_asked_for_is_computed_anew(
    living: tuple[asyncio.Runner, Living],
    later: int,
    picks: tuple[int, ...],
    logprobs: tuple[None, ...],
) -> None:
    runner, pipeline = living

    async def main() -> None:
        async with asyncio.timeout(30):
            await pipeline.compute()
            generation = pipeline.pipeline.generation
            run = replace(run_of(next(pipeline.numbers), SLOW), generation=generation)
            pipeline.pipeline.send(run)
            await pipeline.next(RunTaken)
            other = replace(run, generation=generation + later)
            wrong = RunPass(other, None, picks, SPANS, logprobs=logprobs)
            pipeline.node("stage-1")._next.send(wrong)
            assert (await pipeline.next(StageLost)).generation == generation
            assert (await pipeline.next(StagesBack)).generation > generation

    runner.run(main())


PLAN = DraftPlan(2, 0.0, 0.0, 9)


BUSY = Batch((SLOW,), (0,), (0,), (NO_PARENT,))
"""What a drafter works on until it is told to stop."""


@pytest.mark.cluster
@pytest.mark.parametrize(
    "proposals",
    [
        (Proposal(7, 0, 3, 0.5),),
        (Proposal(7, 0, 1, 0.5), Proposal(8, 1, 1, 0.5)),
        (Proposal(7, 2, 1, 0.5),),
        (Proposal(7, 0, NO_SLOT, 0.5), Proposal(8, NO_SLOT, 1, 0.5)),
        (Proposal(7, 0, 1, inf),),
        (Proposal(7, 0, 1, -1.0),),
    ],
    ids=[
        "a slot of others",
        "one slot twice",
        "a parent of others",
        "a parent without a slot",
        "surer than sure",
        "less likely than never",
    ],
)
def test_a_draft_that_proposes_what_it_may_not_is_not_reported_and_the_drafter_is_replaced(
    living: tuple[asyncio.Runner, Living], proposals: tuple[Proposal, ...]
) -> None:
    runner, pipeline = living

    async def main() -> None:
        async with asyncio.timeout(30):
            await pipeline.compute()
            generation = pipeline.pipeline.draft_generation
            pipeline.pipeline.send(StartDraft(1, generation, 5, BUSY, 1, (1, 2), PLAN))
            pipeline.node("drafter")._tell(Drafted(1, generation, 5, proposals, ()))
            assert (await pipeline.next(DrafterLost)).generation == generation
            await pipeline.next(DrafterBack)

    runner.run(main())


@pytest.mark.cluster
def test_a_draft_that_nobody_has_asked_for_is_not_reported_and_the_drafter_is_replaced(
    living: tuple[asyncio.Runner, Living],
) -> None:
    runner, pipeline = living

    async def main() -> None:
        async with asyncio.timeout(30):
            await pipeline.compute()
            generation = pipeline.pipeline.draft_generation
            pipeline.node("drafter")._tell(Drafted(1, generation, 5, (), ()))
            await pipeline.next(DrafterLost)
            back = await pipeline.next(DrafterBack)
            batch = Batch((7,), (0,), (0,), (NO_PARENT,))
            pipeline.pipeline.send(StartDraft(1, back.generation, 5, batch, 1, (1, 2), PLAN))
            assert (await pipeline.next(Drafted)).generation == back.generation

    runner.run(main())
