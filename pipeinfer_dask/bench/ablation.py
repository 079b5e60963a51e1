"""What each mechanism is worth: switched off alone, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pipeinfer_dask.protocol.messages import LEFT_OUT, RunDone
from pipeinfer_dask.simulation import Costs, simulate
from pipeinfer_dask.simulation.truth import ELSEWHERE
from pipeinfer_dask.trace import Trace

OFF: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("iterative", "", {}),
    ("pipeinfer", "", {}),
    ("pipeinfer", "asynchronous", {"asynchronous": False}),
    ("pipeinfer", "continuous", {"continuous": False}),
    ("pipeinfer", "cancellation", {"cancellation": False}),
    ("pipeinfer", "micro-batching", {"micro_batch": 1}),
    ("pipeinfer", "tree", {"sequences": 1}),
    ("adaptive", "", {}),
    ("adaptive", "cancellation", {"cancellation": False}),
    ("adaptive", "pruning", {"pruning": False}),
    ("adaptive", "micro-batching", {"micro_batch": 1}),
    ("adaptive", "ramp", {"ramp": 16}),
    ("adaptive", "tree", {"tree": False}),
    ("adaptive", "calibration", {"calibrate": False}),
)
"""Strategy, the mechanism that is off, and how."""


def run_ablation_bench(
    stages: Sequence[int] = (8,),
    acceptance: float = 0.66,
    overconfidence: Sequence[float] = (0.0, 2.0),
    *,
    seeds: int = 5,
    tokens: int = 500,
) -> dict[str, Any]:
    """Simulate each strategy with one mechanism less.

    Parameters
    ----------
    stages : sequence of int
    acceptance : float
    overconfidence : sequence of float
        With 0 the draft model's confidences are its chances, so that there is nothing to
        calibrate.
    seeds, tokens : int

    Returns
    -------
    dict
        ``{"suite": "ablation", "rows": [...]}``. A row holds stages, overconfidence, strategy,
        without (the mechanism), ttft, itl, itl_p95 (in times of a stage), tokens_per_s (per time
        of a stage), ratio (of that to the whole strategy's), and wasted: the share of computed
        layers that belong to runs off the text, cancelled or not.
    """
    rows: list[dict[str, Any]] = []
    for count in stages:
        for excess in overconfidence:
            whole: dict[str, float] = {}
            for strategy, without, knobs in OFF:
                runs = [
                    simulate(
                        strategy,
                        acceptance=acceptance,
                        costs=Costs.even(count, stage_s=1.0),
                        max_new_tokens=tokens,
                        seed=seed,
                        overconfidence=excess,
                        **knobs,
                    )
                    for seed in range(seeds)
                ]
                figures = [run.metrics for run in runs]
                speed = fmean(run.tokens_per_s or 0.0 for run in figures)
                whole.setdefault(strategy, speed)
                rows.append(
                    {
                        "stages": count,
                        "overconfidence": excess,
                        "strategy": strategy,
                        "without": without,
                        "ttft": round(fmean(run.ttft_s or 0.0 for run in figures), 3),
                        "itl": round(fmean(run.itl_s or 0.0 for run in figures), 3),
                        "itl_p95": round(fmean(run.itl_p95_s or 0.0 for run in figures), 3),
                        "tokens_per_s": round(speed, 4),
                        "ratio": round(speed / whole[strategy], 3),
                        "wasted": round(fmean(_wasted(run.trace) for run in runs), 3),
                    }
                )
    return {"suite": "ablation", "rows": rows}


def _wasted(trace: Trace) -> float:
    """Return the share of computed layers in runs of which no token lies on the text."""
    computed = wasted = 0
    for _, what in trace:
        if isinstance(what, RunDone):
            layers = sum(span.layers for span in what.spans)
            computed += layers
            # A prompt's first chunks pick nothing, and are of use.
            if what.tokens is None or (what.tokens and set(what.tokens) <= {ELSEWHERE, LEFT_OUT}):
                wasted += layers
    return wasted / computed
