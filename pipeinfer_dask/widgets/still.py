"""What is shown in a notebook leaves a picture there, for when the kernel is gone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from threading import current_thread, main_thread
from typing import Any

import ipywidgets
from IPython.core.getipython import get_ipython
from IPython.display import HTML, display, update_display

from pipeinfer_dask.widgets.channel import Channel

COMMON = ("common.js", "moments.js")
"""What all modules of views begin with."""
WIDGET = "application/vnd.jupyter.widget-view+json"


def module(*parts: str) -> str:
    """Return the ES module of a view: what all have in common, then its own parts."""
    static = files(__package__) / "static"
    return "\n".join((static / part).read_text("utf-8") for part in (*COMMON, *parts))


def style() -> str:
    """Return the style sheet of all views."""
    return (files(__package__) / "static" / "style.css").read_text("utf-8")


class Still(ipywidgets.DOMWidget):  # type: ignore[misc]
    """A widget that can stand still.

    A notebook keeps what a cell shows as it was when it was shown, and a page without the
    kernel can't run a widget. So a picture is shown behind the widget, in an output of its own
    that can still change when a generation is over; the widget hides it while it lives.
    """

    label: str
    """What it is, in words."""
    _shown = False

    def to_html(self) -> str:
        """Return what is shown as HTML that needs neither scripts nor the network."""
        raise NotImplementedError

    def freeze(self) -> HTML:
        """Return a picture of what is there now, for a page that can't run the view itself.

        As a cell's last line it stays in the saved notebook, and is what a web site or
        ``nbconvert`` shows.

        Returns
        -------
        IPython.display.HTML
            Without scripts.
        """
        return HTML(self.to_html())

    def _leave_picture(self) -> None:
        """Put a picture of what is there now where the widget is shown, if it is."""
        if not self._shown:
            return
        self._update_picture()
        shell = get_ipython()
        if shell is not None and current_thread() is not main_thread():
            # Whoever runs a notebook without a page (nbclient, so nbconvert) hears only what
            # comes while a cell runs, and drops what this thread says between two of them.
            def once_more(_: object) -> None:
                shell.events.unregister("pre_run_cell", once_more)
                self._update_picture()

            shell.events.register("pre_run_cell", once_more)

    def _update_picture(self) -> None:
        update_display(self._picture(), display_id=self._picture_id)

    @property
    def _channels(self) -> Sequence[Channel]:
        """What is shown."""
        raise NotImplementedError

    @property
    def _hider(self) -> Any:
        """The part whose module hides the picture while it lives."""
        raise NotImplementedError

    @property
    def _live(self) -> bool:
        return any(channel.feed.live for channel in self._channels)

    @property
    def _picture_id(self) -> str:
        return f"pipeinfer-picture-{self.model_id}"

    def _picture(self) -> HTML:
        inside = "" if self._live else self.to_html()
        return HTML(f'<div class="{self._picture_id}">{inside}</div>')

    def _ipython_display_(self, **_: object) -> None:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        self._hider.picture = self._picture_id
        display({"text/plain": self.label, WIDGET: view}, raw=True)
        live = self._live
        display(self._picture(), display_id=self._picture_id)
        if not self._shown:
            self._shown = True
            for channel in self._channels:
                channel.at_end.append(self._leave_picture)
        if live and not self._live:
            self._leave_picture()  # it was over before anybody could be told
