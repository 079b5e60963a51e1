"""Several generations on one engine: each text is what it is alone, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.engine import GenerationInterrupted
from pipeinfer_dask.policies import Adaptive, PipeInfer
from pipeinfer_dask.protocol.messages import Release, RunDone, StartRun
from pipeinfer_dask.runtime.links.runs import RunPass
from tests.engine.pairs import PROMPT, Pair, greedy_tokens

LONG = 480
"""New tokens that no test waits for."""
PROMPTS = [PROMPT, list(b"for index in range"), list(b"x = [1, 2"), list(b"import os, sys")]


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def texts(pair: Pair) -> list[list[int]]:
    return [greedy_tokens(pair.target, prompt, 60) for prompt in PROMPTS]


def check(engine: pi.Engine, texts: list[list[int]], **options: Any) -> list[pi.Generation]:
    """Generate all at once and compare."""
    running = [engine.start(prompt, max_new_tokens=60, **options) for prompt in PROMPTS]
    assert [run.result(120).token_ids for run in running] == texts
    return running


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_texts_that_are_generated_at_once_are_those_of_each_alone(
    engine: pi.Engine, texts: list[list[int]], strategy: str
) -> None:
    running = check(engine, texts, strategy=strategy)
    # All were in the pipeline together, and each trace is of its own runs.
    began = [run.trace.records[0][0] for run in running]
    ended = [run.trace.records[-1][0] for run in running]
    assert max(began) < min(ended)
    for run in running:
        started = {what.run for _, what in run.trace.records if isinstance(what, StartRun)}
        done = {what.run for _, what in run.trace.records if isinstance(what, RunDone)}
        assert started == done
        assert run.result().metrics.generated_tokens == 60


def test_strategies_and_settings_may_differ(engine: pi.Engine, texts: list[list[int]]) -> None:
    sampled = engine.generate(PROMPTS[0], max_new_tokens=40, temperature=0.9, seed=5).token_ids
    greedy = engine.start(PROMPTS[1], max_new_tokens=60, strategy="pipeinfer")
    again = engine.start(PROMPTS[0], max_new_tokens=40, temperature=0.9, seed=5)
    plain = engine.start(PROMPTS[2], max_new_tokens=60, strategy="iterative")
    assert again.result(120).token_ids == sampled
    assert greedy.result(120).token_ids == texts[1]
    assert plain.result(120).token_ids == texts[2]


def test_whoever_is_cancelled_does_not_disturb_the_others(
    engine: pi.Engine, texts: list[list[int]]
) -> None:
    others = [engine.start(prompt, max_new_tokens=60) for prompt in PROMPTS[1:]]
    cancelled = engine.start(PROMPT, max_new_tokens=LONG)
    next(iter(cancelled))
    cancelled.cancel()
    assert cancelled.result(120).finish_reason == "stopped"
    assert [run.result(120).token_ids for run in others] == texts[1:]


def test_those_that_wait_know_their_place(pair: Pair) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, in_process=True, max_concurrent=2
    ) as engine:
        first, second = (engine.start(PROMPT, max_new_tokens=LONG) for _ in range(2))
        third, fourth = (engine.start(PROMPT, max_new_tokens=20) for _ in range(2))
        next(iter(first))
        next(iter(second))
        assert (first.status, second.status) == ("running", "running")
        assert (third.status, third.position) == ("queued", 1)
        assert (fourth.status, fourth.position) == ("queued", 2)
        third.cancel()
        third.result(120)
        first.cancel()
        assert fourth.result(120).token_ids == pair.greedy[:20]
        assert fourth.position is None
        second.cancel()


def test_a_place_in_the_queue_is_known_before_the_head_has_looked(pair: Pair) -> None:
    with pi.Engine.from_pretrained(
        pair.target, stages=2, in_process=True, max_concurrent=2
    ) as engine:
        assert engine.generate(PROMPT, max_new_tokens=1).token_ids == pair.greedy[:1]
        may_look = threading.Event()
        engine._head.loop.call_soon_threadsafe(may_look.wait, 60)
        try:
            started = [engine.start(PROMPT, max_new_tokens=20) for _ in range(4)]
            assert [one.position for one in started] == [None, None, 1, 2]
        finally:
            may_look.set()
        for one in started:
            assert one.result(120).token_ids == pair.greedy[:20]
            assert one.position is None


def test_a_policy_that_fails_fails_its_own_generation_alone(
    engine: pi.Engine, texts: list[list[int]]
) -> None:
    class Failing(Adaptive):
        def choose_run(self, machine: Machine) -> Any:
            if machine.generated > 20:
                raise ZeroDivisionError("a policy's own mistake")
            return super().choose_run(machine)

    others = [engine.start(prompt, max_new_tokens=60) for prompt in PROMPTS[1:]]
    failing = engine.start(PROMPT, max_new_tokens=60, strategy=Failing())
    with pytest.raises(GenerationInterrupted, match="in choose_run: ZeroDivisionError: a pol"):
        failing.result(120)
    assert [run.result(120).token_ids for run in others] == texts[1:]
    check(engine, texts)


def test_a_policy_that_fails_alone_leaves_nothing_behind(
    engine: pi.Engine, texts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Adaptive):
        def choose_run(self, machine: Machine) -> Any:
            raise ZeroDivisionError("a policy's own mistake")

    with pytest.raises(GenerationInterrupted, match="in choose_run: ZeroDivisionError: a pol"):
        engine.generate(PROMPT, max_new_tokens=60, strategy=Failing())
    check(engine, texts)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_the_cache_of_a_request_that_fails_is_free_once_its_runs_are_out() -> None:
    """A run behind the release would make the cache anew, and nobody would let go of it."""

    class Failing(PipeInfer):
        def taken(self, machine: Machine, run: RunFuture) -> None:
            if machine.generated > 5:
                raise ZeroDivisionError("while the first stage is at work on a run")

    costs = pi.Costs.even(2, stage_s=0.02)
    with pi.Emulation.open(costs, in_process=True, max_concurrent=1) as emulation:
        pipeline = emulation._head.pipeline  # type: ignore[attr-defined]
        last = pipeline._threads[-1]
        came: list[Any] = []
        submit = last.submit

        def note(job: Any) -> None:
            came.append(job)
            submit(job)

        last.submit = note
        failing = emulation.start(Failing(), max_new_tokens=60)
        after = emulation.start("iterative", max_new_tokens=3)
        with pytest.raises(GenerationInterrupted, match="while the first stage is at work"):
            failing.result(60)
        assert after.result(60).token_ids == emulation.text(3)
        releases = [isinstance(job, Release) for job in came if of(job) == failing.request.id]
        assert len(releases) > 2 and releases == [False] * (len(releases) - 1) + [True]


def of(job: Release | RunPass) -> int:
    return job.request if isinstance(job, Release) else job.run.request


class Idle(Adaptive):
    """Has nothing to do, once there is some text."""

    name: ClassVar[str] = "idle"

    def choose_run(self, machine: Machine) -> Any:
        return super().choose_run(machine) if machine.generated < 20 else []

    def choose_draft(self, machine: Machine) -> Any:
        return super().choose_draft(machine) if machine.generated < 20 else None

    def wake_at(self, machine: Machine) -> float | None:
        return None


class Overdue(Idle):
    """Asks to be woken at a time that has passed."""

    def wake_at(self, machine: Machine) -> float | None:
        return 0.0


@pytest.mark.parametrize("kind", [Idle, Overdue])
@pytest.mark.parametrize("alone", [True, False])
def test_a_policy_that_waits_for_nothing_fails_its_own_generation_alone(
    engine: pi.Engine, texts: list[list[int]], alone: bool, kind: type[Idle]
) -> None:
    others = [] if alone else [engine.start(prompt, max_new_tokens=60) for prompt in PROMPTS[1:]]
    idle = engine.start(PROMPT, max_new_tokens=60, strategy=kind())
    with pytest.raises(GenerationInterrupted, match="'idle' planned nothing") as caught:
        idle.result(120)
    assert 20 <= len(caught.value.partial_ids) < 60
    assert caught.value.partial_ids == texts[0][: len(caught.value.partial_ids)]
    assert [run.result(120).token_ids for run in others] == texts[1:][: len(others)]
    check(engine, texts)


@pytest.mark.parametrize("many", [0, -1, 1.5, True, "4"])
def test_a_number_of_generations_that_is_none_is_refused(pair: Pair, many: Any) -> None:
    with pytest.raises(ValueError, match="expected max_concurrent as a whole number"):
        pi.Engine.from_pretrained(pair.target, in_process=True, max_concurrent=many)


def test_caches_are_no_more_than_generations_that_ran_at_once(pair: Pair) -> None:
    """Stages give what one text is done with to the next."""
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, in_process=True, max_concurrent=3
    ) as engine:
        threads = [t for t in threading.enumerate() if t.name.startswith("pipeinfer-stage")]
        running = [engine.start(PROMPT, max_new_tokens=30) for _ in range(9)]
        for run in running:
            assert run.result(120).token_ids == pair.greedy[:30]
        assert len(threads) >= 2


@pytest.mark.cluster
def test_generations_share_workers(tcp_client: Client, pair: Pair, texts: list[list[int]]) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, client=tcp_client, stages=4) as engine:
        check(engine, texts)
        many = [engine.start(PROMPT, max_new_tokens=40) for _ in range(7)]
        many[5].cancel()
        for run in many:
            result = run.result(120)
            assert result.token_ids == pair.greedy[: len(result.token_ids)]
            assert run is many[5] or len(result.token_ids) == 40


@pytest.mark.cluster
def test_texts_that_follow_one_another_at_once_never_meet_the_nodes_bounds(
    tcp_client: Client, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """Each names a cache of its own, often before a node has heard that the last one is free."""
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, client=tcp_client, stages=3, max_concurrent=1
    ) as engine:
        chat = engine.chat(template="plain")
        for length in (1, 2, 3):
            running = [engine.start(PROMPT, max_new_tokens=length) for _ in range(12)]
            assert [run.result(120).token_ids for run in running] == [pair.greedy[:length]] * 12
            chat.send("on", max_new_tokens=length)
    # No link was ended, so that nothing had to be recovered.
    assert [one.message for one in caplog.records if one.name.startswith("pipeinfer")] == []
