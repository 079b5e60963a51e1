"""What memory there is for models: asked of each worker before anything is loaded.

Every worker tells the pools that it takes from (its machine, its control groups, its own limit).
Workers that share one name it alike, so that what they are to take from it is added up.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dask
import psutil
from distributed import Worker

from pipeinfer_dask.models.device_names import CPU

MOST_CONCURRENT = 1024
"""Generations that may share a pipeline: each has a KV cache on every stage."""

HERE = "this process"
"""The worker of nodes that are threads of the caller's own process."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory that may still be taken, by all who name the same pool together.

    Attributes
    ----------
    name : str
    available : int
        Bytes.
    """

    name: str
    available: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a node is going to hold.

    Attributes
    ----------
    title : str
        What to call it in messages.
    nbytes : int
    device : str
    barred : frozenset of str
        Workers that have too little memory, whatever they say.
    """

    title: str
    nbytes: int = 0
    device: str = CPU
    barred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Need:
    """What a node is going to take from its worker.

    Attributes
    ----------
    node : str
        Its title, for messages.
    worker : str
    nbytes : int
    """

    node: str
    worker: str
    nbytes: int


def pools_here(root: Path = Path("/")) -> list[Pool]:
    """Return the memory of this machine, and of the control groups that hold this process."""
    host = platform.node()
    machine = Pool(f"machine {host}", psutil.virtual_memory().available)
    return [machine, *_control_groups(root, host)]


def pools_of(dask_worker: Worker) -> list[Pool]:
    """Return what a worker may take: `pools_here`, and its own limit where it has one."""
    limit = dask_worker.memory_manager.memory_limit
    if not limit:
        return pools_here()
    # There its nanny would kill it.
    end = float(dask.config.get("distributed.worker.memory.terminate") or 1.0)
    left = int(limit * end) - psutil.Process().memory_info().rss
    return [*pools_here(), Pool(f"memory_limit of worker {dask_worker.address}", max(0, left))]


def check_memory(needs: Sequence[Need], pools: Mapping[str, Sequence[Pool]]) -> None:
    """Check that each pool holds all that is to be taken from it.

    Parameters
    ----------
    needs : sequence of Need
    pools : mapping of str to sequence of Pool
        By worker.

    Raises
    ------
    MemoryError
        If one does not.
    """
    available: dict[str, int] = {}
    takers: dict[str, list[Need]] = defaultdict(list)
    for need in needs:
        for pool in pools[need.worker]:
            available[pool.name] = min(pool.available, available.get(pool.name, pool.available))
            takers[pool.name].append(need)
    for name, nodes in takers.items():
        total = sum(need.nbytes for need in nodes)
        if total > available[name]:
            workers = dict.fromkeys(need.worker for need in nodes)
            raise MemoryError(
                f"expected {_size(total)} of free memory for {', '.join(n.node for n in nodes)} on "
                f"{', '.join(workers)}, got {_size(available[name])} ({name}): use more machines "
                "or stages, give this one fewer layers by layer_split, or free memory there"
            )


def _control_groups(root: Path, host: str) -> Iterator[Pool]:
    """Yield the control groups of Linux that limit this process's memory, from the innermost."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            # In a container the path may be the host's, and only its own group can be seen.
            if not (base / group / limit).is_file() or not (base / group / usage).is_file():
                continue
            most = (base / group / limit).read_text().strip()
            if most == "max":
                continue
            left = int(most) - int((base / group / usage).read_text()) + _cached(base / group)
            yield Pool(f"control group /{group} of {host}".replace("/.", "/"), left)


def _cached(group: Path) -> int:
    """Return the bytes of cached files in a control group, which make room when it is needed."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))


def _size(nbytes: int) -> str:
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.2f} MiB"
