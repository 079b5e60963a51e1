"""Which worker takes over from a lost one: a free one, else one that has room beside its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client, Worker, rpc
from distributed.protocol.pickle import dumps

from pipeinfer_dask.models.device_names import CPU
from pipeinfer_dask.runtime.nodes.actors import NodeActor
from pipeinfer_dask.runtime.planning.memory import Load, Need, Pool, check_memory, pools_of
from pipeinfer_dask.runtime.planning.scheduler import NoWorkerError, known_workers

PROBE_TIMEOUT_S = 1.0
"""A worker that does not answer so long is no choice."""
END_TIMEOUT_S = 5.0
"""Nodes that nobody drives any more are waited for so long, and then left to themselves."""
NANNY_S = 5.0
"""A nanny that has lost its worker has started another one after so long, or never will."""
LOOK_S = 0.1
"""While a nanny is waited for, look for new workers so often."""

Rooms = dict[str, dict[str, list[Pool]]]
"""By worker and device: what memory it may take. A device that it lacks is not named."""


@dataclass(frozen=True, slots=True)
class Unable:
    """What becomes of a question to a worker that can't import it, as its package is not ours."""

    reason: str


class Suspects:
    """Workers that nodes were lost on, and who takes over from them. Belongs to the client's loop.

    Parameters
    ----------
    client : Client
    move_in_after_s : float
        As of a `Recovery`.
    """

    def __init__(self, client: Client, move_in_after_s: float) -> None:
        self._client = client
        self._move_in_after_s = move_in_after_s
        self._nannies: set[str] = set()
        self._since: dict[str, float] = {}

    def add(self, worker: str) -> None:
        """Note that a node was lost on this worker, just now."""
        self._since[worker] = time.monotonic()

    async def inherit(self, workers: Sequence[str]) -> None:
        """Note workers that nodes were lost on before anybody looked."""
        for worker in workers:
            self.add(worker)
        known = await known_workers(self._client)
        # Whether one that is gone had a nanny nobody knows: it was like the others.
        if any(about["nanny"] for about in known.values()):
            self._nannies.update(workers)

    def __contains__(self, worker: object) -> bool:
        return worker in self._since

    async def note_nannies(self) -> None:
        """Note which workers have a nanny, that starts another one when they die."""
        known = await known_workers(self._client)
        self._nannies.update(worker for worker, about in known.items() if about["nanny"])

    async def choose(self, loads: Sequence[Load], held: Mapping[str, int]) -> list[str]:
        """Choose a worker for each of some nodes: see `replacements`."""
        known = await known_workers(self._client)
        until = [
            since + NANNY_S
            for worker, since in self._since.items()
            if worker in self._nannies and worker not in known
        ]
        until += [since + self._move_in_after_s for since in self._since.values()]
        workers = await replacements(
            self._client,
            loads,
            held=held,
            suspects=self._since,
            patience=max(until, default=0.0) - time.monotonic(),
        )
        await self.note_nannies()
        return workers


async def replacements(
    client: Client,
    loads: Sequence[Load],
    *,
    held: Mapping[str, int],
    suspects: Collection[str],
    patience: float,
) -> list[str]:
    """Choose a worker for each of some nodes.

    Workers that hold no node come first, and among them those that have not failed us; then,
    after waiting ``patience`` for new ones, those with the fewest nodes. All have the memory.

    Parameters
    ----------
    client : Client
    loads : sequence of Load
    held : mapping of str to int
        Nodes that each worker holds.
    suspects : collection of str
        Workers that nodes were lost on.
    patience : float, seconds

    Raises
    ------
    NoWorkerError
        If there are not enough workers that answer, or they lack the memory.
    NoSchedulerError
        If there is no scheduler any more.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + patience
    devices = {load.device for load in loads}
    while True:
        known = await known_workers(client)
        free = [worker for worker in known if not held.get(worker)]
        for some in ([worker for worker in free if worker not in suspects], free):
            rooms, _ = await _rooms(client, some, devices)
            chosen, _ = _share_out(loads, rooms, {}, most=1)
            if len(chosen) == len(loads):
                return chosen
        if loop.time() >= ends:
            break
        await asyncio.sleep(LOOK_S)
    rooms, unable = await _rooms(client, known, devices)
    chosen, lack = _share_out(loads, rooms, held, most=len(loads) + sum(held.values()))
    if len(chosen) < len(loads):
        raise NoWorkerError(f"{lack}{_told(unable)}")
    return chosen


async def first_able(client: Client, workers: Sequence[str], actor: type[NodeActor]) -> str:
    """Return the first of some workers that answers, and can import this actor.

    Raises
    ------
    NoWorkerError
        If there is none.
    """
    asked = (_ask(client, it, importable, {"actor": actor}, PROBE_TIMEOUT_S) for it in workers)
    answers = dict(zip(workers, await asyncio.gather(*asked), strict=True))
    for worker, answer in answers.items():
        if answer is True:
            return worker
    unable = {worker: it.reason for worker, it in answers.items() if isinstance(it, Unable)}
    raise NoWorkerError(
        f"the cluster has no worker that answers and could take over{_told(unable)}"
    )


def _told(unable: Mapping[str, str]) -> str:
    if not unable:
        return ""
    reasons = "; ".join(f"{worker}: {reason}" for worker, reason in unable.items())
    return f" (others lack pipeinfer-dask as it is here, so install that there: {reasons})"


def _share_out(
    loads: Sequence[Load], rooms: Rooms, held: Mapping[str, int], *, most: int
) -> tuple[list[str], str]:
    """Return workers for the first of these nodes, and why there is none for the next one."""
    pools = {
        (worker, device): pools for worker, room in rooms.items() for device, pools in room.items()
    }
    named = {f"{device} of {worker}": found for (worker, device), found in pools.items()}
    count = {worker: held.get(worker, 0) for worker in rooms}
    chosen: list[str] = []
    needs: list[Need] = []
    for load in loads:
        lack = f"no worker is left that answers and could hold {load.title}"
        for worker in sorted(count, key=lambda worker: count[worker]):
            if count[worker] >= most or (worker, load.device) not in pools:
                continue
            if worker in load.barred:
                lack += f" ({worker} could not)"
                continue
            need = Need(load.title, f"{load.device} of {worker}", load.nbytes)
            try:
                check_memory([*needs, need], named)
            except MemoryError as error:
                lack = str(error)
                continue
            chosen.append(worker)
            needs.append(need)
            count[worker] += 1
            break
        else:
            return chosen, lack
    return chosen, ""


async def _rooms(
    client: Client, workers: Collection[str], devices: Collection[str]
) -> tuple[Rooms, dict[str, str]]:
    """Ask workers, all at once, for their memory; return it, and who could hold no node, and why.

    Who does not answer is left out.
    """
    wanted = {"devices": sorted(devices)}
    asked = (_ask(client, worker, room, wanted, PROBE_TIMEOUT_S) for worker in workers)
    found = dict(zip(workers, await asyncio.gather(*asked), strict=True))
    unable = {worker: it.reason for worker, it in found.items() if isinstance(it, Unable)}
    return {worker: it for worker, it in found.items() if it and worker not in unable}, unable


async def end_strays(client: Client, identity: str, *, but: Collection[str]) -> None:
    """End what workers hold of a pipeline that nobody drives any more, and wait for that.

    Parameters
    ----------
    client : Client
    identity : str
        Of the pipeline's session.
    but : collection of str
        Workers that are not asked: they would not answer.
    """
    known = await known_workers(client)
    arguments = {"identity": identity}
    await asyncio.gather(
        *(
            _ask(client, worker, end_nodes, arguments, END_TIMEOUT_S)
            for worker in known
            if worker not in but
        )
    )


async def _ask(
    client: Client,
    worker: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    timeout_s: float,
) -> Any:
    """Have a worker call a function; return its answer, None where there is none in time.

    That is `Unable` where it can't import what is asked.
    """
    try:
        async with (
            asyncio.timeout(timeout_s),
            rpc(worker, connection_args=client.connection_args) as asked,
        ):
            answer = await asked.run(function=dumps(function), kwargs=dumps(arguments))
    except OSError:  # a timeout is one
        return None
    except Exception as error:  # the worker's own: a module may raise anything
        return Unable(" ".join(f"{type(error).__name__}: {error}".split()))
    return answer["result"] if answer["status"] == "OK" else None


def importable(actor: type[NodeActor]) -> bool:
    """Answer at all: who can't import this module, or the actor, does not come so far."""
    return issubclass(actor, NodeActor)


def room(devices: Sequence[str], dask_worker: Worker) -> dict[str, list[Pool]]:
    """Return the memory that a worker may take, of those of these devices that it has."""
    rooms = {CPU: pools_of(dask_worker)} if CPU in devices else {}
    if on_gpus := [device for device in devices if device != CPU]:
        from pipeinfer_dask.runtime.planning.gpus import (  # only who has GPUs needs torch
            gpu_count,
            gpu_pools,
        )

        count = gpu_count()
        numbers = {device: int(device.partition(":")[2] or 0) for device in on_gpus}
        there = [device for device, number in numbers.items() if number < count]
        rooms |= {device: [pool] for device, pool in gpu_pools(there).items()}
    return rooms


async def end_nodes(identity: str, dask_worker: Worker) -> None:
    """End all nodes that a worker holds of one session: run there, where nobody drives them.

    Parameters
    ----------
    identity : str
        Of the session.
    dask_worker : Worker
    """
    actors = [actor for actor in dask_worker.state.actors.values() if isinstance(actor, NodeActor)]
    await asyncio.gather(*(actor.end(identity) for actor in actors))
