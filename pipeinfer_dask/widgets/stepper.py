"""Several traces side by side on one clock, to be played and stepped through."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import anywidget
import ipywidgets
import traitlets
from IPython.display import HTML

from pipeinfer_dask.trace.picture import comparison_html
from pipeinfer_dask.trace.tables import window
from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.view import TraceView, module, style
from pipeinfer_dask.widgets.views import DraftTree, Timeline, TokenStream

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
        The moment, and the last one there is.
    steps : list of float, seconds
        Where the step buttons lead.
    speed : float
        Seconds of the trace in a second of playing.
    speeds : list of float
        What there is to choose from.
    """

    _esm = module("clock.js")
    _css = style()
    moment = traitlets.Float(0.0).tag(sync=True)
    last = traitlets.Float(0.0).tag(sync=True)
    steps = traitlets.List(traitlets.Float()).tag(sync=True)
    speed = traitlets.Float(1.0).tag(sync=True)
    speeds = traitlets.List(list(SPEEDS)).tag(sync=True)


class Stepper(ipywidgets.VBox):  # type: ignore[misc]
    """Plays traces, step by step or continuously, all on one clock.

    Parameters
    ----------
    *sources : Trace, Result, Simulation or Feed
        Finished; one to three can be taken in at a glance.
    tree : bool
        Whether to show the draft trees, too.
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

    def __init__(
        self, *sources: Any, tree: bool = False, titles: Sequence[str] | None = None
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
        kinds: list[type[TraceView]] = [Timeline, TokenStream, *([DraftTree] if tree else [])]
        last = max(feed.now for feed in feeds)
        moments = {0.0, last}
        for feed in feeds:
            history = feed.history
            moments.update(token.time - history.began for token in history.tokens)
            moments.update(run.started - history.began for run in history.runs.values())
        # A step shows what happened then: the rows hold single precision.
        steps = [moment + 1e-6 * max(1.0, moment) for moment in sorted(moments)]
        speed = next((speed for speed in SPEEDS if last / speed >= GLANCE_S), SPEEDS[-1])
        self.clock = Clock(last=last * (1 + 2e-6), steps=steps, speed=speed)
        self.views = [kind(feed, moment=0.0) for feed in feeds for kind in kinds]
        # One scale for all, or they could not be compared.
        parts = [window(feed.history, COLUMNS) for feed in feeds]
        span = max(ended - began for began, ended in parts)
        for view in self.views:
            if isinstance(view, Timeline):
                view.span = span
        for view in self.views:
            ipywidgets.jslink((self.clock, "moment"), (view, "moment"))
        super().__init__([self.clock, *self.views])

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

    def freeze(self) -> HTML:
        """Return a picture for a page that can't run the views themselves."""
        return HTML(self.to_html())

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/html": self.to_html()}
