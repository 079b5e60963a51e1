import asyncio
import gc
import logging
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import dask
import pytest
from distributed import Client, Security, Worker
from distributed.comm.tcp import TCP

import pipeinfer_dask
from pipeinfer_dask.protocol.messages import (
    AWAY,
    NO_PARENT,
    Batch,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Drafted,
    DrafterLost,
    DraftPlan,
    Event,
    Proposal,
    RunDone,
    RunTaken,
    StartDraft,
)
from pipeinfer_dask.runtime.links.bounds import MOST_HEADER
from pipeinfer_dask.runtime.links.links import Link, dial
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import DialNext, Envelope, encode
from pipeinfer_dask.runtime.nodes.actors import CONTROL, INPUT
from pipeinfer_dask.runtime.nodes.loading import Loading
from pipeinfer_dask.runtime.nodes.specs import StageSpec
from pipeinfer_dask.runtime.pipeline.assembled import PipelineError
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.peers import Peer
from pipeinfer_dask.runtime.pipeline.recovery import Recovery
from pipeinfer_dask.runtime.planning.scheduler import known_workers
from tests.clusters import local_cluster
from tests.runtime.chain import (
    BROKEN,
    READ_BYTES,
    SLOW,
    SLOW_BEGAN,
    CountingSpec,
    DyingOnceSpec,
    DyingSpec,
    EchoingSpec,
    MissingSpec,
    StoppingSpec,
    UnsendableSpec,
    WaitingSpec,
    run_of,
)

pytestmark = pytest.mark.cluster

T = TypeVar("T")

PACKAGE = Path(pipeinfer_dask.__file__).parent

STAGES = (CountingSpec("first"), CountingSpec("middle"), CountingSpec("end", last=True))


@asynccontextmanager
async def cluster(
    *, processes: bool = False, workers: int = 3, **options: Any
) -> AsyncIterator[tuple[Client, list[str]]]:
    # Clusters of other tests may have all of this process's workers forked, with torch in them.
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        local: Any = local_cluster(
            n_workers=workers,
            processes=processes,
            silence_logs=logging.CRITICAL,
            asynchronous=True,
            **options,
        )
        async with local, Client(local, asynchronous=True) as client:
            yield client, list(local.scheduler.workers)


class Listener:
    """Collects what a pipeline reports."""

    def __init__(self, pipeline: DaskPipeline) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.losses: list[Exception] = []
        self.lost = asyncio.Event()
        pipeline.listen(self.events.put_nowait, self._lose)

    def _lose(self, error: Exception) -> None:
        self.losses.append(error)
        self.lost.set()

    async def done(self, count: int) -> list[RunDone]:
        """Return the next runs that left the pipeline."""
        found: list[RunDone] = []
        while len(found) < count:
            event = await self.events.get()
            if isinstance(event, RunDone):
                found.append(event)
        return found

    async def taken(self, run: int) -> None:
        """Wait until the first stage has begun this run."""
        while await self.events.get() != RunTaken(1, 0, run):
            pass

    async def drafted(self) -> Drafted:
        """Return the next draft."""
        return await self.next(Drafted)

    async def next(self, kind: type[T]) -> T:
        """Return the next event of a kind."""
        async with asyncio.timeout(20):
            while not isinstance(event := await self.events.get(), kind):
                pass
        return event


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("processes", [True, False], ids=["tcp", "inproc"])
def test_runs_come_out_in_order_with_what_every_stage_added(processes: bool) -> None:
    async def main() -> None:
        async with cluster(processes=processes) as (client, workers):
            steps: list[Loading] = []
            pipeline = await DaskPipeline.open(client, STAGES, workers, progress=steps.append)
            listener = Listener(pipeline)
            for number in range(20):
                pipeline.send(run_of(number, 10 * number, 7))
            runs = await listener.done(20)
            await pipeline.close()

            assert [run.run for run in runs] == list(range(20))
            assert [run.tokens for run in runs] == [(10 * n + 3, 10) for n in range(20)]
            assert all(len(run.spans) == 3 for run in runs)
            assert all(span.layers == 2 for run in runs for span in run.spans)
            # Spans are on one clock: no stage begins a run before its predecessor has ended it.
            for run in runs:
                ends = [span.ended for span in run.spans[:-1]]
                begins = [span.began for span in run.spans[1:]]
                assert all(began > end - 0.005 for end, began in zip(ends, begins, strict=True))
            for index, (spec, worker) in enumerate(zip(STAGES, workers, strict=True)):
                node = f"stage {index} ({spec.name})"
                told = [step for step in steps if step.node == node]
                assert told[-1] == Loading(node, worker, READ_BYTES, READ_BYTES, stands=True)
                assert [step.stands for step in told[:-1]] == [False] * (len(told) - 1)
                assert [step.nbytes for step in told] == sorted(step.nbytes for step in told)
            if processes:
                imported = await client.run(lambda: "torch" in __import__("sys").modules)
                assert not any(imported.values())

    asyncio.run(main())


def test_a_cancelled_run_is_left_off_and_those_behind_it_are_not_begun() -> None:
    async def main() -> None:
        async with cluster() as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES, workers)
            listener = Listener(pipeline)
            SLOW_BEGAN.clear()
            pipeline.send(run_of(0, SLOW))
            pipeline.send(run_of(1, 5))
            pipeline.send(run_of(2, 6))
            await listener.taken(0)
            assert await asyncio.to_thread(SLOW_BEGAN.wait, 20)
            pipeline.send(CancelRuns(1, 0, (0, 1), CancelReason.INVALID))
            slow, behind, kept = await listener.done(3)
            await pipeline.close()

            assert slow.tokens is None
            assert [span.layers for span in slow.spans] == [1, 0, 0]
            assert behind.tokens is None
            assert [span.layers for span in behind.spans] == [0, 0, 0]
            assert kept.tokens == (9,)

    asyncio.run(main())


def draft_of(number: int, token: int) -> StartDraft:
    batch = Batch((token,), (0,), (0,), (NO_PARENT,))
    return StartDraft(1, 0, number, batch, 1, (1, 2), DraftPlan(2))


def test_a_drafter_that_shares_a_worker_drafts_and_can_be_stopped() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(
                client, STAGES[-1:], workers, EchoingSpec(), workers[0]
            )
            listener = Listener(pipeline)
            pipeline.send(draft_of(0, 4))
            pipeline.send(draft_of(1, SLOW))
            first = await listener.drafted()
            pipeline.send(run_of(0, 5))
            assert [run.tokens for run in await listener.done(1)] == [(6,)]
            pipeline.send(CancelDraft(1, 0, 1))
            second = await listener.drafted()
            await pipeline.close()

            assert first.proposals == (Proposal(4, 0, 1, 0.5), Proposal(4, 1, 2, 0.5))
            assert first.evaluated == (0, 1)
            assert (second.draft, second.proposals, second.evaluated) == (1, (), ())

    asyncio.run(main())


def test_a_draft_model_reads_half_a_million_tokens_at_once_and_says_so() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=1) as (client, workers):
            spec = EchoingSpec()
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers, spec, workers[0])
            listener = Listener(pipeline)
            places = tuple(range(spec.capacity - 2))
            text = Batch(places[::-1], places, places, (NO_PARENT, *places[:-1]))
            draft = replace(draft_of(0, 4), batch=text, slots=(len(text), len(text) + 1))
            assert len(encode(Envelope(0, 0, draft))[0]) > MOST_HEADER
            pipeline.send(draft)
            answer = await listener.drafted()
            assert answer.evaluated == (*places, len(text))
            assert len(encode(Envelope(0, 0, answer))[0]) > MOST_HEADER
            assert all(node["malformed"] == 0 for node in await pipeline.stats())
            await pipeline.close()

    asyncio.run(main())


def test_without_a_worker_a_drafter_drafts_in_the_clients_process() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers, EchoingSpec())
            listener = Listener(pipeline)
            pipeline.send(draft_of(0, 4))
            first = await listener.drafted()
            pipeline.send(draft_of(1, SLOW))
            pipeline.send(CancelDraft(1, 0, 1))
            second = await listener.drafted()
            assert len(await pipeline.stats()) == 1  # the stage is the only node
            await pipeline.close()

            assert first.proposals == (Proposal(4, 0, 1, 0.5), Proposal(4, 1, 2, 0.5))
            assert (second.draft, second.proposals, second.evaluated) == (1, (), ())

    asyncio.run(main())


def test_a_drafter_in_the_clients_process_that_fails_is_lost_alone() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers, EchoingSpec())
            listener = Listener(pipeline)
            pipeline.send(replace(draft_of(0, 4), slots=()))  # fewer than its plan needs
            loss = await listener.next(DrafterLost)
            assert loss.generation == 0
            assert loss.reason.startswith("drafter is lost: IndexError: ")
            assert pipeline.draft_generation == AWAY
            pipeline.send(run_of(0, 5))
            assert [run.tokens for run in await listener.done(1)] == [(6,)]
            await pipeline.close()
            assert not listener.losses

    asyncio.run(main())


def test_a_worker_that_lives_but_gets_no_further_with_loading_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.assembled.STANDSTILL_S", 0.2)
    gate = tmp_path / "gate"

    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            with pytest.raises(PipelineError, match=r"waiting.* has got no further with loading"):
                await DaskPipeline.open(client, [WaitingSpec(str(gate))], workers)
            gate.touch()

    asyncio.run(main())


def test_a_node_that_does_not_tell_of_itself_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.assembled.ANSWER_TIMEOUT_S", 0)

    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            with pytest.raises(PipelineError, match="expected all nodes to answer within 0 s"):
                await pipeline.stats()
            await pipeline.close()

    asyncio.run(main())


def test_two_pipelines_share_the_workers_without_meeting() -> None:
    async def main() -> None:
        async with cluster(workers=2) as (client, workers):
            one = await DaskPipeline.open(client, STAGES[1:], workers)
            other = await DaskPipeline.open(client, STAGES[1:], workers[::-1])
            hears, listens = Listener(one), Listener(other)
            one.send(run_of(0, 1))
            other.send(run_of(0, 2))
            assert [run.tokens for run in await hears.done(1)] == [(3,)]
            assert [run.tokens for run in await listens.done(1)] == [(4,)]
            await one.close()
            other.send(run_of(1, 3))
            assert [run.tokens for run in await listens.done(1)] == [(5,)]
            await other.close()
            assert not hears.losses
            assert not listens.losses

    asyncio.run(main())


def test_a_cluster_with_certificates_has_encrypted_links() -> None:
    async def main() -> None:
        security = Security.temporary()
        async with cluster(workers=2, protocol="tls://", security=security) as (client, workers):
            assert workers[0].startswith("tls://")
            pipeline = await DaskPipeline.open(client, STAGES[1:], workers)
            listener = Listener(pipeline)
            pipeline.send(run_of(0, 1))
            assert [run.tokens for run in await listener.done(1)] == [(3,)]
            await pipeline.close()

    asyncio.run(main())


def test_a_killed_worker_is_named_once() -> None:
    async def main() -> None:
        async with cluster(processes=True) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES, workers)
            listener = Listener(pipeline)
            pids = await client.run(os.getpid)
            os.kill(pids[workers[1]], signal.SIGKILL)
            await listener.lost.wait()
            await pipeline.close()
            assert [str(error) for error in listener.losses] == [
                f"stage 1 (middle) on worker {workers[1]} is lost: its control link has closed: "
                "the worker, or the actor on it, is gone"
            ]

    asyncio.run(main())


def test_a_worker_that_hangs_is_lost_after_the_deadline() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=2) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[1:], workers, deadline=3.0)
            listener = Listener(pipeline)
            pids = await client.run(os.getpid)
            os.kill(pids[workers[0]], signal.SIGSTOP)
            try:
                await listener.lost.wait()
            finally:
                os.kill(pids[workers[0]], signal.SIGCONT)
            await pipeline.close()
            (loss,) = listener.losses
            assert "stage 0 (middle)" in str(loss)
            assert "gave no sign of life for 3 s" in str(loss)

    asyncio.run(main())


def test_a_stage_that_fails_says_why() -> None:
    async def main() -> None:
        async with cluster() as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES, workers)
            listener = Listener(pipeline)
            pipeline.send(run_of(0, BROKEN))
            await listener.lost.wait()
            await pipeline.close()
            (loss,) = listener.losses
            assert isinstance(loss, PipelineError)
            assert str(loss) == (
                f"stage 0 (first) on worker {workers[0]} is lost: ArithmeticError: numbers ran out"
            )

    asyncio.run(main())


def test_a_model_that_can_not_be_loaded_is_an_error_that_names_stage_and_reason() -> None:
    async def main() -> None:
        async with cluster(workers=2) as (client, workers):
            with pytest.raises(PipelineError) as caught:
                await DaskPipeline.open(client, [CountingSpec("first"), MissingSpec()], workers)
            assert str(caught.value) == (
                f"stage 1 (missing) on worker {workers[1]} could not load: "
                "FileNotFoundError: no model here"
            )

    asyncio.run(main())


def open_connections(address: str) -> int:
    """Return how many connections to an address this process has."""
    comms = [thing for thing in gc.get_objects() if type(thing) is TCP]
    return sum(not comm.closed() and comm.peer_address == address for comm in comms)


def test_a_node_that_can_not_be_sent_leaves_no_connection_behind() -> None:
    async def main() -> None:
        async with cluster(workers=1, protocol="tcp") as (client, workers):
            await known_workers(client)
            before = open_connections(workers[0])
            with pytest.raises(TypeError, match="serialize") as caught:
                await DaskPipeline.open(client, [UnsendableSpec()], workers)
            assert open_connections(workers[0]) == before
            assert caught.traceback  # which holds what was left open, if anything was

    asyncio.run(main())


def test_a_worker_that_dies_while_it_loads_does_not_keep_us_waiting() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=1) as (client, workers):
            with pytest.raises(PipelineError, match="the worker died while it was loading"):
                await DaskPipeline.open(client, [DyingSpec()], workers)

    asyncio.run(main())


def test_a_node_whose_worker_dies_while_it_loads_goes_to_another_one_and_not_for_ever(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=2) as (client, workers):
            specs: list[StageSpec] = [CountingSpec("first"), DyingOnceSpec(str(tmp_path / "died"))]
            recovery = Recovery(most=1)
            pipeline = await DaskPipeline.open(client, specs, workers, recovery=recovery)
            listener = Listener(pipeline)
            pipeline.send(replace(run_of(0, 5), generation=pipeline.generation))
            assert [run.tokens for run in await listener.done(1)] == [(7,)]
            await pipeline.close()
            with pytest.raises(PipelineError, match="the worker died while it was loading"):
                await DaskPipeline.open(client, [DyingSpec()], workers[:1], recovery=recovery)

    asyncio.run(main())


def test_a_worker_that_has_stopped_does_not_keep_us_waiting() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=1) as (client, workers):
            pids = await client.run(os.getpid)
            os.kill(pids[workers[0]], signal.SIGSTOP)
            try:
                async with asyncio.timeout(20):
                    with pytest.raises(
                        PipelineError, match="to the worker: it says nothing for 1 s"
                    ):
                        await DaskPipeline.open(client, STAGES[-1:], workers, deadline=1.0)
            finally:
                os.kill(pids[workers[0]], signal.SIGCONT)

    asyncio.run(main())


def test_a_worker_that_stops_while_it_loads_does_not_keep_us_waiting() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=1) as (client, workers):
            pids = await client.run(os.getpid)
            try:
                with pytest.raises(PipelineError, match="the worker gave no sign of life for 1 s"):
                    await DaskPipeline.open(client, [StoppingSpec()], workers, deadline=1.0)
            finally:
                os.kill(pids[workers[0]], signal.SIGCONT)

    asyncio.run(main())


def test_a_worker_that_stops_while_another_loads_does_not_keep_us_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.assembled.CLOSE_TIMEOUT_S", 0.5)
    go = tmp_path / "go"

    async def links(dask_worker: Worker) -> int:
        actors: list[Any] = list(dask_worker.state.actors.values())
        return sum(actor.stats()["links"] for actor in actors if actor is not None)

    async def main() -> None:
        async with cluster(processes=True, workers=2) as (client, workers):
            pids = await client.run(os.getpid)
            specs: list[StageSpec] = [CountingSpec("first"), WaitingSpec(str(go))]
            opening = asyncio.create_task(DaskPipeline.open(client, specs, workers, deadline=3.0))
            try:
                while not opening.done():
                    if (await client.run(links, workers=workers[:1]))[workers[0]] > 0:
                        break
                    await asyncio.sleep(0.01)
                os.kill(pids[workers[0]], signal.SIGSTOP)
                with pytest.raises(PipelineError, match=r"stage 0 .* gave no sign of life for 3 s"):
                    await opening
            finally:
                os.kill(pids[workers[0]], signal.SIGCONT)
                go.touch()

    asyncio.run(main())


def test_what_does_not_fit_together_is_refused_before_anything_is_loaded() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            with pytest.raises(ValueError, match="got 3 stages and 1 workers"):
                await DaskPipeline.open(client, STAGES, workers)
            with pytest.raises(ValueError, match="there is no worker tcp://nowhere:1"):
                await DaskPipeline.open(client, STAGES[:1], ["tcp://nowhere:1"])
            with pytest.raises(ValueError, match="expected a draft spec for the worker"):
                await DaskPipeline.open(client, STAGES[:1], workers, None, workers[0])
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            with pytest.raises(RuntimeError, match="has no drafter"):
                pipeline.send(draft_of(0, 1))
            await pipeline.close()

    asyncio.run(main())


def peer_of(pipeline: DaskPipeline) -> Peer:
    """Return the client's end of a pipeline's only stage."""
    (seat,) = pipeline._assembly.stages.seats
    assert seat.peer is not None
    return seat.peer


def node_on(pipeline: DaskPipeline) -> Any:
    """Return the node of a pipeline's only stage, from the worker in this process."""
    address = peer_of(pipeline).address
    (worker,) = (worker for worker in Worker._instances if worker.address == address)
    actor: Any = next(iter(worker.state.actors.values()))
    return actor._node


async def dial_node(pipeline: DaskPipeline, role: str) -> Link:
    peer = peer_of(pipeline)
    return await dial(peer.address, peer.node, role, pipeline._session, connection_args={})


@pytest.mark.parametrize("protocol", ["tcp", "inproc"])
def test_a_link_that_is_refused_or_comes_too_late_is_closed(protocol: str) -> None:
    async def main() -> None:
        async with cluster(workers=1, protocol=protocol) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            for role in (CONTROL, "unknown"):
                refused = await dial_node(pipeline, role)
                async with asyncio.timeout(20):
                    await refused.receive(lambda message: None)
            node = node_on(pipeline)
            node._stopped = True
            late = await dial_node(pipeline, INPUT)
            async with asyncio.timeout(20):
                await late.receive(lambda message: None)
            await pipeline.close()

    asyncio.run(main())


def test_a_run_that_did_not_pass_every_stage_ends_the_pipeline() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            listener = Listener(pipeline)
            node_on(pipeline)._deliver(RunPass(run_of(0, 1)))
            async with asyncio.timeout(20):
                await listener.lost.wait()
            await pipeline.close()
            assert "expected 1 stages' spans, got 0" in str(listener.losses[0])

    asyncio.run(main())


def test_a_listener_that_fails_ends_the_pipeline() -> None:
    def fail(event: Event) -> None:
        if isinstance(event, RunDone):
            raise KeyError("nobody knows this run")

    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            listener = Listener(pipeline)
            pipeline.listen(fail, listener._lose)
            pipeline.send(run_of(0, 1))
            async with asyncio.timeout(20):
                await listener.lost.wait()
            await pipeline.close()
            assert "KeyError: 'nobody knows this run'" in str(listener.losses[0])

    asyncio.run(main())


def test_a_stage_that_can_not_dial_the_next_one_says_why() -> None:
    async def main() -> None:
        async with cluster(workers=1) as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers)
            listener = Listener(pipeline)
            stage = peer_of(pipeline)
            stage.send(DialNext("nonsense://127.0.0.1:9", "nobody"))
            async with asyncio.timeout(20):
                await listener.lost.wait()
            await pipeline.close()
            assert "could not connect to nobody at nonsense://" in str(listener.losses[0])

    asyncio.run(main())


def left_behind() -> list[str]:
    """Return what of pipelines is still in this process, and on the workers in it."""
    workers = [worker for worker in Worker._instances if worker.status.name == "running"]
    return [
        *(thread.name for thread in threading.enumerate() if "pipeinfer" in thread.name),
        *(repr(task) for task in asyncio.all_tasks() if is_ours(task)),
        *(op for worker in workers for op in worker.handlers if "pipeinfer" in op),
        *(str(key) for worker in workers for key in worker.state.actors),
    ]


def is_ours(task: "asyncio.Task[Any]") -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and PACKAGE in Path(code.co_filename).parents


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("protocol", ["tcp", "inproc"])
def test_thirty_pipelines_leave_nothing_behind(protocol: str) -> None:
    async def main() -> None:
        async with cluster(workers=2, protocol=protocol) as (client, workers):

            async def open_and_close() -> None:
                pipeline = await DaskPipeline.open(
                    client, STAGES[1:], workers, EchoingSpec(), workers[0]
                )
                listener = Listener(pipeline)
                pipeline.send(run_of(0, 1))
                pipeline.send(run_of(1, SLOW))
                await listener.done(1)
                await asyncio.gather(pipeline.close(), pipeline.close())

            await open_and_close()
            await until(lambda: not left_behind())
            files = descriptors()
            for _ in range(30):
                await open_and_close()
            # distributed opens and closes some meanwhile, but not one for each pipeline.
            await until(lambda: not left_behind() and descriptors() < files + 25)

    asyncio.run(main())


@pytest.mark.parametrize("protocol", ["tcp", "inproc"])
def test_stages_end_with_their_client(protocol: str) -> None:
    async def main() -> None:
        async with cluster(workers=2, protocol=protocol) as (client, workers):
            address = client.scheduler.address if client.scheduler is not None else ""
            async with Client(address, asynchronous=True) as other:
                pipeline = await DaskPipeline.open(other, STAGES[1:], workers)
                listener = Listener(pipeline)
            await listener.lost.wait()
            await pipeline.close()
            await until(lambda: not left_behind())

    asyncio.run(main())


def test_a_cluster_that_was_closed_first_does_not_hinder_closing() -> None:
    async def main() -> None:
        async with cluster(workers=2, protocol="tcp") as (client, workers):
            pipeline = await DaskPipeline.open(client, STAGES[1:], workers)
            listener = Listener(pipeline)
        await listener.lost.wait()
        await pipeline.close()
        await pipeline.close()
        await until(lambda: not left_behind())
        # Whichever of its ends is noticed first.
        told = r"stage \d \(\w+\) on worker tcp://.* is lost|your Dask client was closed"
        assert re.search(told, str(listener.losses[0]))

    asyncio.run(main())
