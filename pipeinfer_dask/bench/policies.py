"""The strategies side by side in virtual time, over a grid of pipelines and draft models.

Each baseline is tuned for each row by itself, and what won is told: all its settings are tried on a
short text, and the best few in full. Seeds are the same for all, and every text is checked against
the synthetic target's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

from pipeinfer_dask.simulation import CHAINS, PROMPT_TOKENS, Costs, simulate
from pipeinfer_dask.simulation.truth import SyntheticPair
from pipeinfer_dask.trace import Metrics

Knobs = dict[str, Any]

CONTENDERS: dict[str, tuple[str, Sequence[Knobs]]] = {
    "iterative": ("iterative", [{}]),
    "speculative": ("speculative", [{"k": k} for k in CHAINS]),
    "speculative_tree": (
        "speculative",
        [{"k": k, "depth": depth} for k, depth in product((4, 8, 16), (2, 3, 4))],
    ),
    # The reference's default is one sequence; several are in a column of their own.
    "pipeinfer": (
        "pipeinfer",
        [
            {"sequences": 1, "micro_batch": size, "cutoff": cutoff}
            for size, cutoff in product((1, 2, 3, 4), (0.1, 0.4, 0.7))
        ],
    ),
    "pipeinfer_tree": (
        "pipeinfer",
        [
            {"sequences": 4, "micro_batch": size, "cutoff": cutoff}
            for size, cutoff in product((2, 4), (0.1, 0.4))
        ],
    ),
    "adaptive": ("adaptive", [{}]),
    "bound": ("adaptive", [{}]),
    "clairvoyant": ("adaptive", [{}]),
}
"""What each column is: a strategy, and the settings of which the best one counts."""
TRIED_TOKENS = 200
"""Length of the one text on which all settings are tried."""
KEPT = 2
"""How many settings of each column are then simulated in full."""


@dataclass(frozen=True)
class Job:
    """One column of one row with one setting."""

    stages: int
    acceptance: float
    token_cost: float
    column: str
    knobs: tuple[tuple[str, Any], ...]
    seeds: int
    tokens: int


@dataclass(frozen=True)
class Speed:
    """What a job has come to: means over the seeds, relative to the time of a stage."""

    tokens_per_s: float
    ttft_s: float
    itl_p95_s: float


def run_policies_bench(
    stages: Sequence[int] = (4, 8, 16, 32),
    acceptances: Sequence[float] = (0.79, 0.66, 0.52),
    token_costs: Sequence[float] = (0.05, 0.3),
    *,
    seeds: int = 5,
    tokens: int = 500,
) -> dict[str, Any]:
    """Simulate every strategy, tuned, in every row of the grid.

    Parameters
    ----------
    stages, acceptances, token_costs : sequences
        The grid. A draft pass costs 0.15 and a hop 0.02 of a stage's time.
    seeds : int
        Texts for each figure.
    tokens : int
        Length of each.

    Returns
    -------
    dict
        ``{"suite": "policies", "rows": [...], "summary": {...}}``. A row holds stages,
        acceptance, token_cost, and in tokens for each time of a stage: iterative, speculative
        (a chain at its best k), speculative_tree, pipeinfer (one sequence, at its best
        micro-batch and cutoff), pipeinfer_tree (four), adaptive, bound (adaptive with drafting
        and hops for free) and clairvoyant (as bound, and the draft model knows which of its
        choices is right). ``settings`` tells what won. The summary holds geometric means.
    """
    jobs = [
        Job(count, acceptance, cost, column, tuple(knobs.items()), seeds, tokens)
        for count, acceptance, cost in product(stages, acceptances, token_costs)
        for column, (_, settings) in CONTENDERS.items()
        for knobs in settings
    ]
    # Forked, for nothing here has threads yet, and a worker need not import anything again.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        jobs = _promising(jobs, pool)
        speeds = dict(zip(jobs, pool.map(measure, jobs), strict=True))
    rows = [
        _row(count, acceptance, cost, speeds)
        for count, acceptance, cost in product(stages, acceptances, token_costs)
    ]
    return {"suite": "policies", "rows": rows, "summary": _summary(rows)}


def measure(job: Job) -> Speed:
    """Simulate one job.

    Raises
    ------
    RuntimeError
        If a text is not the synthetic target's own: a bug.
    """
    free = job.column in ("bound", "clairvoyant")
    shares: dict[str, Any] = {"draft_cost": 0.0, "hop_cost": 0.0} if free else {}
    costs = Costs.even(job.stages, stage_s=1.0, token_cost=job.token_cost, **shares)
    results: list[Metrics] = []
    for seed in range(job.seeds):
        result = simulate(
            CONTENDERS[job.column][0],
            acceptance=job.acceptance,
            costs=costs,
            max_new_tokens=job.tokens,
            seed=seed,
            clairvoyant=job.column == "clairvoyant",
            **dict(job.knobs),
        )
        text = SyntheticPair(job.acceptance, seed).text(PROMPT_TOKENS + job.tokens)
        if result.token_ids != list(text[PROMPT_TOKENS:]):
            raise RuntimeError(f"{job} gave another text than the target's: this is a bug")
        results.append(result.metrics)
    return Speed(
        tokens_per_s=_mean(metrics.tokens_per_s for metrics in results),
        ttft_s=_mean(metrics.ttft_s for metrics in results),
        itl_p95_s=_mean(metrics.itl_p95_s for metrics in results),
    )


def _promising(jobs: Sequence[Job], pool: Executor) -> list[Job]:
    # Those that may win their column of their row, in order.
    columns: dict[tuple[int, float, float, str], list[Job]] = {}
    for job in jobs:
        row = (job.stages, job.acceptance, job.token_cost, job.column)
        columns.setdefault(row, []).append(job)
    open_ones = [job for rivals in columns.values() if len(rivals) > KEPT for job in rivals]
    trials = [replace(job, seeds=1, tokens=min(TRIED_TOKENS, job.tokens)) for job in open_ones]
    found = dict(zip(open_ones, pool.map(measure, trials), strict=True))
    kept: list[Job] = []
    for rivals in columns.values():
        if len(rivals) > KEPT:
            rivals.sort(key=lambda job: found[job].tokens_per_s, reverse=True)
        kept += rivals[:KEPT]
    return kept


def _row(
    stages: int, acceptance: float, token_cost: float, speeds: dict[Job, Speed]
) -> dict[str, Any]:
    best: dict[str, tuple[Speed, Knobs]] = {}
    for job, speed in speeds.items():
        if (job.stages, job.acceptance, job.token_cost) != (stages, acceptance, token_cost):
            continue
        if job.column not in best or speed.tokens_per_s > best[job.column][0].tokens_per_s:
            best[job.column] = speed, dict(job.knobs)
    return {
        "stages": stages,
        "acceptance": acceptance,
        "token_cost": token_cost,
        **{column: round(speed.tokens_per_s, 4) for column, (speed, _) in best.items()},
        "settings": {column: knobs for column, (_, knobs) in best.items() if knobs},
        "ttft": {column: round(speed.ttft_s, 3) for column, (speed, _) in best.items()},
        "itl_p95": {column: round(speed.itl_p95_s, 3) for column, (speed, _) in best.items()},
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def ratios(above: str, below: str, least: int = 0, most: int = 1 << 30) -> list[float]:
        chosen = [row for row in rows if least <= row["stages"] <= most]
        return [row[above] / row[below] for row in chosen]

    means = {
        "pipeinfer / speculative": ratios("pipeinfer", "speculative"),
        "adaptive / speculative": ratios("adaptive", "speculative"),
        "adaptive / speculative_tree": ratios("adaptive", "speculative_tree"),
        "adaptive / pipeinfer, 4 stages": ratios("adaptive", "pipeinfer", most=4),
        "adaptive / pipeinfer, 8 stages and more": ratios("adaptive", "pipeinfer", least=8),
        "adaptive / pipeinfer_tree": ratios("adaptive", "pipeinfer_tree"),
        "adaptive / bound": ratios("adaptive", "bound"),
    }
    return {
        name: {
            "geometric_mean": round(math.exp(_mean(map(math.log, found))), 3),
            "least": round(min(found), 3),
            "most": round(max(found), 3),
        }
        for name, found in means.items()
        if found
    }


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)
