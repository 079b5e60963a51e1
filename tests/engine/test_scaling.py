"""Clusters that scale themselves leave an engine's workers alone, as long as it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, SchedulerPlugin

import pipeinfer_dask as pi
from pipeinfer_dask.runtime.pipeline.scaling import keep_nodes
from tests.clusters import client_of, local_cluster
from tests.engine.pairs import PROMPT, Pair

pytestmark = pytest.mark.cluster

PATIENCE_S = 30.0


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(n_workers=4) as cluster:
        yield cluster


def plugins(client: Client) -> list[str]:
    names = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))
    return [name for name in names if name.startswith("pipeinfer")]


class Leaving(SchedulerPlugin):
    """Notices workers that leave."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()

    def remove_worker(self, *_: Any, **__: Any) -> None:
        self.seen.set()


async def until_there_are(count: int, dask_scheduler: Scheduler) -> None:
    """Wait on the scheduler until no more workers than that are left."""
    leaving = Leaving()
    dask_scheduler.add_plugin(leaving, name="leaving")
    try:
        async with asyncio.timeout(PATIENCE_S):
            while len(dask_scheduler.workers) > count:
                leaving.seen.clear()
                await leaving.seen.wait()
    finally:
        dask_scheduler.remove_plugin("leaving")


def test_a_cluster_that_shrinks_takes_no_worker_of_an_open_engine(
    pair: Pair, cluster: LocalCluster
) -> None:
    with Client(cluster, set_as_default=False) as client:
        with pi.Engine.from_pretrained(pair.target, client=client, stages=2, spares=1) as engine:
            cluster.adapt(minimum=0, maximum=4, interval="50ms", wait_count=1)
            client.run_on_scheduler(until_there_are, 3)
            result = engine.generate(PROMPT, max_new_tokens=20)
            assert result.token_ids == pair.greedy[:20]
            assert len(plugins(client)) == 1
        assert plugins(client) == []
        client.run_on_scheduler(until_there_are, 0)


def test_a_scheduler_forgets_an_engine_that_did_not_open_or_whose_client_has_left(
    pair: Pair, cluster: LocalCluster
) -> None:
    with Client(cluster, set_as_default=False) as observer:
        with pytest.raises(ValueError, match="expected"):
            pi.Engine.from_pretrained(
                pair.target, client=observer, stages=2, devices=["cpu", "cuda:99"]
            )
        assert plugins(observer) == []
        client = Client(cluster.scheduler_address, set_as_default=False)
        engine = pi.Engine.from_pretrained(pair.target, client=client, stages=1)
        assert len(plugins(observer)) == 1
        client.close()
        assert plugins(observer) == []
        engine.close()


def test_a_scheduler_that_does_not_answer_is_told_of_with_the_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.scaling.REGISTER_TIMEOUT_S", 0.1)

    async def never(**_: Any) -> None:
        await asyncio.Event().wait()

    def hang(dask_scheduler: Scheduler) -> None:
        dask_scheduler.handlers["register_scheduler_plugin"] = never

    with client_of(1) as client, ExitStack() as resources:
        client.run_on_scheduler(hang)
        keep_nodes(client, 0, resources)
    assert "its scheduler can't be told: TimeoutError: no answer within 0.1 s" in caplog.text
