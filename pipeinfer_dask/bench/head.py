"""How long the machine takes for an event, from small trees to huge ones.

The simulator supplies the events: a target that nearly always agrees with its draft, in
pipelines so long that thousands of drafted tokens are in flight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.policies import Policy, make_policy
from pipeinfer_dask.protocol.messages import Command, Event
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.simulation import Costs
from pipeinfer_dask.simulation.truth import SyntheticPair
from pipeinfer_dask.simulation.world import World

SETUPS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("pipeinfer", 4, {"micro_batch": 4}),
    ("pipeinfer", 32, {"micro_batch": 4}),
    ("pipeinfer", 256, {"micro_batch": 16}),
    ("adaptive", 4, {"micro_batch": 4}),
    ("adaptive", 16, {"micro_batch": 8}),
    ("adaptive", 64, {"micro_batch": 16}),
    ("adaptive", 256, {"micro_batch": 16}),
)
"""Strategy, stages and settings of each row."""


def run_head_bench(
    setups: Sequence[tuple[str, int, dict[str, Any]]] = SETUPS, *, tokens: int = 2000
) -> dict[str, Any]:
    """Measure `Machine.handle`.

    Parameters
    ----------
    setups : sequence of (strategy, stages, settings)
    tokens : int
        Length of each text.

    Returns
    -------
    dict
        ``{"suite": "head", "rows": [{"strategy", "stages", "live_nodes", "events",
        "event_us_p50", "event_us_p99"}]}``: microseconds an event, over the events for which at
        least half of the most live nodes (evaluated, or about to be) were in the tree.
    """
    return {
        "suite": "head",
        "rows": [_measure(strategy, stages, knobs, tokens) for strategy, stages, knobs in setups],
    }


class TimedMachine(Machine):
    """Notes for each event how long it took, and how many nodes were live then."""

    def __init__(self, request: Request, policy: Policy) -> None:
        super().__init__(request, policy)
        self.times: list[tuple[int, float]] = []

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Handle an event, and note how long it took."""
        began = time.perf_counter()
        commands = super().handle(event, now)
        took = time.perf_counter() - began
        slots = self.tree.slots
        text = len(self.request.prompt) + self.generated
        self.times.append((slots.capacity - slots.free - text, took * 1e6))
        return commands


def _measure(strategy: str, stages: int, knobs: dict[str, Any], tokens: int) -> dict[str, Any]:
    pair = SyntheticPair(0.995, 0)
    prompt = pair.text(16)
    request = Request(0, prompt, tokens, 16 + tokens + 8192)
    machine = TimedMachine(request, make_policy(strategy, **knobs))
    # Fast hops and drafts: the pipeline is always full.
    costs = Costs.even(stages, stage_s=1.0, token_cost=0.01, draft_cost=0.05, hop_cost=0.001)
    World(request, machine.policy, costs, pair, machine=machine).run()
    most = max(live for live, _ in machine.times)
    times = [took for live, took in machine.times if live >= most / 2]
    return {
        "strategy": strategy,
        "stages": stages,
        "live_nodes": most,
        "events": len(times),
        "event_us_p50": round(statistics.median(times), 1),
        "event_us_p99": round(statistics.quantiles(times, n=100)[98], 1),
    }
