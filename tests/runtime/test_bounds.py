"""The longest honest messages pass, and what is longer is refused before it is there."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pipeinfer_dask.protocol.messages import (
    NO_SLOT,
    Batch,
    Commit,
    Drafted,
    DraftPlan,
    Event,
    Kind,
    Origin,
    Proposal,
    RunDone,
    Span,
    StartDraft,
    StartRun,
    TreePlan,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Logprobs, Sampling
from pipeinfer_dask.runtime.head.head_actor import MOST_ENTRIES, Outbox
from pipeinfer_dask.runtime.links.bounds import (
    MOST_HEADER,
    MOST_SETTINGS,
    of_answer,
    of_record,
    of_settings,
    of_text,
)
from pipeinfer_dask.runtime.links.framing import PREFIX
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import Envelope, Message, Recorded, WireError, encode
from pipeinfer_dask.runtime.planning.admission import SPECULATIVE_SLOTS
from pipeinfer_dask.trace.entries import written
from tests.runtime.test_links import Inbox, linked

CONTEXT = 1 << 17
VOCABULARY = 1 << 18
LARGEST = 256
"""The largest setting of a strategy."""
THIRD = -1 / 3
"""A number that takes as many letters as there may be."""


def tokens_of(count: int) -> tuple[int, ...]:
    """Return token ids that take as many bytes as there may be."""
    return tuple(range(VOCABULARY - 1, VOCABULARY - 1 - count, -1))


def batch_of(count: int) -> Batch:
    """Return a batch at the end of the longest text that there may be."""
    places = tuple(range(1 << 20, (1 << 20) + count))
    return Batch(tokens_of(count), places, places, places)


def length_of(message: Message) -> int:
    return len(encode(Envelope(1 << 30, 1 << 30, message))[0])


SETTINGS = Sampling(
    seed=2**63 - 1,
    logprobs=20,
    suppress_tokens=tokens_of(50_000),
    sequence_bias=tuple(((token,), THIRD) for token in tokens_of(30_000)),
)
"""As many as are admitted."""

WHOLE = StartDraft(
    *(1 << 30, 1 << 30, 1 << 30),
    batch_of(CONTEXT),
    LARGEST,
    tokens_of(SPECULATIVE_SLOTS),
    TreePlan(SPECULATIVE_SLOTS, 9, LARGEST, 9, THIRD, (THIRD,) * LARGEST),
    SETTINGS,
)
"""Has the draft model read the longest text at once."""

RUN = StartRun(
    *(1 << 30, 1 << 30, 1 << 30),
    Kind.SPECULATIVE,
    batch_of(SPECULATIVE_SLOTS + 1),
    SPECULATIVE_SLOTS + 1,
    SETTINGS,
)
"""Looks at all that there are slots for."""


def picked(run: StartRun) -> tuple[Logprobs, ...]:
    assert run.sampling is not None
    best = tuple((token, THIRD) for token in tokens_of(run.sampling.logprobs))
    return (Logprobs(THIRD, best),) * run.picks


def test_settings_take_no_more_than_they_are_reckoned() -> None:
    reckoned = of_settings(SETTINGS)
    assert 0.9 * MOST_SETTINGS < reckoned <= MOST_SETTINGS
    bare = length_of(RunPass(replace(RUN, sampling=None)))
    assert length_of(RunPass(RUN)) - bare < reckoned + 100


def test_a_run_of_all_slots_and_with_all_settings_needs_no_more_than_any_link_takes() -> None:
    whole = RunPass(RUN, None, spans=(Span(THIRD, THIRD, 1),) * 1024)
    assert length_of(whole) <= MOST_HEADER


def test_the_longest_text_fits_what_a_drafter_takes() -> None:
    assert MOST_HEADER < length_of(WHOLE) <= of_text(CONTEXT + SPECULATIVE_SLOTS)


def test_the_longest_draft_fits_what_is_expected_when_it_is_asked_for() -> None:
    assert isinstance(WHOLE.plan, TreePlan)
    count = (WHOLE.frontier + len(WHOLE.slots)) * WHOLE.plan.width
    proposals = tuple(Proposal(token, 1 << 20, NO_SLOT, THIRD) for token in tokens_of(count))
    evaluated = (*WHOLE.batch.slots, *WHOLE.slots)
    answer = Drafted(*(1 << 30, 1 << 30, 1 << 30), proposals, evaluated, Span(THIRD, THIRD, 9))
    assert length_of(answer) <= of_answer(WHOLE)
    entry = Recorded(1 << 30, (written(THIRD, answer),))
    assert length_of(entry) <= of_record(REQUEST)


@pytest.mark.parametrize("candidates", [0, 20, 2000])
def test_candidates_fit_what_is_expected_when_their_run_is_sent(candidates: int) -> None:
    run = replace(RUN, sampling=replace(SETTINGS, logprobs=candidates))
    logprobs = picked(run) if candidates else ()
    done = RunPass(run, None, tokens_of(run.picks), logprobs=logprobs)
    assert length_of(done) <= of_answer(run)


REQUEST = Request(
    1 << 30,
    tokens_of(CONTEXT - 1000),
    max_new_tokens=1000,
    capacity=CONTEXT + SPECULATIVE_SLOTS,
    sampling=SETTINGS,
)


@pytest.mark.parametrize(
    "what",
    [
        WHOLE,
        RUN,
        RunDone(
            *(1 << 30, 1 << 30, 1 << 30),
            tokens_of(RUN.picks),
            (Span(THIRD, THIRD, 9),) * 1024,
            picked(RUN),
        ),
        Commit(1 << 30, tokens_of(RUN.picks), (Origin.CORRECTED,) * RUN.picks, picked(RUN)),
    ],
    ids=lambda what: type(what).__name__,
)
def test_the_longest_entry_of_a_trace_fits_what_a_client_takes(what: Event) -> None:
    sent: list[Message] = []

    async def main() -> None:
        outbox = Outbox(asyncio.get_running_loop(), sent.append)
        small = "." * (MOST_ENTRIES - 1)
        for entry in (small, written(THIRD, what), small, small):
            outbox.record(1 << 30, entry)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [len(message.entries) for message in sent] == [2, 2]  # type: ignore[union-attr]
    assert max(map(length_of, sent)) <= of_record(REQUEST)


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_longer_header_is_refused_before_it_comes_unless_it_is_expected(transport: str) -> None:
    long = StartDraft(0, 0, 0, batch_of(CONTEXT), 1, (), DraftPlan(0))

    async def is_refused() -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(far)
            stream = near._carrier._transport if transport == "tcp" else near._carrier._stream  # type: ignore[attr-defined]
            stream.write(PREFIX.pack(MOST_HEADER + 1, 0))
            with pytest.raises(WireError, match=f"a header of at most {MOST_HEADER} bytes"):
                await inbox.reading
            assert far.counts.malformed == 1

    async def expected() -> None:
        async with linked(transport) as (near, far):
            far.expect(of_text(CONTEXT))
            inbox = Inbox(far)
            near.send(long)
            assert await inbox.messages.get() == long

    asyncio.run(is_refused())
    asyncio.run(expected())
