"""A closed engine leaves nothing behind, however it came to be closed."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

import pipeinfer_dask as pi
from pipeinfer_dask.bench.sabotage import Saboteur, shared_memory
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.runtime.links.links import Link
from tests.clusters import local_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.tiny import make_tiny

TIMES = 50
LONG = 480

PATIENCE_S = 60.0
"""What is let go of in the background must be gone after so long."""

ROOM = {"threads": TIMES // 2, "files": TIMES // 2}
"""How many more there may be of what can't be told from others' own.

distributed and transformers keep pools of threads and connections, which grow and shrink
meanwhile. What every second engine left behind would still be seen. That it is not less does
no harm: an engine's own threads, links and shards are counted by themselves, to the last one.
"""


def until_empty(look: Callable[[], dict[str, Any]]) -> None:
    """Look again and again until nothing is left."""
    deadline = time.monotonic() + PATIENCE_S
    while left := look():
        assert time.monotonic() < deadline, f"still there after {PATIENCE_S:g} s: {left}"
        time.sleep(0.05)


def held_here() -> dict[str, int]:
    """Count what this process holds."""
    return {
        "threads": threading.active_count(),
        "files": psutil.Process().num_fds(),
        **held_by_engines(),
    }


def held_by_engines() -> dict[str, int]:
    """Count what a process holds for engines, and nobody else has."""
    gc.collect()
    things = gc.get_objects()
    return {
        "engines' threads": len(threads_of_engines()),
        "shards": sum(type(thing) is Shard for thing in things),
        "open links": sum(type(thing) is Link and not thing.closed for thing in things),
    }


def assert_no_more_is_held(before: dict[str, int]) -> None:
    def more() -> dict[str, str]:
        now = held_here()
        return {
            what: f"{before[what]} before, {now[what]} now"
            for what in now
            if now[what] > before[what] + ROOM.get(what, 0)
        }

    until_empty(more)


def held_by(dask_worker: Worker) -> dict[str, Any]:
    """Return what a worker holds for engines; nothing that is zero."""
    held = {
        "actors": len(dask_worker.state.actors),
        "tasks": len(dask_worker.state.tasks),
        "handlers": [name for name in dask_worker.handlers if name.startswith("pipeinfer")],
        "shared memory": shared_memory(),
        **held_by_engines(),
    }
    return {what: count for what, count in held.items() if count}


def descriptors(client: Client) -> dict[str, int]:
    """Return how many files and sockets each worker has open."""
    return Saboteur(client).files()


def wait_until_workers_hold_nothing(client: Client, files: Mapping[str, int] = {}) -> None:
    """Wait, for workers hear of what is released a moment later.

    Workers of these addresses may have so many ``files`` open.
    """

    def held() -> dict[str, Any]:
        by_workers = {worker: held for worker, held in client.run(held_by).items() if held}
        tasks, clients = client.run_on_scheduler(known_by)
        by_others = {
            "scheduler": tasks,
            "client": list(client.futures),
            "clients": [other for other in clients if other != client.id],
            "files": [w for w, count in descriptors(client).items() if count > files.get(w, count)],
        }
        return by_workers | {who: keys for who, keys in by_others.items() if keys}

    until_empty(held)


def known_by(dask_scheduler: Scheduler) -> tuple[list[str], list[str]]:
    """Return a scheduler's tasks, and its clients without the one that it has for itself."""
    clients = [str(client) for client in dask_scheduler.clients if client != "fire-and-forget"]
    return [str(task) for task in dask_scheduler.tasks], clients


def use(pair: Pair, **options: Any) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, **options) as engine:
        result = engine.generate(PROMPT, max_new_tokens=5)
        assert result.token_ids == pair.greedy[:5]


@pytest.mark.slow
def test_engines_of_threads_leave_nothing_behind(pair: Pair) -> None:
    use(pair, in_process=True)
    before = held_here()
    for _ in range(TIMES):
        use(pair, in_process=True)
    assert_no_more_is_held(before)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_engines_on_workers_of_this_process_leave_nothing_behind(
    pair: Pair, inproc_client: Client
) -> None:
    use(pair, client=inproc_client)
    wait_until_workers_hold_nothing(inproc_client)
    before = held_here()
    for _ in range(TIMES):
        use(pair, client=inproc_client)
    wait_until_workers_hold_nothing(inproc_client)
    assert_no_more_is_held(before)


LAYER_BYTES = 6_000_000
HEAVY_TIMES = 25


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of `LAYER_BYTES` a layer: what stays in memory of many such is seen."""
    folder = tmp_path_factory.mktemp("heavy")
    return make_tiny(folder, "llama", layers=2, seed=0, intermediate_size=16384)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_engines_on_workers_of_their_own_processes_leave_nothing_behind(
    heavy: Path, tcp_client: Client
) -> None:
    def use_heavy(times: int) -> None:
        for _ in range(times):
            with pi.Engine.from_pretrained(heavy, heavy, client=tcp_client, stages=2) as engine:
                engine.generate(PROMPT, max_new_tokens=5)
        wait_until_workers_hold_nothing(tcp_client)

    use_heavy(5)
    here, earlier = held_here(), tcp_client.run(files_and_memory)
    use_heavy(HEAVY_TIMES)
    assert_no_more_is_held(here)

    def grown() -> dict[str, Any]:
        return {
            worker: (earlier[worker], now)
            for worker, now in tcp_client.run(files_and_memory).items()
            if now[0] > earlier[worker][0] + ROOM["files"]
            or now[1] > earlier[worker][1] + HEAVY_TIMES * LAYER_BYTES // 3
        }

    until_empty(grown)


def files_and_memory() -> tuple[int, int]:
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss


def threads_of_engines() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pipeinfer")]


def test_an_exception_in_the_with_block_closes_the_engine(pair: Pair) -> None:
    running: list[pi.Generation] = []

    def fail_while_generating() -> None:
        with pi.Engine.from_pretrained(pair.target, pair.draft, in_process=True) as engine:
            running.append(engine.start(PROMPT, max_new_tokens=LONG))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_generating()
    with pytest.raises(GenerationInterrupted):
        running[0].result()
    assert threads_of_engines() == []


def test_an_engine_that_can_not_load_leaves_nothing_behind(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Shard.load

    def load_all_but_the_last(path: Path, layers: range, **options: Any) -> Shard:
        if layers.stop == 4:
            raise MemoryError("no room for layer 3")
        return load(path, layers, **options)

    monkeypatch.setattr(Shard, "load", load_all_but_the_last)
    with pytest.raises(MemoryError, match="no room for layer 3"):
        pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True)
    assert threads_of_engines() == []


@contextmanager
def small_cluster() -> Iterator[LocalCluster]:
    with local_cluster(n_workers=2, protocol="tcp") as cluster:
        yield cluster


def close_client(cluster: LocalCluster, client: Client, engine: pi.Engine) -> None:
    client.close()


def close_cluster(cluster: LocalCluster, client: Client, engine: pi.Engine) -> None:
    cluster.close()


@pytest.mark.cluster
@pytest.mark.parametrize("own_loop", [False, True], ids=["the cluster's loop", "a loop of its own"])
@pytest.mark.parametrize("end", [close_client, close_cluster])
def test_an_engine_whose_client_or_cluster_is_closed_fails_and_can_be_closed(
    pair: Pair, end: Callable[[LocalCluster, Client, pi.Engine], None], own_loop: bool
) -> None:
    with small_cluster() as cluster:
        client = Client(cluster.scheduler_address if own_loop else cluster, set_as_default=False)
        engine = pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=1)
        running = engine.start(PROMPT, max_new_tokens=LONG)
        reader = iter(running)
        next(reader)
        end(cluster, client, engine)
        with pytest.raises(GenerationInterrupted) as caught:
            running.result()
        partial = caught.value.partial_ids[: len(pair.greedy)]
        assert partial
        assert partial == pair.greedy[: len(partial)]
        with pytest.raises(EngineClosedError, match="open another one"):
            engine.start(PROMPT)
        running.cancel()
        engine.close()
        client.close()
    assert threads_of_engines() == []


@pytest.mark.cluster
@pytest.mark.parametrize("own_loop", [False, True], ids=["the cluster's loop", "a loop of its own"])
def test_workers_are_freed_when_the_client_of_an_open_engine_is_closed(
    pair: Pair, own_loop: bool
) -> None:
    with small_cluster() as cluster, Client(cluster, set_as_default=False) as observer:
        client = Client(cluster.scheduler_address if own_loop else cluster, set_as_default=False)
        engine = pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=1)
        assert engine.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]
        client.close()
        wait_until_workers_hold_nothing(observer)
        engine.close()


CLIENT = """
import sys
from distributed import Client
import pipeinfer_dask as pi

engine = pi.Engine.from_pretrained(sys.argv[2], client=Client(sys.argv[1]), stages=1)
for _ in engine.start("def", max_new_tokens=480):
    print("generates", flush=True)
    sys.stdin.read()
"""


@pytest.mark.cluster
def test_workers_are_freed_when_the_process_of_a_client_is_killed(pair: Pair) -> None:
    with small_cluster() as cluster, Client(cluster, set_as_default=False) as observer:
        command = [sys.executable, "-c", CLIENT, cluster.scheduler_address, str(pair.target)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "generates\n"
            assert any(observer.run(held_by).values())
            process.kill()
        wait_until_workers_hold_nothing(observer)


LEAVER = """
import sys
from distributed import Client
import pipeinfer_dask as pi

if __name__ == "__main__":
    engine = pi.Engine.from_pretrained(sys.argv[2], client=Client(sys.argv[1]), stages=1)
    next(iter(engine.start("def", max_new_tokens=480)))
    raise SystemExit(3)
"""


@pytest.mark.cluster
def test_a_process_that_ends_with_an_open_engine_ends_in_silence_and_frees_the_workers(
    pair: Pair,
) -> None:
    with small_cluster() as cluster, Client(cluster, set_as_default=False) as observer:
        command = [sys.executable, "-c", LEAVER, cluster.scheduler_address, str(pair.target)]
        left = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (left.returncode, left.stdout, left.stderr) == (3, "", "")
        wait_until_workers_hold_nothing(observer)


@pytest.mark.cluster
@pytest.mark.parametrize("head", ["client", "worker"])
def test_an_engine_that_is_forgotten_is_closed_once_its_text_is_over(
    pair: Pair, inproc_client: Client, head: str
) -> None:
    running = pi.Engine.from_pretrained(
        pair.target, pair.draft, client=inproc_client, stages=2, head=head
    ).start(PROMPT, max_new_tokens=50)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert running.result().token_ids == pair.greedy[:50]
        until_empty(lambda: {} if never_closed(told) else {"warnings": told})
    wait_until_workers_hold_nothing(inproc_client)


def never_closed(told: list[warnings.WarningMessage]) -> bool:
    gc.collect()
    return any("was never closed" in str(warning.message) for warning in told)


def test_an_engine_of_threads_that_is_forgotten_is_closed(pair: Pair) -> None:
    engine = pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del engine
        assert never_closed(told)
    until_empty(lambda: {"threads": left} if (left := threads_of_engines()) else {})


@pytest.mark.cluster
def test_two_engines_share_a_client(pair: Pair, inproc_client: Client) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, client=inproc_client, stages=2
    ) as staying:
        with pi.Engine.from_pretrained(
            pair.target, pair.draft, client=inproc_client, stages=3
        ) as going:
            runs = [engine.start(PROMPT, max_new_tokens=50) for engine in (staying, going)]
            assert [run.result().token_ids for run in runs] == [pair.greedy[:50]] * 2
        assert staying.generate(PROMPT, max_new_tokens=50).token_ids == pair.greedy[:50]
    wait_until_workers_hold_nothing(inproc_client)


@pytest.mark.cluster
def test_an_engine_without_a_client_ends_the_cluster_that_it_started(pair: Pair) -> None:
    def workers() -> set[psutil.Process]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if "forkserver" in " ".join(process.cmdline()):
                    found.add(process)
        return found

    def more() -> dict[str, Any]:
        return {"processes": left} if (left := workers() - before) else {}

    with pi.Engine.from_pretrained(pair.target, stages=1) as first:
        assert first.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]
    before = workers()  # the process that others are forked from stays
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=1) as second:
        assert len(workers() - before) == 2
        assert second.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]
    until_empty(more)
    assert threads_of_engines() == []
