"""Which worker holds which node."""

from __future__ import annotations

import asyncio
import os

import dask
import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.runtime.planning.gpus import Devices
from pipeinfer_dask.runtime.planning.models import Models
from pipeinfer_dask.runtime.planning.placement import default_stages, place, spread, without_spares
from pipeinfer_dask.runtime.planning.workers import ask
from tests.clusters import client_of
from tests.engine.pairs import Pair

FOUR = {"a": 2, "b": 2, "c": 2, "d": 2}


def test_each_stage_and_the_drafter_get_a_worker_of_their_own() -> None:
    placement = place(FOUR, 3, drafter=True)
    assert placement.stages == ("a", "b", "c")
    assert placement.drafter == "d"
    assert placement.threads == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_without_a_draft_model_there_is_no_drafter() -> None:
    placement = place(FOUR, 4, drafter=False)
    assert placement.stages == ("a", "b", "c", "d")
    assert placement.drafter is None


def test_workers_that_are_not_needed_are_left_alone() -> None:
    assert place(FOUR, 1, drafter=True).threads.keys() == {"a", "b"}


def test_a_drafter_without_a_worker_of_its_own_shares_the_last_stage_and_its_threads() -> None:
    placement = place(FOUR, 4, drafter=True)
    assert placement.drafter == "d"
    assert placement.threads == {"a": 2, "b": 2, "c": 2, "d": 1}


def test_neighbouring_stages_share_a_worker_where_they_may() -> None:
    placement = place({"a": 4, "b": 4}, 4, drafter=False, share=True)
    assert placement.stages == ("a", "a", "b", "b")
    assert placement.threads == {"a": 2, "b": 2}


def test_leave_to_share_changes_nothing_where_there_are_enough_workers() -> None:
    assert place(FOUR, 3, drafter=True, share=True) == place(FOUR, 3, drafter=True)


def on_hosts(*hosts: str) -> dict[str, int]:
    """Return workers, one for each host that is named."""
    return {f"tcp://{host}:{port}": 2 for port, host in enumerate(hosts, 1)}


def test_each_stage_and_the_drafter_are_on_a_machine_of_their_own_if_there_are_enough() -> None:
    workers = on_hosts("one", "one", "two", "two", "three", "three", "four", "four")
    placement = place(workers, 3, drafter=True)
    assert placement.stages == ("tcp://one:1", "tcp://two:3", "tcp://three:5")
    assert placement.drafter == "tcp://four:7"
    assert placement.draft_apart


def test_stages_that_have_to_share_a_machine_are_neighbours_on_workers_of_their_own() -> None:
    workers = on_hosts("one", "one", "two", "two", "three")
    placement = place(workers, 4, drafter=True)
    assert placement.stages == ("tcp://one:1", "tcp://one:2", "tcp://two:3", "tcp://three:5")
    assert placement.drafter == "tcp://two:4"
    assert set(placement.threads.values()) == {2}


def test_workers_are_shared_by_neighbours_on_as_many_machines_as_there_are() -> None:
    placement = place(on_hosts("one", "two", "one"), 5, drafter=False, share=True)
    assert placement.stages == (
        *("tcp://one:1", "tcp://one:1"),
        *("tcp://one:3", "tcp://one:3"),
        "tcp://two:2",
    )


def test_what_is_kept_free_is_not_the_only_worker_of_a_machine() -> None:
    workers = on_hosts("one", "one", "two", "three")
    assert list(without_spares(workers, 1)) == ["tcp://one:1", "tcp://two:3", "tcp://three:4"]


def test_workers_of_one_machine_are_used_in_the_order_given() -> None:
    assert spread(["tcp://10.0.0.1:9", "tcp://10.0.0.1:3"]) == [
        "tcp://10.0.0.1:9",
        "tcp://10.0.0.1:3",
    ]
    in_other_processes = ["inproc://10.0.0.1/1/1", "inproc://10.0.0.1/1/2"]
    assert spread(in_other_processes) == in_other_processes


def test_one_worker_may_hold_everything() -> None:
    placement = place({"a": 2}, 3, drafter=True, share=True)
    assert placement.stages == ("a", "a", "a")
    assert placement.drafter == "a"
    assert placement.threads == {"a": 1}  # never none


def test_too_few_workers_are_refused_without_leave_to_share() -> None:
    with pytest.raises(
        ValueError,
        match=r"^expected a worker for each of 3 stages, found 2: start more workers, ask for "
        r"stages=2, or allow share_workers=True$",
    ):
        place({"a": 1, "b": 1}, 3, drafter=True)


@pytest.mark.parametrize("share", [False, True])
def test_a_cluster_without_workers_is_refused(share: bool) -> None:
    with pytest.raises(ValueError, match=r"^expected a cluster with workers, found none: start"):
        place({}, 1, drafter=False, share=share)


@pytest.mark.parametrize(
    ("workers", "layers", "drafter", "stages"),
    [(4, 12, True, 3), (4, 12, False, 4), (4, 2, True, 2), (1, 12, True, 1), (0, 12, True, 1)],
)
def test_by_default_every_worker_but_the_drafters_is_a_stage(
    workers: int, layers: int, drafter: bool, stages: int
) -> None:
    assert default_stages(workers, layers, drafter=drafter) == stages


@pytest.mark.parametrize(
    ("workers", "apart"),
    [
        (["tcp://10.0.0.1:1", "tcp://10.0.0.2:1", "tcp://10.0.0.3:1"], True),
        (["tcp://10.0.0.1:1", "tcp://10.0.0.2:1", "tcp://10.0.0.2:2"], False),
        (["tls://127.0.0.1:1", "tls://127.0.0.1:2", "tls://127.0.0.1:3"], False),
    ],
)
def test_a_drafter_is_apart_on_a_machine_without_stages(workers: list[str], apart: bool) -> None:
    assert place(dict.fromkeys(workers, 1), 2, drafter=True).draft_apart is apart
    assert not place(dict.fromkeys(workers, 1), 2, drafter=False).draft_apart


@pytest.mark.parametrize(
    ("cores", "shared", "alone"), [(2, 2, 1), (5, 5, 1), (6, None, 2), (64, None, 21)]
)
def test_stages_of_one_process_take_turns_unless_there_are_two_cores_for_each(
    cores: int, shared: int | None, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    target, draft = demo_pair()
    models = Models(open_checkpoint(target), open_checkpoint(draft), "auto", Devices())
    specs, _ = models.specs(models.split(2, None), None)
    assert models.take_turns(2) == (shared is not None)
    assert {(spec.sharers, spec.threads) for spec in specs} == {(shared, alone)}


async def never() -> None:
    await asyncio.Event().wait()


@pytest.mark.cluster
def test_workers_that_do_not_tell_what_they_have_are_named(
    inproc_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.planning.workers.ANSWER_TIMEOUT_S", 0.1)
    worker = min(inproc_client.scheduler_info()["workers"])
    with pytest.raises(RuntimeError, match=f"expected {worker} to answer within 0.1 s"):
        ask(inproc_client, [worker], never)


@pytest.mark.cluster
def test_workers_that_are_gone_before_they_tell_what_they_have_are_named() -> None:
    gone = "tcp://127.0.0.1:1"
    with (
        client_of(1, protocol="tcp") as client,
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
        pytest.raises(RuntimeError, match=f"expected {gone} to answer, but one is gone: see"),
    ):
        ask(client, [gone], os.getpid)


@pytest.mark.cluster
@pytest.mark.parametrize("head", ["client", "worker"])
def test_a_trace_names_machine_and_worker_of_each_node_of_any_client(
    inproc_client: Client, pair: Pair, head: str
) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, client=inproc_client, stages=2, head=head
    ) as engine:
        trace = engine.generate("a b", max_new_tokens=4).trace
    assert sorted(trace.places) == ["drafter", "head", "stage 0", "stage 1"]
    assert trace.places["head"] == (trace.places["drafter"] if head == "worker" else "client")
    workers = inproc_client.scheduler_info(n_workers=-1)["workers"].values()
    told = {f"{worker['host']}, worker {worker['name']}" for worker in workers}
    assert len(set(trace.places.values()) & told) == 3


def test_nodes_in_this_process_are_on_no_worker(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        assert engine.generate("a b", max_new_tokens=2).trace.places == {}
