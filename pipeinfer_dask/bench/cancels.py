"""Generations cancelled at random moments: how soon the stages idle, and what comes next."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from random import Random
from typing import Any

import numpy as np

from pipeinfer_dask.bench.limits import judged
from pipeinfer_dask.bench.soak import (
    PATIENCE_S,
    STAGES,
    TEXT_S,
    is_right,
    plain_texts,
    settled,
    start,
    under_way,
)
from pipeinfer_dask.engine import Engine
from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.runtime.planning.clusters import own_cluster

MOST = {"idle_ms_max": 50.0, "held": 0}
"""Limits of the report's figures; besides, all texts have to be right."""


def run_cancels_bench(*, cancels: int = 200, seed: int = 0) -> dict[str, Any]:
    """Cancel generations, one after another; behind each, another is generated to its end.

    Parameters
    ----------
    cancels : int
        That come before a text's end.
    seed : int
        Of what is generated, and when it is cancelled.

    Returns
    -------
    dict
        ``started``: so many generations it took, for some were over before they were cancelled;
        ``right``: after so many of them their own text, as far as it came, and that of the next
        one were plain decoding's.
        ``idle_ms_p50``, ``_p95`` and ``_max``: from the call of ``cancel`` until nothing of the
        text is under way any more, on no stage and not with the drafter, seen from the client:
        the end of its trace. ``rows`` has one for each strategy, and
        ``within`` says which limits are kept.
    """
    random = Random(seed)
    idle: dict[str, list[float]] = {}
    right = stopped = started = 0
    with ExitStack() as resources:
        client = own_cluster(STAGES + 1, resources)
        texts = plain_texts(client)
        pair = demo_pair()
        with Engine.from_pretrained(
            pair.target, pair.draft, client=client, stages=STAGES, progress=False
        ) as engine:
            while stopped < cancels:
                started += 1
                case, run = start(engine, random)
                threading.Event().wait(random.random() * TEXT_S)
                began = time.monotonic()
                run.cancel()
                result = run.result(PATIENCE_S)
                if result.finish_reason == "stopped":
                    stopped += 1
                    over, _ = result.trace.records[-1]
                    idle.setdefault(run.strategy, []).append(1e3 * (over - began))
                other, behind = start(engine, random)
                right += is_right(run, texts[case]) and is_right(behind, texts[other])
            held = settled(lambda: under_way(client))
    every = [ms for some in idle.values() for ms in some]
    report = {
        "suite": "cancels",
        "cancels": cancels,
        "started": started,
        "right": right,
        **_of(every),
        "held": held,
        "rows": [{"strategy": name, "cancels": len(ms), **_of(ms)} for name, ms in idle.items()],
    }
    return judged(report, least={"right": started}, most=MOST)


def _of(ms: list[float]) -> dict[str, float | None]:
    if not ms:
        return {"idle_ms_p50": None, "idle_ms_p95": None, "idle_ms_max": None}
    p50, p95, most = np.percentile(ms, (50, 95, 100)).round(2).tolist()
    return {"idle_ms_p50": p50, "idle_ms_p95": p95, "idle_ms_max": most}
