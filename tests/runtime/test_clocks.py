"""What pings tell of a node's clock, while it drifts and when it is set."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from types import SimpleNamespace

import pytest

from pipeinfer_dask.runtime.nodes import actors, compute
from pipeinfer_dask.runtime.pipeline.clocks import PeerClock
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from tests.runtime.chain import run_of
from tests.runtime.test_dask_pipeline import STAGES, Listener, cluster

HOUR_S = 3600.0
SET_S = 1000.0
"""What the clock of a worker is set ahead by."""


def heard(clock: PeerClock, sent: float, there: float, back: float, ahead: float) -> None:
    """Let a ping travel for so many seconds each way, to a node whose clock is so much ahead."""
    clock.hear(sent, sent + there + ahead, sent + there + back)


def test_of_pings_at_once_the_one_with_the_least_round_trip_is_believed() -> None:
    clock = PeerClock()
    heard(clock, 0.00, 0.004, 0.001, 5.0)
    assert clock.offset == pytest.approx(5.0015)
    heard(clock, 0.01, 0.0001, 0.0001, 5.0)
    heard(clock, 0.02, 0.001, 0.009, 5.0)
    assert clock.offset == pytest.approx(5.0)


@pytest.mark.parametrize("drift", [-4e-5, 4e-5])
def test_a_clock_that_drifts_for_an_hour_is_known_to_a_few_milliseconds(drift: float) -> None:
    luck = random.Random(1)
    clock = PeerClock()
    now, worst = 0.0, 0.0
    for _ in range(50):
        heard(clock, now, 2e-4, 2e-4, drift * now)
        now += 1e-3
    first = clock.offset
    while now < HOUR_S:
        # A node that computes answers late, now and then very late; hardly ever at once.
        there, back = 1.5e-4 + luck.expovariate(1e3), 1.5e-4 + luck.expovariate(5e2)
        heard(clock, now, there, back, drift * now)
        now += 10 / 3
        worst = max(worst, abs(clock.offset - drift * now))
    assert worst < 3e-3
    assert abs(first - drift * now) > 0.1  # what never asking again would have come to


@pytest.mark.parametrize("ahead", [60.0, -60.0])
def test_a_clock_that_was_set_is_believed_anew_however_slow_the_ping(ahead: float) -> None:
    clock = PeerClock()
    heard(clock, 0.0, 1e-4, 1e-4, 3.0)
    heard(clock, 1.0, 0.02, 0.02, 3.0 + ahead)
    assert clock.offset == pytest.approx(3.0 + ahead)


def set_clock(seconds: float) -> None:
    """Have this process's nodes see a clock that is so much ahead."""
    for module in (actors, compute):
        ahead = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
        module.time = ahead  # type: ignore[attr-defined]


@pytest.mark.cluster
def test_work_is_told_in_our_time_also_after_a_workers_clock_was_set() -> None:
    async def main() -> None:
        async with cluster(processes=True, workers=1) as (client, workers):
            await client.run(set_clock, 0.0)  # imports this module, which holds a worker up
            pipeline = await DaskPipeline.open(client, STAGES[-1:], workers, deadline=3.0)
            listener = Listener(pipeline)

            async def told_in_our_time(number: int) -> bool:
                began = time.monotonic()
                pipeline.send(run_of(number, 5))
                (run,) = await listener.done(1)
                (span,) = run.spans
                return began - 0.05 < span.began <= span.ended < time.monotonic() + 0.05

            numbers = itertools.count()
            assert await told_in_our_time(next(numbers))
            await client.run(set_clock, SET_S)
            assert not await told_in_our_time(next(numbers))
            async with asyncio.timeout(20):
                while not await told_in_our_time(next(numbers)):
                    pass
            assert not listener.losses
            await pipeline.close()

    asyncio.run(main())
