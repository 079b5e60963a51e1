"""What slow networks do to each strategy: emulated stages with emulated distance between them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from pipeinfer_dask.bench.comparison import HOP_ROUNDS, compare
from pipeinfer_dask.runtime.clusters import own_cluster
from pipeinfer_dask.runtime.emulation import Emulation, default_processes
from pipeinfer_dask.runtime.lags import Distance
from pipeinfer_dask.simulation import Costs

NETWORKS = (
    (0.1, math.inf),
    (1.0, math.inf),
    (5.0, math.inf),
    (20.0, math.inf),
    (50.0, math.inf),
    (1.0, 1000.0),
    (1.0, 100.0),
)
"""Latency of a hop in milliseconds, and bandwidth in Mbit/s."""
TOKEN_BYTES = 16 << 10
TIMEOUT_S = 600.0


def run_network_bench(
    networks: tuple[tuple[float, float], ...] = NETWORKS,
    stages: int = 8,
    stage_ms: float = 40.0,
    acceptance: float = 0.79,
    token_cost: float = 0.05,
    tokens: int = 48,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure each strategy over each network, and simulate it beside.

    Parameters
    ----------
    networks : tuple of (float, float)
        Milliseconds of a hop, and Mbit/s. What the real links take counts as part of a hop:
        where they take longer, ``hop_ms`` says so.
    stages : int
    stage_ms, acceptance, token_cost, tokens, seed
        As for `run_paced_bench`.

    Returns
    -------
    dict
        ``{"suite": "network", "rows": [...]}``: as those of the suite ``paced``, and
        ``asked_hop_ms`` and ``bandwidth_mbit`` (None: unlimited). ``hop_ms`` is measured.
    """
    costs = Costs.even(
        stages, stage_s=stage_ms / 1e3, token_cost=token_cost, token_bytes=TOKEN_BYTES
    )
    rows: list[dict[str, Any]] = []
    with ExitStack() as resources:
        client = own_cluster(default_processes(stages), resources)

        def opened(costs: Costs, distance: Distance | None) -> Emulation:
            return Emulation.open(
                costs, acceptance=acceptance, seed=seed, client=client, distance=distance
            )

        with opened(costs, None) as near:
            real_s = near.calibrated(HOP_ROUNDS).hop_s
        for hop_ms, mbit in networks:
            distance = Distance(max(0.0, hop_ms / 1e3 - real_s), mbit * 1e6 / 8)
            with opened(costs, distance) as emulation:
                row = compare(emulation, tokens=tokens, timeout=TIMEOUT_S)
            rows.append(
                {
                    "stages": stages,
                    "acceptance": acceptance,
                    "token_cost": token_cost,
                    "stage_ms": stage_ms,
                    "asked_hop_ms": hop_ms,
                    "bandwidth_mbit": None if math.isinf(mbit) else mbit,
                    **row,
                }
            )
    return {"suite": "network", "rows": rows}
