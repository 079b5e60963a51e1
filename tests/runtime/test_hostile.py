"""What a peer sends that it should not: never acted upon, and always counted."""

from __future__ import annotations

import asyncio
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.comm import connect
from distributed.core import Server
from distributed.protocol import ToPickle
from distributed.protocol.core import dumps

from pipeinfer_dask.protocol.messages import (
    Batch,
    DraftPlan,
    Kind,
    Prune,
    StartDraft,
    StartRun,
    TreePlan,
)
from pipeinfer_dask.runtime.links.bounds import MOST_HEADER
from pipeinfer_dask.runtime.links.framing import CHUNK, PREFIX, Inflow
from pipeinfer_dask.runtime.links.links import Counts, Link, LinkError, Session, accept
from pipeinfer_dask.runtime.links.reading import decode, read_header
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.typed import is_a
from pipeinfer_dask.runtime.links.wire import Envelope, Message, Ping, Pong, WireError, encode
from tests.runtime.test_links import INTAKE, NODE, SESSION, Inbox, linked, payload_of

OVER_A_NETWORK = ["tcp", "tls"]


def ping(number: int, *, generation: int = 0) -> list[Any]:
    return encode(Envelope(generation, number, Ping(number)))


@pytest.mark.parametrize("transport", ["tcp", "tls", "inproc"])
def test_what_comes_twice_or_for_another_generation_is_dropped_and_counted(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(far)
            for frames in (ping(0), ping(0), ping(1, generation=7), ping(1), ping(0), ping(2)):
                near._carrier.write(frames)
            assert [await inbox.messages.get() for _ in range(3)] == [Ping(0), Ping(1), Ping(2)]
            assert inbox.messages.empty()
            assert far.counts == Counts(stale=1, doubled=2)
            assert not far.closed

    asyncio.run(main())


@pytest.mark.parametrize("transport", OVER_A_NETWORK)
def test_a_gap_ends_the_link_and_nothing_behind_it_is_acted_upon(transport: str) -> None:
    async def main() -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(far)
            for number in (0, 2, 1):
                near._carrier.write(ping(number))
            with pytest.raises(LinkError, match=r"expected message 1 from .*, got 2: .* has lost"):
                await inbox.reading
            assert inbox.messages.get_nowait() == Ping(0)
            assert inbox.messages.empty()
            assert far.counts == Counts(gaps=1)
            assert far.closed

    asyncio.run(main())


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("transport", OVER_A_NETWORK)
def test_nothing_that_comes_over_a_link_is_unpickled(transport: str, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    frames = dumps(ToPickle(Bomb(mark)))
    raw = [bytes(frame) for frame in frames]

    async def main(attack: list[bytes]) -> None:
        async with linked(transport) as (near, far):
            inbox = Inbox(far)
            near._carrier.write(attack)
            with pytest.raises(WireError):
                await inbox.reading
            assert far.counts == Counts(malformed=1)

    for attack in (
        raw[:1],
        raw[:2],
        [pickle.dumps(Bomb(mark))],
        [msgpack.packb((0, 0, 6, raw, None))],
    ):
        asyncio.run(main(attack))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb does not work, so that this test would prove nothing"


ONE = payload_of(1, 0)


def widened(width: int) -> RunPass:
    return replace(ONE, hidden=np.ones((1, width), np.float32))


@pytest.mark.parametrize(
    ("job", "match"),
    [
        (widened(1023), r"expected hidden states \[1, 1024\] .*, got \[1, 1023\]"),
        (widened(1 << 20), r"got \[1, 1048576\]"),
        (replace(ONE, hidden=np.ones((2, 1024), np.float32)), r"got \[2, 1024\]"),
        (replace(ONE, hidden=np.ones((0, 1024), np.float32)), r"got \[0, 1024\]"),
        (payload_of(2001, 0), "of at most 2000 tokens"),
        (replace(ONE, hidden=np.ones((1, 1024), np.float64)), "as <f4 or <f2 .* got .'<f8'"),
        (replace(ONE, hidden=np.ones((1, 1024), np.int32)), "as <f4 or <f2"),
        (replace(ONE, hidden=np.ones((1024,), np.float32)), "as <f4 or <f2"),
    ],
    ids=["narrow", "wide", "too many rows", "no rows", "too many tokens", "f8", "ints", "flat"],
)
def test_hidden_states_that_the_stage_does_not_take_are_refused_before_they_come(
    job: RunPass, match: str
) -> None:
    header, payload = encode(Envelope(0, 0, job))

    async def main() -> None:
        async with linked() as (near, far):
            inbox = Inbox(far)
            # The header alone: who would make room first would wait for the rest.
            prefix = PREFIX.pack(len(header), memoryview(payload).nbytes)
            near._carrier._transport.write(prefix + header)  # type: ignore[attr-defined]
            with pytest.raises(WireError, match=match):
                await inbox.reading
            assert far.counts == Counts(malformed=1)

    asyncio.run(main())


def test_a_link_that_brings_no_runs_takes_no_hidden_states() -> None:
    async def main() -> None:
        async with linked(intake=None) as (near, far):
            inbox = Inbox(far)
            near.send(ONE)
            with pytest.raises(WireError, match="expected no hidden states here"):
                await inbox.reading

    asyncio.run(main())


def test_a_payload_of_another_size_than_its_shape_is_refused_before_it_comes() -> None:
    header, _ = encode(Envelope(0, 0, ONE))
    with pytest.raises(WireError, match=r"expected 4096 bytes of hidden states .*, got 8589934592"):
        read_header(header, 1 << 33, INTAKE)


def feed(inflow: Inflow, data: bytes) -> None:
    """Put bytes there as a socket does: as many at a time as there is room for."""
    while data:
        buffer = inflow.buffer()
        part = data[: len(buffer)]
        buffer[: len(part)] = part
        inflow.filled(len(part))
        data = data[len(part) :]


def nothing_whole(header: object, nbytes: int) -> Any:
    raise AssertionError("no message is whole")


def test_a_header_that_does_not_come_takes_no_more_memory_than_what_has_come() -> None:
    inflow = Inflow(nothing_whole)
    feed(inflow, PREFIX.pack(MOST_HEADER, 0))
    assert inflow.nbytes == CHUNK
    feed(inflow, bytes(3 * CHUNK))
    assert inflow.nbytes == 4 * CHUNK


def test_a_header_beyond_all_bounds_is_refused_at_once() -> None:
    with pytest.raises(
        WireError, match=f"at most {MOST_HEADER} bytes, got one of {MOST_HEADER + 1}"
    ):
        feed(Inflow(nothing_whole), PREFIX.pack(MOST_HEADER + 1, 0))


def run_with(**columns: Any) -> RunPass:
    batch = replace(Batch((1, 2), (0, 1), (0, 1), (-1, 0)), **columns)
    return RunPass(StartRun(0, 0, 0, Kind.SPECULATIVE, batch, 1))


def draft_with(plan: DraftPlan | TreePlan) -> StartDraft:
    batch = Batch((1, 2), (0, 1), (0, 1), (-1, 0))
    return StartDraft(0, 0, 0, batch, 1, (2, 3), plan)


SOUND = run_with()
SOUND_PLAN = TreePlan(2, 1, 1, 1, 0.0, (1.0,))
WRONG: dict[str, Any] = {
    "no tokens": run_with(tokens=(), positions=(), slots=(), parents=()),
    "columns of two lengths": run_with(slots=(0,)),
    "a negative slot": run_with(slots=(-1, 0)),
    "a negative token": run_with(tokens=(1, -2)),
    "a parent before all": run_with(parents=(-2, 0)),
    "a slot beyond 64 bits": run_with(slots=(0, 2**63)),
    "a token of text": run_with(tokens=(1, "2")),
    "half a token": run_with(tokens=(1, 1.5)),
    "true as a token": run_with(tokens=(1, True)),
    "a batch of nothing": run_with(tokens=None),
    "more picks than tokens": replace(SOUND, run=replace(SOUND.run, picks=3)),
    "fewer than no picks": replace(SOUND, run=replace(SOUND.run, picks=-1)),
    "a run of text": replace(SOUND, run=replace(SOUND.run, run="1")),  # type: ignore[arg-type]
    "left out twice": replace(SOUND, left_out=(0, 0)),
    "left out in no order": replace(SOUND, left_out=(1, 0)),
    "left out beyond the batch": replace(SOUND, left_out=(2,)),
    "a skip of 1": replace(SOUND, skipped=1),  # type: ignore[arg-type]
    "tokens of text": replace(SOUND, tokens="12"),  # type: ignore[arg-type]
    "prunes of other runs": Prune(0, 0, (1, 2), ((0,),)),
    "a plan for more slots": draft_with(DraftPlan(3)),
    "a plan for fewer slots": draft_with(replace(SOUND_PLAN, size=1)),
    "chances of another frontier": draft_with(replace(SOUND_PLAN, chances=(1.0, 0.5))),
    "a calibration with nothing between": draft_with(replace(SOUND_PLAN, calibration=(1.0,))),
    "a ping of text": Ping("1"),  # type: ignore[arg-type]
    "a ping of nothing": Ping(None),  # type: ignore[arg-type]
    "a clock that is no number": Pong(1, float("nan"), 0.0),
}


@pytest.mark.parametrize("message", WRONG.values(), ids=WRONG.keys())
def test_a_message_with_contents_that_make_no_sense_is_malformed(message: Message) -> None:
    for sound in (SOUND, draft_with(SOUND_PLAN)):
        decode(encode(Envelope(0, 0, sound)), None)
    with pytest.raises(WireError, match="expected a message, got"):
        decode(encode(Envelope(0, 0, message)), None)


@pytest.mark.parametrize(
    "header",
    [
        (0, 0, 99, (1,), None),
        (0, 0, -1, (1,), None),
        (0, 0, True, (1,), None),
        (0.0, 0, 6, (1,), None),
        (2**64 - 1, 0, 6, (1,), None),
        (0, 0, 6, (1, 2), None),
        (0, 0, 6, {"number": 1}, None),
        (0, 0, 6, 1, None),
        (0, 0, 6, (1,), ("<f4", (1, 1))),
        (0, 0, 6, (1,)),
        {},
        "hello",
    ],
    ids=repr,
)
def test_a_header_of_another_form_is_malformed(header: object) -> None:
    decode([msgpack.packb((0, 0, 6, (1,), None))], INTAKE)
    with pytest.raises(WireError):
        decode([msgpack.packb(header)], INTAKE)


@pytest.mark.parametrize("nonsense", [b"\x80", b"\xc7\x00\x05"], ids=["maps", "extensions"])
def test_a_header_takes_no_memory_for_what_no_message_holds(nonsense: bytes) -> None:
    count = 100_000
    header = msgpack.packb((0, 0, 6, None, None)).replace(
        b"\x06\xc0", b"\x06\xdd" + count.to_bytes(4, "big") + nonsense * count
    )
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="neither maps nor extensions"):
            decode([header], INTAKE)
        assert tracemalloc.get_traced_memory()[1] < 20 * count
    finally:
        tracemalloc.stop()


def array_of(count: int) -> bytes:
    """Return the beginning of an array that says to hold so much."""
    return b"\xdd" + count.to_bytes(4, "big")


SIZE = 1 << 16
"""Things of nonsense in a header; what it takes is in proportion to them."""
NONSENSE = {
    "arrays of one": array_of(SIZE) + b"\x91\x00" * SIZE,
    "arrays in arrays": array_of(SIZE // 500) + (b"\x91" * 499 + b"\x00") * (SIZE // 500),
    "short texts": array_of(SIZE) + b"\xa2hi" * SIZE,
    "large numbers": array_of(SIZE) + b"\xce\xff\xff\xff\xff" * SIZE,
    "nothing": array_of(SIZE) + b"\xc0" * SIZE,
    "arrays that hold nothing of what they say": array_of(SIZE) * 1000 + b"\x00" * SIZE,
    "one that holds less than it says": array_of(2**32 - 1) + b"\x00" * SIZE,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
@pytest.mark.parametrize("place", range(5))
def test_a_header_of_nonsense_takes_memory_in_proportion_to_its_size(
    nonsense: bytes, place: int
) -> None:
    fields = [msgpack.packb(field) for field in (0, 0, 0, (), None)]
    fields[place] = nonsense
    header = b"\x95" + b"".join(fields)
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as refused:
            decode([header], INTAKE)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(header)
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 500


def test_a_proof_is_good_once(caplog: pytest.LogCaptureFixture) -> None:
    shown: set[str] = set()
    links: list[Link | None] = []
    answers: list[asyncio.Event] = []

    async def handler(comm: Any, **hello: Any) -> None:
        links.append(await accept(comm, NODE, hello, SESSION, shown, {}))
        answers.pop().set()

    async def hello(address: str, **said: Any) -> None:
        answers.append(answered := asyncio.Event())
        comm = await connect(address)
        await comm.write({"op": NODE, "reply": False, **said})
        await answered.wait()
        comm.abort()

    async def main() -> None:
        server = Server({NODE: handler})
        await server.listen("tcp://127.0.0.1:0")
        recorded = {
            "role": "input",
            "nonce": "7",
            "proof": SESSION.prove("dial", NODE, "input", "7"),
        }
        try:
            await hello(server.address, **recorded)
            await hello(server.address, **recorded)
            # Nor is it good for another role, by a turned answer, or in pieces.
            await hello(server.address, **recorded | {"role": "control"})
            answer = SESSION.prove("accept", NODE, "input", "8")
            await hello(server.address, role="input", nonce="8", proof=answer)
            for nonsense in ({}, {"role": ["input"], "nonce": {}, "proof": b""}, {"proof": "text"}):
                await hello(server.address, **nonsense)
        finally:
            for link in links:
                if link is not None:
                    link.abort()
            await server.close()

    asyncio.run(main())
    assert [link is not None for link in links] == [True] + 6 * [False]
    assert caplog.text.count("this proof has been shown before") == 1
    assert caplog.text.count("wrong secret") == 5


def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append(theirs)
        return ours == theirs

    monkeypatch.setattr("hmac.compare_digest", compare)
    session = Session.new()
    proof = session.prove("a", "b")
    assert session.proven(proof, "a", "b")
    assert not session.proven(proof, "b", "a")
    assert compared == [proof, proof]


def test_types_are_told_as_annotations_say() -> None:
    assert is_a(tuple[tuple[int, str], ...], ((1, "a"),))
    assert not is_a(tuple[tuple[int, str], ...], ((1, 2),))
    assert is_a(float | None, 2)
    assert not is_a(float | None, True)
    assert not is_a(bytes, b"bytes never travel")


def test_counts_add_up() -> None:
    total = Counts(1, 2, 3, 4, 5) + Counts(stale=1, refused=1)
    assert astuple(total) == (2, 2, 3, 4, 6)
