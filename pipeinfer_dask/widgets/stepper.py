"""Several traces side by side on one clock, to be played and stepped through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import anywidget
import ipywidgets
import traitlets

from pipeinfer_dask.trace.picture import comparison_html
from pipeinfer_dask.trace.tables import window
from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.still import Still, module, style
from pipeinfer_dask.widgets.view import TraceView
from pipeinfer_dask.widgets.views import DraftTree, Metrics, Timeline, TokenStream

COLUMNS = 100
"""Of `window`: so much of the traces is seen at once."""
SPEEDS = (1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
GLANCE_S = 10.0
"""A trace is played at least so long at first, if the slowest speed allows."""


class Clock(anywidget.AnyWidget):
    """Buttons and a slider for one moment, in seconds. It runs in the page alone.

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

    _esm = module("clock.js")
    _css = style()
    moment = traitlets.Float(-1.0).tag(sync=True)
    last = traitlets.Float(0.0).tag(sync=True)
    steps = traitlets.List(traitlets.Float()).tag(sync=True)
    speed = traitlets.Float(1.0).tag(sync=True)
    speeds = traitlets.List(list(SPEEDS)).tag(sync=True)
    picture = traitlets.Unicode().tag(sync=True)

    def link(self, views: Iterable[TraceView]) -> None:
        """Have views show the clock's moment; the page sees to it."""
        for view in views:
            ipywidgets.jslink((self, "moment"), (view, "moment"))

    def wind(self, feeds: Iterable[Feed], moment: float) -> None:
        """Take the steps of traces that are over, and go to a moment; no traces, no steps."""
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


class Stepper(Still, ipywidgets.VBox):  # type: ignore[misc]
    """Plays traces, step by step or continuously, all on one clock.

    Parameters
    ----------
    *sources : Trace, Result, Simulation or Feed
        Finished; one to three can be taken in at a glance.
    metrics, tree : bool
        Whether to show the figures and the draft trees, too.
    titles : sequence of str, optional
        What to call them; by default their strategies.

    Attributes
    ----------
    clock : Clock
    views : list of TraceView

    Raises
    ------
    ValueError
        If there is no source, one that has not finished, or not a title for each.
    """

    label = "Stepper"

    def __init__(
        self,
        *sources: Any,
        metrics: bool = False,
        tree: bool = False,
        titles: Sequence[str] | None = None,
    ) -> None:
        if not sources:
            raise ValueError("expected at least one trace, got none: Stepper(result, ...)")
        feeds = [source if isinstance(source, Feed) else Feed(source) for source in sources]
        if any(feed.live for feed in feeds):
            raise ValueError(
                "expected finished generations, got one that goes on: wait for its result"
            )
        if titles is not None:
            if isinstance(titles, str) or len(titles) != len(feeds):
                raise ValueError(f"expected a title for each of {len(feeds)}, got {titles!r}")
            for feed, title in zip(feeds, titles, strict=True):
                feed.title = title
        kinds: list[type[TraceView]] = [Timeline, TokenStream]
        kinds += [kind for kind, asked in ((Metrics, metrics), (DraftTree, tree)) if asked]
        tables = dict.fromkeys(table for kind in kinds for table in kind.shows)
        self._channels = [Channel(feed, tables) for feed in feeds]
        self.clock = Clock()
        self.clock.wind(feeds, 0.0)
        self.views = [kind(each, moment=0.0) for each in self._channels for kind in kinds]
        # One scale for all, or they could not be compared.
        parts = [window(feed.history, COLUMNS) for feed in feeds]
        span = max(ended - began for began, ended in parts)
        for view in self.views:
            if isinstance(view, Timeline):
                view.span = span
        self.clock.link(self.views)
        super().__init__([self.clock, *self.views])

    @property
    def channels(self) -> Sequence[Channel]:
        """What is shown."""
        return self._channels

    @property
    def _hider(self) -> Clock:
        return self.clock

    def to_html(self) -> str:
        """Return all traces as they ended: timelines on one scale, then what else is shown."""
        feeds = [view.feed for view in self.views if isinstance(view, Timeline)]
        pictures = comparison_html([(feed.title, feed.history) for feed in feeds])
        rest = "".join(
            f"<div>{escape(view.feed.title)}, {view.label.lower()}: {view.to_html()}</div>"
            for view in self.views
            if not isinstance(view, Timeline)
        )
        return f"{pictures}<details><summary>Texts</summary>{rest}</details>"
