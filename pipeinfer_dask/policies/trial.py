"""Whether speculation pays: measured against plain decoding, in the same text.

While tokens come clearly faster than a run alone takes from end to end, nothing needs to
be tried. Where they don't (a draft model that is never right, or that takes the target's
cores), a few tokens are decoded plainly. If these come faster, speculation pauses, for
longer each time.
"""

from __future__ import annotations

WINDOW = 16
"""Tokens after which speculation is judged."""
PROBE = 6
"""Tokens that are decoded plainly to compare."""
SETTLE = 2
"""Tokens after a change that don't count: runs of before may still be in flight."""
SHORTEST_PAUSE, LONGEST_PAUSE = 32, 1024
"""Tokens."""
HOPELESS = 1.2
"""A window is over, too, when it takes so many times as long as plain decoding would."""
CLEARLY = 0.9
"""Speculation is above suspicion while a token takes less than this share of plain's time."""


class Trial:
    """Hears of each commit, and says whether to speculate.

    Attributes
    ----------
    speculate : bool
    """

    def __init__(self) -> None:
        self.speculate = True
        self._tokens = 0
        self._since: float | None = None
        self._length = WINDOW
        self._settling = 0
        self._pause = SHORTEST_PAUSE
        self._speculating_s = 0.0
        self._probing = False

    def committed(self, tokens: int, now: float, plain_s: float, *, clear: bool = True) -> None:
        """Take in a commit.

        Parameters
        ----------
        tokens : int
        now : float, seconds
        plain_s : float, seconds
            What plain decoding would take for a token, by all that is known; 0 if nothing is.
        clear : bool
            Whether nothing of earlier speculation is left in the pipeline, or before a slow link.
        """
        if not self.speculate and not clear:
            self._settling = max(self._settling, 1)
        if self._settling > 0 or self._since is None:
            self._settling -= tokens
            self._since = now
            return
        self._tokens += tokens
        hopeless = self.speculate and now - self._since > HOPELESS * self._length * plain_s
        if plain_s == 0 or (self._tokens < self._length and not hopeless):
            return
        token_s = (now - self._since) / self._tokens
        self._since = now
        if self.speculate:
            if token_s > CLEARLY * plain_s:
                self._speculating_s = token_s
                self._turn(speculate=False, length=PROBE)
                self._probing = True
            else:
                self._pause = max(SHORTEST_PAUSE, self._pause // 2)
                self._turn(speculate=True, length=WINDOW)
        elif self._probing and token_s < self._speculating_s:
            self._turn(speculate=False, length=self._pause)
            self._probing = False
            self._pause = min(LONGEST_PAUSE, 3 * self._pause)
        else:
            # Either plain decoding was no better, or the pause is over.
            self._turn(speculate=True, length=self._pause if self._probing else WINDOW)
            self._probing = False

    def interrupted(self) -> None:
        """Begin the comparison at hand anew: what went by was not ours alone."""
        self._since = None
        self._tokens = 0

    def _turn(self, *, speculate: bool, length: int) -> None:
        self._settling = 0 if speculate == self.speculate else SETTLE
        self.speculate = speculate
        self._length = length
        self._tokens = 0
