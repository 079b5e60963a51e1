"""What a cluster that scales itself must leave alone: the workers that hold a node, and spares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler, WorkerState

from pipeinfer_dask.runtime.planning.clusters import call_on, loop_of

logger = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 10.0
"""How long the scheduler may take to be told."""


class KeepNodes(SchedulerPlugin):
    """Keeps clusters that scale themselves from taking workers that hold a node.

    It leaves the scheduler with its client, whatever becomes of that.

    Parameters
    ----------
    name : str
        The plugin's own, on the scheduler.
    client : str
        Identity of the client that it is for.
    spares : int
        Further workers to leave.
    """

    def __init__(self, name: str, client: str, spares: int) -> None:
        self.name = name
        self.client = client
        self.spares = spares

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Return those of the workers that may be taken."""
        idle = [
            worker
            for worker in workers
            # Looked up anew each time: a node may have moved to another worker.
            if not any(str(task.key).startswith("pipeinfer-") for task in worker.actors)
        ]
        return idle[self.spares :]

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Leave with the client."""
        if client == self.client:
            scheduler.remove_plugin(name=self.name)


def keep_nodes(client: Client, spares: int, resources: ExitStack) -> None:
    """Protect nodes and spares until ``resources`` are closed, or the client is.

    A scheduler that knows nothing of this package can't, and a warning in the log says so.
    """
    name = f"pipeinfer-keep-nodes-{uuid4().hex}"
    loop = loop_of(client)

    async def within(asked: Awaitable[Any]) -> None:
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                await asked
        except TimeoutError:
            raise TimeoutError(f"no answer within {REGISTER_TIMEOUT_S:g} s") from None

    async def register() -> None:
        # On its own loop a client's calls can be awaited.
        await within(client.register_plugin(KeepNodes(name, client.id, spares), name=name))

    async def unregister() -> None:
        await within(client.unregister_scheduler_plugin(name))

    def end() -> None:
        if client.status != "running":
            return  # the plugin has left with it
        try:
            call_on(loop, unregister())
        except Exception as error:  # closing goes on
            logger.info("the scheduler could not be told of an engine's end: %s", error)

    try:
        call_on(loop, register())
    except Exception as error:
        logger.warning(
            "a cluster that scales itself may take workers that hold a node, as its scheduler "
            "can't be told: %s: %s",
            type(error).__name__,
            error,
        )
    else:
        resources.callback(end)
