"""How long the machine takes for an event while many drafted tokens are in flight."""

from __future__ import annotations

import statistics
import time
from typing import Any

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.messages import (
    Begin,
    CancelDraft,
    Command,
    Drafted,
    Event,
    Proposal,
    RunDone,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.core.policies import PipeInfer
from pipeinfer_dask.core.request import Request

NEW_TOKENS = 2000


def run_head_bench(live_nodes: tuple[int, ...] = (10, 100, 300)) -> dict[str, Any]:
    """Measure `Machine.handle`.

    Parameters
    ----------
    live_nodes : tuple of int
        Sizes of the token tree to measure at.

    Returns
    -------
    dict
        ``{"suite": "head", "rows": [{"live_nodes", "events", "event_us_p50", "event_us_p99"}]}``:
        microseconds an event.
    """
    return {"suite": "head", "rows": [_measure(count) for count in live_nodes]}


def _measure(live: int) -> dict[str, Any]:
    """Let a pipeline hold back its results until ``live`` drafted tokens are in flight."""
    policy = PipeInfer(micro_batch=4, cutoff=0.0, recovery=0.0, sequences=2, split=0.4)
    request = Request(0, tuple(range(16)), NEW_TOKENS, 16 + NEW_TOKENS + 2 * live + 64)
    machine = Machine(request, policy)
    runs: list[StartRun] = []
    events: list[Event] = [Begin(0)]
    times: list[float] = []
    finished = False
    while not finished:
        if not events:
            events.append(_result(runs.pop(0)))
        began = time.perf_counter()
        commands = machine.handle(events.pop(0))
        elapsed = time.perf_counter() - began
        size = sum(1 for _ in machine.tree.speculation())
        if 0.8 * live <= size <= 1.2 * live:
            times.append(elapsed * 1e6)
        for command in commands:
            finished = finished or machine.finished is not None
            events.extend(_answer(command, runs))
        while runs and size > live:
            events.append(_result(runs.pop(0)))
            size -= 4
    return {
        "live_nodes": live,
        "events": len(times),
        "event_us_p50": statistics.median(times),
        "event_us_p99": statistics.quantiles(times, n=100)[98],
    }


def _answer(command: Command, runs: list[StartRun]) -> list[Event]:
    match command:
        case StartRun():
            runs.append(command)
            return [RunTaken(0, 0, command.run)]
        case StartDraft():
            batch, slots = command.batch, command.slots
            parent, proposals = batch.slots[-1], []
            for slot in slots:
                proposals.append(Proposal(1, parent, slot, 0.9))
                parent = slot
            return [Drafted(0, 0, command.draft, tuple(proposals), (*batch.slots, *slots[:-1]))]
        case CancelDraft():
            raise AssertionError("nothing is cancelled before the end")
        case _:
            return []


def _result(run: StartRun) -> RunDone:
    """Return the result of a target that always agrees with the draft."""
    return RunDone(0, 0, run.run, (1,) * run.picks)
