"""The messages between the client, the stages and a head on a worker, and their bytes: `encode`.

A message is two frames at most: a msgpack header, which holds everything but hidden
states, and the hidden states themselves, which are never copied here. Nothing is
pickled: a header holds numbers and text, in the order of the fields of the few types
listed below. Every hop encodes and decodes, so that the run, which is most of the
traffic, is packed flat by hand. What comes is read by `pipeinfer_dask.runtime.links.reading`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np

from pipeinfer_dask.protocol.messages import (
    Batch,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Drafted,
    DraftPlan,
    Kind,
    Proposal,
    Prune,
    Release,
    RunTaken,
    Span,
    StartDraft,
    StartRun,
    TreePlan,
)
from pipeinfer_dask.protocol.sampling import Logprobs, Sampling
from pipeinfer_dask.runtime.links.runs import RunPass

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """What came over a link is not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Client to node: answer with a `Pong` of the same number, at once."""

    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Node to client: ``clock`` is the node's own `time.monotonic`, in seconds.

    For ``stalled`` seconds its computing has not moved; 0 while there is nothing to compute.
    """

    number: int
    clock: float
    stalled: float


@dataclass(frozen=True, slots=True)
class AwaitLoaded:
    """Client to node: tell of your loading by `BytesRead`, then by `Loaded` or `Failed`."""


@dataclass(frozen=True, slots=True)
class BytesRead:
    """Node to client: so much of the checkpoint has been read, of so much."""

    nbytes: int
    total: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Node to client: the model stands."""


@dataclass(frozen=True, slots=True)
class DialNext:
    """Client to stage: open the data link to the next stage, then answer with `Dialled`."""

    address: str
    node: str


@dataclass(frozen=True, slots=True)
class Dialled:
    """Stage to client: the data link to the next stage stands."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Client to stage: give up all runs of before this generation, and your data links."""

    generation: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """Stage to client: what was before this generation is gone, from the thread too."""

    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Node to client: this node can't go on, and why; ``memory`` if that was refused."""

    reason: str
    memory: bool = False


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Stage to client: a data link of this generation has closed, or brought nonsense."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """Client to node: end your thread and your links, then close this link."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Client to head: the user wants no more of this request."""

    request: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Client to head: the conversation that has this KV cache is over."""

    cache: int


@dataclass(frozen=True, slots=True)
class NodeLoading:
    """Head to client: how far a node is that it loads. Fields as those of `Loading`."""

    node: str
    where: str
    nbytes: int
    total: int
    stands: bool


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """Head to client: queued (then ``position`` is at least 1), running or recovering."""

    request: int
    status: str
    position: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """Head to client: entries of a request's trace, in order, on the head's clock.

    As text: see `pipeinfer_dask.trace.entries`.
    """

    request: int
    entries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Head to client: the last of a request: why it has ended, or what it has ``failed`` by."""

    request: int
    reason: str
    failed: bool


Message = (
    RunPass
    | CancelRuns
    | Prune
    | Release
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
    | AwaitLoaded
    | BytesRead
    | Loaded
    | Renew
    | Renewed
    | StopRequest
    | Forget
    | NodeLoading
    | RequestStatus
    | Recorded
    | RequestEnded
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message, and what tells whether it is stale or out of order."""

    generation: int
    sequence: int
    message: Message


Plain = tuple[Any, ...]

_PLANS: tuple[type[DraftPlan] | type[TreePlan], ...] = (DraftPlan, TreePlan)

_batch = attrgetter("tokens", "positions", "slots", "parents")
_logprobs = attrgetter("token", "best")
_run = attrgetter("request", "generation", "run", "kind", "picks", "cache")
_span = attrgetter("began", "ended", "layers")


def _plain_run_pass(job: RunPass) -> Plain:
    spans = tuple(map(_span, job.spans))
    run, batch = _run(job.run), _batch(job.run.batch)
    sampling = _plain_sampling(job.run.sampling)
    logprobs = tuple(one and _logprobs(one) for one in job.logprobs)
    return (*run, batch, job.tokens, spans, job.skipped, job.left_out, sampling, logprobs)


def _run_pass(plain: Plain) -> RunPass:
    request, generation, run, kind, picks, cache, batch, *passing = plain
    tokens, spans, skipped, left_out, sampling, logprobs = passing
    start = StartRun(
        request, generation, run, Kind(kind), Batch(*batch), picks, _sampling(sampling), cache
    )
    return RunPass(
        start,
        None,
        tokens,
        tuple(Span(*span) for span in spans),
        skipped,
        left_out,
        tuple(one and Logprobs(*one) for one in logprobs),
    )


def _plain_sampling(sampling: Sampling | None) -> Plain | None:
    return None if sampling is None else _fields(Sampling)(sampling)


def _sampling(plain: Plain | None) -> Sampling | None:
    return None if plain is None else Sampling(*plain)


def _plain_draft(draft: StartDraft) -> Plain:
    whole = attrgetter("request", "generation", "draft", "cache", "frontier", "slots")(draft)
    kind = type(draft.plan)
    plan, sampling = _fields(kind)(draft.plan), _plain_sampling(draft.sampling)
    return (*whole, _batch(draft.batch), _PLANS.index(kind), plan, sampling)


def _draft(plain: Plain) -> StartDraft:
    request, generation, draft, cache, frontier, slots, batch, kind, plan, sampling = plain
    return StartDraft(
        request,
        generation,
        draft,
        Batch(*batch),
        frontier,
        slots,
        _PLANS[kind](*plan),
        _sampling(sampling),
        cache,
    )


def _plain_drafted(drafted: Drafted) -> Plain:
    whole = attrgetter("request", "generation", "draft", "evaluated")(drafted)
    proposals = tuple(map(_fields(Proposal), drafted.proposals))
    return (*whole, proposals, drafted.span and _span(drafted.span))


def _drafted(plain: Plain) -> Drafted:
    request, generation, draft, evaluated, proposals, span = plain
    return Drafted(
        request,
        generation,
        draft,
        tuple(Proposal(*proposal) for proposal in proposals),
        evaluated,
        span and Span(*span),
    )


def _cancel_runs(plain: Plain) -> CancelRuns:
    request, generation, runs, reason = plain
    return CancelRuns(request, generation, runs, CancelReason(reason))


def _fields(kind: type) -> Callable[[Any], Plain]:
    names = [field.name for field in fields(kind)]
    return lambda value: tuple([getattr(value, name) for name in names])


def _flat(kind: type[Message]) -> tuple[type, Callable[[Any], Plain], Callable[[Plain], Message]]:
    return kind, _fields(kind), lambda plain: kind(*plain)


# Both ends run the same version. A message's code is its place here: append only.
CODECS: tuple[tuple[type, Callable[[Any], Plain], Callable[[Plain], Message]], ...] = (
    (RunPass, _plain_run_pass, _run_pass),
    (CancelRuns, _fields(CancelRuns), _cancel_runs),
    (StartDraft, _plain_draft, _draft),
    (Drafted, _plain_drafted, _drafted),
    *map(_flat, (CancelDraft, RunTaken, Ping, Pong, DialNext, Dialled, Failed, PeerLost, Close)),
    *map(_flat, (Prune, AwaitLoaded, BytesRead, Loaded, Release, Renew, Renewed)),
    *map(_flat, (StopRequest, Forget, NodeLoading, RequestStatus, Recorded, RequestEnded)),
)
_ENCODERS = {kind: (code, plain) for code, (kind, plain, _) in enumerate(CODECS)}


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
        The message holds something other than plain numbers and text.
    """
    message = envelope.message
    payload: list[Buffer] = []
    layout: tuple[str, tuple[int, ...]] | None = None
    if isinstance(message, RunPass) and message.hidden is not None:
        hidden = np.ascontiguousarray(message.hidden)
        layout = hidden.dtype.str, hidden.shape
        payload = [hidden.reshape(-1).view(np.uint8).data]
    code, plain = _ENCODERS[type(message)]
    header = (envelope.generation, envelope.sequence, code, plain(message), layout)
    return [msgpack.Packer(buf_size=1024).pack(header), *payload]
