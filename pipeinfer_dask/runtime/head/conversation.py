"""Conversations, and who has which KV cache: texts that go on keep theirs while there is room.

Each stage and the drafter hold a cache for each request that runs. That of a conversation stays
between its turns, until so many others run that it has to give way: then the next turn reads
the whole text again, and nothing else is lost. That of a request which has failed stays until
nothing of it is under way: what came later would make it anew, and nobody would let go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.tree import Held
from pipeinfer_dask.protocol.messages import (
    AWAY,
    Drafted,
    DrafterLost,
    Event,
    Release,
    RunDone,
    StageLost,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.pipeline.interface import PipelineCommand


@dataclass(slots=True, eq=False)
class Conversation:
    """A text that several requests go on with, one after another.

    Attributes
    ----------
    cache : int
        The number of its KV cache, which no request and no other conversation has.
    held : list of Held
        What the cache holds between two requests.
    request : int
        The last one.
    generation, draft_generation : int
        Of the pipeline that holds it; another one holds nothing.
    closed : bool
        Whether no further request will come.
    """

    cache: int
    held: list[Held] = field(default_factory=list)
    request: int = 0
    generation: int = 0
    draft_generation: int = 0
    closed: bool = False


class Caches:
    """Keeps count of the caches. Belongs to the head's loop.

    Parameters
    ----------
    most : int
        Caches that each stage may hold.
    send : callable
        Tells the pipeline which of them are free.
    """

    def __init__(self, most: int, send: Callable[[Release], None]) -> None:
        self._most = most
        self._send = send
        # Between two requests, the one that has waited longest first.
        self._idle: dict[Conversation, None] = {}
        # What the pipeline has not answered yet: runs and drafts, each with its request.
        self._runs: set[tuple[int, int]] = set()
        self._drafts: set[tuple[int, int]] = set()
        # Requests that are over while something of them is under way, by their caches.
        self._leaving: dict[int, int] = {}

    def has_room(self, running: int, cache: int) -> bool:
        """Return whether a request with this cache may begin beside so many that run."""
        return running + len(self._leaving) < self._most and cache not in self._leaving

    def sent(self, command: PipelineCommand) -> None:
        """Take note of what the pipeline is asked for."""
        if isinstance(command, StartRun):
            self._runs.add((command.request, command.run))
        elif isinstance(command, StartDraft):
            self._drafts.add((command.request, command.draft))

    def heard(self, event: Event) -> bool:
        """Take note of what came of it; return whether that has made room."""
        match event:
            case RunDone():
                self._runs.discard((event.request, event.run))
            case Drafted():
                self._drafts.discard((event.request, event.draft))
            case StageLost():
                self._runs.clear()
            case DrafterLost():
                self._drafts.clear()
        gone = [
            cache for cache, request in self._leaving.items() if not self._is_under_way(request)
        ]
        for cache in gone:
            self._send(Release(self._leaving.pop(cache), 0, cache))
        return bool(gone)

    def _is_under_way(self, request: int) -> bool:
        return any(request == other for other, _ in (*self._runs, *self._drafts))

    def take(
        self,
        conversation: Conversation | None,
        *,
        running: int,
        generation: int,
        draft_generation: int,
    ) -> list[Held]:
        """Have a cache for a request that begins; return what it holds.

        Parameters
        ----------
        conversation : Conversation, optional
            That the request goes on with.
        running : int
            Other requests that run.
        generation, draft_generation : int
            Of the pipeline.
        """
        if conversation is not None:
            self._idle.pop(conversation, None)
        self.make_room(self._most - 1 - running - len(self._leaving))
        if conversation is None:
            return []
        held, conversation.held = conversation.held, []
        if generation == AWAY or conversation.generation != generation:
            return []
        if conversation.draft_generation != draft_generation:
            return [replace(one, drafted=False) for one in held]
        return held

    def give_back(self, machine: Machine, conversation: Conversation | None) -> None:
        """Take note that nothing of a request is in flight any more."""
        request = machine.request
        if conversation is None or conversation.closed:
            self._send(Release(request.id, machine.generation, request.cache_id))
            return
        self._send(Release(request.id, machine.generation, None))
        conversation.held = machine.tree.held()
        conversation.request = request.id
        conversation.generation = machine.generation
        conversation.draft_generation = machine.draft_generation
        self._idle[conversation] = None

    def drop(self, request: int, cache: int) -> None:
        """Give up the cache of a request that has failed, once nothing of it is under way."""
        if self._is_under_way(request):
            self._leaving[cache] = request
        else:
            self._send(Release(request, 0, cache))

    def close(self, conversation: Conversation) -> None:
        """Give up a conversation's cache: at once, or when its request is over."""
        conversation.closed = True
        if conversation in self._idle:
            self._evict(conversation)

    def make_room(self, most: int) -> None:
        """Have no more than ``most`` conversations keep a cache between two requests."""
        while len(self._idle) > max(0, most):
            self._evict(next(iter(self._idle)))

    def _evict(self, conversation: Conversation) -> None:
        del self._idle[conversation]
        conversation.held = []
        self._send(Release(conversation.request, conversation.generation, conversation.cache))
