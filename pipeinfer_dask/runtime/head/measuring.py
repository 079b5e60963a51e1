"""What a live pipeline costs: the simulator's cost model, measured with runs of its own.

One run at a time goes through the pipeline, so that what is measured is its parts and not
how they get into each other's way.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pipeinfer_dask.protocol.messages import (
    NO_PARENT,
    Batch,
    Drafted,
    DraftPlan,
    Event,
    Kind,
    RunDone,
    Span,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.simulation.costs import Costs, Curve

if TYPE_CHECKING:
    from pipeinfer_dask.runtime.head.head import Head

TOKENS = 8
"""Runs of up to so many tokens are measured."""
CONTEXT = 16
"""Tokens of the text that they attend to."""
ROUNDS = 5
"""Of each; the median counts. One more round comes first and counts for nothing."""
PATIENCE_S = 120.0
"""Most seconds to wait for one run."""


async def measure_costs(head: Head, request: int, *, drafter: bool, rounds: int = ROUNDS) -> Costs:
    """Measure what each part of an idle pipeline costs. On the head's loop.

    Parameters
    ----------
    head : Head
        Its generations wait meanwhile.
    request : int
        A number that no generation has.
    drafter : bool
        Whether there is a draft model. Without one a pass of it costs nothing.
    rounds : int
        Runs of each size, after one that warms up.

    Returns
    -------
    Costs
        Median seconds of 1 to 8 tokens, on each stage and on the drafter. A hop is what a run
        takes from start to result beyond the stages' own work, by its hops: the hand-over
        between threads is part of it. Links are so given as latency alone.

    Raises
    ------
    PipelineBusyError
        If a generation runs or waits.
    ConnectionError or RuntimeError
        If the pipeline is lost.
    TimeoutError
        If a run does not come back.
    """
    probe = _Probe(head, request)
    with head.lend(probe.hear, probe.fail), probe:
        await probe.run(CONTEXT)
        runs: dict[int, list[tuple[float, tuple[Span, ...]]]] = {}
        passes: dict[int, list[float]] = {}
        if drafter:
            await probe.draft(CONTEXT)
        for number, tokens in itertools.product(range(rounds + 1), range(1, TOKENS + 1)):
            took, spans = await probe.run(tokens, CONTEXT)
            drafted = await probe.draft(tokens, CONTEXT) if drafter else 0.0
            if number:
                runs.setdefault(tokens, []).append((took, spans))
                passes.setdefault(tokens, []).append(drafted)
    stages = tuple(
        Curve(
            tuple(
                statistics.median(_seconds(spans[stage]) for _, spans in runs[tokens])
                for tokens in range(1, TOKENS + 1)
            )
        )
        for stage in range(head.pipeline.stages)
    )
    draft = Curve(tuple(statistics.median(passes[n]) for n in range(1, TOKENS + 1)))
    layers = statistics.mean(span.layers for span in runs[1][0][1])
    return Costs(stages, draft, _hop(runs[1]), layers=max(1, round(layers)))


async def measure_hop(head: Head, request: int, rounds: int) -> float:
    """Return what a hop of an idle pipeline costs, in seconds: see `measure_costs`."""
    probe = _Probe(head, request)
    with head.lend(probe.hear, probe.fail), probe:
        await probe.run(CONTEXT)
        return _hop([await probe.run(1, CONTEXT) for _ in range(rounds)])


def _hop(runs: Sequence[tuple[float, tuple[Span, ...]]]) -> float:
    """Return the median seconds of a hop in runs: (seconds from start to result, spans)."""
    hops = (
        (took - sum(_seconds(span) for span in spans)) / (len(spans) + 1) for took, spans in runs
    )
    return max(0.0, statistics.median(hops))


def _seconds(span: Span) -> float:
    return max(0.0, span.ended - span.began)


class _Probe:
    """Sends one run or draft at a time, and waits for it; its cache is free at the end."""

    def __init__(self, head: Head, request: int) -> None:
        self._head = head
        self._pipeline = head.pipeline
        self._request = request
        self._numbers = itertools.count()
        self._answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._head.drop(self._request, cache=self._request)

    async def run(self, tokens: int, behind: int = 0) -> tuple[float, tuple[Span, ...]]:
        """Run a chain of tokens ``behind`` others; return the seconds and each stage's span."""
        batch = _chain(tokens, behind)
        kind = Kind.SPECULATIVE if behind else Kind.PREFILL
        number = next(self._numbers)
        run = StartRun(
            self._request, self._pipeline.generation, number, kind, batch, 1, cache=self._request
        )
        sent = time.monotonic()
        done = await self._ask(run)
        took = time.monotonic() - sent
        assert isinstance(done, RunDone)
        return took, done.spans

    async def draft(self, tokens: int, behind: int = 0) -> float:
        """Have the draft model evaluate a chain of tokens; return the seconds of the pass."""
        batch = _chain(tokens, behind)
        number, plan = next(self._numbers), DraftPlan(size=0)
        drafted = await self._ask(
            StartDraft(
                self._request,
                self._pipeline.draft_generation,
                number,
                batch,
                1,
                (),
                plan,
                cache=self._request,
            )
        )
        assert isinstance(drafted, Drafted) and drafted.span is not None
        return _seconds(drafted.span)

    def hear(self, event: Event) -> None:
        if isinstance(event, RunDone | Drafted) and not self._answer.done():
            self._answer.set_result(event)

    def fail(self, error: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)

    async def _ask(self, command: StartRun | StartDraft) -> Event:
        if self._answer.done():
            self._answer.result()  # raises if the pipeline is lost
            self._answer = asyncio.get_running_loop().create_future()
        self._head.send(command)
        return await asyncio.wait_for(asyncio.shield(self._answer), PATIENCE_S)


def _chain(tokens: int, behind: int) -> Batch:
    """Return so many tokens in a row, the first of them at place ``behind`` of the text."""
    slots = tuple(range(behind, behind + tokens))
    parents = tuple(slot - 1 if slot else NO_PARENT for slot in slots)
    return Batch((0,) * tokens, slots, slots, parents)
