"""Which worker takes over from a lost one: a free one, else one that has room beside its own."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from distributed import Client, Worker, rpc
from distributed.protocol.pickle import dumps

from pipeinfer_dask.models.devices import CPU
from pipeinfer_dask.runtime.planning.memory import Load, Need, Pool, check_memory, pools_of

PROBE_TIMEOUT_S = 1.0
"""A worker that does not answer so long is no choice."""
NANNY_S = 5.0
"""A nanny that has lost its worker has started another one after so long, or never will."""
LOOK_S = 0.1
"""While a nanny is waited for, look for new workers so often."""
SCHEDULER_TIMEOUT_S = 10.0
"""How long the scheduler may take to name its workers."""

Rooms = dict[str, dict[str, list[Pool]]]
"""By worker and device: what memory it may take. A device that it lacks is not named."""


class NoWorkerError(RuntimeError):
    """No worker can take over. The text says why."""


class NoSchedulerError(NoWorkerError):
    """Nobody knows of workers any more: none will come, either."""


async def known_workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return what the scheduler knows of each worker, by address.

    Raises
    ------
    NoSchedulerError
        If there is no scheduler any more.
    """
    try:
        if client.scheduler is None or client.status != "running":
            raise OSError(f"the client is {client.status}")
        async with asyncio.timeout(SCHEDULER_TIMEOUT_S):
            identity = await client.scheduler.identity()
    except OSError as error:  # a timeout is one, of no words
        reason = str(error) or f"it gave no answer within {SCHEDULER_TIMEOUT_S:g} s"
        raise NoSchedulerError(
            f"the cluster's scheduler can't be asked for workers: {reason}"
        ) from error
    workers: dict[str, dict[str, Any]] = identity["workers"]
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
            rooms = await _rooms(client, some, devices)
            chosen, _ = _share_out(loads, rooms, {}, most=1)
            if len(chosen) == len(loads):
                return chosen
        if loop.time() >= ends:
            break
        await asyncio.sleep(LOOK_S)
    rooms = await _rooms(client, known, devices)
    chosen, lack = _share_out(loads, rooms, held, most=len(loads) + sum(held.values()))
    if len(chosen) < len(loads):
        raise NoWorkerError(lack)
    return chosen


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


async def _rooms(client: Client, workers: Collection[str], devices: Collection[str]) -> Rooms:
    """Ask workers, all at once, for their memory; who does not answer is left out."""
    found = await asyncio.gather(*(_room_of(client, worker, devices) for worker in workers))
    return {worker: room for worker, room in zip(workers, found, strict=True) if room}


async def _room_of(
    client: Client, worker: str, devices: Collection[str]
) -> dict[str, list[Pool]] | None:
    with suppress(OSError):  # a timeout is one
        async with (
            asyncio.timeout(PROBE_TIMEOUT_S),
            rpc(worker, connection_args=client.connection_args) as asked,
        ):
            answer = await asked.run(
                function=dumps(room), kwargs=dumps({"devices": sorted(devices)})
            )
            if answer["status"] == "OK":
                rooms: dict[str, list[Pool]] = answer["result"]
                return rooms
    return None


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
