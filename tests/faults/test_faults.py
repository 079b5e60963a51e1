"""Nodes are lost in all ways, and nothing of a text with them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.bench.faults import KINDS, MEMORY_LIMIT, PAUSE_S, Harm, false_alarms
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.engine import GenerationInterrupted
from pipeinfer_dask.protocol.messages import Commit, DrafterLost, StageLost, StagesBack
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.clusters import local_cluster
from tests.engine.pairs import PROMPT, Pair, greedy_tokens
from tests.engine.test_leaks import until_empty

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

NODE_TIMEOUT_S = 3.0
PATIENCE_S = 60.0
STAGES = 3
WORKERS = STAGES + 2
LONG_PROMPT = 6 * PROMPT
"""One that is read in several runs."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Workers for three stages, a drafter and a spare, which their nannies restart."""
    with ExitStack() as resources:
        yield own_cluster(WORKERS, resources, memory_limit=MEMORY_LIMIT)


@pytest.fixture(scope="module")
def engine(pair: Pair, client: Client) -> Iterator[pi.Engine]:
    """An engine that leaves its workers as it has found them, whatever happened to it."""
    saboteur = Saboteur(client)
    with pi.Engine.from_pretrained(pair.target, pair.draft, client=client):
        pass  # what comes with the first use of a worker stays: each has a node
    files = saboteur.files()
    most = max(files.values())  # of a worker that has come in the place of another one
    with pi.Engine.from_pretrained(
        pair.target,
        pair.draft,
        client=client,
        stages=STAGES,
        spares=1,
        node_timeout=NODE_TIMEOUT_S,
    ) as engine:
        yield engine
    until_empty(saboteur.left)
    until_empty(lambda: {w: n for w, n in saboteur.files().items() if n > files.get(w, most)})


@pytest.fixture
def saboteur(client: Client, engine: pi.Engine) -> Iterator[Saboteur]:
    """One who begins with all workers, and leaves no more behind than an engine's nodes."""
    client.wait_for_workers(WORKERS, timeout=PATIENCE_S)
    saboteur = Saboteur(client)
    yield saboteur
    nodes = STAGES + 1
    until(lambda: len(saboteur.places()) == nodes)
    for what in ("actors", "nodes", "threads", "shared memory"):
        count = 0 if what == "shared memory" else nodes
        until(lambda what=what, count=count: held(saboteur, what) == count)  # type: ignore[misc]


def held(saboteur: Saboteur, what: str) -> int:
    return sum(by_worker.get(what, 0) for by_worker in saboteur.left().values())


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not so after {PATIENCE_S:g} s"
        time.sleep(0.05)


def in_mid_text(engine: pi.Engine, **options: Any) -> pi.Generation:
    """Start a generation, and return it when it has given a few tokens."""
    run = engine.start(PROMPT, max_new_tokens=200, **options)
    for _ in zip(range(3), run, strict=False):
        pass
    return run


def told(result: pi.Result, *kinds: type) -> list[type]:
    return [type(what) for _, what in result.trace if isinstance(what, kinds)]


def test_a_killed_stage_is_replaced_in_mid_text(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur, caplog: pytest.LogCaptureFixture
) -> None:
    before = saboteur.places()
    run = in_mid_text(engine, strategy="iterative")
    saboteur.kill("stage-1")
    until(lambda: run.status == "recovering")
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, StageLost, StagesBack) == [StageLost, StagesBack]
    (loss,) = (what for _, what in result.trace if isinstance(what, StageLost))
    assert loss.reason.startswith(f"stage 1 (layers 2 to 2) on worker {before['stage-1']} is lost")
    assert f"pipeinfer recovers, and goes on with all texts: {loss.reason}" in caplog.text
    after = saboteur.places()
    assert after.pop("stage-1") not in before.values()
    assert after.items() <= before.items()


def test_a_killed_drafter_never_stops_the_text(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur
) -> None:
    run = in_mid_text(engine, strategy="speculative")
    saboteur.kill("drafter")
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, DrafterLost, StageLost) == [DrafterLost]


def test_several_nodes_may_be_lost_at_once(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur
) -> None:
    run = in_mid_text(engine, temperature=0.8, seed=5)
    saboteur.kill("stage-0", "stage-1", "drafter")
    result = run.result(PATIENCE_S)
    whole = engine.generate(PROMPT, max_new_tokens=200, temperature=0.8, seed=5)
    assert result.token_ids == whole.token_ids
    assert told(result, StageLost, StagesBack) == [StageLost, StagesBack]


def test_a_stage_that_is_stopped_is_lost_and_holds_nothing_when_it_wakes_up(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur
) -> None:
    worker = saboteur.places()["stage-0"]
    run = in_mid_text(engine)
    with saboteur.stopped("stage-0"):
        result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, StageLost, StagesBack) == [StageLost, StagesBack]
    until(lambda: worker not in saboteur.left())


@pytest.mark.parametrize(("harm", "node"), [("die", "stage-1"), ("drop", "stage-0")])
def test_a_stage_or_a_message_that_is_lost_while_the_prompt_is_read_costs_no_token(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur, harm: str, node: str
) -> None:
    getattr(saboteur, harm)(node)
    result = engine.generate(LONG_PROMPT, max_new_tokens=20)
    assert result.token_ids == greedy_tokens(pair.target, LONG_PROMPT, 20)
    assert told(result, StageLost, StagesBack, Commit)[:3] == [StageLost, StagesBack, Commit]


def test_a_stage_that_is_killed_while_another_one_is_being_replaced_costs_no_token(
    pair: Pair, client: Client, engine: pi.Engine, saboteur: Saboteur
) -> None:
    worker = saboteur.places()["stage-0"]
    process = client.run(os.getpid, workers=[worker])[worker]
    run = in_mid_text(engine)
    saboteur.kill("stage-1")
    until(lambda: run.status == "recovering")
    os.kill(process, signal.SIGKILL)
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, StageLost, StagesBack) == [StageLost, StagesBack]
    assert worker not in saboteur.places().values()


@pytest.mark.parametrize("node", ["stage-1", "drafter"])
def test_a_process_that_takes_more_memory_than_it_may_costs_no_token(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur, node: str
) -> None:
    worker = saboteur.places()[node]
    run = engine.start(PROMPT, max_new_tokens=200)
    saboteur.squeeze(node)
    assert run.result(PATIENCE_S).token_ids == pair.greedy
    until(lambda: saboteur.places().get(node, worker) != worker)
    assert engine.generate(PROMPT, max_new_tokens=20).token_ids == pair.greedy[:20]


@pytest.mark.parametrize(
    ("node", "harm"),
    [
        *(("stage-0", harm) for harm in ("cut", "swallow")),
        *(("stage-1", harm) for harm in ("swap", "hang")),
        ("stage-2", "drop"),
        *(("drafter", harm) for harm in ("cut", "swallow", "hang")),
    ],
)
def test_what_is_wrong_between_living_nodes_costs_no_token(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur, node: str, harm: str
) -> None:
    drafts = node == "drafter"
    run = in_mid_text(engine, strategy="speculative" if drafts else "iterative")
    getattr(saboteur, harm)(node)
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, StageLost, DrafterLost) == [DrafterLost if drafts else StageLost]


@pytest.mark.parametrize(
    ("node", "harm"),
    [
        *(("stage-0", harm) for harm in ("busy", "pause")),
        ("stage-1", "hold_up"),
        ("stage-2", "repeat"),
        ("drafter", "hold_up"),
    ],
)
def test_what_is_slow_or_says_things_twice_is_not_lost(
    pair: Pair, engine: pi.Engine, saboteur: Saboteur, node: str, harm: str
) -> None:
    run = in_mid_text(engine)
    if harm == "pause":
        with saboteur.stopped(node):
            time.sleep(PAUSE_S)
    else:
        getattr(saboteur, harm)(node)
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    assert told(result, StageLost, DrafterLost) == []


def test_faults_by_chance_cost_no_token(pair: Pair, engine: pi.Engine, saboteur: Saboteur) -> None:
    seed = Random().randrange(2**32)
    harm = Harm(saboteur, Random(seed), tuple(KINDS))
    run = engine.start(PROMPT, max_new_tokens=200)
    harm.do(run, 3)
    what = f"seed {seed}: {harm.faults}"
    assert run.result(PATIENCE_S).token_ids == pair.greedy, what
    assert false_alarms(run, harm.faults) == 0, what


def test_without_free_workers_one_holds_two_nodes_and_without_any_the_text_so_far_is_kept(
    pair: Pair,
) -> None:
    with (
        local_cluster(n_workers=2, worker_class="distributed.Worker", protocol="tcp") as cluster,
        Client(cluster, set_as_default=False) as client,
        pi.Engine.from_pretrained(
            pair.target, client=client, stages=2, recovery_timeout=5.0
        ) as engine,
    ):
        run = in_mid_text(engine)
        first, last = cluster.workers.values()
        cluster.sync(last.close)
        assert run.result(PATIENCE_S).token_ids == pair.greedy

        run = in_mid_text(engine, temperature=0.9, seed=3)
        cluster.sync(first.close)
        with pytest.raises(GenerationInterrupted, match="could not be replaced: no worker") as lost:
            run.result(PATIENCE_S)
    with pi.Engine.from_pretrained(pair.target, pair.draft, in_process=True) as other:
        whole = other.generate(PROMPT, max_new_tokens=200, temperature=0.9, seed=3)
        request = lost.value.request
        rest = other.generate(
            [*request.prompt, *lost.value.partial_ids],
            max_new_tokens=request.max_new_tokens - len(lost.value.partial_ids),
            temperature=0.9,
            seed=3,
        )
    assert lost.value.partial_ids + rest.token_ids == whole.token_ids
    # A letter of several tokens may be broken in two.
    assert whole.text.startswith(lost.value.partial.rstrip("\N{REPLACEMENT CHARACTER}"))
