"""Clusters that scale themselves leave an engine's workers alone, as long as it is open."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

import pipeinfer_dask as pi
from tests.engine.pairs import PROMPT, Pair

pytestmark = pytest.mark.cluster

PATIENCE_S = 30.0


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=4,
        threads_per_worker=1,
        processes=False,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield cluster


def plugins(client: Client) -> list[str]:
    names = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))
    return [name for name in names if name.startswith("pipeinfer")]


def until_there_are(count: int, client: Client) -> set[str]:
    """Wait until the cluster has so many workers; return their addresses."""
    deadline = time.monotonic() + PATIENCE_S
    while len(left := set(client.scheduler_info(n_workers=-1)["workers"])) != count:
        assert time.monotonic() < deadline, f"{len(left)} workers after {PATIENCE_S:g} s"
        time.sleep(0.05)
    return left


def test_a_cluster_that_shrinks_takes_no_worker_of_an_open_engine(
    pair: Pair, cluster: LocalCluster
) -> None:
    with Client(cluster, set_as_default=False) as client:
        with pi.Engine.from_pretrained(pair.target, client=client, stages=2, spares=1) as engine:
            cluster.adapt(minimum=0, maximum=4, interval="50ms", wait_count=1)
            until_there_are(3, client)
            result = engine.generate(PROMPT, max_new_tokens=20)
            assert result.token_ids == pair.greedy[:20]
            assert len(plugins(client)) == 1
        assert plugins(client) == []
        until_there_are(0, client)


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
