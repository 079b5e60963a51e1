"""Faults at random, while texts are generated: what they cost, and that they cost no token.

The embedded pair on worker processes of this machine, one of them spare. During each
generation nodes are killed, stopped, cut off, held up, made to hang or squeezed out of memory,
alone, several at once, before the first token, or while others are being replaced; each text
is held against the one that plain decoding gave before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from pipeinfer_dask.bench.limits import judged
from pipeinfer_dask.bench.sabotage import DRAFTER, STUCK_S, Saboteur
from pipeinfer_dask.engine import Engine, Generation, GenerationInterrupted
from pipeinfer_dask.models.demo_pair import DEMO_PROMPT, demo_pair
from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.protocol.messages import Commit, DrafterLost, StageLost, StagesBack
from pipeinfer_dask.runtime.planning.clusters import own_cluster

PROMPTS = ("def main", "import os\n", "class Node:", "for line in")
LONG_PROMPT = 3 * DEMO_PROMPT
"""One that is read in several runs."""
KINDS = {
    "kill": 3,
    "die": 1,
    "several": 2,
    "squeeze": 1,
    "stop": 1,
    "pause": 1,
    "busy": 1,
    "cut": 1,
    "hold_up": 1,
    "repeat": 1,
    "swap": 1,
    "drop": 1,
    "swallow": 1,
    "hang": 1,
}
"""What may happen, and how often. ``kill``: SIGKILL of one node's process, ``die``: while it
computes; ``several``: of two at once; ``squeeze``: a process takes memory until its nanny ends
it; ``stop``: SIGSTOP until that is noticed; ``pause``: for a moment; ``busy``: a thread of the
process computes in Python; ``cut``: links close; ``hold_up``, ``repeat``, ``swap``, ``drop``,
``swallow``: messages between stages come late, twice, in the wrong order, one less, or no more;
``hang``: the computing does.
"""
ANYWHERE = ("kill", "squeeze", "stop", "pause", "busy", "cut", "hold_up", "repeat")
"""What may happen to the drafter, too. The others wait for the next that a node says or computes,
which every text asks of all stages, and not of a drafter.
"""
WHOLE = ("kill", "several")
"""What may happen while others are being replaced: the rest needs links."""
READY = ("die", "swap", "drop", "swallow", "hang")
"""What may be prepared, so that it happens before a text's first token."""
HARMLESS = ("pause", "busy", "hold_up", "repeat")
"""What makes a node slow or says something again, and must not be taken for its loss."""
EARLY = AGAIN = 0.25
"""How often a text's first fault comes before the first token, and how often a fault comes
on top of the one before."""
TOKENS = 200
STAGES = 2
NODE_TIMEOUT_S = 2.0
MEMORY_LIMIT = "1GiB"
"""Of a worker: three times what it takes."""
PAUSE_S = 0.3
"""A process that is stopped for so short a time is slow, and not lost."""
PATIENCE_S = 120.0
MOST = {
    "tokens_lost": 0,
    "false_alarms": 0,
    "leaks": 0,
    "recovery_s_p50": 3.0,
    "drafter_s_p50": 0.5,
}
"""Limits of the report's figures; besides, all texts have to be identical."""
RESTART_S = 20.0
"""How long to wait for a nanny; without a spare the others do."""


@dataclass
class Fault:
    """What was done, to whom, and when.

    Attributes
    ----------
    kind : str
    nodes : tuple of str
    moment : str
        ``prefill``: before the text's first token; ``recovering``; or ``mid-text``.
    began : float, seconds
        On the monotonic clock.
    spare : bool
        Whether a worker was free for what it did away with: another one's may not be back yet.
    gap : float, seconds, or None
        Until the next token; None where nothing was noticed before the text's end.
    silence : float, seconds, or None
        The longest that no token came within the gap: a drafter's loss is noticed while the
        target goes on.
    """

    kind: str
    nodes: tuple[str, ...]
    moment: str
    began: float
    spare: bool
    gap: float | None = None
    silence: float | None = None


def run_faults_bench(
    *,
    faults: int = 40,
    generations: int = 20,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    node_timeout: float = NODE_TIMEOUT_S,
    recoveries: int = 10,
) -> dict[str, Any]:
    """Generate under faults.

    Parameters
    ----------
    faults : int
        In all, spread over the generations.
    generations : int
    seed : int
        Of what happens when, and to whom.
    kinds : sequence of str
        What may happen.
    node_timeout : float, seconds
    recoveries : int
        Losses in a row that a text has to survive.

    Returns
    -------
    dict
        ``recovery_s_p50`` and ``recovery_s_p95``: from the moment of a stage's fault to the first
        token that came after it was noticed, where there was a spare worker; where all were in use,
        ``waiting_s_p50``: a nanny had to bring one back first. ``drafter_s_p50``: the same of the
        drafter's loss, to the next token, and ``drafter_silence_s_p50`` the longest that no token
        came until then: the target decodes while memory fills up, or before silence is noticed.
        ``false_alarms``: losses that were told of though nothing
        had happened but what is harmless. ``leaks``: nodes, threads, descriptors and mappings of
        shared memory that the workers have too many. ``interrupted``: what ended a text before its
        time, and the bench with it; None if nothing did. ``rows`` has one for each kind, and
        ``within`` says which limits are kept.
    """
    random = Random(seed)
    done: list[Fault] = []
    identical = lost = alarms = 0
    interrupted = None
    with ExitStack() as resources:
        client = own_cluster(STAGES + 2, resources, memory_limit=MEMORY_LIMIT)
        pair, saboteur = demo_pair(), Saboteur(client)
        with Engine.from_pretrained(pair.target, client=client, progress=False):
            pass  # what comes with the first use of a worker stays
        files = saboteur.files()
        with Engine.from_pretrained(
            pair.target,
            pair.draft,
            client=client,
            stages=STAGES,
            spares=1,
            node_timeout=node_timeout,
            max_recoveries=recoveries,
            progress=False,
        ) as engine:
            texts = {
                prompt: engine.generate(
                    prompt, max_new_tokens=TOKENS, strategy="iterative"
                ).token_ids
                for prompt in (*PROMPTS, LONG_PROMPT)
            }
            for number in range(generations):
                share = faults * (number + 1) // generations - faults * number // generations
                # A spare is part of what is measured: nannies bring one back, mostly in seconds.
                until(lambda: saboteur.workers > STAGES + 1, RESTART_S)
                harm = Harm(saboteur, random, kinds)
                prompt = random.choice(PROMPTS)
                if share and random.random() < EARLY:
                    prompt = LONG_PROMPT
                    harm.prepare()
                run = engine.start(
                    prompt, max_new_tokens=TOKENS, strategy=random.choice(tuple(STRATEGIES))
                )
                harm.do(run, share)
                done += harm.faults
                try:
                    tokens = run.result(PATIENCE_S).token_ids
                except (GenerationInterrupted, TimeoutError) as error:
                    interrupted = f"{error}; seed {seed}, generation {number}: {harm.faults}"
                    tokens = run.token_ids
                identical += tokens == texts[prompt]
                lost += max(0, len(texts[prompt]) - len(tokens))
                alarms += false_alarms(run, done)
                if interrupted is not None:
                    break
            nodes = len(saboteur.places())
            leaks = _leaks(saboteur, nodes)
        leaks += _leaks(saboteur, 0) + _open(saboteur, files)
    report = _report(done, generations, identical, lost, alarms, leaks)
    return report | {"interrupted": interrupted}


class Harm:
    """What is done to one generation."""

    def __init__(self, saboteur: Saboteur, random: Random, kinds: Sequence[str]) -> None:
        self.faults: list[Fault] = []
        self._saboteur = saboteur
        self._random = random
        self._kinds = kinds

    def prepare(self) -> None:
        """Have something happen to the next run, the first of a text that is to be started."""
        kinds = [kind for kind in self._kinds if kind in READY]
        if kinds:
            self._strike(self._choose(kinds), "prefill", ExitStack())

    def do(self, run: Generation, count: int) -> None:
        """Do so many faults, evenly over a text; some come on top of the one before."""
        groups = self._groups(count - len(self.faults))
        self._follow(run, self.faults)
        for number, group in enumerate(groups):
            at = max(1, TOKENS * number // len(groups))
            until(lambda at=at: run.done() or len(run.token_ids) >= at)  # type: ignore[misc]
            with ExitStack() as stopped:
                struck: list[Fault] = []
                for kind in group:
                    if struck:
                        until(lambda first=struck[0]: run.done() or _is_told(run, first))  # type: ignore[misc]
                    struck.append(self._strike(kind, _moment(run), stopped))
                self._follow(run, struck)

    def _groups(self, count: int) -> list[list[str]]:
        """Draw what happens; what is not the first of its group comes while others recover."""
        whole = [kind for kind in self._kinds if kind in WHOLE]
        groups: list[list[str]] = []
        for _ in range(count):
            again = groups and groups[-1][0] not in HARMLESS and self._random.random() < AGAIN
            if again and whole:
                groups[-1].append(self._choose(whole))
            else:
                groups.append([self._choose(self._kinds)])
        return groups

    def _choose(self, kinds: Sequence[str]) -> str:
        return self._random.choices(kinds, [KINDS[kind] for kind in kinds])[0]

    def _strike(self, kind: str, moment: str, stopped: ExitStack) -> Fault:
        nodes = list(self._saboteur.places())
        if kind not in (*ANYWHERE, *WHOLE):
            nodes = [node for node in nodes if node != DRAFTER]
        chosen = tuple(self._random.sample(nodes, min(len(nodes), 1 + (kind == "several"))))
        spare = self._saboteur.workers >= STAGES + 1 + len(chosen)
        fault = Fault(kind, chosen, moment, time.monotonic(), spare)
        self.faults.append(fault)
        if kind in WHOLE:
            self._saboteur.kill(*chosen)
        elif kind == "stop":
            stopped.enter_context(self._saboteur.stopped(*chosen))
        elif kind == "pause":
            with self._saboteur.stopped(*chosen):
                threading.Event().wait(PAUSE_S)
        else:
            getattr(self._saboteur, kind)(*chosen)
        return fault

    def _follow(self, run: Generation, struck: Sequence[Fault]) -> None:
        """Wait for the first token behind each of these faults, or the text's end."""
        for fault in struck:
            if fault.kind not in HARMLESS:
                until(lambda f=fault: run.done() or _gap(run, f) is not None)  # type: ignore[misc]
                fault.gap = _gap(run, fault)
                if fault.gap is not None:
                    fault.silence = _silence(run, fault.began, fault.began + fault.gap)


def _moment(run: Generation) -> str:
    seen = recovering = False
    for _, what in run.trace.records:
        seen = seen or isinstance(what, Commit)
        if isinstance(what, StageLost | StagesBack):
            recovering = isinstance(what, StageLost)
    return "recovering" if recovering else "mid-text" if seen else "prefill"


def _is_told(run: Generation, fault: Fault) -> bool:
    """Whether the trace tells of a loss since then."""
    return any(
        when >= fault.began and isinstance(what, StageLost | DrafterLost)
        for when, what in run.trace.records
    )


def _gap(run: Generation, fault: Fault) -> float | None:
    """Return the seconds from a fault to the next token: of a stage's, behind its recovery."""
    waits, behind = True, DrafterLost if fault.nodes == ("drafter",) else StagesBack
    for when, what in run.trace.records:
        if when < fault.began:
            continue
        waits = waits and not isinstance(what, behind)
        if isinstance(what, Commit) and not waits:
            return when - fault.began
    return None


def _silence(run: Generation, since: float, end: float) -> float:
    """Return the longest time without a token, in seconds, between two moments."""
    tokens = [when for when, what in run.trace.records if isinstance(what, Commit)]
    moments = [since, *(when for when in tokens if since < when <= end)]
    return max(after - before for before, after in pairwise(moments))


def false_alarms(run: Generation, done: list[Fault]) -> int:
    """Return how many losses were told of that nothing harmful came before."""
    alarms = 0
    for when, what in run.trace.records:
        if isinstance(what, StageLost | DrafterLost):
            before = [fault for fault in done if fault.began <= when]
            alarms += not before or before[-1].kind in HARMLESS
    return alarms


def until(holds: Callable[[], bool], patience: float = PATIENCE_S) -> bool:
    """Wait for what is only seen in other processes; return whether it came."""
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _leaks(saboteur: Saboteur, nodes: int) -> int:
    """Return how many nodes, threads and mappings there are beyond those that there have to be."""

    def beyond() -> int:
        left = saboteur.left().values()
        counts = (
            sum(held.get(what, 0) for held in left) for what in ("actors", "nodes", "threads")
        )
        return max(counts) - nodes + sum(held.get("shared memory", 0) for held in left)

    until(lambda: beyond() <= 0, STUCK_S + PATIENCE_S)
    return max(0, beyond())


def _open(saboteur: Saboteur, files: dict[str, int]) -> int:
    """Return how many descriptors workers have open beyond what each had before.

    One that has come meanwhile, in another one's place, may have as many as any had.
    """
    most = max(files.values())

    def beyond() -> int:
        now = saboteur.files().items()
        return sum(max(0, count - files.get(worker, most)) for worker, count in now)

    until(lambda: not beyond())
    return beyond()


def _report(
    done: list[Fault], generations: int, identical: int, lost: int, alarms: int, leaks: int
) -> dict[str, Any]:
    felt = [fault for fault in done if fault.gap is not None]
    drafter = [f for f in felt if f.nodes == ("drafter",)]
    alone = [f for f in drafter if f.moment != "recovering"]
    stages = [f for f in felt if f not in drafter]
    rows = []
    for kind in KINDS:
        of = [fault for fault in done if fault.kind == kind]
        moments = {
            moment: sum(fault.moment == moment for fault in of)
            for moment in ("prefill", "mid-text", "recovering")
        }
        some = [fault for fault in felt if fault.kind == kind]
        rows.append(
            {"kind": kind, "faults": len(of), **moments, "felt": len(some)}
            | {"spare": sum(fault.spare for fault in some)}
            | {
                "s_p50": _at((fault.gap for fault in some), 0.5),
                "s_p95": _at((fault.gap for fault in some), 0.95),
            }
        )
    report = {
        "suite": "faults",
        "faults": len(done),
        "generations": generations,
        "identical": identical,
        "tokens_lost": lost,
        "recovery_s_p50": _at((f.gap for f in stages if f.spare), 0.5),
        "recovery_s_p95": _at((f.gap for f in stages if f.spare), 0.95),
        "waiting_s_p50": _at((f.gap for f in stages if not f.spare), 0.5),
        "drafter_s_p50": _at((fault.gap for fault in alone), 0.5),
        "drafter_silence_s_p50": _at((fault.silence for fault in alone), 0.5),
        "false_alarms": alarms,
        "leaks": leaks,
        "rows": rows,
    }
    return judged(report, least={"identical": generations}, most=MOST)


def _at(times: Iterable[float | None], share: float) -> float | None:
    """Return the time below which this share of them lies; None if there are none."""
    ordered = sorted(time for time in times if time is not None)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
