"""What all views of a trace share: following it, and standing still.

Rows travel as binary messages while there are new ones. A page that comes later asks for all
of them. Once nothing more can come they are the widget's state, so that a saved notebook has
them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, ClassVar

import anywidget
import traitlets
from IPython.display import HTML

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace.picture import LOOKS, ORIGINS
from pipeinfer_dask.trace.tables import node_name
from pipeinfer_dask.widgets.feed import TABLES, Feed


def module(*parts: str) -> str:
    """Return the ES module of a view: what all have in common, then its own parts."""
    static = files(__package__) / "static"
    return "\n".join((static / part).read_text("utf-8") for part in ("common.js", *parts))


def style() -> str:
    """Return the style sheet of all views."""
    return (files(__package__) / "static" / "style.css").read_text("utf-8")


class TraceView(anywidget.AnyWidget):
    """A view of a trace, live or not.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Feed
        What to show. Views of one `Feed` share its work.

    Attributes
    ----------
    moment : float, seconds
        What is shown is the state at this time after the begin; -1 for the newest.
    complete : bool
        Whether all there is to come is here.

    Raises
    ------
    ValueError
        If the source has no trace.
    """

    shows: ClassVar[Sequence[str]]
    """The tables that the view needs."""
    label: ClassVar[str]
    """What it is, in words."""

    moment = traitlets.Float(-1.0).tag(sync=True)
    complete = traitlets.Bool(False).tag(sync=True)
    rows = traitlets.Dict().tag(sync=True)
    texts = traitlets.Dict().tag(sync=True)
    about = traitlets.Dict().tag(sync=True)

    def __init__(self, source: Any, **traits: Any) -> None:
        self.feed = source if isinstance(source, Feed) else Feed(source)
        self._sent = dict.fromkeys(self.shows, 0)
        super().__init__(about=self._about(), **traits)
        self.on_msg(self._asked)
        self._attach()

    def show(self, source: Any) -> None:
        """Show another trace from now on, in the same place."""
        feed = source if isinstance(source, Feed) else Feed(source)
        self.feed.unsubscribe(self)
        self.feed = feed
        with self.hold_sync():
            self.complete = False
            self.rows, self.texts, self.about = {}, {}, self._about()
        self._attach()

    def to_html(self) -> str:
        """Return what is shown as HTML that needs neither scripts nor the network."""
        raise NotImplementedError

    def freeze(self) -> HTML:
        """Return a picture of what is there now, for a page that can't run the view itself.

        As a cell's last line it stays in the saved notebook, and is what a web site or
        ``nbconvert`` shows.
        """
        return HTML(self.to_html())

    def close(self) -> None:
        """Close the view; the generation goes on."""
        if hasattr(self, "feed"):  # what could not be made is closed, too
            self.feed.unsubscribe(self)
        super().close()

    # --- for the feed -----------------------------------------------------------------

    def push(self) -> None:
        """Send the rows that have come since."""
        self._send_rows({name: self._sent[name] for name in self.shows}, reset=False)

    def _attach(self) -> None:
        with self.feed.lock:
            if self.feed.live:
                self.feed.subscribe(self)
                self._send_rows(dict.fromkeys(self.shows, 0), reset=True)
            else:
                self.finish()

    def finish(self) -> None:
        """Make all rows the widget's state."""
        all_rows = {name: self.feed.rows(name) for name in self.shows}
        with self.hold_sync():
            self.about = self._about()
            self.rows = {name: rows.packed for name, rows in all_rows.items()}
            self.texts = {name: rows.texts for name, rows in all_rows.items() if rows.texts}
            self.complete = True

    def _send_rows(self, firsts: dict[str, int], *, reset: bool) -> None:
        tables, buffers = [], []
        for name, first in firsts.items():
            rows = self.feed.rows(name, first)
            self._sent[name] = rows.end
            if rows.packed:
                tables.append([name, first, *([rows.texts] if rows.texts is not None else [])])
                buffers.append(rows.packed)
        if tables or reset:
            message = {"kind": "rows", "reset": reset, "now": self.feed.now, "tables": tables}
            self.send(message, buffers)

    def _asked(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("kind") == "resync":
            with self.feed.lock:
                if self.feed.live:
                    self._send_rows(dict.fromkeys(self.shows, 0), reset=True)

    def _about(self) -> dict[str, Any]:
        feed = self.feed
        return {
            "title": feed.title,
            "label": self.label,
            "now": feed.now,
            "nodes": [node_name(row) for row in range(feed.trace.stages + 1)],
            "layers": feed.history.layers,
            "finished": feed.history.finished,
            "looks": [{"name": name, **look._asdict()} for name, look in LOOKS.items()],
            "origins": [{"name": str(name), "meaning": ORIGINS[name][2]} for name in Origin],
            "schema": {name: list(TABLES[name].columns.items()) for name in self.shows},
        }

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None and self.complete:
            bundle[0]["text/html"] = self.to_html()
        return bundle
