"""What slow networks do to each strategy: emulated stages with emulated distance between them.

And what distance between the cluster and its client does, with the head here or there.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from itertools import product
from statistics import median
from typing import Any, Literal

from distributed import Client

from pipeinfer_dask.bench.comparison import HOP_ROUNDS, TIMEOUT_S, compare
from pipeinfer_dask.bench.limits import judged
from pipeinfer_dask.runtime.emulation.emulation import Emulation, default_processes
from pipeinfer_dask.runtime.emulation.lags import Distance
from pipeinfer_dask.runtime.planning.clusters import own_cluster
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
AWAY_MS = (0.0, 10.0, 50.0)
"""Milliseconds from the client to any worker, one way."""
HEADS: tuple[Literal["client", "worker"], ...] = ("client", "worker")
AWAY_STAGES = 4
AWAY_TOKENS = 72
AWAY_STRATEGIES = ("pipeinfer", "adaptive")
LEAST = {f"{strategy}_share": 0.9 for strategy in AWAY_STRATEGIES}
"""Limits of the report's figures."""
TOKEN_BYTES = 16 << 10


def run_network_bench(
    networks: tuple[tuple[float, float], ...] = NETWORKS,
    away_ms: tuple[float, ...] = AWAY_MS,
    stages: int = 8,
    stage_ms: float = 40.0,
    acceptance: float = 0.79,
    token_cost: float = 0.05,
    tokens: int = 48,
    seed: int = 0,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure each strategy over each network, and simulate it beside.

    Parameters
    ----------
    networks : tuple of (float, float)
        Milliseconds of a hop, and Mbit/s. What the real links take counts as part of a hop:
        where they take longer, ``hop_ms`` says so.
    away_ms : tuple of float
        Milliseconds between the client and the workers, which are close to one another.
    stages : int
    stage_ms, acceptance, token_cost, tokens, seed
        As for `run_paced_bench`.
    rounds : int
        Texts for each client and strategy, of which the middle one counts: on a few busy cores
        one may take a tenth longer.

    Returns
    -------
    dict
        ``{"suite": "network", "rows": [...]}``: as those of the suite ``paced``, and
        ``asked_hop_ms`` and ``bandwidth_mbit`` (None: unlimited). ``hop_ms`` is measured. And
        ``"clients"``: rows of ``away_ms``, ``head`` ("client" or "worker"), the tokens/s of
        `pipeinfer` and `adaptive` on up to 4 stages, from start to result as the client sees
        them, and ``share``, by strategy, of what it gives the first of these clients. And each
        strategy's least share with a head on a worker (``pipeinfer_share``, ``adaptive_share``),
        and whether it is ``within`` its limit.
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
        few = min(stages, AWAY_STAGES)
        clients = _clients(client, away_ms, few, stage_ms, token_cost, acceptance, seed, rounds)
    shares = [row["share"] for row in clients if row["head"] == "worker"]
    least = {f"{s}_share": min((one[s] for one in shares), default=None) for s in AWAY_STRATEGIES}
    report = {"suite": "network", "rows": rows, "clients": clients, **least}
    return judged(report, least=LEAST, most={})


def _clients(
    client: Client,
    away_ms: tuple[float, ...],
    stages: int,
    stage_ms: float,
    token_cost: float,
    acceptance: float,
    seed: int,
    rounds: int,
) -> list[dict[str, Any]]:
    costs = Costs.even(stages, stage_s=stage_ms / 1e3, token_cost=token_cost)
    rows: list[dict[str, Any]] = []
    for ms, head in product(away_ms, HEADS):
        away = Distance(ms / 1e3) if ms else None
        with Emulation.open(
            costs, acceptance=acceptance, seed=seed, client=client, away=away, head=head
        ) as emulation:
            speeds = {
                strategy: median(_seen_by_the_client(emulation, strategy) for _ in range(rounds))
                for strategy in AWAY_STRATEGIES
            }
        first = rows[0] if rows else speeds
        about = {"away_ms": ms, "head": head, "stages": stages, "stage_ms": stage_ms}
        share = {strategy: speed / first[strategy] for strategy, speed in speeds.items()}
        rows.append({**about, **speeds, "share": share})
    return rows


def _seen_by_the_client(emulation: Emulation, strategy: str) -> float:
    began = time.monotonic()
    result = emulation.generate(
        strategy, max_new_tokens=AWAY_TOKENS, prompt_tokens=1, timeout=TIMEOUT_S
    )
    took = time.monotonic() - began
    if result.token_ids != emulation.text(AWAY_TOKENS, 1):
        raise RuntimeError(
            f"{strategy} generated another text than the emulated target's: this is a bug in "
            f"pipeinfer_dask, please report it"
        )
    return AWAY_TOKENS / took
