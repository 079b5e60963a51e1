"""Programs end in all ways beside others on a cluster: none of what was theirs stays on it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.protocol.messages import StageLost
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.engine.test_leaks import (
    descriptors,
    threads_of_engines,
    until_empty,
    wait_until_workers_hold_nothing,
)
from tests.tiny import make_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PATIENCE_S = 60.0
WORKERS = 3
LONG = 480

PROGRAM = """
import sys
from distributed import Client
import pipeinfer_dask as pi

client = Client(sys.argv[1])
engine = pi.Engine.from_pretrained(sys.argv[2], client=client, stages=2, progress=False)
for _ in engine.start("def", max_new_tokens=480):
    print("generates", flush=True)
    sys.stdin.readline()
    break
"""
"""A user's program that ends, by itself or not, with an engine open and a text under way."""


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[Client]:
    with ExitStack() as resources:
        client = own_cluster(WORKERS, resources)
        # What the first use brings once for all, such as a pool of threads, is no engine's.
        with pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2) as engine:
            engine.generate(PROMPT, max_new_tokens=5)
        wait_until_workers_hold_nothing(client)
        yield client


@pytest.fixture
def leaving_nothing(client: Client) -> Iterator[None]:
    """Workers that hold, after a test, nothing that they did not hold before."""
    before = descriptors(client)
    yield
    wait_until_workers_hold_nothing(client, before)


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a process group of its own, which ends with the block at the latest."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", *command],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.usefixtures("leaving_nothing")
def test_a_client_that_is_killed_takes_nothing_from_another_one_on_the_same_workers(
    pair: Pair, client: Client
) -> None:
    with (
        running(PROGRAM, address_of(client), str(pair.target)) as other,
        pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2) as engine,
    ):
        assert line_of(other) == "generates\n"
        run = engine.start(PROMPT, max_new_tokens=200)
        next(iter(run))
        other.kill()
        result = run.result(PATIENCE_S)
        assert result.token_ids == pair.greedy
        assert result.metrics.losses == 0
        until_empty(lambda: {} if actors(client) == WORKERS else {"actors": actors(client)})


def address_of(client: Client) -> str:
    return str(client.scheduler_info()["address"])


def actors(client: Client) -> int:
    return sum(held.get("actors", 0) for held in Saboteur(client).left().values())


@pytest.mark.usefixtures("leaving_nothing")
def test_a_program_that_ends_with_an_open_engine_frees_its_workers(
    pair: Pair, client: Client
) -> None:
    with running(PROGRAM, address_of(client), str(pair.target)) as program:
        assert line_of(program) == "generates\n"
        assert actors(client) == 2
        said, complained = program.communicate(timeout=PATIENCE_S)
        assert (program.returncode, said, complained) == (0, "", "")


OPENED = """
from distributed import Client
import pipeinfer_dask as pi

client = Client({scheduler!r})
engine = pi.Engine.from_pretrained({target!r}, client=client, stages=2, progress=False)
run = engine.start("def", max_new_tokens=480)
next(iter(run))
print("generates", end="")
"""


def test_a_kernel_that_is_restarted_opens_an_engine_on_the_same_workers(
    pair: Pair, client: Client, leaving_nothing: None
) -> None:
    jupyter = pytest.importorskip("jupyter_client.manager")
    manager, kernel = jupyter.start_new_kernel(startup_timeout=PATIENCE_S)
    cell = OPENED.format(scheduler=address_of(client), target=str(pair.target))
    try:
        assert said_by(kernel, cell) == "generates"
        assert actors(client) == 2
        manager.restart_kernel(now=True)
        kernel.wait_for_ready(timeout=PATIENCE_S)
        wait_until_workers_hold_nothing(client)
        assert said_by(kernel, cell) == "generates"
        assert said_by(kernel, "print(len(run.result(60).token_ids), end='')") == "480"
        assert said_by(kernel, "engine.close(); client.close()") == ""
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)


def said_by(kernel: Any, cell: str) -> str:
    """Run a cell in a kernel; return what it prints, or raise what it raises."""
    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    reply = kernel.execute_interactive(cell, timeout=PATIENCE_S, output_hook=hear)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose texts go on for longer than anybody waits."""
    folder = tmp_path_factory.mktemp("endless")
    return make_tiny(folder, "llama", layers=2, seed=0, max_position_embeddings=20_000)


INTERRUPTED = """
import signal, sys, threading
from distributed import Client
import pipeinfer_dask as pi

signal.signal(signal.SIGINT, signal.default_int_handler)
client = Client(sys.argv[1])
with pi.Engine.from_pretrained(sys.argv[2], client=client, stages=2, progress=False) as engine:

    def tell():
        engine.generate("def", max_new_tokens=20)
        print("generates", flush=True)

    threading.Thread(target=tell).start()
    try:
        engine.generate("def", max_new_tokens=19_000)
    except KeyboardInterrupt:
        print(len(engine.generate("def", max_new_tokens=5).token_ids), flush=True)
        raise
"""


@pytest.mark.usefixtures("leaving_nothing")
def test_a_program_that_is_interrupted_while_it_generates_can_go_on_and_ends_clean(
    endless: Path, client: Client
) -> None:
    with running(INTERRUPTED, address_of(client), str(endless)) as program:
        assert line_of(program) == "generates\n"
        program.send_signal(signal.SIGINT)
        said, complained = program.communicate(timeout=PATIENCE_S)
        assert said == "5\n"
        # Python ends by the signal itself, unless it forgets it in what torch does at its end.
        assert program.returncode in (-signal.SIGINT, 1)
        assert complained.count("Traceback") == 1
        assert complained.splitlines()[-1] == "KeyboardInterrupt"


COMMAND = """
import signal
from pipeinfer_dask.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
main(prog_name="pipeinfer")
"""


def test_ctrl_c_ends_a_command_and_its_workers_with_one_line(endless: Path) -> None:
    options = ["--target", str(endless), "--stages", "2", "--max-new-tokens", "19000"]
    with running(COMMAND, "generate", "def", *options) as command:
        assert command.stdout is not None
        assert command.stdout.read(1)
        others = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        _, complained = command.communicate(timeout=PATIENCE_S)
        assert (command.returncode, complained) == (130, "Error: interrupted\n")
        _, alive = psutil.wait_procs(others, PATIENCE_S)
        assert others and alive == []


def test_ctrl_c_while_workers_start_ends_them_however_long_they_would_take() -> None:
    with running(COMMAND, "demo") as command:
        until_empty(lambda: {} if forked_from(command.pid) else {"not yet": "forked"})
        (forks,) = forked_from(command.pid)
        forks.suspend()  # so they never come
        os.kill(command.pid, signal.SIGINT)
        _, complained = command.communicate(timeout=PATIENCE_S)
        assert (command.returncode, complained) == (130, "Error: interrupted\n")
        _, alive = psutil.wait_procs([forks], PATIENCE_S)
        assert alive == []


def forked_from(program: int) -> list[psutil.Process]:
    """Return the process that a program's workers are forked from, once there is one."""
    found = []
    for child in psutil.Process(program).children():
        with suppress(psutil.NoSuchProcess):  # another one, that has ended meanwhile
            if "forkserver" in " ".join(child.cmdline()):
                found.append(child)
    return found


CLOSED = """
import os, signal
from contextlib import ExitStack
from pipeinfer_dask.runtime.planning.clusters import own_cluster

with ExitStack() as resources:
    client = own_cluster(2, resources)
    first, _ = client.run(os.getpid).values()
    os.kill(first, signal.SIGSTOP)
"""


def test_a_cluster_of_our_own_ends_in_silence_though_a_worker_hangs() -> None:
    with running(CLOSED) as program:
        # Of which it takes nearly all to start, where others use the cores, too.
        said, complained = program.communicate(timeout=3 * PATIENCE_S)
        assert (program.returncode, said, complained) == (0, "", "")


@pytest.mark.usefixtures("leaving_nothing")
def test_a_text_under_which_all_workers_are_restarted_is_finished(
    pair: Pair, client: Client
) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2) as engine:
        run = engine.start(PROMPT, max_new_tokens=LONG)
        next(iter(run))
        client.restart()
        result = run.result(PATIENCE_S)
        assert result.metrics.losses > 0
        assert result.token_ids[: len(pair.greedy)] == pair.greedy
        assert result.token_ids == engine.generate(PROMPT, max_new_tokens=LONG).token_ids


@pytest.mark.usefixtures("leaving_nothing")
def test_two_engines_that_lose_the_same_worker_both_go_on(pair: Pair, client: Client) -> None:
    with (
        pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2) as one,
        pi.Engine.from_pretrained(pair.target, client=client, stages=3) as other,
    ):
        runs = [engine.start(PROMPT, max_new_tokens=LONG) for engine in (one, other)]
        for run in runs:
            next(iter(run))
        Saboteur(client).kill("stage-2")  # of the other engine, where the one has its drafter
        results = [run.result(PATIENCE_S) for run in runs]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].token_ids[: len(pair.greedy)] == pair.greedy
        assert all(result.metrics.losses > 0 for result in results)


def limit_memory(beyond: int | None) -> None:
    """Refuse this process more bytes than so many beyond those it has; None: nothing any more."""
    most = resource.RLIM_INFINITY if beyond is None else psutil.Process().memory_info().vms + beyond
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


FEW = 2**23
"""Bytes: the activations of a layer of `wide` for a token are fewer, for a long prompt more."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    return make_tiny(
        folder, "llama", layers=2, seed=0, intermediate_size=2**16, max_position_embeddings=1024
    )


@pytest.mark.usefixtures("leaving_nothing")
def test_a_stage_that_is_refused_memory_moves_to_a_worker_that_has_some(
    client: Client, wide: Path
) -> None:
    saboteur = Saboteur(client)
    with pi.Engine.from_pretrained(wide, client=client, stages=2, progress=False) as engine:
        whole = engine.generate(PROMPT * 40, max_new_tokens=8)
        full = saboteur.places()["stage-0"]
        client.run(limit_memory, FEW, workers=[full])
        try:
            result = engine.generate(PROMPT * 40, max_new_tokens=8)
            assert result.token_ids == whole.token_ids
            (loss,) = (what for _, what in result.trace if isinstance(what, StageLost))
            assert re.match(r"stage 0 .* has run out of memory: .*can't allocate", loss.reason)
            spare = saboteur.places()["stage-0"]
            assert spare not in (full, saboteur.places()["stage-1"])

            # Those that are left, one of which holds a stage: what is full is asked no more.
            client.run(limit_memory, FEW, workers=[spare])
            result = engine.generate(PROMPT * 40, max_new_tokens=8)
            assert result.token_ids == whole.token_ids
            assert len(set(saboteur.places().values())) == 1
        finally:
            client.run(limit_memory, None)


@pytest.mark.usefixtures("leaving_nothing")
def test_where_all_workers_are_refused_memory_the_text_so_far_is_kept_at_once(
    client: Client, wide: Path
) -> None:
    with pi.Engine.from_pretrained(wide, client=client, stages=2, progress=False) as engine:
        text = engine.generate(PROMPT, max_new_tokens=8).token_ids
        client.run(limit_memory, FEW)
        try:
            run = engine.start(PROMPT * 40, max_new_tokens=8)
            why = r"stage 0 .* has run out of memory: .*can't allocate .*could not be replaced: "
            with pytest.raises(GenerationInterrupted, match=why) as caught:
                run.result(PATIENCE_S)
        finally:
            client.run(limit_memory, None)
        assert caught.value.partial_ids == run.token_ids == []
        with pytest.raises(EngineClosedError, match=r"can't allocate .*open another one"):
            engine.start(PROMPT)
    with pi.Engine.from_pretrained(wide, client=client, stages=2, progress=False) as engine:
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == text


def cut_off(run: pi.Generation, pair: Pair, why: str) -> None:
    """Have a generation end in one error that has its text so far."""
    with pytest.raises(GenerationInterrupted, match=why) as caught:
        run.result(PATIENCE_S)
    partial = caught.value.partial_ids[: len(pair.greedy)]
    assert partial and partial == pair.greedy[: len(partial)]


def test_an_engine_whose_cluster_is_closed_in_mid_text_says_so_and_ends_with_it(
    pair: Pair,
) -> None:
    with ExitStack() as resources:
        client = own_cluster(2, resources)
        workers = [psutil.Process(process) for process in client.run(os.getpid).values()]
        engine = pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=1)
        run = engine.start(PROMPT, max_new_tokens=LONG)
        next(iter(run))
        client.cluster.close()  # type: ignore[union-attr]
        cut_off(run, pair, r"stage 0 .* is lost|the event loop has ended|client was closed")
        with pytest.raises(EngineClosedError, match="open another one"):
            engine.start(PROMPT)
        engine.close()
        assert threads_of_engines() == []
        _, alive = psutil.wait_procs(workers, PATIENCE_S)
        assert alive == []


@pytest.mark.parametrize("head", ["client", "worker"])
def test_a_client_that_is_closed_in_mid_text_is_what_the_error_names(
    pair: Pair, caplog: pytest.LogCaptureFixture, head: str
) -> None:
    with ExitStack() as resources:
        owner = own_cluster(2, resources)
        with Client(owner.cluster, set_as_default=False) as client:
            engine = pi.Engine.from_pretrained(
                pair.target, pair.draft, client=client, stages=1, head=head
            )
            run = engine.start(PROMPT, max_new_tokens=LONG)
            next(iter(run))
            client.close()
            cut_off(run, pair, "your Dask client was closed")
            engine.close()
        assert "goes on" not in caplog.text


DASK = "from distributed.cli.dask_{} import main; main()"
Program = subprocess.Popen[str]


@contextmanager
def cluster_of_programs(folder: Path) -> Iterator[tuple[Program, Program, Client]]:
    """Give a scheduler and a worker that are programs of their own, and a client of theirs."""
    file = str(folder / "scheduler.json")
    here = ["--scheduler-file", file, "--no-dashboard", "--host", "127.0.0.1"]
    node = ["--no-nanny", "--nthreads", "1", "--memory-limit", "0"]
    with (
        running(DASK.format("scheduler"), *here, "--port", "0") as scheduler,
        running(DASK.format("worker"), *here, *node) as worker,
        Client(scheduler_file=file, set_as_default=False, timeout=PATIENCE_S) as client,
    ):
        client.wait_for_workers(1, timeout=PATIENCE_S)
        yield scheduler, worker, client


@pytest.mark.parametrize("head", ["client", "worker"])
def test_an_engine_whose_scheduler_is_killed_says_so_and_its_workers_end(
    pair: Pair, tmp_path: Path, head: str
) -> None:
    with cluster_of_programs(tmp_path) as (scheduler, worker, client):
        engine = pi.Engine.from_pretrained(pair.target, client=client, stages=1, head=head)
        run = engine.start(PROMPT, max_new_tokens=LONG)
        next(iter(run))
        scheduler.kill()
        cut_off(run, pair, r" is lost: .* connection to the cluster's scheduler is, too")
        with pytest.raises(EngineClosedError, match="open another one"):
            engine.start(PROMPT)
        engine.close()
        assert threads_of_engines() == []
        _, said = worker.communicate(timeout=PATIENCE_S)
        assert worker.returncode == 0
        assert "pipeinfer" not in said


def test_a_scheduler_that_hangs_costs_no_token_and_keeps_nobody_waiting(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.runtime.planning.scheduler.SCHEDULER_TIMEOUT_S", 0.5)
    monkeypatch.setattr("pipeinfer_dask.runtime.pipeline.scaling.REGISTER_TIMEOUT_S", 0.5)
    with cluster_of_programs(tmp_path) as (scheduler, _, client):
        engine = pi.Engine.from_pretrained(pair.target, client=client, stages=1)
        scheduler.send_signal(signal.SIGSTOP)
        try:
            assert engine.generate(PROMPT, max_new_tokens=200).token_ids == pair.greedy
            with pytest.raises(RuntimeError, match=r"scheduler can't be asked .* no answer within"):
                pi.Engine.from_pretrained(pair.target, client=client, stages=1)
            engine.close()
            assert threads_of_engines() == []
        finally:
            scheduler.send_signal(signal.SIGCONT)
        wait_until_workers_hold_nothing(client)
