"""How a text ends."""

from __future__ import annotations

from collections.abc import Callable

from pipeinfer_dask.protocol.request import Request


class Ending:
    """Looks at each committed token and says whether the text ends with it.

    Parameters
    ----------
    request : Request
    stops : callable, optional
        Told of each token in order: whether it completes what ends the text, such as a
        stop string.
    """

    def __init__(self, request: Request, stops: Callable[[int], bool] | None = None) -> None:
        self._request = request
        self._stops = stops

    def after(self, token: int, generated: int) -> str | None:
        """Return why the text ends with this token, its ``generated``-th; None if it goes on."""
        if token in self._request.end_tokens:
            return "end_token"
        if self._stops is not None and self._stops(token):
            return "stop_string"
        return "length" if generated == self._request.max_new_tokens else None
