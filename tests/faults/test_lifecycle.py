"""Programs end in all ways beside others on a cluster: none of what was theirs stays on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.engine.test_leaks import descriptors, until_empty, wait_until_workers_hold_nothing

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
    """Run a program of another process, which ends with the block at the latest."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True
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
        assert program.stdin is not None
        program.stdin.close()
        program.wait(PATIENCE_S)


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
