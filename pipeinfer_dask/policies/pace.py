"""How fast this pipeline is: learned from the runs that have come to their end."""

from __future__ import annotations

from collections.abc import Sequence

from pipeinfer_dask.protocol.messages import Span

PRIOR_SHARE = 0.15
"""What a further token adds to a run, as a share of the first one's time, until it's known."""

FARTHEST = 2.0
"""A run that takes longer than so many times what was expected counts as if it took that."""


class Pace:
    """Estimates of one pipeline's times, in seconds.

    Attributes
    ----------
    first : float
        A one-token run on the slowest stage; 0 until one is known.
    share : float
        What each further token of a run adds, as a share of `first`.
    plain : float
        From the start of a one-token run to its result when nothing is in its way, which is what
        plain decoding takes for a token; 0 until one is known.
    trip : float
        From the start of a run to the news that an idle first stage has turned to it.
    stages : int
        As many as have told of their work.
    """

    def __init__(self) -> None:
        self.stages = 1
        self.first = self.plain = self.trip = 0.0
        self.share = PRIOR_SHARE

    def stage_s(self, tokens: int) -> float:
        """Return how long the slowest stage takes for so many tokens."""
        return self.first * (1 + self.share * (tokens - 1))

    def ran(self, tokens: int, seconds: float | None, spans: Sequence[Span]) -> None:
        """Take in a run of ``tokens`` tokens that took ``seconds`` from start to result.

        None where others were in its way, who are no part of what it takes.
        """
        if tokens == 1 and seconds is not None:
            self.plain = _least_of_late(self.plain, seconds)
        if not spans:
            return
        self.stages = len(spans)
        took = max(span.ended - span.began for span in spans)
        if self.first > 0:
            # One run that was held up says nothing of the others.
            took = min(took, FARTHEST * self.stage_s(tokens))
        if tokens == 1 or took < self.first:
            self.first = _toward(self.first, took)
        if tokens > 1 and self.first > 0:  # there was a run of one token before: the first one is
            self.share = max(0.0, _toward(self.share, (took / self.first - 1) / (tokens - 1)))

    def taken_at_once(self, seconds: float) -> None:
        """Take in how long the news took that an idle first stage has turned to a run."""
        self.trip = _least_of_late(self.trip, seconds)


def _least_of_late(old: float, new: float) -> float:
    """Return the smaller one, where the old one slowly loses its validity."""
    return new if old == 0 else min(new, 1.002 * old)


def _toward(old: float, new: float) -> float:
    return new if old == 0 else old + 0.15 * (new - old)
