"""What is worth its time where other requests fill the pipeline.

Then a stage is never idle, and speculating deeper only makes others wait. A request has one run
at a time, the root and what a draft has put below it, and what counts is how many tokens that
brings for the time that it takes from all. Waiting for one's turn says nothing of that: so
nothing here is learned from the time between a start and its result, but only from the time
that was spent computing.
"""

from __future__ import annotations

from pipeinfer_dask.policies.pace import Pace
from pipeinfer_dask.protocol.messages import Span

PRIOR_PASS = 0.15
"""A pass of the draft model, as a share of a run of one token, until it's known."""
MOST_PASSES = 12
"""Of one draft."""
STEP = 0.1
"""How fast passes are learned."""
AGAIN = 32
"""Where drafting does not pay, it's tried again after so many tokens."""


class Crowd:
    """Estimates for one text among others."""

    def __init__(self) -> None:
        self._pass = 0.0

    def drafted(self, span: Span) -> None:
        """Take in a draft: its span counts passes as layers."""
        if span.layers:
            took = (span.ended - span.began) / span.layers
            self._pass = took if self._pass == 0 else self._pass + STEP * (took - self._pass)

    def passes(
        self, agreement: float, pace: Pace, sharers: int, *, shares_cores: bool
    ) -> tuple[int, float]:
        """Return how many passes of the draft model pay, and what a token must be worth then.

        Parameters
        ----------
        agreement : float
            How often what the draft model puts first is right.
        pace : Pace
        sharers : int
            Requests on the pipeline.
        shares_cores : bool
            Whether stages and draft model take turns on the same cores.

        Returns
        -------
        passes : int
        least : float
            How likely the text has to reach a token that its place in a run is worth it.
        """
        stage = pace.first or 1.0
        one_pass = (self._pass or PRIOR_PASS * stage) / stage
        best, fastest, expected = 0, 0.0, 0.0
        for passes in range(MOST_PASSES + 1):
            expected += agreement**passes
            size = 1 + pace.share * passes
            drafting = one_pass * passes
            if shares_cores:
                took = pace.stages * size + drafting
            else:
                # The slowest stage, the drafter, or the whole way round with its share of others.
                took = max(size, drafting, (pace.stages * size + drafting) / sharers)
            if expected / took > fastest:
                best, fastest = passes, expected / took
        return best, pace.share * fastest * (pace.stages if shares_cores else 1)
