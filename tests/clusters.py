"""Small clusters for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client, LocalCluster


def local_cluster(**options: Any) -> LocalCluster:
    """Return a cluster of this process alone, unless the options say otherwise.

    Without limits of memory, which would be those of this process, and at a port that is free.
    """
    settings: dict[str, Any] = {
        "threads_per_worker": 1,
        "processes": False,
        "memory_limit": 0,
        "dashboard_address": "127.0.0.1:0",
    }
    return LocalCluster(**settings | options)


@contextmanager
def client_of(workers: int, **options: Any) -> Iterator[Client]:
    """Give a client of such a cluster."""
    with (
        local_cluster(n_workers=workers, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
