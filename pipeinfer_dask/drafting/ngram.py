"""Drafting without a model (prompt lookup): by what followed the same tokens before.

The last tokens of a path are looked for earlier on the same path, which is the prompt, what
was generated and what was drafted. What came after them there is proposed. All n-grams on the
path are indexed; the index is a stack, so that going from one branch to another costs no more
than the tokens in which they differ.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.protocol.sampling import Sampling

NGRAM: Literal["ngram"] = "ngram"
"""What to give in place of a draft model."""
LONGEST = 4
"""Tokens that are compared at most."""
RECENT = 16
"""Of an n-gram that occurred more often, only so many occurrences count: the last ones."""
DOUBT = 2.0
"""An n-gram's word counts against the shorter one's like that of so many occurrences."""


@dataclass(slots=True, eq=False)
class _Place:
    """A token, and the way to it."""

    token: int
    before: _Place | None
    depth: int


class NgramDraft:
    """A `DraftModel` that computes nothing: see the top of this file."""

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}

    def candidates(
        self,
        batch: Batch,
        frontier: int,
        *,
        width: int,
        stopped: Callable[[], bool],
        sampling: Sampling | None = None,
        cache: int = 0,
    ) -> list[list[tuple[int, float]]] | None:
        """Say what may come next; see `DraftModel`. Where nothing is known it's an empty list."""
        if stopped():
            return None
        return self._texts.setdefault(cache, _Text()).candidates(batch, frontier, width)

    def release(self, cache: int) -> None:
        """Forget a text; see `DraftModel`."""
        self._texts.pop(cache, None)


class _Text:
    """What is known of one text."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        # The path that is indexed.
        self._path: list[_Place] = []
        self._tokens: list[int] = []
        # Where on the path each n-gram of 1 to LONGEST tokens ends, in order.
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def candidates(self, batch: Batch, frontier: int, width: int) -> list[list[tuple[int, float]]]:
        """Take in a batch, and say what may come next."""
        for token, slot, parent in zip(batch.tokens, batch.slots, batch.parents, strict=True):
            before = None if parent == NO_PARENT else self._places[parent]
            if before is None:
                self._places.clear()  # it begins anew
            self._places[slot] = _Place(token, before, before.depth + 1 if before else 0)
        found = []
        for slot in batch.slots[len(batch) - frontier :]:
            self._turn_to(self._places[slot])
            found.append(heapq.nlargest(width, self._following().items(), key=lambda item: item[1]))
        return found

    def _following(self) -> dict[int, float]:
        """Return how likely each token comes after the path, as far as the path itself tells.

        The longer n-gram has the first word; the fewer its occurrences, the more is left to
        the shorter ones.
        """
        tokens = self._tokens
        chances: dict[int, float] = {}
        for n in range(1, min(LONGEST, len(tokens)) + 1):
            # The last one of all is the end of the path: nothing has followed it yet.
            ends = self._ends[tuple(tokens[-n:])][-RECENT - 1 : -1]
            if not ends:
                break
            total = len(ends) + DOUBT
            chances = {token: chance * DOUBT / total for token, chance in chances.items()}
            for end in reversed(ends):  # of equal chances the latest comes first
                token = tokens[end + 1]
                chances[token] = chances.get(token, 0.0) + 1 / total
        return chances

    def _turn_to(self, place: _Place) -> None:
        """Index the path that ends here."""
        further: list[_Place] = []
        common: _Place | None = place
        while common is not None and not self._holds(common):
            further.append(common)
            common = common.before
        for _ in range(len(self._path) - (common.depth + 1 if common else 0)):
            for ngram in self._ngrams():
                ends = self._ends[ngram]
                ends.pop()
                if not ends:
                    del self._ends[ngram]
            self._path.pop()
            self._tokens.pop()
        for new in reversed(further):
            self._path.append(new)
            self._tokens.append(new.token)
            for ngram in self._ngrams():
                self._ends.setdefault(ngram, []).append(new.depth)

    def _holds(self, place: _Place) -> bool:
        return place.depth < len(self._path) and self._path[place.depth] is place

    def _ngrams(self) -> list[tuple[int, ...]]:
        """Return the n-grams at the end of the path."""
        tail = tuple(self._tokens[-LONGEST:])
        return [tail[start:] for start in range(len(tail))]
