"""Faults at random, while texts are generated: what they cost, and that they cost no token.

The embedded pair on worker processes of this machine, one of them spare. During each
generation nodes are killed, stopped, cut off, held up or made to hang; each text is held
against the one that plain decoding gave before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any

from pipeinfer_dask.bench.sabotage import STUCK_S, Saboteur
from pipeinfer_dask.engine import Engine, Generation
from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.protocol.messages import Commit, DrafterLost, StageLost, StagesBack
from pipeinfer_dask.runtime.clusters import own_cluster

PROMPTS = ("def main", "import os\n", "class Node:", "for line in")
STRATEGIES = ("iterative", "speculative", "pipeinfer", "adaptive")
KINDS = ("kill", "kill", "kill", "stop", "pause", "cut", "hold_up", "swap", "swallow", "hang")
"""What may happen; death three times as often as each of the others."""
HARMLESS = ("pause", "hold_up")
"""What makes a node slow, and must not be taken for its loss."""
TOKENS = 200
STAGES = 2
NODE_TIMEOUT_S = 5.0
PAUSE_S = 0.3
"""A process that is stopped for so short a time is slow, and not lost."""
PATIENCE_S = 120.0
RESTART_S = 20.0
"""How long to wait for a nanny; without a spare the others do."""


def run_faults_bench(
    *, faults: int = 40, generations: int = 20, seed: int = 0, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """Generate under faults.

    Parameters
    ----------
    faults : int
        In all, spread over the generations.
    generations : int
    seed : int
        Of what happens when, and to whom.
    kinds : tuple of str
        What may happen.

    Returns
    -------
    dict
        ``recovery_s_p50`` and ``recovery_s_p95``: from the moment of a stage's fault to the first
        token that came after it was noticed. ``drafter_s_p50``: the same of the drafter's loss,
        to the next token. ``rows`` has one for each kind.
    """
    random = Random(seed)
    done: list[tuple[str, str, float | None]] = []
    identical = lost = 0
    with ExitStack() as resources:
        client = own_cluster(STAGES + 2, resources)
        pair = demo_pair()
        with Engine.from_pretrained(
            pair.target,
            pair.draft,
            client=client,
            stages=STAGES,
            spares=1,
            node_timeout=NODE_TIMEOUT_S,
            max_recoveries=10,
            progress=False,
        ) as engine:
            saboteur = Saboteur(client)
            texts = {
                prompt: engine.generate(
                    prompt, max_new_tokens=TOKENS, strategy="iterative"
                ).token_ids
                for prompt in PROMPTS
            }
            for number in range(generations):
                share = faults * (number + 1) // generations - faults * number // generations
                prompt = random.choice(PROMPTS)
                # A spare is part of what is measured: nannies bring one back, mostly in seconds.
                _until(lambda: saboteur.workers > STAGES + 1, RESTART_S)
                run = engine.start(
                    prompt, max_new_tokens=TOKENS, strategy=random.choice(STRATEGIES)
                )
                done.extend(
                    _harm(run, saboteur, random, kinds, TOKENS * fault // share)
                    for fault in range(share)
                )
                result = run.result(PATIENCE_S)
                identical += result.token_ids == texts[prompt]
                lost += max(0, len(texts[prompt]) - len(result.token_ids))
            nodes = len(saboteur.places())
            leaks = _leaks(saboteur, nodes)
        leaks += _leaks(saboteur, 0)
    return _report(done, generations, identical, lost, leaks)


def _harm(
    run: Generation, saboteur: Saboteur, random: Random, kinds: tuple[str, ...], at: int
) -> tuple[str, str, float | None]:
    """Do some harm once a text has so many tokens; return how long it was until the next one."""
    kind = random.choice(kinds)
    stages = [f"stage-{index}" for index in range(STAGES)]
    # What goes wrong with links goes wrong between the first stage and the second.
    node = random.choice([*stages, "drafter"]) if kind in ("kill", "stop") else stages[0]
    _until(lambda: run.done() or len(run.token_ids) >= at)
    began = time.monotonic()
    if kind == "stop":
        with saboteur.stopped(node):
            _until(lambda: run.done() or _loss(run, node, began) is not None)
    elif kind == "pause":
        with saboteur.stopped(node):
            threading.Event().wait(PAUSE_S)
    else:
        getattr(saboteur, kind)(node)
    if kind in HARMLESS:
        return kind, node, None
    _until(lambda: run.done() or _gap(run, node, began) is not None)
    return kind, node, _gap(run, node, began)


def _loss(run: Generation, node: str, began: float) -> int | None:
    """Return where in the trace the loss of a node since then is told of."""
    kind = DrafterLost if node == "drafter" else StageLost
    for place, (when, what) in enumerate(run.trace.records):
        if when >= began and isinstance(what, kind):
            return place
    return None


def _gap(run: Generation, node: str, began: float) -> float | None:
    """Return the seconds from a fault to the next token: of a stage's, behind its recovery."""
    place = _loss(run, node, began)
    if place is None:
        return None
    waits = node != "drafter"
    for when, what in run.trace.records[place:]:
        waits = waits and not isinstance(what, StagesBack)
        if isinstance(what, Commit) and not waits:
            return when - began
    return None


def _until(holds: Callable[[], bool], patience: float = PATIENCE_S) -> bool:
    """Wait for something that nobody announces; return whether it came."""
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _leaks(saboteur: Saboteur, nodes: int) -> int:
    """Return how many nodes and threads there are beyond those that there have to be."""

    def beyond() -> int:
        left = saboteur.left().values()
        counts = (
            sum(held.get(what, 0) for held in left) for what in ("actors", "nodes", "threads")
        )
        return max(counts) - nodes

    _until(lambda: beyond() <= 0, STUCK_S + PATIENCE_S)
    return max(0, beyond())


def _report(
    done: list[tuple[str, str, float | None]],
    generations: int,
    identical: int,
    lost: int,
    leaks: int,
) -> dict[str, Any]:
    stages = [gap for _, node, gap in done if gap is not None and node != "drafter"]
    drafter = [gap for _, node, gap in done if gap is not None and node == "drafter"]
    rows = []
    for kind in dict.fromkeys(KINDS):
        gaps = [gap for other, _, gap in done if other == kind and gap is not None]
        count = sum(other == kind for other, _, _ in done)
        rows.append({"kind": kind, "faults": count, "felt": len(gaps), "s_p50": _at(gaps, 0.5)})
    return {
        "suite": "faults",
        "faults": len(done),
        "generations": generations,
        "identical": identical,
        "tokens_lost": lost,
        "recovery_s_p50": _at(stages, 0.5),
        "recovery_s_p95": _at(stages, 0.95),
        "drafter_s_p50": _at(drafter, 0.5),
        "leaks": leaks,
        "rows": rows,
    }


def _at(values: list[float], share: float) -> float | None:
    """Return the value below which this share of them lies; None if there are none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
