"""Several traces side by side on one clock, to be played and stepped through."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets

from pipeinfer_dask.trace.charts import charts_html
from pipeinfer_dask.trace.picture import comparison_html
from pipeinfer_dask.trace.tables import window
from pipeinfer_dask.trace.text import text_html
from pipeinfer_dask.trace.tree import tree_html
from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.clock import Clock
from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.still import Still
from pipeinfer_dask.widgets.view import TraceView
from pipeinfer_dask.widgets.views import DraftTree, Metrics, Timeline, TokenStream

COLUMNS = 100
"""Of `window`: so much of the traces is seen at once."""


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
            named = [isinstance(title, str) for title in _listed(titles)]
            if len(named) != len(feeds) or not all(named):
                raise ValueError(f"expected a title for each of {len(feeds)}, got {titles!r}")
            for feed, title in zip(feeds, titles, strict=True):
                feed.title = title
        kinds: list[type[TraceView]] = [TokenStream]
        kinds += [kind for kind, asked in ((Metrics, metrics), (DraftTree, tree)) if asked]
        tables = dict.fromkeys([*Timeline.shows, *(name for kind in kinds for name in kind.shows)])
        channels = [Channel(feed, tables) for feed in feeds]
        self.clock = Clock()
        self.clock.wind(feeds, 0.0)
        # What is to be compared is side by side, on one scale and in the same part of it.
        parts = [window(feed.history, COLUMNS) for feed in feeds]
        span = max(ended - began for began, ended in parts)
        ends = max(feed.now for feed in feeds) if len(feeds) > 1 else 0.0
        timelines = [
            Timeline(each, moment=0.0, span=span, ends=ends, led=number > 0)
            for number, each in enumerate(channels)
        ]
        for other in timelines[1:]:
            ipywidgets.jslink((timelines[0], "seen"), (other, "seen"))
        rest = [kind(each, moment=0.0) for kind in kinds for each in channels]
        self.views: list[TraceView] = [*timelines, *rest]
        self.clock.link(self.views)
        super().__init__([self.clock, *self.views])

    @property
    def _channels(self) -> Sequence[Channel]:
        """What is shown."""
        return [view.channel for view in self.views if isinstance(view, Timeline)]

    @property
    def _hider(self) -> Clock:
        return self.clock

    def to_html(self) -> str:
        """Return all traces as they ended: timelines on one scale, and what else is shown.

        Returns
        -------
        str
            HTML without scripts. The texts are folded: they are the same, or nearly so.
        """
        feeds = [view.feed for view in self.views if isinstance(view, Timeline)]
        pictures = comparison_html([(feed.title, feed.history) for feed in feeds])
        drawn, texts = "", ""
        for view in self.views:  # the clock's moment is the page's: what is here has ended
            story, title = view.feed.history, escape(view.feed.title)
            if isinstance(view, TokenStream):
                texts += f"<div>{title}: {text_html(story, struck=True)}</div>"
            elif not isinstance(view, Timeline):
                # Of a tree its fullest tells most.
                page = tree_html(story) if isinstance(view, DraftTree) else charts_html(story)
                drawn += f"<div><b>{title}</b>{page}</div>"
        return f"{pictures}{drawn}<details><summary>Texts</summary>{texts}</details>"


def _listed(titles: Any) -> Sequence[Any]:
    """Return what can be gone through; of anything else, as of a single text, nothing."""
    return titles if isinstance(titles, Sequence) and not isinstance(titles, str) else ()
