"""The views of a trace; each has an ES module of its own in ``static``."""

from __future__ import annotations

from collections import defaultdict
from html import escape

import traitlets

from pipeinfer_dask.trace import Guess, History
from pipeinfer_dask.trace.picture import depths_html, metrics_html, text_html, timeline_html
from pipeinfer_dask.widgets.still import module, style
from pipeinfer_dask.widgets.view import TraceView

LISTED = 20
"""Most guesses of a tree that a frozen one lists."""


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
    """

    _esm = module("bars.js", "marks.js", "timeline.js")
    _css = style()
    shows = ("works", "bars", "waves", "tokens")
    label = traitlets.Unicode("Timeline").tag(sync=True)
    span = traitlets.Float(0.0).tag(sync=True)

    def to_html(self) -> str:
        """Return the timeline as an image, a part of a long one, with its legend and a table.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return timeline_html(self.feed.history)


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
        """Return the figures as a table, and acceptance by depth as another.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            history = self.feed.history
            return metrics_html(history.tally.metrics()) + depths_html(history)


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
        """Return the text and what its marks mean.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return text_html(self.feed.history)


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
        """Return the likeliest of the tree when it was largest, as nested lists.

        Returns
        -------
        str
            HTML without scripts.
        """
        with self.feed.lock:
            return _tree_html(self.feed.history)


def _tree_html(history: History) -> str:
    """Return the tree at the commitment before which most guesses were open."""
    changes = sorted(
        (time, change)
        for guess in history.guesses
        if guess.ahead
        for time, change in ((guess.made, 1), (guess.settled, -1))
        if time is not None
    )
    moment, most, live = history.began, 0, 0
    for time, change in changes:
        live += change
        if live > most:
            moment, most = time, live
    root = None
    for token in history.tokens:
        if token.time > moment:
            break
        root = token.guess
    if root is None:
        return "<div>Nothing has been guessed yet.</div>"

    def there(guess: Guess) -> bool:
        return guess.made <= moment and (guess.settled is None or guess.settled > moment)

    # A guess that has become text since was one then.
    reach = {root: 1.0}
    below = defaultdict[Guess, list[Guess]](list)  # what is ruled out later was a child then, too
    for guess in history.guesses:  # parents first
        if guess.parent in reach and there(guess):
            reach[guess] = reach[guess.parent] * guess.confidence
            below[guess.parent].append(guess)
    likeliest = set(sorted(reach, key=lambda guess: -reach[guess])[: LISTED + 1])

    def said(guess: Guess) -> str:
        word = f"<code>{escape(_visible(history.trace.text_of(guess.token)))}</code>"
        out = guess.settled is not None and not guess.kept
        parts = [f"{f'<s>{word}</s>' if out else word} {guess.confidence:.0%}"]
        if guess.placed is not None and guess.placed <= moment:
            parts.append(f"run {guess.run} slot {guess.slot}")
        later = "became text" if guess.kept else "ruled out later"
        parts.append("still open" if guess.settled is None else later)
        return ", ".join(parts)

    def listed(guess: Guess) -> str:
        items = "".join(
            f"<li>{said(each)}{listed(each)}</li>" for each in below[guess] if each in likeliest
        )
        return f"<ul>{items}</ul>" if items else ""

    text = escape(_visible(history.trace.text_of(root.token)))
    return (
        f"<div>What was guessed to follow <code>{text}</code> at "
        f"{(moment - history.began) * 1e3:.0f} ms: {most} tokens, the likeliest "
        f"{len(likeliest) - 1} of them{listed(root)}</div>"
    )


def _visible(text: str) -> str:
    """Return a token as it can be seen: spaces and line ends have signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
