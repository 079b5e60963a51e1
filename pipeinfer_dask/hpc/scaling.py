"""A cluster that scales itself keeps as many workers as the engines on it need."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from distributed.deploy.adaptive_core import AdaptiveCore


@dataclass(slots=True)
class _Held:
    """A minimum as it was, who has raised it, and how many workers there were to be last."""

    minimum: int
    floors: set[Floor] = field(default_factory=set)
    planned: int = 0


_held: WeakKeyDictionary[AdaptiveCore, _Held] = WeakKeyDictionary()
_lock = threading.Lock()


class Floor:
    """What an engine needs of a cluster that scales itself.

    Dask cancels jobs whose worker has not come yet without asking anybody: its minimum alone
    holds it back. Engines are closed by any thread, while the cluster's looks after its jobs.

    Parameters
    ----------
    cluster : Cluster or None
    workers : int
        No fewer, until `release`.
    """

    def __init__(self, cluster: Any, workers: int) -> None:
        self.workers = workers
        self.paused = False
        self._cluster = cluster
        self._released = False

    @property
    def scales(self) -> bool:
        """Whether the cluster scales itself."""
        scaling = getattr(self._cluster, "_adaptive", None)
        return getattr(scaling, "periodic_callback", None) is not None  # else it was stopped

    def hold(self, *, paused: bool = False) -> None:
        """Raise the minimum to what is needed. For the cluster's loop.

        Again and again: who calls ``cluster.adapt`` begins another scaling, with its own minimum.

        Parameters
        ----------
        paused : bool
            Whether no job may be submitted now. Then the minimum is no more than there is, and
            keeps that.
        """
        scaling = getattr(self._cluster, "_adaptive", None)
        if not isinstance(scaling, AdaptiveCore):
            return
        with _lock:
            if not self._released:
                held = _held.setdefault(scaling, _Held(scaling.minimum))
                held.floors.add(self)
                held.planned = len(scaling.plan)
                self.paused = paused
                _raise(scaling, held)

    def release(self) -> None:
        """Give the minimum back, or what other engines need."""
        with _lock:
            self._released = True
            for scaling, held in list(_held.items()):
                if self in held.floors:
                    held.floors.remove(self)
                    _raise(scaling, held)
                    if not held.floors:
                        del _held[scaling]


def _raise(scaling: AdaptiveCore, held: _Held) -> None:
    minimum = max([held.minimum, *(floor.workers for floor in held.floors)])
    paused = any(floor.paused for floor in held.floors)
    scaling.minimum = min(minimum, held.planned) if paused else minimum
