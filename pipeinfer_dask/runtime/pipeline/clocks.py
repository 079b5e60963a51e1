"""A node's clock against ours, as pings tell of it: never for good, for clocks drift."""

from __future__ import annotations

from math import inf

DRIFT = 1e-4
"""Seconds by which two clocks part in a second, at most: a crystal is held to half of it."""


class PeerClock:
    """What is known of a node's clock.

    A ping says where it stands within half a round trip; from then on that is known less well
    by the second. The ping that says it best now is believed, unless a later one can't be true
    along with it: then the node's clock was set, or its machine has slept.

    Attributes
    ----------
    offset : float, seconds
        The node's clock minus ours.
    """

    def __init__(self) -> None:
        self.offset = 0.0
        self._error = inf
        self._heard = 0.0

    def hear(self, sent: float, clock: float, arrived: float) -> None:
        """Take a ping.

        Parameters
        ----------
        sent, arrived : float, seconds
            When it left and when its answer was here, on our clock.
        clock : float, seconds
            What the node's clock said in between.
        """
        offset, error = clock - (sent + arrived) / 2, (arrived - sent) / 2
        before = self._error + DRIFT * (arrived - self._heard)
        if error <= before or abs(offset - self.offset) > error + before:
            self.offset, self._error, self._heard = offset, error, arrived
