"""The bytes of every message between the client and the stages: `encode` and `decode`.

A message is two frames at most: a msgpack header, which holds everything but hidden
states, and the hidden states themselves, which are never copied here. Nothing is
pickled: a header can only name the dataclasses listed below, and the hidden states'
dtype and shape stand in the header and are held against the bytes that came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np

from pipeinfer_dask.core.messages import (
    Batch,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Drafted,
    DraftPlan,
    Kind,
    Proposal,
    RunTaken,
    Span,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.models.stage import HiddenStates
from pipeinfer_dask.runtime.compute import RunPass

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """What came over a link is not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Client to node: answer with a `Pong` of the same number, at once."""

    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Node to client: ``clock`` is the node's own `time.monotonic`, in seconds."""

    number: int
    clock: float


@dataclass(frozen=True, slots=True)
class DialNext:
    """Client to stage: open the data link to the next stage, then answer with `Dialled`."""

    address: str
    node: str


@dataclass(frozen=True, slots=True)
class Dialled:
    """Stage to client: the data link to the next stage stands."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Node to client: this node can't go on, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Stage to client: the data link to or from a neighbour has closed, or brought nonsense."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """Client to node: end your thread and your links, then close this link."""


Message = (
    RunPass
    | CancelRuns
    | StartDraft
    | CancelDraft
    | Drafted
    | RunTaken
    | Ping
    | Pong
    | DialNext
    | Dialled
    | Failed
    | PeerLost
    | Close
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message, and what tells whether it is stale or out of order."""

    generation: int
    sequence: int
    message: Message


# Both ends run the same version: the order is the code, so append only.
_TYPES: tuple[type, ...] = (
    RunPass,
    CancelRuns,
    StartDraft,
    CancelDraft,
    Drafted,
    RunTaken,
    Ping,
    Pong,
    DialNext,
    Dialled,
    Failed,
    PeerLost,
    Close,
    StartRun,
    Batch,
    Span,
    Proposal,
    DraftPlan,
)
_MESSAGES = _TYPES[: _TYPES.index(StartRun)]
# Where a word has to become a member again, and of what.
_ENUMS: dict[type, tuple[int, type[StrEnum]]] = {
    StartRun: (3, Kind),
    CancelRuns: (3, CancelReason),
}
_CODES = {kind: code for code, kind in enumerate(_TYPES)}


def _reader(kind: type) -> Callable[[Any], Sequence[Any]]:
    names = [field.name for field in fields(kind)]
    if not names:
        return lambda value: ()
    read = attrgetter(*names)
    return read if len(names) > 1 else lambda value: (read(value),)


_READERS = tuple(_reader(kind) for kind in _TYPES)


def _pack(value: object) -> msgpack.ExtType:
    code = _CODES.get(type(value))
    if code is None:
        raise TypeError(f"expected a message of plain numbers, got {value!r} in it")
    return msgpack.ExtType(code, msgpack.packb(_READERS[code](value), default=_pack))


def _unpack(code: int, data: bytes) -> object:
    if code >= len(_TYPES):
        raise WireError(f"expected a type code below {len(_TYPES)}, got {code}")
    kind = _TYPES[code]
    values = msgpack.unpackb(data, use_list=False, ext_hook=_unpack)
    if kind in _ENUMS:
        place, enum = _ENUMS[kind]
        values = (*values[:place], enum(values[place]), *values[place + 1 :])
    return kind(*values)


def encode(envelope: Envelope) -> list[Buffer]:
    """Turn a message into frames.

    Parameters
    ----------
    envelope : Envelope

    Returns
    -------
    list of buffers
        The header, then the hidden states of a run if there are any: a view of the
        array's own memory, which must not change until the frames have been sent.

    Raises
    ------
    TypeError
        The message holds something other than the types of this module and plain numbers.
    """
    message, payload = envelope.message, []
    layout: tuple[str, tuple[int, ...]] | None = None
    if isinstance(message, RunPass) and message.hidden is not None:
        hidden = np.ascontiguousarray(message.hidden)
        layout = hidden.dtype.str, hidden.shape
        payload = [hidden.reshape(-1).view(np.uint8).data]
        message = replace(message, hidden=None)
    header = (envelope.generation, envelope.sequence, message, layout)
    # A bytearray, since distributed gives the frame behind it a buffer of its own,
    # aligned for arithmetic; behind bytes it would be a slice of a larger one.
    return [bytearray(msgpack.packb(header, default=_pack)), *payload]


def decode(frames: Sequence[Buffer]) -> Envelope:
    """Turn frames back into the message.

    Parameters
    ----------
    frames : sequence of buffers
        As `encode` made them. The hidden states are a view of the second one.

    Returns
    -------
    Envelope

    Raises
    ------
    WireError
        The frames are no message, or the hidden states do not have the size that the
        header gives.
    """
    if not 1 <= len(frames) <= 2:
        raise WireError(f"expected 1 or 2 frames, got {len(frames)}")
    try:
        generation, sequence, message, layout = msgpack.unpackb(
            frames[0], use_list=False, ext_hook=_unpack
        )
    except WireError:
        raise
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise WireError(f"expected a message header, got {len(frames[0])} bytes: {error}") from None
    if not isinstance(message, _MESSAGES):
        raise WireError(f"expected a message, got {type(message).__name__}")
    if not (isinstance(generation, int) and isinstance(sequence, int)):
        raise WireError(f"expected numbers, got {generation!r} and {sequence!r}")
    if layout is not None:
        if not isinstance(message, RunPass):
            raise WireError(f"expected hidden states with a run, got {type(message).__name__}")
        message = replace(message, hidden=_hidden(layout, frames))
    elif len(frames) > 1:
        raise WireError(f"expected no payload, got {memoryview(frames[1]).nbytes} bytes")
    return Envelope(generation, sequence, message)


def _hidden(layout: object, frames: Sequence[Buffer]) -> HiddenStates:
    match layout:
        case ("<f2" | "<f4" | "<f8" as dtype, (int(rows), int(width))) if min(rows, width) >= 0:
            expected = rows * width * int(dtype[-1])
        case _:
            raise WireError(f"expected a floating dtype and [n, hidden_size], got {layout!r}")
    found = memoryview(frames[1]).nbytes if len(frames) > 1 else 0
    if found != expected:
        raise WireError(
            f"expected {expected} bytes of hidden states {dtype} [{rows}, {width}], got {found}: "
            "the message was cut, or its header is wrong"
        )
    hidden: HiddenStates = np.frombuffer(frames[1] if expected else b"", dtype)
    return hidden.reshape(rows, width)
