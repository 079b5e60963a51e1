"""A head on a worker is lost in all ways, and nothing of a text with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.engine import GenerationInterrupted
from pipeinfer_dask.protocol.messages import Commit, DrafterLost, StageLost, StagesBack
from pipeinfer_dask.runtime.planning.clusters import names_of, own_cluster
from pipeinfer_dask.trace import History
from tests.clusters import local_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.engine.test_leaks import wait_until_workers_hold_nothing
from tests.engine.test_remote_head_ends import heads

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PATIENCE_S = 90.0
WORKERS = 4


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Workers for two stages, a drafter with the head, and a spare; nannies restart them."""
    with ExitStack() as resources:
        yield own_cluster(WORKERS, resources)


@pytest.fixture
def engine(pair: Pair, client: Client) -> Iterator[pi.Engine]:
    """An engine with its head on a worker, which leaves nothing behind, whatever happens to it."""
    client.wait_for_workers(WORKERS, timeout=PATIENCE_S)
    with pi.Engine.from_pretrained(
        pair.target,
        pair.draft,
        client=client,
        stages=2,
        spares=1,
        node_timeout=5.0,
        head="worker",
        max_concurrent=2,
    ) as engine:
        yield engine
    wait_until_workers_hold_nothing(client)


def place_of_head(client: Client) -> str:
    found: dict[str, int] = client.run(heads, on_error="ignore")
    (worker,) = (worker for worker, count in found.items() if count)
    return worker


def process_of_head(client: Client) -> int:
    worker = place_of_head(client)
    process: int = client.run(os.getpid, workers=[worker])[worker]
    return process


def in_mid_text(engine: pi.Engine, **options: Any) -> pi.Generation:
    run = engine.start(PROMPT, max_new_tokens=200, **options)
    for _ in zip(range(3), run, strict=False):
        pass
    return run


def until_the_head_is_lost(run: pi.Generation) -> None:
    """Wait for that, which nobody announces; a busy machine may lose a stage before."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(loss.reason.startswith("head") for loss in History(run.trace).losses):
        assert time.monotonic() < deadline and not run.done()
        time.sleep(0.01)


def told(result: pi.Result, *kinds: type) -> list[type]:
    return [type(what) for _, what in result.trace if isinstance(what, kinds)]


def test_texts_go_on_when_the_worker_of_the_head_is_killed(
    pair: Pair, client: Client, engine: pi.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 11, "top_k": 40, "logprobs": 1}
    sampled = engine.generate(PROMPT, max_new_tokens=200, **options)
    worker, process = place_of_head(client), process_of_head(client)
    runs = [
        in_mid_text(engine, strategy="pipeinfer"),
        in_mid_text(engine, **options),
        engine.start(PROMPT, max_new_tokens=50),
    ]
    assert runs[2].status == "queued"
    os.kill(process, signal.SIGKILL)
    until_the_head_is_lost(runs[0])
    runs.append(engine.start(PROMPT, max_new_tokens=20))
    results = [run.result(PATIENCE_S) for run in runs]
    assert results[0].token_ids == pair.greedy
    assert results[1].token_ids == sampled.token_ids
    assert results[1].text == sampled.text
    assert results[1].logprobs is not None and len(results[1].logprobs) == 200
    assert results[2].token_ids == pair.greedy[:50]
    assert results[3].token_ids == pair.greedy[:20]
    assert told(results[0], StageLost, DrafterLost) == [StageLost, DrafterLost]
    for result in results[:2]:
        assert told(result, StageLost, StagesBack) == [StageLost, StagesBack]
    for result in results:
        story = History(result.trace)
        assert [one.guess.token for one in story.tokens] == result.token_ids
        assert all(run.done is not None or run.cancelled is not None for run in story.runs.values())
        assert len(story.runs) == result.metrics.runs
        times = [at for at, _ in result.trace]
        assert times == sorted(times)
        committed = [what.tokens for _, what in result.trace if isinstance(what, Commit)]
        assert [token for tokens in committed for token in tokens] == result.token_ids
    assert place_of_head(client) != worker
    where = names_of(client)[place_of_head(client)]
    assert f"<td>head</td><td>{where}</td>" in engine._repr_html_()
    what = f"head (of 2 stages) on worker {worker} is lost"
    assert f"pipeinfer recovers, and goes on with all texts: {what}" in caplog.text


def test_the_next_head_goes_to_a_worker_that_answers_though_a_free_one_hangs(
    pair: Pair, client: Client, engine: pi.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    processes: dict[str, int] = client.run(os.getpid)
    (free,) = processes.keys() - Saboteur(client).places().values() - {place_of_head(client)}
    run = in_mid_text(engine)
    worker = place_of_head(client)
    os.kill(processes[free], signal.SIGSTOP)
    try:
        os.kill(processes[worker], signal.SIGKILL)
        assert run.result(PATIENCE_S).token_ids == pair.greedy
    finally:
        os.kill(processes[free], signal.SIGCONT)
    assert place_of_head(client) not in (free, worker)
    assert "could not connect to the worker" not in caplog.text


def test_texts_go_on_when_the_head_hangs_and_it_holds_nothing_when_it_wakes_up(
    pair: Pair, client: Client, engine: pi.Engine
) -> None:
    run = in_mid_text(engine)
    process = process_of_head(client)
    os.kill(process, signal.SIGSTOP)
    try:
        assert run.result(PATIENCE_S).token_ids == pair.greedy
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_text_survives_the_loss_of_the_next_head_and_of_all_workers_at_once(
    pair: Pair, client: Client, engine: pi.Engine
) -> None:
    run = in_mid_text(engine, temperature=0.9, seed=5)
    os.kill(process_of_head(client), signal.SIGKILL)
    until_the_head_is_lost(run)
    deadline = time.monotonic() + PATIENCE_S
    while not any(client.run(heads, on_error="ignore").values()):  # the next one is being made
        assert time.monotonic() < deadline
    os.kill(process_of_head(client), signal.SIGKILL)
    result = run.result(PATIENCE_S)
    assert len(result.token_ids) == 200

    again = in_mid_text(engine, temperature=0.9, seed=5)
    client.restart()
    assert again.result(PATIENCE_S).token_ids == result.token_ids
    whole = engine.generate(PROMPT, max_new_tokens=200, temperature=0.9, seed=5)
    assert whole.token_ids == result.token_ids


def test_the_client_is_warned_of_a_stage_that_its_head_elsewhere_replaces(
    pair: Pair, client: Client, engine: pi.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    run = in_mid_text(engine)
    Saboteur(client).kill("stage-0")
    result = run.result(PATIENCE_S)
    assert result.token_ids == pair.greedy
    (loss,) = (loss for loss in History(result.trace).losses if "stage 0" in loss.reason)
    assert caplog.text.count(f"pipeinfer recovers: {loss.reason}") == 1


def test_conversations_and_costs_survive_the_head(
    pair: Pair, client: Client, engine: pi.Engine
) -> None:
    turns = "def main(arguments):", " more"
    with (
        pi.Engine.from_pretrained(pair.target, in_process=True) as near,
        near.chat(template="plain") as same,
    ):
        expected = [same.send(turn, max_new_tokens=8).token_ids for turn in turns]
    with engine.chat(template="plain") as chat:
        first = chat.send(turns[0], max_new_tokens=8)
        run = in_mid_text(engine)
        os.kill(process_of_head(client), signal.SIGKILL)
        until_the_head_is_lost(run)
        with pytest.raises(RuntimeError, match="expected an idle pipeline, got"):
            engine.measure_costs()
        second = chat.send(turns[1], max_new_tokens=8)
        assert [first.token_ids, second.token_ids] == expected
        assert run.result(PATIENCE_S).token_ids == pair.greedy
    assert len(engine.measure_costs().stages) == 2


def test_a_text_that_is_cancelled_while_the_head_is_replaced_is_over_at_once(
    client: Client, engine: pi.Engine, pair: Pair
) -> None:
    run, other = in_mid_text(engine), in_mid_text(engine)
    os.kill(process_of_head(client), signal.SIGKILL)
    until_the_head_is_lost(run)
    run.cancel()
    result = run.result(PATIENCE_S)
    assert result.finish_reason == "stopped"
    assert result.token_ids == pair.greedy[: len(result.token_ids)]
    assert other.result(PATIENCE_S).token_ids == pair.greedy


def test_a_head_moves_in_with_a_stage_and_without_any_worker_the_text_so_far_is_kept(
    pair: Pair,
) -> None:
    with (
        local_cluster(n_workers=2, worker_class="distributed.Worker", protocol="tcp") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        first, last = cluster.workers.values()
        with pi.Engine.from_pretrained(
            pair.target, client=client, stages=2, head=last.address, recovery_timeout=5.0
        ) as engine:
            run = in_mid_text(engine)
            cluster.sync(last.close)
            assert run.result(PATIENCE_S).token_ids == pair.greedy
            assert place_of_head(client) == first.address

            run = in_mid_text(engine)
            cluster.sync(first.close)
            why = r"head .* is lost: .*; it could not be replaced: .* none came within 5 s"
            with pytest.raises(GenerationInterrupted, match=why) as lost:
                run.result(PATIENCE_S)
            partial = lost.value.partial_ids
            assert partial and partial == pair.greedy[: len(partial)]
