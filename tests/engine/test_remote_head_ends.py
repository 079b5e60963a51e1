"""A head on a worker opens and ends: nothing is left, and what is lost is named."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest
from distributed import Client, Worker

import pipeinfer_dask as pi
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.protocol.messages import StageLost
from pipeinfer_dask.runtime.head.head_actor import HeadNode
from pipeinfer_dask.runtime.links.wire import (
    Close,
    Message,
    Recorded,
    RequestEnded,
    RequestStatus,
)
from pipeinfer_dask.runtime.nodes.loading import Loading
from pipeinfer_dask.runtime.pipeline.assembled import CLOSE_TIMEOUT_S
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.engine.test_failure import break_after
from tests.engine.test_leaks import (
    threads_of_engines,
    until_empty,
    wait_until_workers_hold_nothing,
)

pytestmark = pytest.mark.cluster

LONG = 480


def test_each_node_tells_of_its_loading_and_nothing_is_left_at_the_end(
    pair: Pair, inproc_client: Client
) -> None:
    told: list[Loading] = []
    for draft in (pair.draft, "ngram"):
        with pi.Engine.from_pretrained(
            pair.target, draft, stages=2, client=inproc_client, head="worker", progress=told.append
        ) as engine:
            assert engine.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]
        workers = set(inproc_client.scheduler_info()["workers"])
        stand = {step.node: step.where for step in told if step.stands}
        assert len(stand) == 3
        assert set(stand.values()) <= workers
        told.clear()
        wait_until_workers_hold_nothing(inproc_client)


def heads(dask_worker: Worker) -> int:
    actors: list[Any] = list(dask_worker.state.actors.values())
    return sum(isinstance(actor._node, HeadNode) for actor in actors)


def test_the_head_is_where_it_was_asked_for_and_is_named_when_it_is_lost(pair: Pair) -> None:
    with ExitStack() as resources:
        client = own_cluster(2, resources)
        workers = client.scheduler_info()["workers"]
        stage, other = workers
        with pi.Engine.from_pretrained(
            pair.target, client=client, stages=1, head=other, max_recoveries=0
        ) as engine:
            assert client.run(heads) == {stage: 0, other: 1}
            place = f"127.0.0.1, worker {workers[other]['name']}"
            assert f"<td>head</td><td>{place}</td>" in engine._repr_html_()
            run = engine.start(PROMPT, max_new_tokens=LONG)
            next(iter(run))
            os.kill(client.run(os.getpid)[other], signal.SIGKILL)
            told = rf"head \(of 1 stages\) on worker {other} is lost: .* open another engine"
            with pytest.raises(GenerationInterrupted, match=told) as caught:
                run.result()
            partial = caught.value.partial_ids[: len(pair.greedy)]
            assert partial and partial == pair.greedy[: len(partial)]
            with pytest.raises(EngineClosedError, match="open another one"):
                engine.start(PROMPT)
        with pi.Engine.from_pretrained(pair.target, client=client, stages=1) as again:
            rest = again.generate([*PROMPT, *partial], max_new_tokens=5)
        assert rest.token_ids == pair.greedy[len(partial) : len(partial) + 5]


def test_what_breaks_in_the_pipeline_is_named_through_the_head(
    pair: Pair, inproc_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, client=inproc_client, head="worker"
    ) as engine:
        break_after(20, monkeypatch, "run", 4)
        running = engine.start(PROMPT, max_new_tokens=200, strategy="speculative")
        with pytest.raises(GenerationInterrupted, match=r"stage 1 .*numbers ran out") as caught:
            running.result()
        partial = caught.value.partial_ids
        assert partial == pair.greedy[: len(partial)] and len(partial) > 0
    wait_until_workers_hold_nothing(inproc_client)


def say(message: Message, dask_worker: Worker) -> None:
    """Have a head on this worker say something to its client."""
    actors: list[Any] = list(dask_worker.state.actors.values())
    for actor in actors:
        if isinstance(actor._node, HeadNode):
            actor._node._tell(message)


@pytest.mark.parametrize(
    "message",
    [RequestStatus(0, "asleep", 0), Recorded(0, ("no entry",)), Close()],
    ids=["a status that is none", "an entry that is none", "what clients say"],
)
def test_a_head_that_talks_nonsense_is_replaced_and_the_text_goes_on(
    pair: Pair, inproc_client: Client, message: Message
) -> None:
    with pi.Engine.from_pretrained(
        pair.target, stages=1, client=inproc_client, head="worker"
    ) as engine:
        run = engine.start(PROMPT, max_new_tokens=LONG)
        next(iter(run))
        # Nobody has asked for this one.
        inproc_client.run(say, RequestEnded(7, "length", False))
        inproc_client.run(say, message)
        result = run.result(60)
        (loss,) = (what for _, what in result.trace if isinstance(what, StageLost))
        assert re.match(r"head .* is lost: .*[Ee]xpect", loss.reason)
        assert result.token_ids[:200] == pair.greedy
    until_empty(lambda: {"threads": left} if (left := threads_of_engines()) else {})


def test_where_no_recovery_is_wanted_nobody_waits_for_a_head_that_hangs(pair: Pair) -> None:
    with ExitStack() as resources:
        client = own_cluster(2, resources)
        _, other = client.scheduler_info()["workers"]
        engine = pi.Engine.from_pretrained(
            pair.target, client=client, stages=1, head=other, node_timeout=3.0, max_recoveries=0
        )
        run = engine.start(PROMPT, max_new_tokens=LONG)
        next(iter(run))
        process = client.run(os.getpid)[other]
        os.kill(process, signal.SIGSTOP)
        try:
            told = rf"head \(of 1 stages\) on worker {other} is lost: gave no sign of life for 3 s"
            with pytest.raises(GenerationInterrupted, match=told) as caught:
                run.result(60)
            partial = caught.value.partial_ids[: len(pair.greedy)]
            assert partial and partial == pair.greedy[: len(partial)]
            closing = Thread(target=engine.close)
            closing.start()
            closing.join(CLOSE_TIMEOUT_S)  # for so long a link is kept that nobody answers on
            assert not closing.is_alive()
        finally:
            os.kill(process, signal.SIGCONT)
        wait_until_workers_hold_nothing(client)
