"""What is worth its time where draft model and target take turns on the same cores.

Then nothing is free: each pass of the draft model, and each token more in a run, is time in
which the text does not grow. It's worth that if it brings more tokens than the same time
brings otherwise, and that is known: the seconds that a token takes at present.
"""

from __future__ import annotations

from pipeinfer_dask.policies.pace import FARTHEST, PRIOR_SHARE

PRIOR_PASS = 0.1
"""A pass of the draft model, as a share of a run of one token, until it's known."""
PRIOR_RUNS, PRIOR_TOKENS = 6.0, 4
"""So many imagined runs of one token, and as many with so many tokens more."""
KEPT = 0.98
"""What a run counts when the next one has come."""
STEP = 0.1
"""How fast passes and turns are learned."""
LEAST_SHARE = 0.01
"""Of a run of one token: a token more never takes less."""
HIGHEST = 0.9
"""No chance is asked for that is higher than this."""


class Turns:
    """Estimates for one text, in seconds.

    Attributes
    ----------
    plain : float
        A run of one token, judged by the runs of late, whatever their size; 0 until there was one.
    place : float
        What each further token of a run adds.
    """

    def __init__(self) -> None:
        self.plain = self.place = 0.0
        self._pass = self._turn = 0.0
        self._tokens = 1.0
        self._since: float | None = None
        # Sums for a straight line through (further tokens, seconds).
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def ran(self, tokens: int, seconds: float) -> None:
        """Take in a run: its line is drawn anew, by least squares."""
        further = tokens - 1
        if self.plain == 0:
            self._turn = first = seconds / (1 + PRIOR_SHARE * further)
            self._pass = PRIOR_PASS * first
            self._add(PRIOR_RUNS, 0, first)
            self._add(PRIOR_RUNS, PRIOR_TOKENS, first * (1 + PRIOR_SHARE * PRIOR_TOKENS))
        else:
            # One that was held up says nothing of the others.
            seconds = min(seconds, FARTHEST * (self.plain + self.place * further))
        self._add(1.0, further, seconds)
        spread = self._xx - self._x**2 / self._n
        slope = (self._xy - self._x * self._y / self._n) / max(spread, 1e-9)
        mean, middle = self._y / self._n, self._x / self._n
        # A line that falls, or that starts below zero, is noise.
        self.place = min(max(slope, LEAST_SHARE * mean), mean / (middle + 1))
        self.plain = mean - self.place * middle

    def _add(self, weight: float, further: int, seconds: float) -> None:
        self._n = KEPT * self._n + weight
        self._x = KEPT * self._x + weight * further
        self._y = KEPT * self._y + weight * seconds
        self._xx = KEPT * self._xx + weight * further**2
        self._xy = KEPT * self._xy + weight * further * seconds

    def drafted(self, passes: int, seconds: float) -> None:
        """Take in a draft of so many passes, the first of which may have read a prompt."""
        self._pass += STEP * (min(seconds / passes, FARTHEST * self._pass) - self._pass)

    def committed(self, tokens: int, now: float, *, speculating: bool) -> None:
        """Take in what a turn has brought: a draft, if there was one, and a run."""
        if self._since is not None and speculating and self.plain > 0:
            seconds = min(now - self._since, FARTHEST * self._turn)
            self._turn += STEP * (seconds - self._turn)
            self._tokens += STEP * (tokens - self._tokens)
        self._since = now

    def interrupted(self) -> None:
        """Don't count the time since the last turn: it was not ours alone."""
        self._since = None

    @property
    def least_to_run(self) -> float:
        """How likely a token has to be that its place in a run is worth it."""
        return min(HIGHEST, self.place * self._tokens / self._turn)

    def least_to_extend(self, agreement: float) -> float:
        """Return how likely a token has to be that a pass for what follows it is worth it.

        Parameters
        ----------
        agreement : float
            How often what the draft model puts first is right.
        """
        price = (self._pass + self.place) * self._tokens / self._turn
        return min(HIGHEST, price / max(agreement, 0.01))
