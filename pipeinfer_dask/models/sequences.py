"""What a shard keeps of each text: keys and values, who attends to what, how it is picked from.

What one text is done with serves the next as it is: nothing in a cache needs to be reset, and
storage that has grown, or that passes were captured over, is worth keeping. So a shard holds as
many caches as texts were ever under way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeinfer_dask.models.ancestry import Ancestry
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.graphs import StaticPasses
from pipeinfer_dask.models.sampling import Sampler


@dataclass(slots=True)
class SequenceState:
    """What belongs to one text.

    Attributes
    ----------
    cache : SlotCache
    passes : StaticPasses or None
        Those that were captured over this cache, if that is done.
    ancestry : Ancestry
    sampler : Sampler or None
        The one of the settings that were used last.
    """

    cache: SlotCache
    passes: StaticPasses | None = None
    ancestry: Ancestry = field(default_factory=Ancestry)
    sampler: Sampler | None = None


class Sequences:
    """The states by the number of their cache.

    Parameters
    ----------
    make : callable
        Makes a cache where no other can be used again.
    """

    def __init__(self, make: Callable[[], SlotCache]) -> None:
        self._make = make
        self._held: dict[int, SequenceState] = {}
        self._spare: list[SequenceState] = []

    @property
    def nbytes(self) -> int:
        """Bytes that all caches hold, those that wait for another text too."""
        return sum(state.cache.nbytes for state in (*self._held.values(), *self._spare))

    def of(self, number: int) -> SequenceState:
        """Return the state of this number; one that is new has a cache of its own."""
        state = self._held.get(number)
        if state is None:
            state = self._spare.pop() if self._spare else SequenceState(self._make())
            self._held[number] = state
        return state

    def release(self, number: int) -> None:
        """Let the next text have the state of this number, if there is one."""
        if (state := self._held.pop(number, None)) is not None:
            self._spare.append(state)
