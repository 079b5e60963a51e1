"""How messages lie in a stream of bytes: lengths, header, payload.

The stream comes from outside. Room is made only as bytes arrive, and for a payload only
once whoever reads the header has agreed to its size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from pipeinfer_dask.runtime.links.bounds import MOST_HEADER
from pipeinfer_dask.runtime.links.wire import Buffer, WireError

Deliver = Callable[[Buffer | None], None]
"""Called with a message's payload, None where it has none."""
Open = Callable[[Buffer, int], Deliver]
"""Called with a message's header and the size of its payload, before there is room for it.

What it raises, or what it returns does, is the connection's end.
"""
Most = Callable[[], int]
"""Returns how many bytes a header may have by now: see `bounds`.

How long a payload may be, the header's reader says.
"""

PREFIX = struct.Struct("<IQ")
"""Bytes of the header, and of the payload behind it."""
CHUNK = 1 << 17
"""A message up to this size is sent and read in one piece."""


def pack(frames: Sequence[Buffer]) -> tuple[bytes, int]:
    """Return what goes before a message's payload, and the payload's size."""
    size = memoryview(frames[1]).nbytes if len(frames) > 1 else 0
    return PREFIX.pack(len(frames[0]), size) + frames[0], size


def unpack(prefix: Buffer, most: int, start: int = 0) -> tuple[int, int]:
    """Return the sizes of a message's header, which may be ``most``, and payload.

    Raises
    ------
    WireError
        There are no such messages.
    """
    length, size = PREFIX.unpack_from(prefix, start)
    if length > most:
        raise WireError(
            f"expected a header of at most {most} bytes, got one of {length}: the two ends do not "
            "speak the same protocol"
        )
    return length, size


def room(size: int) -> memoryview:
    """Return an array's own memory: aligned, writable, and free of other messages."""
    return np.empty(size, np.uint8).data


class Inflow:
    """Takes a stream apart into messages, whatever the pieces that it comes in.

    Parameters
    ----------
    open : callable
        See `Open`.
    most : callable
        See `Most`.
    """

    def __init__(self, open: Open, most: Most = lambda: MOST_HEADER) -> None:
        self._open = open
        self._most = most
        self._deliver: Deliver
        self._buffer = memoryview(bytearray(CHUNK))
        self._filled = 0
        self._payload: memoryview | None = None
        self._missing = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held for what is not whole yet."""
        return len(self._buffer) + (len(self._payload) if self._payload is not None else 0)

    def buffer(self) -> memoryview:
        """Return where the next bytes are to be put."""
        if self._payload is not None:
            return self._payload[-self._missing :]
        return self._buffer[self._filled :]

    def filled(self, nbytes: int) -> None:
        """Take note that so many bytes have been put there.

        Raises
        ------
        WireError
            They are no message. Nothing may be put there any more.
        """
        if self._payload is None:
            self._filled += nbytes
            self._parse()
            return
        self._missing -= nbytes
        if not self._missing:
            payload, self._payload = self._payload, None
            self._deliver(payload)

    def _parse(self) -> None:
        """Take apart what is in the buffer, and leave what is not whole yet at its front."""
        start = 0
        while self._payload is None and self._filled - start >= PREFIX.size:
            length, size = unpack(self._buffer, self._most(), start)
            end = start + PREFIX.size + length
            if end > self._filled:
                self._reserve(PREFIX.size + length)
                break
            deliver = self._open(bytes(self._buffer[start + PREFIX.size : end]), size)
            start = end
            if not size:
                deliver(None)
                continue
            payload = room(size)
            there = min(size, self._filled - start)
            payload[:there] = self._buffer[start : start + there]
            start += there
            if there == size:
                deliver(payload)
            else:
                self._deliver, self._payload, self._missing = deliver, payload, size - there
        if start:
            rest = self._filled - start
            if rest:
                self._buffer[:rest] = bytes(self._buffer[start : self._filled])
            self._filled = rest

    def _reserve(self, size: int) -> None:
        """Make room for a long header, at most twice of what has come: the rest may never come."""
        if size > len(self._buffer) and self._filled == len(self._buffer):
            larger = memoryview(bytearray(min(size, 2 * self._filled)))
            larger[: self._filled] = self._buffer[: self._filled]
            self._buffer = larger
