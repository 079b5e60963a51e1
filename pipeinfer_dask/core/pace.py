"""How fast this pipeline is: learned from the runs that have come to their end."""

from __future__ import annotations

from collections.abc import Sequence

from pipeinfer_dask.core.messages import Span

PRIOR_SHARE = 0.1
"""What a further token adds to a run, as a share of the first one's time, until it's known."""


class Pace:
    """Estimates of one pipeline's times, in seconds.

    Attributes
    ----------
    first : float
        A one-token run on the first stage; 0 until one is known.
    share : float
        What each further token of a run adds, as a share of `first`.
    latency : float
        From the start of a run to its result; 0 until one is known.
    trip : float
        From the start of a run to the news that an idle first stage has turned to it.
    stages : int
        As many as have told of their work.
    """

    def __init__(self) -> None:
        self.stages = 1
        self.first = self.latency = self.trip = 0.0
        self.share = PRIOR_SHARE

    def stage_s(self, tokens: int) -> float:
        """Return how long the first stage takes for so many tokens."""
        return self.first * (1 + self.share * (tokens - 1))

    def ran(self, tokens: int, seconds: float, spans: Sequence[Span]) -> None:
        """Take in a run of ``tokens`` tokens that took ``seconds`` from start to result."""
        self.latency = _toward(self.latency, seconds)
        if not spans:
            return
        self.stages = len(spans)
        took = spans[0].ended - spans[0].began
        if tokens == 1:
            self.first = _toward(self.first, took)
        elif self.first > 0:  # there was a run of one token before: the first one is
            self.share = max(0.0, _toward(self.share, (took / self.first - 1) / (tokens - 1)))

    def taken_at_once(self, seconds: float) -> None:
        """Take in how long the news took that an idle first stage has turned to a run."""
        # The least of late: more than that is something else than the way.
        self.trip = seconds if self.trip == 0 else min(seconds, 1.002 * self.trip)


def _toward(old: float, new: float) -> float:
    return new if old == 0 else old + 0.15 * (new - old)
