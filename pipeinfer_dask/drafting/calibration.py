"""What a draft model's confidences are worth: learned from what the target puts there.

A model of 2 layers may say 0.9 and be right 7 times in 10. Whoever weighs one branch
against another needs the 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence

BINS = 12
"""Confidences are told apart in this many steps."""
PRIOR = 12.0
"""So many imagined tokens in each bin for which the confidence was just right."""


def worth(confidence: float, table: Sequence[float]) -> float:
    """Return what a confidence is worth by a table for 0, 1/n, ..., 1; itself without one."""
    if not table:
        return confidence
    place = min(max(confidence, 0.0), 1.0) * (len(table) - 1)
    below = min(int(place), len(table) - 2)
    return table[below] + (place - below) * (table[below + 1] - table[below])


class Calibration:
    """Counts, for confidences of about the same size, how often the token came.

    Attributes
    ----------
    table : tuple of float, [BINS + 1]
        For `worth`: what confidences of 0, 1/BINS, ..., 1 have turned out to be worth.
    """

    def __init__(self) -> None:
        self._seen = [0.0] * (BINS + 1)
        self._came = [0.0] * (BINS + 1)
        self.table: tuple[float, ...] = ()

    def learn(self, confidence: float, came: bool) -> None:
        """Take in one token that the draft model had proposed, and whether the target agreed."""
        place = min(max(confidence, 0.0), 1.0) * BINS
        below = min(int(place), BINS - 1)
        share = place - below
        for index, part in ((below, 1 - share), (below + 1, share)):
            self._seen[index] += part
            # Relative to the confidence itself: then a bin's width does no harm.
            self._came[index] += part * (came - confidence)
        self.table = tuple(
            min(1.0, max(0.0, index / BINS + came / (seen + PRIOR)))
            for index, (seen, came) in enumerate(zip(self._seen, self._came, strict=True))
        )
