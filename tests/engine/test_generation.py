"""A generation as its caller sees it: text as it comes, results, cancelling, failing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.policies import Iterative
from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace import History
from tests.engine.pairs import PROMPT, Pair, ending_at, greedy_tokens

LONG = 480
"""New tokens that no test waits for."""


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def greedy_text(engine: pi.Engine, pair: Pair) -> str:
    return decoded(engine, pair.greedy)


def decoded(engine: pi.Engine, tokens: list[int]) -> str:
    text = engine.tokenizer.decode(tokens)
    assert isinstance(text, str)
    return text


def test_pieces_come_in_order_and_make_up_the_text(
    engine: pi.Engine, pair: Pair, greedy_text: str
) -> None:
    run = engine.start(PROMPT, max_new_tokens=200)
    pieces = list(run)
    assert len(pieces) > 1
    assert "".join(pieces) == greedy_text == run.result().text == run.text
    assert run.token_ids == run.result().token_ids == pair.greedy
    assert run.status == "finished" and run.done()


def test_the_pieces_can_be_read_again_from_the_start(engine: pi.Engine) -> None:
    run = engine.start(PROMPT, max_new_tokens=20)
    assert list(run) == list(run)


def test_each_token_says_where_it_came_from(engine: pi.Engine) -> None:
    result = engine.generate(PROMPT, max_new_tokens=100, strategy="speculative")
    assert len(result.origins) == 100
    assert set(result.origins) == set(Origin)
    assert result.origins.count(Origin.ACCEPTED) == result.metrics.accepted_tokens
    assert {piece.origin for piece in engine.start(PROMPT, strategy="iterative")} == {Origin.PLAIN}


def test_async_for_gives_the_same_pieces(engine: pi.Engine, greedy_text: str) -> None:
    async def read() -> list[str]:
        return [piece async for piece in engine.start(PROMPT, max_new_tokens=200)]

    assert "".join(asyncio.run(read())) == greedy_text


def test_a_generation_can_be_awaited_more_than_once(engine: pi.Engine, pair: Pair) -> None:
    async def wait() -> tuple[pi.Result, pi.Result]:
        run = engine.start(PROMPT, max_new_tokens=200)
        return await run, await run

    first, second = asyncio.run(wait())
    assert first is second
    assert first.token_ids == pair.greedy


async def _await(run: pi.Generation) -> None:
    await run


async def _read(run: pi.Generation) -> None:
    async for _ in run:
        pass


async def _give_up(run: pi.Generation, waiting: asyncio.Future[Any]) -> None:
    await anext(aiter(run))
    await asyncio.sleep(0)  # who was cancelled before his first step would not have waited
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("wait", [_await, _read])
def test_a_task_that_is_cancelled_while_it_waits_cancels_the_generation(
    engine: pi.Engine, wait: Callable[[pi.Generation], Coroutine[Any, Any, None]]
) -> None:
    async def wait_a_while() -> pi.Result:
        run = engine.start(PROMPT, max_new_tokens=LONG)
        await _give_up(run, asyncio.create_task(wait(run)))
        return await run

    assert asyncio.run(wait_a_while()).finish_reason == "stopped"


def test_a_shielded_wait_that_is_cancelled_leaves_the_generation_running(
    engine: pi.Engine, pair: Pair
) -> None:
    async def wait_a_while() -> pi.Result:
        run = engine.start(PROMPT, max_new_tokens=200)
        await _give_up(run, asyncio.shield(run))
        return await run

    assert asyncio.run(wait_a_while()).token_ids == pair.greedy


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts are heard, also in a process that was started to ignore them, as by ``nohup``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("wait", [pi.Generation.result, list], ids=["result", "for"])
def test_an_interrupt_while_somebody_waits_cancels_the_generation(
    engine: pi.Engine, wait: Callable[[pi.Generation], object]
) -> None:
    run = engine.start(PROMPT, max_new_tokens=LONG)

    def interrupt() -> None:
        for _ in zip(range(20), run, strict=False):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            wait(run)
    assert run.result().finish_reason == "stopped"


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_generate_has_the_text_so_far(pair: Pair) -> None:
    heard = Event()

    class Heard(Iterative):
        def committed(self, machine: Machine, origins: Sequence[Origin]) -> None:
            if machine.generated == 20:
                heard.set()

    def interrupt() -> None:
        heard.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        pi.Engine.from_pretrained(pair.target, stages=2, in_process=True) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            engine.generate(PROMPT, max_new_tokens=LONG, strategy=Heard())
        stopped: pi.Generation = caught.value.generation  # type: ignore[attr-defined]
        result = stopped.result(60)
    assert result.finish_reason == "stopped"
    assert result.token_ids
    tokens = result.token_ids[: len(pair.greedy)]
    assert tokens == pair.greedy[: len(tokens)]


def test_who_leaves_the_loop_leaves_the_generation_running(engine: pi.Engine, pair: Pair) -> None:
    run = engine.start(PROMPT, max_new_tokens=200)
    for _ in run:
        break
    assert run.result().token_ids == pair.greedy


def test_a_reader_whose_loop_has_gone_does_not_disturb_the_generation(
    engine: pi.Engine, pair: Pair
) -> None:
    run = engine.start(PROMPT, max_new_tokens=200)
    pieces = aiter(run)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(pieces))
    loop.close()
    assert run.result().token_ids == pair.greedy


def test_a_wait_that_times_out_leaves_the_generation_running(engine: pi.Engine, pair: Pair) -> None:
    run = engine.start(PROMPT, max_new_tokens=200)
    with pytest.raises(TimeoutError):
        run.result(timeout=0)
    assert run.result().token_ids == pair.greedy


def test_a_prompt_may_be_text(engine: pi.Engine, pair: Pair) -> None:
    tokens = engine.tokenizer("naïve → 日本").input_ids
    expected = greedy_tokens(pair.target, tokens, 50)
    assert engine.generate("naïve → 日本", max_new_tokens=50).token_ids == expected


def test_a_long_prompt_is_read_in_several_chunks(engine: pi.Engine, pair: Pair) -> None:
    prompt = list(b"for index in range(10): print(index)\n" * 9)
    result = engine.generate(prompt, max_new_tokens=20)
    assert result.token_ids == greedy_tokens(pair.target, prompt, 20)


def test_a_text_as_long_as_the_context_is_generated_to_its_end(
    engine: pi.Engine, pair: Pair
) -> None:
    prompt = list(b"x" * 500)
    result = engine.generate(prompt, max_new_tokens=12)
    assert result.token_ids == greedy_tokens(pair.target, prompt, 12)


def test_a_trace_can_be_followed_while_the_generation_goes_on(
    engine: pi.Engine, pair: Pair, greedy_text: str
) -> None:
    run = engine.start(PROMPT, max_new_tokens=200)
    story = History(run.trace)
    for _ in run:  # another thread goes on writing
        story.update()
        assert [token.guess.token for token in story.tokens] == pair.greedy[: len(story.tokens)]
    result = run.result()
    story.update()
    assert result.trace is run.trace
    assert len(story.tokens) == 200 and story.finished == "length"
    assert story.tally.metrics() == result.metrics
    assert "".join(run.trace.pieces) == greedy_text


def test_single_tokens_of_a_trace_have_their_text(engine: pi.Engine, pair: Pair) -> None:
    trace = engine.generate(PROMPT, max_new_tokens=50).trace
    assert [trace.text_of(t) for t in pair.greedy] == [decoded(engine, [t]) for t in pair.greedy]


def test_engines_generations_and_results_show_themselves_in_a_page(engine: pi.Engine) -> None:
    run = engine.start("<script>alert(1)</script>", max_new_tokens=8)
    result = run.result()
    for shown in (engine, run, result, result.trace):
        page = shown._repr_html_()
        assert "<table>" in page and "<script" not in page
    assert "stage 1" in engine._repr_html_()


def test_one_new_token_is_enough(engine: pi.Engine, pair: Pair) -> None:
    for strategy in ("iterative", "speculative", "pipeinfer", "adaptive"):
        result = engine.generate(PROMPT, max_new_tokens=1, strategy=strategy)
        assert result.token_ids == pair.greedy[:1]


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer"])
def test_an_end_token_ends_the_text(pair: Pair, tmp_path: Path, strategy: str) -> None:
    # The first token that comes for the first time only after some others.
    end = next(
        token for n, token in enumerate(pair.greedy) if n > 40 if token not in pair.greedy[:n]
    )
    target = ending_at(shutil.copytree(pair.target, tmp_path / "target"), end)
    with pi.Engine.from_pretrained(target, pair.draft, stages=2, in_process=True) as engine:
        result = engine.generate(PROMPT, max_new_tokens=200, strategy=strategy)
        following = engine.generate(PROMPT, max_new_tokens=20, strategy=strategy)
    assert result.token_ids == pair.greedy[: pair.greedy.index(end) + 1]
    assert result.finish_reason == "end_token"
    assert following.token_ids == pair.greedy[:20]


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer"])
def test_a_cancelled_generation_ends_with_the_text_so_far(
    engine: pi.Engine, pair: Pair, strategy: str
) -> None:
    run = engine.start(PROMPT, max_new_tokens=LONG, strategy=strategy)
    next(iter(run))
    run.cancel()
    result = run.result()
    assert run.status == result.finish_reason == "stopped"
    assert 0 < len(result.token_ids) < LONG
    expected = greedy_tokens(pair.target, PROMPT, len(result.token_ids))
    assert result.token_ids == expected
    assert result.text == decoded(engine, expected)
    run.cancel()  # no effect any more
    assert engine.generate(PROMPT, max_new_tokens=200).token_ids == pair.greedy


@pytest.fixture
def serial(pair: Pair) -> Iterator[pi.Engine]:
    """An engine for one at a time."""
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, in_process=True, max_concurrent=1
    ) as engine:
        yield engine


def test_a_queued_generation_can_be_cancelled(serial: pi.Engine, pair: Pair) -> None:
    engine = serial
    running = engine.start(PROMPT, max_new_tokens=LONG)
    next(iter(running))
    queued = engine.start(PROMPT, max_new_tokens=200)
    third = engine.start(PROMPT, max_new_tokens=200)
    assert queued.status == "queued"
    queued.cancel()
    assert queued.result().token_ids == []
    assert (queued.position, running.position) == (None, None)
    assert queued.result().finish_reason == "stopped"
    assert list(queued) == []
    assert not running.done()
    running.cancel()
    assert third.result().token_ids == pair.greedy


def test_generations_are_served_in_the_order_of_their_start(serial: pi.Engine, pair: Pair) -> None:
    engine = serial
    first = engine.start(PROMPT, max_new_tokens=200)
    second = engine.start(PROMPT, max_new_tokens=200, strategy="speculative")
    next(iter(second))
    assert first.done()
    assert first.result().token_ids == second.result().token_ids == pair.greedy


def test_generations_may_be_started_from_any_thread(engine: pi.Engine, pair: Pair) -> None:
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(engine.generate, PROMPT, max_new_tokens=30) for _ in range(8)]
        for result in waiting:
            assert result.result().token_ids == pair.greedy[:30]


def test_a_generation_that_runs_when_its_engine_is_closed_fails_with_its_text(pair: Pair) -> None:
    engine = pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True)
    running = engine.start(PROMPT, max_new_tokens=LONG)
    queued = engine.start(PROMPT)
    reader = iter(running)
    next(reader)
    engine.close()
    with pytest.raises(GenerationInterrupted, match="the engine was closed meanwhile") as caught:
        running.result()
    partial = caught.value.partial_ids
    assert 0 < len(partial) < LONG
    assert partial == greedy_tokens(pair.target, PROMPT, len(partial))
    assert running.status == queued.status == "failed"
    with pytest.raises(GenerationInterrupted):
        list(reader)
    with pytest.raises(GenerationInterrupted):
        queued.result()

    async def wait() -> None:
        await running

    with pytest.raises(GenerationInterrupted):
        asyncio.run(wait())
    running.cancel()  # no effect any more


def test_a_closed_engine_starts_nothing(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, in_process=True) as engine:
        pass
    with pytest.raises(EngineClosedError, match="this engine is closed: open another one"):
        engine.start(PROMPT)
    engine.close()  # no effect any more
