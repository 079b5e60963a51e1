"""Engines on clusters that are not dask-jobqueue's: waited for, named and protected."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster, Scheduler

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from pipeinfer_dask.engine import Loading
from pipeinfer_dask.hpc.jobs import ages_of
from pipeinfer_dask.hpc.opening import _names
from pipeinfer_dask.runtime.planning.scheduler import NoSchedulerError
from pipeinfer_dask.widgets import Timeline
from tests.clusters import client_of, local_cluster

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(n_workers=5) as cluster:
        yield cluster


def removable(client: Client) -> set[str]:
    """Return the workers that a cluster that scales itself would take."""

    def all_that_may_go(dask_scheduler: Scheduler) -> list[str]:
        return dask_scheduler.workers_to_close(n=len(dask_scheduler.workers))

    return set(client.run_on_scheduler(all_that_may_go))


def test_an_engine_knows_its_nodes_and_keeps_them_and_its_spares_until_it_is_closed(
    cluster: LocalCluster,
) -> None:
    target, draft = pi.demo_pair()
    steps: list[Any] = []
    with Client(cluster, set_as_default=False) as observer:
        workers = set(observer.scheduler_info(n_workers=-1)["workers"])
        with hpc.engine_from(
            cluster, target, draft, stages=2, spares=1, progress=steps.append
        ) as engine:
            result = engine.generate("def main", max_new_tokens=16)
            text = result.text
            places = {node.partition(" (")[0]: place for node, place in engine.nodes.items()}
            assert result.trace.places == places
            shown = Timeline(result).channel.about
            assert places.pop("head") == "client"
            assert dict(zip(shown["nodes"], shown["places"], strict=True)) == places
            assert sorted(engine.nodes) == [
                "drafter (draft)",
                "head",
                "stage 0 (layers 0 to 2)",
                "stage 1 (layers 3 to 5)",
            ]
            assert len(set(places.values())) == 3
            assert all(", worker " in place for place in places.values())
            assert engine.nodes["drafter (draft)"] in engine._repr_html_()
            assert "<td>head</td><td>client</td>" in engine._repr_html_()
            kept = workers - removable(observer)
            assert len(kept) == 4
            used = {step.where for step in steps if isinstance(step, Loading)}
            assert len(used) == 3 and used < kept
        assert removable(observer) == workers
    waited = [step for step in steps if isinstance(step, hpc.Waiting)]
    assert (waited[-1].workers, waited[-1].wanted) == (5, 4)
    with pi.Engine.from_pretrained(target, draft, in_process=True) as plain:
        assert plain.generate("def main", max_new_tokens=16, strategy="iterative").text == text


def test_a_cluster_that_scales_itself_has_the_workers_that_the_engines_on_it_need() -> None:
    target, _ = pi.demo_pair()
    with (
        local_cluster(n_workers=0) as cluster,
        ExitStack() as engines,
    ):
        scaling = cluster.adapt(minimum=1, maximum=2, interval="50ms")
        first, second = (
            engines.enter_context(hpc.engine_from(cluster, target, "ngram", stages=stages))
            for stages in (3, 2)
        )
        assert scaling.minimum == 3
        first.close()
        assert scaling.minimum == 2
        assert second.generate("def main", max_new_tokens=4).token_ids
        second.close()
        assert scaling.minimum == 1


def test_workers_that_do_not_come_are_told_and_a_client_is_left_open(
    cluster: LocalCluster,
) -> None:
    target, _ = pi.demo_pair()
    with Client(cluster, set_as_default=False) as client:
        with pytest.raises(
            hpc.StartTimeoutError,
            match=r"^expected 6 workers within 0.2 s, got 5: start more workers, or allow more",
        ):
            hpc.engine_from(client, target, "ngram", stages=6, start_timeout="200ms")
        assert client.status == "running"


def test_a_scheduler_that_ends_while_workers_are_waited_for_is_named() -> None:
    target, _ = pi.demo_pair()
    waits = Event()

    def told(step: hpc.Waiting | Loading) -> None:
        waits.set()

    with (
        local_cluster(n_workers=0) as cluster,
        Client(cluster.scheduler_address, set_as_default=False) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        opening = pool.submit(
            lambda: hpc.engine_from(client, target, "ngram", stages=1, progress=told)
        )
        assert waits.wait(60)
        cluster.close()
        with pytest.raises(NoSchedulerError, match="scheduler can't be asked for workers: "):
            opening.result(60)


def test_where_the_scheduler_hangs_at_the_last_workers_go_by_their_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.planning.scheduler.SCHEDULER_TIMEOUT_S", 0.1)

    async def never(**_: Any) -> None:
        await asyncio.Event().wait()

    def hang(dask_scheduler: Scheduler) -> None:
        dask_scheduler.handlers["identity"] = never

    with client_of(1) as client:
        assert len(_names(client)) == 1
        client.run_on_scheduler(hang)
        assert _names(client) == {}


def test_a_worker_says_how_long_it_has_run_without_loading_what_computes() -> None:
    def loaded() -> set[str]:
        return {"torch", "transformers"} & sys.modules.keys()

    # Clusters of other tests may have all of this process's workers forked, with torch in them.
    spawned = dask.config.set({"distributed.worker.multiprocessing-method": "spawn"})
    with spawned, client_of(1, processes=True) as client:
        assert [age > 0 for age in ages_of(client).values()] == [True]
        assert [*client.run(loaded).values()] == [set()]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"stages": 0}, "expected stages to be a whole number from 1 on, got 0"),
        ({"stages": True}, "expected stages to be a whole number from 1 on, got True"),
        ({"spares": -1}, "expected spares to be a whole number from 0 on, got -1"),
        ({"start_timeout": "soon"}, "expected start-timeout as a time such as '10 minutes'"),
        ({"start_timeout": [1]}, r"expected start-timeout as a time such as .* got \[1\]"),
        ({"stages": 7}, "7 stages"),
        ({"layer_splits": [1]}, "no setting 'layer_splits': did you mean 'layer_split'"),
        ({"layer_split": [1, 1]}, "one weight for each of the 6 stages, not"),
    ],
)
def test_what_can_not_be_is_refused_before_any_worker_is_waited_for(
    cluster: LocalCluster, asked: dict[str, Any], expected: str
) -> None:
    target, _ = pi.demo_pair()
    with pytest.raises(ValueError, match=expected):
        hpc.engine_from(cluster, target, **{"stages": 6, "spares": 9} | asked)


def test_models_are_looked_at_before_any_worker_is_waited_for(cluster: LocalCluster) -> None:
    with pytest.raises(FileNotFoundError):
        hpc.engine_from(cluster, "./nowhere", stages=1, spares=9)


def test_what_is_no_cluster_is_refused() -> None:
    async def asynchronous() -> None:
        async with Client(processes=False, asynchronous=True, dashboard_address=None) as client:
            with pytest.raises(ValueError, match=r"asynchronous=False, got <Client"):
                hpc.engine_from(client, pi.demo_pair()[0], stages=1)

    asyncio.run(asynchronous())
    with pytest.raises(ValueError, match=r"^expected a cluster or a client made with .*got 'tcp:"):
        hpc.engine_from("tcp://a:1", pi.demo_pair()[0], stages=1)  # type: ignore[arg-type]
