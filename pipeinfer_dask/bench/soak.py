"""One engine for a long time: what it gives stays right, and what it takes stays the same.

The embedded pair on a cluster of processes of this machine; texts of all kinds, some at once, some
cancelled at a random moment. Each text is held against plain decoding.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any

import dask
import numpy as np
import psutil
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster
from tqdm import tqdm

from pipeinfer_dask.bench.limits import judged
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.engine import Engine, Generation
from pipeinfer_dask.models.demo_pair import DEMO_PROMPT, demo_pair
from pipeinfer_dask.models.sequences import Sequences
from pipeinfer_dask.policies import STRATEGIES

STAGES = 2
PROMPTS = (
    *("def main", "import os\n", "class Node:", "for line in", "x", DEMO_PROMPT),
    *("".join(f"x{number} = {number}\n" for number in range(count)) for count in (3, 12, 25)),
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2, "seed": 3},
)
TOKENS = (8, 40)
"""Least and most of a text."""
TEXT_S = 0.15
"""Those that are cancelled are, at a random moment of so many seconds."""
CANCELLED = 0.3
AT_ONCE = 3
WARM = 200
"""Generations after which nothing should grow any more."""
MOST = {"bytes_per_generation": 1000.0, "files": 0, "held": 0}
"""Limits of the report's figures; besides, all texts have to be identical."""
SHORT = "distributed.admin.system-monitor.log-length"
EVERY = 10
"""Processes are looked at after so many generations."""
PATIENCE_S = 60.0

Texts = dict[tuple[int, int], list[int]]
"""Plain decoding's text of each prompt and sampling, by their places."""


def run_soak_bench(
    *, generations: int = 400, warm: int = WARM, every: int = EVERY, seed: int = 0
) -> dict[str, Any]:
    """Generate and cancel, and watch the processes.

    Parameters
    ----------
    generations : int
    warm : int
        Generations before growth is measured.
    every : int
        Generations between two looks at the processes.
    seed : int

    Returns
    -------
    dict
        ``bytes_per_generation`` is the largest slope of a process's memory, the median of those
        between any two looks; ``files`` and ``threads`` the largest growth, from the median of
        the first third of the looks to that of the last; ``held`` what is still taken of a cache
        or under way at the end. ``rows`` has one for each process, and ``within`` says which
        limits are kept.
    """
    random = Random(seed)
    identical = cancelled = begun = 0
    looks: dict[str, list[tuple[int, int, int, int]]] = {}
    with ExitStack() as resources:
        client = cluster_apart(STAGES + 1, resources)
        texts = plain_texts(client)
        pair = demo_pair()
        # On stderr, and not more often than a file can take that somebody keeps it in.
        bar = resources.enter_context(tqdm(total=generations, desc="generations", mininterval=5.0))
        with Engine.from_pretrained(
            pair.target, pair.draft, client=client, stages=STAGES, progress=False
        ) as engine:
            while begun < generations:
                runs = []
                for _ in range(min(random.randint(1, AT_ONCE), generations - begun)):
                    case, run = start(engine, random)
                    ends = random.random() * TEXT_S if random.random() < CANCELLED else None
                    runs.append((case, run, ends))
                cancelled += cancel_in_time([(run, ends) for _, run, ends in runs])
                identical += sum(is_right(run, texts[case]) for case, run, _ in runs)
                if (begun + len(runs)) // every > begun // every and begun >= warm:
                    for process, look in _look(client).items():
                        looks.setdefault(process, []).append((begun, *look))
                begun += len(runs)
                bar.update(len(runs))
            held = settled(lambda: under_way(client))
    return _report(generations, cancelled, identical, held, looks)


def cluster_apart(workers: int, resources: ExitStack) -> Client:
    """Open a cluster whose scheduler is a process of its own, too: each is looked at alone."""
    # dask keeps records of each process for an hour, and would seem to leak until then.
    resources.enter_context(dask.config.set({SHORT: 9}))
    variable = f"DASK_{SHORT.upper().replace('.', '__').replace('-', '_')}"
    os.environ[variable] = "9"  # for the processes that are to come
    resources.callback(os.environ.pop, variable, None)
    cluster = SubprocessCluster(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=None,  # type: ignore[arg-type]  # as its docstring says
        worker_kwargs={"memory_limit": 0},
    )
    client: Client = resources.enter_context(Client(resources.enter_context(cluster)))
    client.wait_for_workers(workers, timeout=PATIENCE_S)
    return client


def plain_texts(client: Client) -> Texts:
    """Decode plainly, in one piece, what is going to be generated."""
    target = demo_pair().target
    with Engine.from_pretrained(target, client=client, stages=1, progress=False) as engine:
        runs = {
            (p, s): engine.start(prompt, max_new_tokens=TOKENS[1], **sampling)
            for p, prompt in enumerate(PROMPTS)
            for s, sampling in enumerate(SAMPLINGS)
        }
        return {case: run.result(PATIENCE_S).token_ids for case, run in runs.items()}


def start(engine: Engine, random: Random) -> tuple[tuple[int, int], Generation]:
    """Start a generation of any kind; return it, and whose text it should give."""
    p, s = random.randrange(len(PROMPTS)), random.randrange(len(SAMPLINGS))
    return (p, s), engine.start(
        PROMPTS[p],
        max_new_tokens=random.randint(*TOKENS),
        strategy=random.choice(tuple(STRATEGIES)),
        logprobs=random.choice((0, 0, 2)),
        **SAMPLINGS[s],
    )


def is_right(run: Generation, text: list[int]) -> bool:
    """Whether a text is the plain one: to its end, or as far as it came before it was cancelled."""
    result = run.result(PATIENCE_S)
    count = len(result.token_ids)
    whole = min(run.request.max_new_tokens, len(text))
    return result.token_ids == text[:count] and (
        result.finish_reason == "stopped" or count == whole
    )


def cancel_in_time(runs: list[tuple[Generation, float | None]]) -> int:
    """Cancel each generation after its seconds, None for never; return how many stopped."""
    began = time.monotonic()
    for ends, run in sorted(((e, r) for r, e in runs if e is not None), key=lambda one: one[0]):
        threading.Event().wait(max(0.0, began + ends - time.monotonic()))
        run.cancel()
    return sum(run.result(PATIENCE_S).finish_reason == "stopped" for run, _ in runs)


def settled(look: Callable[[], int]) -> int:
    """Return what is left once it is nothing, or after a long time."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := look()) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    return left


def under_way(client: Client) -> int:
    """Return how many caches are taken on the workers, and requests under way in this process."""
    gc.collect()
    caches: dict[str, int] = client.run(caches_taken)
    return sum(type(t) is Machine for t in gc.get_objects()) + sum(caches.values())


def caches_taken() -> int:
    """Return how many KV caches of this process are taken by a text."""
    return sum(len(t._held) for t in gc.get_objects() if type(t) is Sequences)


def _look(client: Client) -> dict[str, tuple[int, int, int]]:
    scheduler = client.run_on_scheduler(_process)
    return {"client": _process(), "scheduler": scheduler, **client.run(_process)}


def _process() -> tuple[int, int, int]:
    """Return bytes of memory, descriptors and threads of this process."""
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def _report(
    generations: int,
    cancelled: int,
    identical: int,
    held: int,
    looks: dict[str, list[tuple[int, int, int, int]]],
) -> dict[str, Any]:
    rows = [_row(process, np.array(seen)) for process, seen in looks.items()]
    growth = ("bytes_per_generation", "files", "threads")
    report = {
        "suite": "soak",
        "generations": generations,
        "cancelled": cancelled,
        "identical": identical,
        **{what: max((row[what] for row in rows), default=None) for what in growth},
        "held": held,
        "rows": rows,
    }
    return judged(report, least={"identical": generations}, most=MOST)


def _row(process: str, seen: Any) -> dict[str, Any]:
    number, rss, files, threads = seen.T
    return {
        "process": process,
        "looks": len(seen),
        "mib": round(float(rss[-1]) / 2**20, 1),
        "bytes_per_generation": _slope(number, rss),
        "files": _growth(files),
        "threads": _growth(threads),
    }


def _slope(x: Any, y: Any) -> float:
    """Return the median of the slopes between any two points (Theil and Sen)."""
    one, other = np.triu_indices(len(x), 1)
    slopes = (y[other] - y[one]) / (x[other] - x[one])
    return round(float(np.median(slopes)), 1) if len(slopes) else 0.0


def _growth(values: Any) -> float:
    third = max(1, len(values) // 3)
    return float(np.median(values[-third:]) - np.median(values[:third]))
