"""Which worker holds which node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distributed.comm import get_address_host


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers by address, and the threads that each node may use.

    Attributes
    ----------
    stages : tuple of str, [stages]
    drafter : str or None
    threads : dict of str to int
        By worker: its threads, shared among the nodes that it holds.
    """

    stages: tuple[str, ...]
    drafter: str | None
    threads: dict[str, int]

    @property
    def draft_apart(self) -> bool:
        """Whether the drafter is on a machine that holds no stage, by the addresses' hosts."""
        if self.drafter is None:
            return False
        return host_of(self.drafter) not in {host_of(address) for address in self.stages}


CLIENT, WORKER = "client", "worker"
"""Where the head may be, beside a worker that is named by its address."""


def head_worker(head: str, workers: Mapping[str, int], placement: Placement) -> str | None:
    """Return the worker that is to drive the pipeline; None if the client does.

    That is the drafter's, which computes less than a stage's, or else the first stage's.

    Raises
    ------
    ValueError
        If there is no such worker.
    """
    if head == CLIENT:
        return None
    if head == WORKER:
        return placement.drafter or placement.stages[0]
    if head not in workers:
        raise ValueError(
            f"expected head as 'client', 'worker' or the address of a worker, got {head!r}: this "
            f"cluster has {', '.join(workers)}"
        )
    return head


def host_of(address: str) -> str:
    """Return the machine of a worker, by its address; of one in a process, the process."""
    try:
        return str(get_address_host(address))
    except ValueError:
        return address.rpartition("/")[0]


def spread(workers: Iterable[str]) -> list[str]:
    """Return workers in the order in which to use them: one of each machine, then its second."""
    ranks: dict[str, int] = {}
    ranked = []
    for address in workers:
        host = host_of(address)
        ranks[host] = ranks.get(host, -1) + 1
        ranked.append((ranks[host], address))
    return [address for _, address in sorted(ranked, key=lambda item: item[0])]


def _side_by_side(workers: Iterable[str]) -> list[str]:
    """Return workers with those of each machine after one another: a hop within it costs least."""
    chosen = list(workers)
    hosts = list(dict.fromkeys(map(host_of, chosen)))
    return sorted(chosen, key=lambda address: hosts.index(host_of(address)))


def default_stages(workers: int, layers: int, *, drafter: bool) -> int:
    """Return one stage for each worker that the drafter leaves, as far as there are layers."""
    return max(1, min(layers, workers - drafter))


def without_spares(workers: Mapping[str, int], spares: int) -> Mapping[str, int]:
    """Return the workers to use, where so many are to be kept free, machines apart first.

    Raises
    ------
    ValueError
        If none is left.
    """
    if spares and len(workers) <= spares:
        raise ValueError(
            f"expected more workers than spares={spares}, found {len(workers)}: start more "
            "workers, or keep fewer free"
        )
    return {address: workers[address] for address in spread(workers)[: len(workers) - spares]}


def place(
    workers: Mapping[str, int], stages: int, *, drafter: bool, share: bool = False
) -> Placement:
    """Choose workers: one for each stage, and one for the drafter where there is one left.

    As far as there are machines enough, each is on one of its own; where stages have to share
    one, these are neighbours.

    Parameters
    ----------
    workers : mapping of str to int
        Address and threads of each worker, in the order in which to use them.
    stages : int
    drafter : bool
        Whether there is a draft model. Without a worker of its own it shares the last
        stage's.
    share : bool
        Whether several stages may be on one worker.

    Raises
    ------
    ValueError
        If there are no workers, or fewer than stages and they may not be shared.
    """
    if not workers:
        raise ValueError(
            "expected a cluster with workers, found none: start some, or wait for them with "
            "client.wait_for_workers(n)"
        )
    if len(workers) < stages and not share:
        raise ValueError(
            f"expected a worker for each of {stages} stages, found {len(workers)}: start more "
            f"workers, ask for stages={len(workers)}, or allow share_workers=True"
        )
    addresses = spread(workers)
    used = _side_by_side(addresses[:stages])
    # Where workers are shared, it is by neighbours.
    chosen = tuple(used[stage * len(used) // stages] for stage in range(stages))
    rest = addresses[stages:]
    draft_worker = (rest[0] if rest else chosen[-1]) if drafter else None
    held = [*chosen, *([draft_worker] if draft_worker is not None else [])]
    threads = {
        address: max(1, workers[address] // held.count(address)) for address in dict.fromkeys(held)
    }
    return Placement(chosen, draft_worker, threads)
