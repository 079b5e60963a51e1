"""What the scheduler says of its cluster. It is asked with a limit, for it may hang."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed import Client

SCHEDULER_TIMEOUT_S = 10.0
"""How long the scheduler may take to name its workers."""


class NoWorkerError(RuntimeError):
    """No worker can take over. The text says why."""


class NoSchedulerError(NoWorkerError):
    """Nobody knows of workers any more: none will come, either."""


async def identity_of(client: Client) -> dict[str, Any]:
    """Return what the scheduler says of itself, and of its ``workers`` by address.

    Parameters
    ----------
    client : Client
        This must run on its event loop.

    Raises
    ------
    NoSchedulerError
        If there is no scheduler any more, or it does not answer.
    """
    try:
        if client.scheduler is None or client.status != "running":
            raise OSError(f"the client is {client.status}")
        async with asyncio.timeout(SCHEDULER_TIMEOUT_S):
            identity: dict[str, Any] = await client.scheduler.identity()
    except OSError as error:  # a timeout is one, of no words
        within = f"{SCHEDULER_TIMEOUT_S:g} s"
        reason = str(error) or f"it gave no answer within {within}, see whether it still runs"
        raise NoSchedulerError(
            f"the cluster's scheduler can't be asked for workers: {reason}"
        ) from error
    return identity


async def known_workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return what the scheduler knows of each worker, by address: see `identity_of`."""
    workers: dict[str, dict[str, Any]] = (await identity_of(client))["workers"]
    return workers
