"""What the strategies do on real links between emulated stages, and whether the simulator knows.

The stages only wait, in real worker processes; links, threads and the head are the real
ones. So a few cores run many nodes.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any

from pipeinfer_dask.bench.comparison import TIMEOUT_S, compare
from pipeinfer_dask.runtime.emulation.emulation import Emulation, default_processes
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from pipeinfer_dask.simulation import Costs


def run_paced_bench(
    stages: tuple[int, ...] = (4, 8, 16),
    stage_ms: tuple[float, ...] = (40.0, 80.0),
    acceptances: tuple[float, ...] = (0.79,),
    token_costs: tuple[float, ...] = (0.05,),
    tokens: int = 72,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure each strategy on emulated stages, and simulate it with the hops measured.

    Parameters
    ----------
    stages : tuple of int
        Lengths of the pipeline.
    stage_ms : tuple of float
        Milliseconds of one token on one stage; a pass of the draft model takes 0.15 of it.
    acceptances : tuple of float
    token_costs : tuple of float
        What each further token of a run adds, as a share.
    tokens : int
    seed : int

    Returns
    -------
    dict
        ``{"suite": "paced", "rows": [{"stages", "acceptance", "token_cost", "stage_ms",
        "hop_ms", "iterative", "speculative", "pipeinfer", "adaptive", "simulated",
        "deviation", "ratio_deviation", "settings", "tokens", "emulated"}]}``: tokens/s;
        see `pipeinfer_dask.bench.comparison.compare`.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as resources:
        client = own_cluster(default_processes(max(stages)), resources)
        for count, acceptance, token_cost, ms in product(
            stages, acceptances, token_costs, stage_ms
        ):
            costs = Costs.even(count, stage_s=ms / 1e3, token_cost=token_cost)
            with Emulation.open(
                costs, acceptance=acceptance, seed=seed, client=client
            ) as emulation:
                row = compare(emulation, tokens=tokens, timeout=TIMEOUT_S)
            rows.append(
                {
                    "stages": count,
                    "acceptance": acceptance,
                    "token_cost": token_cost,
                    "stage_ms": ms,
                    **row,
                }
            )
    return {"suite": "paced", "rows": rows}
