"""Several requests at once on an emulated pipeline: what they reach together, and how fairly.

The stages only wait, in real worker processes; links, threads and the head are the real ones.
All requests begin at once, each with a text of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from pipeinfer_dask.bench.comparison import HOP_ROUNDS, TIMEOUT_S
from pipeinfer_dask.bench.limits import judged
from pipeinfer_dask.runtime.emulation.emulation import Emulation, default_processes
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from pipeinfer_dask.simulation import Costs, simulate_together
from pipeinfer_dask.trace import Metrics

LEAST, MOST = {"speedup": 1.5}, {"spread": 1.5}
"""Limits of the report's figures."""


def run_load_bench(
    requests: tuple[int, ...] = (1, 2, 4, 8, 16),
    strategies: tuple[str, ...] = ("adaptive",),
    *,
    stages: int = 4,
    stage_ms: float = 50.0,
    acceptance: float = 0.79,
    token_cost: float = 0.05,
    tokens: int = 100,
) -> dict[str, Any]:
    """Measure several requests on one pipeline, and simulate them with the hops measured.

    Parameters
    ----------
    requests : tuple of int
        How many at once.
    strategies : tuple of str
    stages : int
    stage_ms : float
        Milliseconds of one token on one stage; a pass of the draft model takes 0.15 of it.
    acceptance : float
    token_cost : float
        What each further token of a run adds, as a share.
    tokens : int
        Of each text.

    Returns
    -------
    dict
        ``{"suite": "load", "stages", "stage_ms", "acceptance", "token_cost", "tokens", "hop_ms",
        "rows": [{"strategy", "requests", "tokens_per_s", "slowest_tokens_per_s",
        "fastest_tokens_per_s", "spread", "itl_s", "itl_p95_s", "ttft_s", "speedup",
        "simulated", "emulated"}]}``: tokens/s of all together, from the first begin to the last
        token, and of single requests; ``spread`` is the fastest by the slowest; the mean ITL, the
        longest p95 of it and the longest TTFT; ``speedup``, how many times the tokens/s of one
        alone, if that was measured; and what the simulator says to all together. And the least
        ``speedup`` of as many requests as stages, if that was measured, and the largest
        ``spread``, each with whether it is ``within`` its limit.

    Raises
    ------
    RuntimeError
        If a request gave another text than its own.
    """
    costs = Costs.even(stages, stage_s=stage_ms / 1e3, token_cost=token_cost)
    rows: list[dict[str, Any]] = []
    with ExitStack() as resources:
        client = own_cluster(default_processes(stages), resources)
        emulation = resources.enter_context(
            Emulation.open(
                costs, acceptance=acceptance, client=client, max_concurrent=max(requests)
            )
        )
        here = emulation.calibrated(HOP_ROUNDS)
        for strategy in strategies:
            alone: float | None = None
            for count in requests:
                row = _measure(emulation, strategy, count, tokens)
                if count == 1:
                    alone = row["tokens_per_s"]
                simulated = simulate_together(
                    strategy,
                    count,
                    costs=here,
                    acceptance=acceptance,
                    max_new_tokens=tokens,
                    prompt_tokens=1,
                )
                speeds = [_speed(one.metrics) for one in simulated]
                rows.append(
                    {
                        "strategy": strategy,
                        "requests": count,
                        **row,
                        "speedup": row["tokens_per_s"] / alone if alone is not None else None,
                        "simulated": count * min(speeds),
                        "emulated": True,
                    }
                )
    together = [row["speedup"] for row in rows if row["requests"] == stages and row["speedup"]]
    report = {
        "suite": "load",
        "stages": stages,
        "stage_ms": stage_ms,
        "acceptance": acceptance,
        "token_cost": token_cost,
        "tokens": tokens,
        "hop_ms": 1e3 * here.hop_s,
        "speedup": min(together, default=None),
        "spread": max(row["spread"] for row in rows),
        "rows": rows,
    }
    return judged(report, least=LEAST, most=MOST)


def _measure(emulation: Emulation, strategy: str, count: int, tokens: int) -> dict[str, Any]:
    # The shortest prompt: what is measured is decoding.
    running = [
        emulation.start(strategy, max_new_tokens=tokens, prompt_tokens=1, seed=seed)
        for seed in range(count)
    ]
    results = [generation.result(TIMEOUT_S) for generation in running]
    for seed, result in enumerate(results):
        if result.token_ids != emulation.text(tokens, 1, seed):
            raise RuntimeError(
                f"{strategy} generated another text than the emulated target's: this is a bug in "
                f"pipeinfer_dask, please report it"
            )
    metrics = [result.metrics for result in results]
    speeds = [_speed(one) for one in metrics]
    began = [result.trace.records[0][0] for result in results]
    ended = [start + tokens / speed for start, speed in zip(began, speeds, strict=True)]
    return {
        "tokens_per_s": count * tokens / (max(ended) - min(began)),
        "slowest_tokens_per_s": min(speeds),
        "fastest_tokens_per_s": max(speeds),
        "spread": max(speeds) / min(speeds),
        "itl_s": sum(one.itl_s or 0.0 for one in metrics) / count,
        "itl_p95_s": max(one.itl_p95_s or 0.0 for one in metrics),
        "ttft_s": max(one.ttft_s or 0.0 for one in metrics),
    }


def _speed(metrics: Metrics) -> float:
    assert metrics.tokens_per_s is not None, "a text has tokens"
    return metrics.tokens_per_s
