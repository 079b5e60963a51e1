"""A head on a worker gives what a head here gives: texts, traces as they grow, and errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.policies import STRATEGIES, Iterative
from pipeinfer_dask.protocol.messages import Begin, Commit, Kind, RunDone, StartRun
from pipeinfer_dask.runtime.head.head import PipelineBusyError
from pipeinfer_dask.widgets.feed import TABLES, Feed
from tests.engine.pairs import PROMPT, Pair

pytestmark = pytest.mark.cluster

LONG = 480


@pytest.fixture(scope="module")
def engine(pair: Pair, tcp_client: Client) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, client=tcp_client, head="worker", max_concurrent=2
    ) as engine:
        yield engine


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_text_and_its_story_are_those_of_a_head_here(
    engine: pi.Engine, pair: Pair, strategy: str
) -> None:
    result = engine.generate(PROMPT, max_new_tokens=60, strategy=strategy)
    assert result.token_ids == pair.greedy[:60]
    assert result.strategy == strategy and result.finish_reason == "length"
    committed = [what.tokens for _, what in result.trace if isinstance(what, Commit)]
    assert [token for tokens in committed for token in tokens] == pair.greedy[:60]
    runs = {what.run for _, what in result.trace if isinstance(what, StartRun)}
    done = [what.run for _, what in result.trace if isinstance(what, RunDone)]
    assert sorted(done) == sorted(runs) and len(runs) == result.metrics.runs


def test_times_are_on_the_clients_own_clock_and_in_order(engine: pi.Engine) -> None:
    began = time.monotonic()
    result = engine.generate(PROMPT, max_new_tokens=30)
    ended = time.monotonic()
    times = [at for at, _ in result.trace]
    assert times == sorted(times)
    # The clocks of processes on one machine are one; what is measured of it is less exact.
    assert began - 0.05 < times[0] and times[-1] < ended + 0.05
    spans = [span for _, what in result.trace if isinstance(what, RunDone) for span in what.spans]
    assert all(began - 0.05 < span.began <= span.ended < ended + 0.05 for span in spans)


def test_text_and_trace_come_while_the_text_is_generated(engine: pi.Engine, pair: Pair) -> None:
    running = engine.start(PROMPT, max_new_tokens=LONG)
    next(iter(running))
    assert not running.done()
    assert isinstance(running.trace.records[0][1], Begin)
    running.cancel()
    result = running.result(30)
    assert (result.finish_reason, running.status) == ("stopped", "stopped")
    assert 0 < len(result.token_ids) < LONG
    assert result.token_ids == pair.greedy[: len(result.token_ids)]


def test_requests_wait_in_line_and_can_be_stopped_there(engine: pi.Engine, pair: Pair) -> None:
    running = [engine.start(PROMPT, max_new_tokens=LONG) for _ in range(2)]
    waiting = [engine.start(PROMPT, max_new_tokens=8) for _ in range(2)]
    assert [one.position for one in waiting] == [1, 2], "known at once, though the head is far"
    for one in running:
        next(iter(one))
    waiting[0].cancel()
    assert waiting[0].result(30).token_ids == []
    with pytest.raises(PipelineBusyError, match="wait for what runs, or cancel it"):
        engine.measure_costs()
    for one in running:
        one.cancel()
    assert waiting[1].result(30).token_ids == pair.greedy[:8]


def test_stop_strings_end_the_text_where_they_do_here(engine: pi.Engine, pair: Pair) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=40)
    stop = "".join(whole.text[10:12])
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True) as near:
        expected = near.generate(PROMPT, max_new_tokens=40, stop_strings=[stop])
    result = engine.generate(PROMPT, max_new_tokens=40, stop_strings=[stop])
    assert result.finish_reason == expected.finish_reason == "stop_string"
    assert result.token_ids == expected.token_ids


def test_sampled_texts_and_their_logprobs_come_as_they_are(engine: pi.Engine, pair: Pair) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "logprobs": 2, "max_new_tokens": 20}
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True) as near:
        expected = near.generate(PROMPT, strategy="iterative", **options)
    result = engine.generate(PROMPT, strategy="iterative", **options)
    assert result.token_ids == expected.token_ids
    assert result.logprobs is not None and len(result.logprobs) == 20


def test_conversations_keep_their_cache(engine: pi.Engine) -> None:
    def read(result: pi.Result) -> int:
        started = [what for _, what in result.trace if isinstance(what, StartRun)]
        return sum(len(run.batch) for run in started if run.kind is Kind.PREFILL)

    with engine.chat(template="plain") as chat:
        first = chat.send("def main(arguments):", max_new_tokens=8)
        second = chat.send(" more", max_new_tokens=8)
        assert read(first) > read(second) > 0


def test_costs_are_measured_from_the_head_on(engine: pi.Engine, pair: Pair) -> None:
    costs = engine.measure_costs()
    assert len(costs.stages) == 2 and costs.hop_s > 0
    assert engine.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]


@dataclass(slots=True)
class Guarded(Iterative):
    """A policy of one's own that can't travel."""

    lock: Any = field(default_factory=Lock)


def test_a_policy_that_can_not_travel_is_refused(engine: pi.Engine, pair: Pair) -> None:
    with pytest.raises(ValueError, match="expected a policy that can be pickled"):
        engine.generate(PROMPT, max_new_tokens=5, strategy=Guarded())
    assert engine.generate(PROMPT, max_new_tokens=5).token_ids == pair.greedy[:5]


def test_views_that_follow_live_have_the_rows_of_the_whole_trace(engine: pi.Engine) -> None:
    running = engine.start(PROMPT, max_new_tokens=60)
    live = Feed(running)
    assert live.wait(30)
    whole = Feed(running.result(30))
    for name in TABLES:
        assert live.rows(name) == whole.rows(name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "nobody"}, "expected head as 'client' or 'worker' where the engine brings"),
        ({"head": 3}, "expected head as 'client', 'worker' or the address of a worker, got 3"),
        ({"head": "banana", "in_process": True}, "the address of a worker, got 'banana'"),
        ({"head": "worker", "in_process": True}, "in_process=True or head='worker', got both"),
    ],
)
def test_a_head_that_can_not_be_had_is_refused(
    pair: Pair, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        pi.Engine.from_pretrained(pair.target, **options)


def test_a_worker_that_is_not_there_can_hold_no_head(pair: Pair, inproc_client: Client) -> None:
    with pytest.raises(ValueError, match=r"got 'tcp://1\.2\.3\.4:5': this cluster has inproc://"):
        pi.Engine.from_pretrained(pair.target, client=inproc_client, head="tcp://1.2.3.4:5")
