"""What comes over a link is read here, and not trusted: `read_header` and `decode`.

A header is held against the annotations of the message's types, and the hidden states'
dtype and shape, which stand in it, against what the link may bring. Only then is there
room made for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgpack
import numpy as np

from pipeinfer_dask.models.stage import HiddenStates, Intake
from pipeinfer_dask.protocol.messages import (
    NO_SLOT,
    Batch,
    Drafted,
    Prune,
    StartDraft,
    TreePlan,
)
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.typed import is_a
from pipeinfer_dask.runtime.links.wire import CODECS, Buffer, Envelope, Message, WireError

Numbers = tuple[int, ...]

SAID = 200
"""So much of nonsense is quoted, at most."""
ROUNDING = 1e-3
"""By so much a probability may be above 1."""


@dataclass(frozen=True, slots=True)
class Header:
    """A message without its hidden states, and what they are to be.

    Attributes
    ----------
    generation, sequence : int
        See `Envelope`.
    message : Message
    layout : (str, int, int), optional
        Their dtype and shape; None where none are to come.
    """

    generation: int
    sequence: int
    message: Message
    layout: tuple[str, int, int] | None

    def complete(self, payload: Buffer | None) -> Message:
        """Return the message with the hidden states in ``payload``, a view of its memory."""
        job = self.message
        if self.layout is None or payload is None or not isinstance(job, RunPass):
            return job
        dtype, rows, width = self.layout
        hidden: HiddenStates = np.frombuffer(payload, dtype).reshape(rows, width)
        # Not by `replace`, which takes longer than all else here.
        return RunPass(
            job.run, hidden, job.tokens, job.spans, job.skipped, job.left_out, job.logprobs
        )


def read_header(header: Buffer, nbytes: int, intake: Intake | None) -> Header:
    """Read a message's first frame, while there is no room yet for the second one.

    Parameters
    ----------
    header : buffer
    nbytes : int
        The size that the second frame is said to have; 0 where there is none.
    intake : Intake, optional
        What hidden states may come; by default none at all.

    Raises
    ------
    WireError
        It is no message, or one with hidden states that may not come.
    """
    try:
        _skim(header)
        generation, sequence, code, plain, layout = msgpack.unpackb(
            header, use_list=False, object_pairs_hook=_refuse, ext_hook=_refuse, max_ext_len=0
        )
        numbers = generation, sequence, code
        if not is_a(Numbers, numbers) or min(numbers) < 0:
            raise ValueError(f"generation, sequence number and code are {numbers!r}")
        message: Message = CODECS[code][2](plain)
        if not is_a(type(message), message):
            raise ValueError(f"a {type(message).__name__} with fields of other types")
        _check(message)
    except _MALFORMED as error:
        size = memoryview(header).nbytes
        raise WireError(f"expected a message, got {size} bytes: {error!s:.{SAID}}") from None
    if layout is None:
        if nbytes:
            raise WireError(f"expected no payload, got {nbytes} bytes")
        return Header(generation, sequence, message, None)
    if not isinstance(message, RunPass):
        raise WireError(f"expected hidden states with a run, got them with code {code}")
    return Header(generation, sequence, message, _layout(layout, message, nbytes, intake))


def _skim(header: Buffer) -> None:
    """Go through it without making anything of it.

    An array takes room for all that it says to hold: nested ones that end in nothing would
    take a thousand times their size.
    """
    unpacker = msgpack.Unpacker(None, max_buffer_size=memoryview(header).nbytes)
    unpacker.feed(header)
    unpacker.skip()


def _refuse(*_: object) -> None:
    """Stop at the first map: no message holds one, and a byte of nonsense would take a hundred."""
    raise ValueError("there are neither maps nor extensions in a message")


_MALFORMED = (
    *(ValueError, TypeError, IndexError, AttributeError, OverflowError),
    msgpack.UnpackException,
)
"""What trying to read nonsense raises."""


def decode(frames: Sequence[Buffer], intake: Intake | None) -> Envelope:
    """Turn frames back into the message.

    Parameters
    ----------
    frames : sequence of buffers
        As `encode` made them. The hidden states are a view of the second one.
    intake : Intake or None
        What hidden states may come, if any.

    Returns
    -------
    Envelope

    Raises
    ------
    WireError
        The frames are no message, or the hidden states are not what may come.
    """
    if not 1 <= len(frames) <= 2:
        raise WireError(f"expected 1 or 2 frames, got {len(frames)}")
    payload = frames[1] if len(frames) > 1 else None
    nbytes = 0 if payload is None else memoryview(payload).nbytes
    header = read_header(frames[0], nbytes, intake)
    return Envelope(header.generation, header.sequence, header.complete(payload))


def _check(message: Message) -> None:
    """Look at what annotations don't say."""
    match message:
        case RunPass():
            n = _tokens(message.run.batch)
            if not 0 <= message.run.picks <= n:
                raise ValueError(f"a run of {n} tokens that wants {message.run.picks} picks")
            if (out := message.left_out) and not (
                0 <= out[0] <= out[-1] < n and all(one < other for one, other in pairwise(out))
            ):
                raise ValueError(f"a run of {n} tokens that leaves out {out}")
        case StartDraft(plan=plan, frontier=frontier):
            if not 0 < frontier <= _tokens(message.batch):
                raise ValueError("a draft whose frontier is not in its batch")
            if plan.size != len(message.slots) or (
                isinstance(plan, TreePlan)
                and (len(plan.chances) != frontier or len(plan.calibration) == 1)
            ):
                raise ValueError("a draft whose plan is that of another one")
        case Prune():
            if len(message.runs) != len(message.tokens):
                raise ValueError("places of other runs than those named")


def is_answer(asked: StartDraft, drafted: Drafted) -> bool:
    """Return whether a draft proposes no more than it was asked for: in its slots, each once."""
    parents, free = {*asked.batch.slots}, {*asked.slots}
    for proposal in drafted.proposals:
        if proposal.parent not in parents or not 0 <= proposal.confidence <= 1 + ROUNDING:
            return False
        if proposal.slot != NO_SLOT:
            if proposal.slot not in free:
                return False
            free.remove(proposal.slot)
            parents.add(proposal.slot)
    return True


def _tokens(batch: Batch) -> int:
    columns = batch.tokens, batch.positions, batch.slots, batch.parents
    tokens, positions, slots, parents = columns
    n = len(tokens)
    if not 0 < n == len(positions) == len(slots) == len(parents):
        raise ValueError(f"a batch with columns of {[*map(len, columns)]} tokens")
    if min(tokens) < 0 or min(positions) < 0 or min(slots) < 0:
        raise ValueError("a batch with negative tokens, positions or slots")
    return n


def _layout(
    layout: object, run: RunPass, nbytes: int, intake: Intake | None
) -> tuple[str, int, int]:
    match layout:
        case ("<f2" | "<f4" as dtype, (int(rows), int(width))):
            expected = rows * width * int(dtype[-1])
        case _:
            raise WireError(
                f"expected hidden states as <f4 or <f2 [n, width], got {layout!r:.{SAID}}"
            )
    if intake is None:
        raise WireError(f"expected no hidden states here, got {dtype} [{rows}, {width}]")
    tokens = len(run.run.batch) - len(run.left_out)
    if (rows, width) != (tokens, intake.width) or rows > intake.tokens:
        raise WireError(
            f"expected hidden states [{tokens}, {intake.width}] of at most {intake.tokens} "
            f"tokens, got [{rows}, {width}]"
        )
    if nbytes != expected:
        raise WireError(
            f"expected {expected} bytes of hidden states {dtype} [{rows}, {width}], got {nbytes}: "
            "the message was cut, or its header is wrong"
        )
    return dtype, rows, width
