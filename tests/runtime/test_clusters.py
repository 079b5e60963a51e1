"""Calls on a loop of another thread, and what an interrupt does to them."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType

import dask
import pytest
from distributed import Client, LocalCluster

from pipeinfer_dask.runtime.planning import clusters
from pipeinfer_dask.runtime.planning.clusters import (
    PATIENCE,
    LoopThread,
    _Settings,
    call_on,
    keep_nannies,
    own_cluster,
)
from pipeinfer_dask.runtime.planning.ending import interruptible_start


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Hear of interrupts, also where whoever started the tests had them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_whoever_ignores_interrupts_goes_on_doing_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible_start():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_waits_until_the_start_has_ended() -> None:
    steps: list[str] = []

    def start() -> None:
        with interruptible_start():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("ended")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert steps == ["ended"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_call_waits_until_what_it_began_is_taken_back() -> None:
    steps: list[str] = []
    begun = threading.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            steps.append("taken back")

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)  # at whatever the caller is by now

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with LoopThread() as thread, pytest.raises(KeyboardInterrupt):
        call_on(thread.loop, work())
    interrupter.join()
    assert steps == ["taken back"]


@pytest.mark.parametrize("handed_over", [False, True])
def test_an_interrupt_before_the_loop_has_begun_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    async def work() -> None:
        pass

    with LoopThread() as thread, monkeypatch.context() as patched:
        hand_over = thread.loop.call_soon_threadsafe

        def interrupted(begin: Callable[[], None]) -> None:
            patched.undo()
            patched.setattr("pipeinfer_dask.runtime.planning.clusters.CLEANUP_TIMEOUT_S", math.inf)
            if handed_over:
                hand_over(begin)
            raise KeyboardInterrupt

        patched.setattr(thread.loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call_on(thread.loop, work())


def test_a_call_on_a_loop_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.new_event_loop()
    hand_over = loop.call_soon_threadsafe

    async def work() -> None:
        pass

    def hand_over_too_late(callback: Callable[[], None]) -> None:
        hand_over(callback)
        loop.close()

    monkeypatch.setattr(loop, "call_soon_threadsafe", hand_over_too_late)
    for error in ("the event loop has ended", "Event loop is closed"):
        with pytest.raises(RuntimeError, match=error):
            call_on(loop, work())


def test_a_call_from_the_loop_itself_is_an_error_and_does_not_wait_for_ever() -> None:
    async def work() -> None:
        pass

    with LoopThread() as thread:

        async def from_within() -> None:
            call_on(thread.loop, work())

        with pytest.raises(RuntimeError, match="call from another thread than that of the engine"):
            call_on(thread.loop, from_within())


def test_an_error_of_the_call_is_the_callers() -> None:
    async def work() -> None:
        raise LookupError("gone")

    with LoopThread() as thread, pytest.raises(LookupError, match="gone"):
        call_on(thread.loop, work())


def test_settings_of_clusters_that_overlap_are_gone_with_the_last_one() -> None:
    settings = _Settings()
    name = "distributed.deploy.lost-worker-timeout"
    before = dask.config.get(name)
    with ExitStack() as first, ExitStack() as second:
        for resources in (first, second):
            resources.enter_context(settings.hold({name: "1 day"}))
        first.close()
        assert dask.config.get(name) == "1 day"
        second.close()
        assert dask.config.get(name) == before


@pytest.mark.cluster
def test_nannies_get_time_where_they_are_of_this_process_and_as_long_as_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((name, patient),) = PATIENCE.items()
    monkeypatch.setattr(clusters, "_SETTINGS", _Settings())  # other tests' engines hold theirs
    with (
        dask.config.set({name: "15 s"}),
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as ours,
        Client(cluster.scheduler_address, set_as_default=False) as from_elsewhere,
        ExitStack() as resources,
    ):
        before = dask.config.get(name)
        keep_nannies(from_elsewhere, resources)
        assert dask.config.get(name) == before != patient
        keep_nannies(ours, resources)
        assert dask.config.get(name) == patient
        resources.close()
        assert dask.config.get(name) == before


@pytest.mark.cluster
def test_a_worker_of_our_own_that_is_killed_is_forked_anew_however_long_that_takes() -> None:
    with dask.config.set({"distributed.deploy.lost-worker-timeout": 0}), ExitStack() as resources:
        client = own_cluster(1, resources)
        ((address, process),) = client.run(os.getpid).items()
        (server,) = client.run(os.getppid).values()
        os.kill(process, signal.SIGKILL)
        while address in client.scheduler_info()["workers"]:
            threading.Event().wait(0.01)
        client.wait_for_workers(1, timeout=60)
        assert address not in client.run(os.getpid)
        assert list(client.run(os.getppid).values()) == [server]


def test_an_ipython_shell_that_was_reset_opens_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    del main.__spec__  # as `%reset` does
    monkeypatch.setitem(sys.modules, "__main__", main)
    with ExitStack() as resources:
        assert len(own_cluster(1, resources).run(os.getpid)) == 1
