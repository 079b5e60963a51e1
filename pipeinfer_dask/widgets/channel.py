"""A feed's rows on their way to pages: sent once, however many views show them.

Rows travel as binary messages while there are new ones. A page that comes later asks for all
of them. Once nothing more can come they are the widget's state, so that a saved notebook has
them, too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets
import traitlets

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace.picture import LOOKS
from pipeinfer_dask.trace.tables import node_name, row_names
from pipeinfer_dask.trace.text import ORIGINS
from pipeinfer_dask.widgets.feed import TABLES, Feed

HEAD = struct.Struct("<f?")
"""Begins a message: the last known moment, and whether all rows follow rather than new ones."""
PART = struct.Struct("<BIII")
"""Begins a table in it: its number in the schema, its first row, bytes of rows and of texts."""


class Channel(ipywidgets.Widget):  # type: ignore[misc]
    """Sends a trace to the browser once, for any number of views.

    Make one, and give it to each view in place of the trace: ``Timeline(channel)`` and
    ``TokenStream(channel)`` then share what was sent, and `show` turns both to another trace. It
    shows nothing itself.

    Parameters
    ----------
    source : Trace, Generation, Result, Simulation or Feed
        What its views show.
    tables : iterable of str
        Which parts of the trace to send, by the names that a view has in its ``shows``. By
        default all, which serve any view.

    Attributes
    ----------
    feed : Feed
        The trace as rows, which grow while a generation goes on.
    tables : tuple of str
    complete : bool
        Whether the trace is over, and all of it in `rows` and `texts`.
    rows : dict of str to bytes
        By table, its rows as bytes, once the trace is over: a saved notebook keeps them.
    texts : dict of str to list of str
        By table, the texts of its rows, where it has any.
    at_end : list of callable
        Called without arguments whenever a trace that is shown is over.

    Raises
    ------
    ValueError
        If the source has no trace.
    """

    complete = traitlets.Bool(False).tag(sync=True)
    rows = traitlets.Dict().tag(sync=True)
    texts = traitlets.Dict().tag(sync=True)
    about = traitlets.Dict().tag(sync=True)

    def __init__(self, source: Any, tables: Iterable[str] = TABLES) -> None:
        self.feed = source if isinstance(source, Feed) else Feed(source)
        self.tables = tuple(tables)
        self.at_end: list[Callable[[], None]] = []
        self._sent = dict.fromkeys(self.tables, 0)
        with self.feed.lock:
            super().__init__(**self._state())
            self.on_msg(self._asked)
            self._attach()

    def show(self, source: Any) -> None:
        """Show another trace from now on, in the same place.

        Parameters
        ----------
        source : Trace, Generation, Result, Simulation or Feed
            What to show.
        """
        feed = source if isinstance(source, Feed) else Feed(source)
        self.feed.unsubscribe(self)
        self.feed = feed
        with feed.lock:
            self._set(self._state())
            self._attach()
        if not feed.live:
            self.over()

    def close(self) -> None:
        """Close the channel; the generation goes on."""
        if hasattr(self, "feed"):  # what could not be made is closed, too
            self.feed.unsubscribe(self)
        super().close()

    # --- for the feed -----------------------------------------------------------------

    def push(self) -> None:
        """Send the rows that have come since the last time. The feed calls it.

        :meta private:
        """
        self._send_rows(reset=False)

    def finish(self) -> None:
        """Make all rows the widget's state, as nothing more can come. The feed calls it.

        :meta private:
        """
        self._set(self._state())

    def over(self) -> None:
        """Call what is in `at_end`. The feed calls it, once the trace is over.

        :meta private:
        """
        for action in list(self.at_end):
            action()

    def _attach(self) -> None:
        if self.feed.live:
            self.feed.subscribe(self)
            self._send_rows(reset=True)

    def _state(self) -> dict[str, Any]:
        about = self._about()
        if self.feed.live:
            return {"complete": False, "rows": {}, "texts": {}, "about": about}
        all_rows = {name: self.feed.rows(name) for name in self.tables}
        return {
            "complete": True,
            "rows": {name: rows.packed for name, rows in all_rows.items()},
            "texts": {name: rows.texts for name, rows in all_rows.items() if rows.texts},
            "about": about,
        }

    def _set(self, state: dict[str, Any]) -> None:
        with self.hold_sync():
            for name, value in state.items():
                setattr(self, name, value)

    def _send_rows(self, *, reset: bool) -> None:
        feed, sent = self.feed, self._sent
        if reset:
            sent.update(dict.fromkeys(sent, 0))
        # One buffer, and next to nothing for JSON: a message costs by its parts.
        parts = [HEAD.pack(feed.now, reset)]
        for number, name in enumerate(self.tables):
            rows = feed.rows(name, sent[name])
            if rows.packed:
                texts = json.dumps(rows.texts).encode() if rows.texts is not None else b""
                parts += [
                    PART.pack(number, rows.first, len(rows.packed), len(texts)),
                    rows.packed,
                    texts,
                ]
                sent[name] = rows.end
        if len(parts) > 1 or reset:
            self.send({"kind": "rows"}, [b"".join(parts)])

    def _asked(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("kind") == "resync":
            with self.feed.lock:
                if self.feed.live:
                    self._send_rows(reset=True)

    def _about(self) -> dict[str, Any]:
        feed = self.feed
        return {
            "title": feed.title,
            "now": feed.now,
            "nodes": [node_name(row) for row in range(feed.trace.stages + 1)],
            "rows": row_names(feed.trace),
            "places": [
                feed.trace.places.get(node_name(row), "") for row in range(feed.trace.stages + 1)
            ],
            "layers": feed.history.layers,
            "finished": feed.history.finished,
            "looks": [
                {"name": name, **look._asdict(), "legend": look.legend}
                for name, look in LOOKS.items()
            ],
            "origins": [{"name": str(name), "meaning": ORIGINS[name][2]} for name in Origin],
            "schema": [[name, list(TABLES[name].columns.items())] for name in self.tables],
        }
