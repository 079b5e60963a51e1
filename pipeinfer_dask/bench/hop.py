"""What a hop from stage to stage costs, beside the same chain over bare sockets.

Stages that compute nothing, in real worker processes, behind the real compute threads
and links. One run at a time goes through the chain, by turns with one message through
a chain of bare relays, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

from pipeinfer_dask.bench.floor import Floor
from pipeinfer_dask.models.stage import CountBytes, HiddenStates, Intake, StageOutput
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch, Event, Kind, RunDone, StartRun
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline

HIDDEN_SIZE = 2048
"""8 KiB a token: a payload is a run of one token or more through a model of this width."""
INTAKE = Intake(tokens=1 << 16, width=HIDDEN_SIZE)


class PassingStage:
    """Hands its input on."""

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
        """Return ``hidden``."""
        return StageOutput(hidden, None, 0)

    def release(self, cache: int) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class PassingSpec:
    """Makes a `PassingStage`."""

    name: str = "passes on"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> PassingStage:
        """Return the stage."""
        return PassingStage()


def run_hop_bench(
    stages: tuple[int, ...] = (4, 8),
    payloads: tuple[int, ...] = (8 << 10, 32 << 10, 1 << 20),
    runs: int = 300,
) -> dict[str, Any]:
    """Measure a hop over links and over bare sockets.

    Parameters
    ----------
    stages : tuple of int
        Lengths of the chain.
    payloads : tuple of int
        Bytes of hidden states in a run.
    runs : int
        Runs for each figure, one at a time.

    Returns
    -------
    dict
        ``{"suite": "hop", "rows": [{"stages", "payload_bytes", "hop_ms_p50",
        "floor_ms_p50", "ratio"}]}``: medians of the time through the whole chain, there
        and back to the client, divided by its hops, in milliseconds.
    """
    return asyncio.run(_run(stages, payloads, runs))


async def _run(stages: tuple[int, ...], payloads: tuple[int, ...], runs: int) -> dict[str, Any]:
    async with (
        LocalCluster(
            n_workers=max(stages),
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        workers = list(cluster.scheduler.workers)
        rows = []
        for count in stages:
            async with AsyncExitStack() as resources:
                floor = await Floor.open(count)
                resources.push_async_callback(floor.close)
                pipeline = await Ring.open(client, [PassingSpec()] * count, workers[:count])
                resources.push_async_callback(pipeline.close)
                chain = Chain(pipeline)
                rows.extend([await _measure(chain, floor, count, size, runs) for size in payloads])
    return {"suite": "hop", "rows": rows}


class Ring(DaskPipeline):
    """A pipeline whose last stage hands on what it gets, too."""

    output_intake = INTAKE


class Chain:
    """Passes one run at a time through a pipeline."""

    def __init__(self, pipeline: DaskPipeline) -> None:
        self._pipeline = pipeline
        self._runs = 0
        self._done: asyncio.Future[None]
        pipeline.listen(self._report, self._lost)

    async def pass_on(self, hidden: HiddenStates) -> None:
        """Send a run with these hidden states through all stages."""
        self._runs += 1
        self._done = asyncio.get_running_loop().create_future()
        slots = tuple(range(len(hidden)))
        batch = Batch(slots, slots, slots, (NO_PARENT, *slots[:-1]))
        run = StartRun(0, 0, self._runs, Kind.SPECULATIVE, batch, 1)
        self._pipeline.feed(RunPass(run, hidden))
        await self._done

    def _report(self, event: Event) -> None:
        if isinstance(event, RunDone):
            self._done.set_result(None)

    def _lost(self, error: Exception) -> None:
        if not self._done.done():  # an interrupt has cancelled it
            self._done.set_exception(error)


async def _measure(
    chain: Chain, floor: Floor, stages: int, payload: int, runs: int
) -> dict[str, Any]:
    hidden = np.ones((payload // (4 * HIDDEN_SIZE), HIDDEN_SIZE), np.float32)
    message = hidden.tobytes()
    ours, theirs = [], []
    for number in range(runs + 20):
        began = time.perf_counter()
        await chain.pass_on(hidden)
        between = time.perf_counter()
        await floor.pass_on(message)
        ended = time.perf_counter()
        if number >= 20:  # both are warm
            ours.append(between - began)
            theirs.append(ended - between)
    hop, least = (1e3 * statistics.median(times) / (stages + 1) for times in (ours, theirs))
    return {
        "stages": stages,
        "payload_bytes": hidden.nbytes,
        "hop_ms_p50": round(hop, 4),
        "floor_ms_p50": round(least, 4),
        "ratio": round(hop / least, 3),
    }
