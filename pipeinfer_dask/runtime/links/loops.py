"""A call on another thread's event loop, which may have ended meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


def post(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object
) -> None:
    """Have a loop call this soon. Where it is closed nobody is left to hear of it."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)
