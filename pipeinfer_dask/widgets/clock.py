"""The clock under views: plays traces that are over, and steps through their moments."""

from __future__ import annotations

from collections.abc import Iterable

import anywidget
import ipywidgets
import traitlets

from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.still import module, style

SPEEDS = (1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
GLANCE_S = 10.0
"""A trace is played at least so long at first, if the slowest speed allows."""


class Moments(ipywidgets.Widget):  # type: ignore[misc]
    """What a page's clock knows: the moment that is shown, and which there are.

    Attributes
    ----------
    moment, last : float, seconds
        The moment, -1 for the newest; and the last one there is, 0 while that is not known.
    steps : list of float, seconds
        Where the step buttons lead.
    speed : float
        Seconds of the trace in a second of playing.
    speeds : list of float
        What there is to choose from.
    """

    moment = traitlets.Float(-1.0).tag(sync=True)
    last = traitlets.Float(0.0).tag(sync=True)
    steps = traitlets.List(traitlets.Float()).tag(sync=True)
    speed = traitlets.Float(1.0).tag(sync=True)
    speeds = traitlets.List(list(SPEEDS)).tag(sync=True)

    def wind(self, feeds: Iterable[Feed], moment: float) -> None:
        """Take the steps of traces that are over, and go to a moment; no traces, no steps.

        :meta private:

        Parameters
        ----------
        feeds : iterable of Feed
            Those that are stepped through, on one clock.
        moment : float, seconds
            After the begin; -1 for the newest.
        """
        moments, last = {0.0}, 0.0
        for feed in feeds:
            history = feed.history
            moments.update(token.time - history.began for token in history.tokens)
            moments.update(run.started - history.began for run in history.runs.values())
            last = max(last, feed.now)
        moments.add(last)
        with self.hold_sync():
            # A step shows what happened then: the rows hold single precision.
            self.steps = [each + 1e-6 * max(1.0, each) for each in sorted(moments)]
            self.last = last * (1 + 2e-6)
            self.speed = next((each for each in SPEEDS if last / each >= GLANCE_S), SPEEDS[-1])
            self.moment = moment


class Clock(Moments, anywidget.AnyWidget):
    """Buttons and a slider for one moment of several views. It runs in the page alone."""

    _esm = module("clock.js")
    _css = style()
    picture = traitlets.Unicode().tag(sync=True)

    def link(self, views: Iterable[Moments]) -> None:
        """Have views show the clock's moment; the page sees to it."""
        for view in views:
            ipywidgets.jslink((self, "moment"), (view, "moment"))
