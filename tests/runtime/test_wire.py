from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeinfer_dask.models.stage import Intake
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
from pipeinfer_dask.runtime.links.reading import decode
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import (
    Close,
    Dialled,
    DialNext,
    Envelope,
    Failed,
    Forget,
    NodeLoading,
    PeerLost,
    Ping,
    Pong,
    Recorded,
    RequestEnded,
    RequestStatus,
    StopRequest,
    WireError,
    encode,
)

INTAKE = Intake(tokens=100, width=5)

counts = st.integers(0, 2**40)
sizes = st.integers(0, 2**31 - 1)
numbers = st.tuples() | st.lists(counts, max_size=5).map(tuple)
seconds = st.floats(allow_nan=False)
spans = st.builds(Span, seconds, seconds, counts)
batches = st.lists(st.tuples(counts, counts, counts, st.integers(-1, 99)), min_size=1).map(
    lambda rows: Batch(*zip(*rows, strict=True))
)
samplings = st.builds(
    Sampling,
    seed=st.none() | st.integers(0, 2**63 - 1),
    temperature=st.floats(0.01, 9),
    top_k=sizes,
    top_h=st.none() | st.floats(0.01, 1),
    bad_words_ids=st.lists(st.lists(counts, min_size=1, max_size=2).map(tuple)).map(tuple),
    sequence_bias=st.lists(
        st.tuples(st.lists(counts, min_size=1, max_size=2).map(tuple), st.floats(-5, 5))
    ).map(tuple),
    suppress_tokens=numbers,
    min_length=sizes,
)
logprobs = st.builds(Logprobs, seconds, st.lists(st.tuples(counts, seconds), max_size=3).map(tuple))
runs = st.builds(
    StartRun,
    *(counts, counts, counts, st.sampled_from(Kind), batches, st.just(1), st.none() | samplings),
    counts,
)


@st.composite
def run_passes(draw: st.DrawFn) -> RunPass:
    run = draw(runs)
    places = st.sets(st.integers(0, len(run.batch) - 1), max_size=len(run.batch) - 1)
    left_out = tuple(sorted(draw(places)))
    shape = (len(run.batch) - len(left_out), INTAKE.width)
    return RunPass(
        run,
        draw(st.none() | arrays.arrays(st.sampled_from([np.float16, np.float32]), shape)),
        draw(st.none() | numbers),
        draw(st.lists(spans, max_size=3).map(tuple)),
        draw(st.booleans()),
        left_out,
        draw(st.lists(st.none() | logprobs, max_size=3).map(tuple)),
    )


proposals = st.builds(Proposal, counts, counts, st.integers(-1, 2**40), st.floats(0, 1))
plans = st.builds(DraftPlan, counts, st.floats(0, 1), st.floats(0, 1), counts, st.none() | counts)
trees = st.builds(
    TreePlan,
    counts,
    counts,
    counts,
    counts,
    st.floats(0, 1),
    st.tuples(st.floats(0, 1)),
    st.lists(st.floats(0, 1), max_size=4).map(tuple),
    st.floats(0, 1),
    st.none() | counts,
)
drafts = st.builds(
    StartDraft,
    *(counts, counts, counts, batches, st.just(1), numbers, plans | trees),
    st.none() | samplings,
    counts,
).map(lambda draft: replace(draft, plan=replace(draft.plan, size=len(draft.slots))))
messages = st.one_of(
    run_passes(),
    st.lists(st.tuples(counts, numbers), max_size=3).map(
        lambda pruned: Prune(1, 2, tuple(run for run, _ in pruned), tuple(p for _, p in pruned))
    ),
    st.builds(CancelRuns, counts, counts, numbers, st.sampled_from(CancelReason)),
    drafts,
    st.builds(Release, counts, counts, st.none() | counts),
    st.builds(CancelDraft, counts, counts, counts),
    st.builds(
        Drafted,
        counts,
        counts,
        counts,
        st.lists(proposals, max_size=3).map(tuple),
        numbers,
        st.none() | spans,
    ),
    st.builds(RunTaken, counts, counts, counts),
    st.builds(Ping, counts),
    st.builds(Pong, counts, seconds, seconds),
    st.builds(DialNext, st.text(), st.text()),
    st.builds(Dialled),
    st.builds(Failed, st.text()),
    st.builds(PeerLost, counts, st.text()),
    st.builds(Close),
    st.builds(StopRequest, counts),
    st.builds(Forget, counts),
    st.builds(NodeLoading, st.text(), st.text(), counts, counts, st.booleans()),
    st.builds(RequestStatus, counts, st.text(), counts),
    st.builds(Recorded, counts, st.lists(st.text(), max_size=3).map(tuple)),
    st.builds(RequestEnded, counts, st.text(), st.booleans()),
)


@given(counts, counts, messages)
def test_every_message_comes_back_as_it_was(
    generation: int, sequence: int, message: RunPass | Ping
) -> None:
    envelope = decode(encode(Envelope(generation, sequence, message)), INTAKE)

    assert (envelope.generation, envelope.sequence) == (generation, sequence)
    came = envelope.message
    assert type(came) is type(message)
    if isinstance(message, RunPass) and isinstance(came, RunPass):
        if message.hidden is None:
            assert came.hidden is None
        else:
            assert came.hidden is not None
            assert came.hidden.dtype == message.hidden.dtype
            np.testing.assert_array_equal(came.hidden, message.hidden)
        came, message = replace(came, hidden=None), replace(message, hidden=None)
        assert isinstance(came.run.kind, Kind)
    assert came == message


@given(st.lists(st.binary(max_size=64), max_size=3))
def test_bytes_that_are_no_message_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames, INTAKE)


WIDE = Intake(tokens=2, width=8)


def run_pass(hidden: np.ndarray) -> RunPass:
    batch = Batch((1, 2), (0, 1), (0, 1), (-1, 0))
    return RunPass(StartRun(0, 0, 0, Kind.PREFILL, batch, 1), hidden)


def test_hidden_states_are_not_copied() -> None:
    sent = np.ones((2, 8), np.float32)
    came = decode(encode(Envelope(0, 0, run_pass(sent))), WIDE).message
    assert isinstance(came, RunPass)
    assert came.hidden is not None
    assert np.shares_memory(came.hidden, sent)


def test_hidden_states_of_another_size_than_the_header_says_are_refused() -> None:
    header, payload = encode(Envelope(0, 0, run_pass(np.ones((2, 8), np.float32))))
    with pytest.raises(WireError, match=r"expected 64 bytes of hidden states <f4 \[2, 8\], got 60"):
        decode([header, payload[:-4]], WIDE)
    with pytest.raises(WireError, match="got 0"):
        decode([header], WIDE)


def test_a_payload_that_no_header_announces_is_refused() -> None:
    (header,) = encode(Envelope(0, 0, Ping(1)))
    with pytest.raises(WireError, match="expected no payload, got 3 bytes"):
        decode([header, b"abc"], WIDE)


def test_hidden_states_of_objects_are_refused() -> None:
    header, payload = encode(Envelope(0, 0, run_pass(np.ones((2, 8), np.float32))))
    *rest, layout = msgpack.unpackb(header, use_list=False)
    forged = msgpack.packb((*rest, ("|O", layout[1])))
    with pytest.raises(WireError, match="expected hidden states as <f4 or <f2"):
        decode([forged, payload], WIDE)


def test_settings_out_of_range_are_no_message() -> None:
    run = replace(run_pass(np.ones((2, 8), np.float32)).run, sampling=Sampling(temperature=2.0))
    (header,) = encode(Envelope(0, 0, RunPass(run)))
    forged = header.replace(msgpack.packb(2.0), msgpack.packb(-2.0))  # type: ignore[union-attr]
    with pytest.raises(WireError, match=r"expected temperature from 1e-6 to 1e6, got -2\.0"):
        decode([forged], WIDE)


def test_what_is_no_number_is_not_sent() -> None:
    with pytest.raises(TypeError):
        encode(Envelope(0, 0, Failed(ValueError("an object"))))  # type: ignore[arg-type]
