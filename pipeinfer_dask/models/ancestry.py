"""Which slots a token attends to: the attention mask, kept on every stage and never sent.

A token attends to its parent, to all that its parent attends to, and to itself. So a
stage that has seen a token's ancestors can tell its row of the mask from its parent's
slot alone. Slots are handed out lowest first, so the row of a token is nearly always
a few spans of neighbouring slots, however long the text, and that is how rows are
kept: holes close by themselves when later tokens take the slots of pruned ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeinfer_dask.protocol.messages import Batch

Spans = tuple[tuple[int, int], ...]
"""Slots as half-open spans [start, stop), ascending, no two of them touching."""


@dataclass(frozen=True, slots=True)
class Attendance:
    """What the tokens of one batch attend to.

    Attributes
    ----------
    mask : ndarray of bool, [n, filled]
        True where the token attends to the slot.
    positions : ndarray of int64, [filled]
        The place in its text of the token in each slot; 0 where none was.
    """

    mask: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.int64]

    @property
    def filled(self) -> int:
        """The highest slot attended to, plus one: as much of the cache as is looked at."""
        return len(self.positions)


class Ancestry:
    """The ancestors of the token in each slot.

    Nothing is ever reset: a text's first token has no parent, and a token that takes a
    freed slot replaces what was there.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Spans] = {}
        self._tokens = np.zeros(0, dtype=np.int64)
        self._positions = np.zeros(0, dtype=np.int64)

    def attend(self, batch: Batch) -> Attendance:
        """Take in a batch, parents before children, and tell what its tokens attend to."""
        rows = []
        for slot, parent in zip(batch.slots, batch.parents, strict=True):
            # A parent that is not here is the root's, or belongs to a run that was skipped:
            # then this run is cancelled too, and nobody will look at what it attends to.
            row = _joined(self._rows.get(parent, ()), slot)
            self._rows[slot] = row
            rows.append(row)
        filled = max(row[-1][1] for row in rows)
        self._place(batch, filled)
        mask = np.zeros((len(rows), filled), dtype=np.bool_)
        for attended, row in zip(mask, rows, strict=True):
            for start, stop in row:
                attended[start:stop] = True
        return Attendance(mask, self._positions[:filled].copy())

    def path(self, slot: int) -> npt.NDArray[np.int64]:
        """Return the token ids of the text up to the token in this slot, [n]."""
        held = np.concatenate([np.arange(*span) for span in self._rows[slot]])
        # In the order of positions, not at them: what belongs to a cancelled run may have gaps.
        order = self._positions[held].argsort(kind="stable")
        path: npt.NDArray[np.int64] = self._tokens[held[order]]
        return path

    def _place(self, batch: Batch, filled: int) -> None:
        if filled > len(self._positions):
            more = np.zeros(2 * filled - len(self._positions), dtype=np.int64)
            self._tokens = np.concatenate((self._tokens, more))
            self._positions = np.concatenate((self._positions, more))
        slots = list(batch.slots)
        self._tokens[slots] = batch.tokens
        self._positions[slots] = batch.positions


def _joined(spans: Spans, slot: int) -> Spans:
    start, stop = slot, slot + 1
    below, above = [], []
    for span in spans:
        if span[1] < start:
            below.append(span)
        elif span[0] > stop:
            above.append(span)
        else:
            start, stop = min(start, span[0]), max(stop, span[1])
    return (*below, (start, stop), *above)
