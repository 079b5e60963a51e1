"""What all views of a trace share: following it, and standing still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, ClassVar

import anywidget
import traitlets
from ipywidgets import widget_serialization

from pipeinfer_dask.trace import History
from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.clock import Moments
from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.still import Still


class TraceView(Still, Moments, anywidget.AnyWidget):
    """A view of a trace, live or not.

    A view with a channel of its own has a clock of its own, too, once its trace is over.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation, Feed or Channel
        What to show. Views of one `Channel` share all that travels, and turn together.

    Attributes
    ----------
    channel : Channel
    moment : float, seconds
        What is shown is the state at this time after the begin; -1 for the newest.
    alone : bool
        Whether the channel is its own.

    Raises
    ------
    ValueError
        If the source has no trace, or is a channel without a table that the view needs, or if
        there is no such trait.
    """

    shows: ClassVar[Sequence[str]]
    """The tables that the view needs."""

    channel = traitlets.Instance(Channel).tag(sync=True, **widget_serialization)
    alone = traitlets.Bool(False).tag(sync=True)
    picture = traitlets.Unicode().tag(sync=True)

    def __init__(self, source: Any, **traits: Any) -> None:
        for name in traits:  # a widget would take any, and only warn
            if name not in (known := self.class_trait_names()):
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "look for a slip"
                raise ValueError(f"there is no setting {name!r} of a {type(self).__name__}: {hint}")
        alone = not isinstance(source, Channel)
        channel = Channel(source, self.shows) if alone else source
        if lacking := set(self.shows).difference(channel.tables):
            raise ValueError(
                f"expected a channel with {', '.join(self.shows)}, got one without "
                f"{', '.join(sorted(lacking))}: leave its tables out to have all"
            )
        super().__init__(channel=channel, alone=alone, **traits)
        if alone:
            channel.at_end.append(self._wind)
            if not self.feed.live:
                self._wind()

    @property
    def feed(self) -> Feed:
        """What is shown."""
        return self.channel.feed

    @property
    def _channels(self) -> Sequence[Channel]:
        """What is shown."""
        return (self.channel,)

    @property
    def _known(self) -> History:
        """The story as far as it was known at the moment that is chosen; all, where none is."""
        story = self.feed.history
        if self.moment < 0:
            return story
        known = [entry for entry in story.trace if entry[0] - story.began <= self.moment]
        return History(replace(story.trace, records=known))

    @property
    def _hider(self) -> Any:
        return self

    def show(self, source: Any) -> None:
        """Show another trace from now on, in the same place.

        Parameters
        ----------
        source : Trace, Generation, Result, Simulation or Feed
            What to show.
        """
        if self.last:
            self.wind([], -1.0)
        self.channel.show(source)

    def close(self) -> None:
        """Close the view; the generation goes on."""
        if self.alone and self.trait_has_value("channel"):
            self.channel.close()
        super().close()

    def _wind(self) -> None:
        self.wind([self.feed], self.moment)
