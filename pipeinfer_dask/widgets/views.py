"""The views of a trace; each has an ES module of its own in ``static``."""

from __future__ import annotations

import math

import traitlets

from pipeinfer_dask.trace.charts import charts_html
from pipeinfer_dask.trace.picture import timeline_html
from pipeinfer_dask.trace.text import text_html
from pipeinfer_dask.trace.tree import tree_html
from pipeinfer_dask.widgets.still import module, style
from pipeinfer_dask.widgets.view import TraceView


class Timeline(TraceView):
    """Which node worked on what, and when: a row for the drafter and for each stage.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Channel
        What to show. Views of one `Channel` share all that travels, and turn together.
    **traits
        Of the widget, such as ``layout``.

    Attributes
    ----------
    span : float, seconds
        How much is seen at first; 0 for as much as lets single runs be told apart.
    ends : float, seconds
        When the longest of several on one scale ends; 0 for one that is alone.
    seen : list of float
        Which part the reader has chosen, where there are several: from and to, in seconds, and
        whether it follows the moment (1).
    led : bool
        Whether it goes without legend and buttons, since another of several has them for all.
    """

    _esm = module("bars.js", "marks.js", "words.js", "timeline.js")
    _css = style()
    shows = ("works", "bars", "waves", "tokens")
    label = traitlets.Unicode("Timeline").tag(sync=True)
    span = traitlets.Float(0.0).tag(sync=True)
    ends = traitlets.Float(0.0).tag(sync=True)
    seen = traitlets.List(traitlets.Float()).tag(sync=True)
    led = traitlets.Bool(False).tag(sync=True)

    def to_html(self) -> str:
        """Return the timeline as an image, a part of a long one, with its legend and a table.

        Where a moment is chosen, it is what was known then.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            moment = math.inf if self.moment < 0 else self.moment
            return timeline_html(self.feed.history, moment)


class Metrics(TraceView):
    """The figures, and how they came about.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Channel
        What to show. Views of one `Channel` share all that travels, and turn together.
    **traits
        Of the widget, such as ``layout``.
    """

    _esm = module("metrics.js")
    _css = style()
    shows = ("figures", "busy", "tokens", "guesses", "settled")
    label = traitlets.Unicode("Figures").tag(sync=True)

    def to_html(self) -> str:
        """Return the figures and charts of how they came about, and the same as tables.

        Where a moment is chosen, they are those of what was known then.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return charts_html(self._known)


class TokenStream(TraceView):
    """The text as it comes, each token marked by where it came from.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Channel
        What to show. Views of one `Channel` share all that travels, and turn together.
    **traits
        Of the widget, such as ``layout``.
    """

    _esm = module("text.js")
    _css = style()
    shows = ("tokens", "guesses", "settled")
    label = traitlets.Unicode("Text").tag(sync=True)

    def to_html(self) -> str:
        """Return the text, what its marks mean, and the rejected guesses struck through.

        Where a moment is chosen, it is what was known then.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return text_html(self._known, struck=True)


class DraftTree(TraceView):
    """The tokens that are guessed to follow the text, and what becomes of them.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Channel
        What to show. Views of one `Channel` share all that travels, and turn together.
    **traits
        Of the widget, such as ``layout``.
    """

    _esm = module("tree.js")
    _css = style()
    shows = ("tokens", "guesses", "placed", "settled")
    label = traitlets.Unicode("Draft tree").tag(sync=True)

    def to_html(self) -> str:
        """Return the likeliest of the tree, and the same as a table.

        Where no moment is chosen, it is as it was when it was full.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return tree_html(self.feed.history, self.moment if self.moment >= 0 else None)
