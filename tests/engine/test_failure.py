"""What breaks in mid-run is told by name, along with the text so far."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.drafting.ngram import NgramDraft
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.stage import HiddenStates, StageOutput
from pipeinfer_dask.protocol.messages import Batch, DrafterLost, Finish, Kind, StartRun
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.head.text import DecodedText
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.nodes.compute import StageThread
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.engine.pairs import PROMPT, Pair
from tests.engine.test_leaks import PATIENCE_S, until_empty

LONG = 480


@pytest.fixture(params=["in-process", pytest.param("inproc", marks=pytest.mark.cluster)])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "in-process":
        return {"in_process": True}
    return {"client": request.getfixturevalue("inproc_client")}


def break_after(calls: int, monkeypatch: pytest.MonkeyPatch, method: str, last: int) -> None:
    """Have a method of the shards that end at layer ``last`` fail after so many calls."""
    original = getattr(Shard, method)
    count = itertools.count()

    def breaking(shard: Shard, *arguments: Any, **options: Any) -> Any:
        if shard.layers.stop == last and next(count) >= calls:
            raise ArithmeticError("numbers ran out")
        return original(shard, *arguments, **options)

    monkeypatch.setattr(Shard, method, breaking)


def test_a_stage_that_breaks_ends_the_generation_and_is_named(
    pair: Pair, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = "stage 1"
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, **where) as engine:
        break_after(20, monkeypatch, "run", last=4)
        run = engine.start(PROMPT, max_new_tokens=200, strategy="speculative")
        queued = engine.start(PROMPT, max_new_tokens=200)
        with pytest.raises(GenerationInterrupted, match=rf"{node} .*numbers ran out") as caught:
            run.result()
        partial = caught.value.partial_ids
        assert 0 < len(partial) < 200
        assert partial == pair.greedy[: len(partial)]
        assert caught.value.partial == run.text
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(GenerationInterrupted, match=node):
            queued.result()
        with pytest.raises(
            EngineClosedError, match=rf"the pipeline is lost \(.*{node}.*open another"
        ):
            engine.start(PROMPT)


def test_a_draft_model_that_breaks_costs_no_text_and_is_named_once(
    pair: Pair,
    where: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, **where) as engine:
        break_after(20, monkeypatch, "candidates", last=1)
        run = engine.start(PROMPT, max_new_tokens=200, strategy="speculative")
        queued = engine.start(PROMPT, max_new_tokens=200)
        assert run.result().token_ids == pair.greedy
        assert queued.result().token_ids == pair.greedy
        losses = [what for _, what in run.trace if isinstance(what, DrafterLost)]
        assert len(losses) == 1
        assert re.search(r"drafter .*numbers ran out", losses[0].reason)
        assert run.trace.metrics().drafted_tokens > 0
        later = engine.generate(PROMPT, max_new_tokens=20, strategy="pipeinfer")
        assert later.token_ids == pair.greedy[:20]
        assert later.metrics.drafted_tokens == 0
        assert engine.measure_costs().draft.seconds == (0.0,) * 8
    assert caplog.text.count("pipeinfer goes on without drafts") == 1


@pytest.mark.parametrize("method", ["run", "candidates"])
def test_what_hangs_in_this_process_keeps_nobody_waiting(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original, count, go = getattr(Shard, method), itertools.count(), Event()

    def hanging(shard: Shard, *arguments: Any, **options: Any) -> Any:
        if shard.layers.start == 0 and next(count) == 20:
            go.wait(PATIENCE_S)
        return original(shard, *arguments, **options)

    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, in_process=True, node_timeout=2
    ) as engine:
        monkeypatch.setattr(Shard, method, hanging)
        run = engine.start(PROMPT, max_new_tokens=200, strategy="speculative")
        if method == "run":
            with pytest.raises(
                GenerationInterrupted, match="stage 0 failed: its computing has not moved for 2 s"
            ) as caught:
                run.result(PATIENCE_S)
            partial = caught.value.partial_ids
            assert partial == pair.greedy[: len(partial)]
        else:
            assert run.result(PATIENCE_S).token_ids == pair.greedy[:200]
            (lost,) = (what for _, what in run.trace if isinstance(what, DrafterLost))
            assert "its computing has not moved for 2 s" in lost.reason
        go.set()


def test_a_lookup_that_breaks_costs_no_text(
    pair: Pair, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*_: Any, **__: Any) -> None:
        raise ArithmeticError("numbers ran out")

    with pi.Engine.from_pretrained(pair.target, "ngram", stages=2, **where) as engine:
        monkeypatch.setattr(NgramDraft, "candidates", breaking)
        result = engine.generate(PROMPT, max_new_tokens=100, strategy="speculative")
    assert result.token_ids == pair.greedy[:100]
    assert [type(what) for _, what in result.trace].count(DrafterLost) == 1


def test_a_text_whose_end_can_not_be_written_fails_with_its_tokens(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(_: DecodedText) -> str:
        raise ArithmeticError("letters ran out")

    with pi.Engine.from_pretrained(pair.target, stages=2, in_process=True) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(DecodedText, "flush", breaking)
            run = engine.start(PROMPT, max_new_tokens=5)
            with pytest.raises(GenerationInterrupted, match="letters ran out") as caught:
                run.result(60)
        assert caught.value.partial_ids == pair.greedy[:5]
        assert engine.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]


def test_a_stage_that_is_closed_in_mid_run_does_not_pass_it_off_as_cancelled() -> None:
    begun = Event()
    delivered: list[RunPass] = []
    failures: list[Exception] = []

    class Busy:
        def run(
            self,
            batch: Batch,
            hidden: HiddenStates | None,
            *,
            picks: int,
            stopped: Callable[[], bool],
            sampling: Sampling | None = None,
            cache: int = 0,
        ) -> StageOutput:
            begun.set()
            pause = Event()
            while not stopped():
                pause.wait(0.001)
            return StageOutput(None, None, 1)

        def release(self, cache: int) -> None:
            pass

    stage = StageThread(Busy, deliver=delivered.append, failed=failures.append, name="busy")
    stage.submit(RunPass(StartRun(1, 0, 0, Kind.SINGLE, Batch((1,), (0,), (0,), (-1,)), 1)))
    assert begun.wait(10)
    stage.close()
    assert delivered == []
    assert failures == []


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"in_process": True}, id="in-process"),
        pytest.param({"head": "client"}, id="client", marks=pytest.mark.cluster),
        pytest.param({"head": "worker"}, id="worker", marks=pytest.mark.cluster),
    ],
)
def test_a_text_that_is_whole_is_given_though_what_is_still_in_flight_is_lost(
    pair: Pair,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    ended = Event()

    def hanging(*_: Any, **__: Any) -> None:
        ended.wait(PATIENCE_S)

    if "head" in options:
        options = options | {"client": request.getfixturevalue("inproc_client")}
    with (
        pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, **options) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        monkeypatch.setattr(Shard, "candidates", hanging)
        run = engine.start(PROMPT, max_new_tokens=20, strategy="pipeinfer")
        waiting = pool.submit(run.result, PATIENCE_S)
        waiting.add_done_callback(lambda _: ended.set())
        until_empty(lambda: {} if len(run.token_ids) == 20 else {"tokens": len(run.token_ids)})
        assert not run.done()
        engine.close()
        result = waiting.result()
    assert (result.token_ids, result.finish_reason) == (pair.greedy[:20], "length")
    assert isinstance(result.trace.records[-1][1], Finish)


@pytest.mark.cluster
def test_where_no_recovery_is_wanted_a_killed_worker_ends_the_generation_and_is_named(
    pair: Pair,
) -> None:
    with ExitStack() as resources:
        client: Client = own_cluster(2, resources)
        with pi.Engine.from_pretrained(
            pair.target, client=client, stages=2, max_recoveries=0
        ) as engine:
            run = engine.start(PROMPT, max_new_tokens=LONG)
            next(iter(run))
            address, process = list(client.run(os.getpid).items())[1]
            os.kill(process, signal.SIGKILL)
            with pytest.raises(GenerationInterrupted, match=rf"stage 1 .*{address}") as caught:
                run.result()
            partial = caught.value.partial_ids[: len(pair.greedy)]
            assert partial
            assert partial == pair.greedy[: len(partial)]
            with pytest.raises(EngineClosedError, match="the pipeline is lost"):
                engine.start(PROMPT)
