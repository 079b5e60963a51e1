"""What is lost comes back when there is a worker for it; texts need no drafter meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from distributed import Client, LocalCluster, Worker

from pipeinfer_dask.models.stage import CountBytes
from pipeinfer_dask.protocol.messages import AWAY, DrafterBack, DrafterLost, StageLost, StagesBack
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.recovery import NONE, Recovery
from tests.runtime.chain import (
    CountingSpec,
    EchoingDraft,
    EchoingSpec,
    run_of,
)
from tests.runtime.test_dask_pipeline import Listener, draft_of, until

pytestmark = pytest.mark.cluster

STAGE = (CountingSpec("end", last=True),)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again after seconds is tried again at once."""
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.assembly.RETRY_S", 0.05)


@asynccontextmanager
async def workers(count: int) -> AsyncIterator[tuple[Client, list[Worker]]]:
    """Workers in this process, which nobody starts again."""
    async with (
        LocalCluster(
            n_workers=0,
            processes=False,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=False,
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        yield client, [await one_more(client) for _ in range(count)]
        assert client.scheduler is not None
        for worker in list(Worker._instances):
            # Others of this process belong to other tests, and to their loops.
            if worker.scheduler.address == client.scheduler.address:
                await worker.close()


async def one_more(client: Client) -> Worker:
    assert client.scheduler is not None
    worker: Worker = await Worker(client.scheduler.address, nthreads=1, memory_limit=0)
    return worker


async def opened(
    client: Client, held_by: Sequence[Worker], drafter: EchoingSpec, recovery: Recovery
) -> DaskPipeline:
    """A stage on the first worker, and the drafter on the second."""
    stage, other = (worker.address for worker in held_by)
    return await DaskPipeline.open(client, STAGE, [stage], drafter, other, recovery=recovery)


async def runs(pipeline: DaskPipeline, listener: Listener) -> bool:
    """Whether a run comes through."""
    pipeline.send(replace(run_of(0, 5), generation=pipeline.generation))
    return [run.tokens for run in await listener.done(1)] == [(6,)]


@dataclass(frozen=True)
class BreakingSpec(EchoingSpec):
    """A draft model that can't draft."""

    def load(self, count: CountBytes) -> EchoingDraft:
        class Breaking(EchoingDraft):
            def candidates(self, *arguments: object, **options: object) -> None:
                raise ArithmeticError("numbers ran out")

        return Breaking()


@dataclass(frozen=True)
class FoundSpec(EchoingSpec):
    """A draft model that is there while a file is."""

    path: str = ""

    def load(self, count: CountBytes) -> EchoingDraft:
        if not Path(self.path).exists():
            raise FileNotFoundError(f"no {self.path}")
        return EchoingDraft()


@pytest.mark.parametrize("recovery", [NONE, Recovery(most=5)], ids=["none", "five"])
def test_a_draft_model_that_raises_costs_drafts_alone_and_is_let_go(
    recovery: Recovery, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with workers(2) as (client, held_by):
            pipeline = await opened(client, held_by, BreakingSpec(), recovery)
            listener = Listener(pipeline)
            pipeline.send(draft_of(0, 4))
            loss = await listener.next(DrafterLost)
            assert "numbers ran out" in loss.reason
            assert await runs(pipeline, listener)
            await until(lambda: not held_by[1].state.actors)
            assert not listener.losses
            assert caplog.text.count("pipeinfer goes on without drafts") == 1
            await pipeline.close()

    asyncio.run(main())


def test_where_no_recovery_is_wanted_a_lost_drafter_costs_drafts_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with workers(2) as (client, held_by):
            pipeline = await opened(client, held_by, EchoingSpec(), NONE)
            listener = Listener(pipeline)
            await held_by[1].close()
            await listener.next(DrafterLost)
            assert await runs(pipeline, listener)
            assert pipeline.draft_generation == AWAY
            assert not listener.losses
            assert caplog.text.count("pipeinfer goes on without drafts") == 1
            await pipeline.close()

    asyncio.run(main())


def test_a_drafter_that_can_not_be_replaced_is_tried_again_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    model.touch()

    async def main() -> None:
        async with workers(2) as (client, held_by):
            spec = FoundSpec(path=str(model))
            pipeline = await opened(client, held_by, spec, Recovery(most=1))
            listener = Listener(pipeline)
            model.unlink()
            await held_by[1].close()
            await listener.next(DrafterLost)
            await until(lambda: "goes on without drafts" in caplog.text)
            generation = pipeline._assembly._generations
            tried = next(generation)
            await until(lambda: next(generation) > tried + 10)  # each attempt takes one
            assert await runs(pipeline, listener)
            model.touch()
            back = await listener.next(DrafterBack)
            pipeline.send(replace(draft_of(0, 4), generation=back.generation))
            assert (await listener.drafted()).proposals
            assert pipeline._assembly.stages.left == 1
            assert caplog.text.count("pipeinfer goes on without drafts") == 1
            await pipeline.close()

    asyncio.run(main())


def test_a_lost_stage_waits_for_a_worker_to_come_and_goes_before_the_drafter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with workers(2) as (client, held_by):
            pipeline = await opened(client, held_by, EchoingSpec(), Recovery(most=5))
            listener = Listener(pipeline)
            await asyncio.gather(*(worker.close() for worker in held_by))
            await listener.next(StageLost)
            await until(lambda: "waits up to 300 s for a worker to come" in caplog.text)
            assert not listener.losses
            late = await one_more(client)
            await listener.next(StagesBack)
            assert await runs(pipeline, listener)
            await until(lambda: pipeline.draft_generation != AWAY)
            assert len(late.state.actors) == 2
            await pipeline.close()

    asyncio.run(main())


def test_a_lost_stage_for_which_no_worker_comes_in_time_is_told_with_what_was_lacking() -> None:
    async def main() -> None:
        async with workers(2) as (client, held_by):
            recovery = Recovery(most=5, timeout_s=0.2)
            pipeline = await opened(client, held_by, EchoingSpec(), recovery)
            listener = Listener(pipeline)
            await asyncio.gather(*(worker.close() for worker in held_by))
            async with asyncio.timeout(20):
                await listener.lost.wait()
            await pipeline.close()
            assert str(listener.losses[0]).endswith(
                "could not be replaced: no worker is left that answers and could hold "
                "stage 0 (end), and none came within 0.2 s"
            )

    asyncio.run(main())


def test_where_nobody_knows_of_workers_any_more_none_is_waited_for() -> None:
    async def main() -> None:
        async with workers(2) as (other, held_by):
            assert other.scheduler is not None
            async with Client(other.scheduler.address, asynchronous=True) as client:
                pipeline = await opened(client, held_by, EchoingSpec(), Recovery(most=5))
                listener = Listener(pipeline)
            async with asyncio.timeout(20):
                await listener.lost.wait()
            await pipeline.close()
            assert str(listener.losses[0]) == "your Dask client was closed"

    asyncio.run(main())
