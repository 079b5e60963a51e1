"""Whatever comes over a link: no crash, no hang, no memory beyond the bound.

Hypothesis always; with atheris (`pip install atheris`), which is led by coverage, in a process
of its own, too.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import enumerate as enumerate_threads
from typing import Any, Self

import msgpack
import pytest
from distributed import LocalCluster, Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeinfer_dask.protocol.messages import (
    CancelDraft,
    CancelReason,
    CancelRuns,
    DraftPlan,
    Prune,
    Release,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.head.head_actor import HeadNode, PipelinePlan
from pipeinfer_dask.runtime.links.framing import CHUNK, Inflow, pack
from pipeinfer_dask.runtime.links.links import Link, Session, dial
from pipeinfer_dask.runtime.links.reading import decode, read_header
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import (
    AwaitLoaded,
    BytesRead,
    Close,
    Dialled,
    Envelope,
    Failed,
    Loaded,
    Message,
    PeerLost,
    Ping,
    Pong,
    Renew,
    Renewed,
    WireError,
    encode,
)
from pipeinfer_dask.runtime.nodes.actors import (
    CONTROL,
    FIRST_STAGE,
    INPUT,
    DrafterNode,
    Node,
    StageNode,
)
from pipeinfer_dask.runtime.nodes.compute import MOST_CANCELLED
from pipeinfer_dask.runtime.nodes.room import Bounds
from pipeinfer_dask.runtime.pipeline.recovery import NONE
from tests.clusters import local_cluster
from tests.runtime.chain import SLOW, CountingSpec, EchoingSpec, run_of
from tests.runtime.test_wire import INTAKE, counts, messages

MOST = INTAKE.tokens * INTAKE.width * 4
"""Bytes of the largest hidden states that the stage takes."""

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=20,
)
"""What msgpack can say."""


@st.composite
def almost(draw: st.DrawFn) -> list[bytes]:
    """A message of ours, some bytes of it changed, or some parts of its header."""
    message = draw(messages)
    frames = [
        bytes(frame)
        for frame in encode(Envelope(draw(st.integers(0, 1)), draw(st.integers(0, 2)), message))
    ]
    if draw(st.booleans()):
        fields = msgpack.unpackb(frames[0], use_list=True)
        fields[draw(st.integers(0, 4))] = draw(plain)
        frames[0] = msgpack.packb(fields)
    changed = bytearray(frames[0])
    for _ in range(draw(st.integers(0, 3))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return [bytes(changed), *frames[1:]]


anything = almost() | st.lists(st.binary(max_size=64), min_size=1, max_size=2)


@settings(max_examples=400)
@given(anything | plain.map(lambda value: [msgpack.packb(value)]))
def test_the_decoder_gives_a_message_or_refuses(frames: list[bytes]) -> None:
    try:
        envelope = decode(frames, INTAKE)
    except WireError:
        return
    # What was let in can be said again, and means the same.
    again = decode(encode(envelope), INTAKE)
    assert repr(again) == repr(envelope)


def heard(stream: bytes, pieces: Sequence[int]) -> tuple[list[Message], bool]:
    """Return what a link hears of a stream that comes in pieces, and whether to the end."""
    found: list[Message] = []

    def open_message(frame: Any, nbytes: int) -> Any:
        header = read_header(frame, nbytes, INTAKE)
        return lambda payload: found.append(header.complete(payload))

    inflow = Inflow(open_message)
    sizes = iter(pieces)
    while stream:
        buffer = inflow.buffer()
        part = stream[: min(len(buffer), next(sizes, len(stream)))]
        buffer[: len(part)] = part
        try:
            inflow.filled(len(part))
        except WireError:
            return found, False
        assert inflow.nbytes <= CHUNK + MOST
        stream = stream[len(part) :]
    return found, True


def streamed(frames: list[bytes]) -> bytes:
    return pack(frames)[0] + b"".join(frames[1:])


@settings(max_examples=400)
@given(
    st.lists(almost().map(streamed) | st.binary(max_size=200), max_size=4).map(b"".join),
    st.lists(st.integers(1, 300), max_size=20),
)
def test_a_stream_means_the_same_in_whatever_pieces_it_comes(
    stream: bytes, pieces: list[int]
) -> None:
    assert repr(heard(stream, pieces)) == repr(heard(stream, []))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def worker(runner: asyncio.Runner) -> Iterator[Worker]:
    async def start() -> LocalCluster:
        cluster: LocalCluster = await local_cluster(
            n_workers=1, protocol="tcp", silence_logs=logging.CRITICAL, asynchronous=True
        )
        return cluster

    async def stop() -> None:
        await cluster.close()  # type: ignore[misc]

    cluster = runner.run(start())
    yield next(iter(cluster.workers.values()))
    runner.run(stop())


said = (
    messages
    | st.builds(BytesRead, counts, counts)
    | st.sampled_from([Loaded(), AwaitLoaded(), Dialled()])
    | st.builds(Renew, counts)
    | st.builds(Renewed, st.integers(0, 2))
    | st.builds(Pong, st.integers(0, 2), st.floats(-9, 9), st.floats(0, 1e9))
)
"""What may be said in the right form, be there a reason to or not."""


def say(link: Link, what: Sequence[Message | list[bytes]]) -> None:
    """Send messages as they come in order, and frames as they are."""
    for one in what:
        if isinstance(one, list):
            link._carrier.write(one)
        else:
            link.send(one)


STAGE, DRAFTER = Bounds.of_stage(2, 2), Bounds.of_drafter(2)


def stage(worker: Worker, session: Session) -> Node[Any]:
    spec = CountingSpec("fuzzed", last=True, intake=INTAKE)
    return StageNode(worker, session, "stage-1", spec, STAGE)


def drafter(worker: Worker, session: Session) -> Node[Any]:
    return DrafterNode(worker, session, "drafter", EchoingSpec(), DRAFTER)


def head(worker: Worker, session: Session) -> Node[Any]:
    stages, workers = (CountingSpec("driven", last=True),), (worker.address,)
    plan = PipelinePlan(stages, workers, None, None, NONE, 20.0, 1)
    return HeadNode(worker, session, "head", plan)


@pytest.mark.cluster
@pytest.mark.parametrize("kind", [stage, drafter, head], ids=lambda kind: kind.__name__)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([CONTROL, INPUT]), st.lists(said | almost() | anything, min_size=1, max_size=4)
)
def test_a_node_outlives_nonsense_or_ends_its_link(
    runner: asyncio.Runner,
    worker: Worker,
    kind: Callable[[Worker, Session], Node[Any]],
    role: str,
    sent: list[Message | list[bytes]],
) -> None:
    """After whatever came over one link the node answers over another, or has closed with it."""

    async def main() -> None:
        session = Session.new()
        node = kind(worker, session)
        node.open()
        failures: list[Exception] = []
        node.thread._failed = failures.append
        links: list[Link] = []

        async def open_link(role: str) -> Link:
            link = await dial(worker.address, node.identity, role, session, connection_args={})
            links.append(link)
            return link

        try:
            async with asyncio.timeout(20):
                control = await open_link(CONTROL)
                attacked = control if role == CONTROL else await open_link(role)
                say(attacked, sent)
                if role == CONTROL:
                    await ended_or_answers(node, control, number=len(sent))
                else:
                    await ended_or_answers(node, control, number=0)
            stats = node.stats()
            assert stats["malformed"] + stats["gaps"] <= 1
        finally:
            node.stop()
            await node._end()
            for link in links:
                link.abort()
        threads = [thread.name for thread in enumerate_threads()]
        assert node.identity not in threads
        assert failures == []

    runner.run(main())


@pytest.mark.cluster
def test_a_later_stage_computes_no_run_that_comes_without_hidden_states(
    runner: asyncio.Runner, worker: Worker
) -> None:
    async def main() -> None:
        session = Session.new()
        node = stage(worker, session)
        node.open()
        link = await dial(worker.address, node.identity, INPUT, session, connection_args={})
        try:
            link.send(RunPass(run_of(0, 1), skipped=True))
            link.send(RunPass(run_of(1, 1)))
            async with asyncio.timeout(20):
                await link.receive(lambda message: None)
            assert node.stats()["malformed"] == 1
        finally:
            node.stop()
            await node._end()
            link.abort()

    runner.run(main())


@pytest.mark.cluster
@pytest.mark.parametrize("kind", [stage, drafter], ids=lambda kind: kind.__name__)
def test_a_client_that_calls_off_more_than_can_be_in_flight_is_cut_off(
    runner: asyncio.Runner, worker: Worker, kind: Callable[[Worker, Session], Node[Any]]
) -> None:
    """None of these runs ever comes, so that nothing would take their numbers away again."""
    all_but_one = tuple(range(MOST_CANCELLED - 1))
    if kind is stage:
        half = len(all_but_one) // 2
        told: list[Message] = [
            CancelRuns(1, 0, all_but_one[:half], CancelReason.INVALID),
            CancelRuns(1, 0, all_but_one[:half], CancelReason.INVALID),  # no more than before
            Prune(2, 0, (3,), (all_but_one[half:],)),
        ]
        last: Message = CancelRuns(4, 0, (5,), CancelReason.INVALID)
    else:
        told = [CancelDraft(1, 0, number) for number in range(MOST_CANCELLED)]
        last = CancelDraft(1, 0, MOST_CANCELLED)

    async def main() -> None:
        session = Session.new()
        node = kind(worker, session)
        node.open()
        link = await dial(worker.address, node.identity, CONTROL, session, connection_args={})
        try:
            async with asyncio.timeout(60):
                answered = asyncio.Event()
                reading = asyncio.create_task(link.receive(lambda message: answered.set()))
                say(link, [*told, Ping(1)])
                await answered.wait()
                assert node.stats()["malformed"] == 0
                say(link, [last])
                await reading
            assert node.stats()["malformed"] == 1
            assert len(node.thread.cancelled) <= MOST_CANCELLED
        finally:
            node.stop()
            await node._end()
            link.abort()

    runner.run(main())


@pytest.mark.cluster
def test_a_head_that_is_given_up_while_it_connects_closes_its_client(
    runner: asyncio.Runner, worker: Worker
) -> None:
    async def main() -> None:
        session = Session.new()
        node = head(worker, session)
        node.open()
        link = await dial(worker.address, node.identity, CONTROL, session, connection_args={})
        say(link, [AwaitLoaded(), Close()])
        async with asyncio.timeout(20):
            await link.receive(lambda message: None)  # until the node has ended
        await node._end()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        runner.run(main())
        gc.collect()  # what is not closed by now warns
    assert [str(warning.message) for warning in warned] == []


def first(worker: Worker, session: Session) -> Node[Any]:
    return StageNode(worker, session, FIRST_STAGE, CountingSpec("first"), STAGE)


def asked(kind: object, number: int, token: int = 1, cache: int | None = None) -> Message:
    """Return a run or a draft of a request of its own, by default with a KV cache of its own."""
    cache = number if cache is None else cache
    run = replace(run_of(number, token), request=number, cache=cache)
    if kind is first:
        return RunPass(run)
    plan = DraftPlan(1)
    return StartDraft(number, 0, number, run.batch, 1, (1,), plan, cache=cache)


@pytest.mark.cluster
@pytest.mark.parametrize("token", [1, SLOW], ids=["idle", "busy"])
@pytest.mark.parametrize("kind", [first, drafter], ids=lambda kind: kind.__name__)
def test_a_peer_that_asks_for_more_than_an_honest_head_is_cut_off_before_memory_is_taken(
    runner: asyncio.Runner,
    worker: Worker,
    kind: Callable[[Worker, Session], Node[Any]],
    token: int,
) -> None:
    """It knows the secret, and makes up requests and caches, whether or not the node is busy."""
    bounds = STAGE if kind is first else DRAFTER

    async def main() -> None:
        session = Session.new()
        node = kind(worker, session)
        node.open()
        links = [
            await dial(worker.address, node.identity, role, session, connection_args={})
            for role in (CONTROL, INPUT)[: 1 + (kind is first)]
        ]
        told: asyncio.Queue[Message] = asyncio.Queue()
        hearing = [asyncio.create_task(link.receive(told.put_nowait)) for link in links]
        try:
            async with asyncio.timeout(60):
                say(links[0], [Release(number, 0, number) for number in range(500)])
                for number in range(bounds.waiting + bounds.requests + 2):
                    say(links[-1], [asked(kind, number, token)])
                await hearing[-1]
                if kind is first:  # the head hears why, whoever brought the runs
                    while not isinstance(lost := await told.get(), PeerLost):
                        pass
                    assert "expected at most 16 runs or drafts under way, of 2" in lost.reason
            assert node.stats()["malformed"] == 1
            assert node.thread.waiting <= bounds.waiting
            assert len(node.thread.caches) <= bounds.requests
        finally:
            node.stop()
            await node._end()
            for link in links:
                link.abort()
            await asyncio.gather(*hearing, return_exceptions=True)

    runner.run(main())


class Watched:
    """A first stage, which tells of each run what it holds when it turns to it."""

    def __init__(self, worker: Worker) -> None:
        self.held: list[set[int]] = []
        self._session = Session.new()
        self.node = first(worker, self._session)
        self._address = worker.address
        self._tell = self.node.thread._taken
        self.node.thread._taken = self._note
        self._told: asyncio.Queue[Message] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self.node.open()
        self.control, self.input = [
            await dial(self._address, self.node.identity, role, self._session, connection_args={})
            for role in (CONTROL, INPUT)
        ]
        self._hearing = [
            asyncio.create_task(link.receive(self._told.put_nowait))
            for link in (self.control, self.input)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.node.stop()
        await self.node._end()
        await asyncio.gather(*self._hearing, return_exceptions=True)

    async def taken(self) -> int:
        """Return the request of the next run that it turns to."""
        async with asyncio.timeout(60):
            while not isinstance(message := await self._told.get(), RunTaken):
                pass
        return message.request

    async def release(self, *told: Release) -> None:
        """Tell it what is free, and wait until it has heard that."""
        say(self.control, [*told, Ping(1)])
        async with asyncio.timeout(60):
            while not isinstance(await self._told.get(), Pong):
                pass

    def _note(self, run: StartRun) -> None:
        self.held.append({*self.node.thread.caches, run.cache})
        self._tell(run)


@pytest.mark.cluster
def test_a_run_that_is_ahead_of_the_word_that_a_cache_is_free_waits_for_it(
    runner: asyncio.Runner, worker: Worker
) -> None:
    async def main() -> None:
        async with Watched(worker) as stage:
            say(stage.input, [asked(first, number) for number in (1, 2, 3, 2)])
            assert [await stage.taken(), await stage.taken()] == [1, 2]
            say(stage.control, [Release(1, 0, 1)])
            assert [await stage.taken(), await stage.taken()] == [3, 2]
            await stage.release(Release(2, 0, 2), Release(3, 0, 3))
            say(stage.input, [asked(first, 4)])
            assert await stage.taken() == 4
            assert stage.held == [{1}, {1, 2}, {2, 3}, {2, 3}, {4}]

    runner.run(main())


@pytest.mark.cluster
def test_late_word_that_a_cache_is_free_leaves_it_to_the_request_that_has_it_by_now(
    runner: asyncio.Runner, worker: Worker
) -> None:
    """As where a conversation gave way, and goes on before a stage has heard of it."""

    async def main() -> None:
        async with Watched(worker) as stage:
            say(stage.input, [asked(first, number, cache=7) for number in (1, 2)])
            assert [await stage.taken(), await stage.taken()] == [1, 2]
            await stage.release(Release(1, 0, 7))
            say(stage.input, [asked(first, 3)])
            assert await stage.taken() == 3
            await stage.release(Release(2, 0, 7))
            say(stage.input, [asked(first, 4)])
            assert await stage.taken() == 4
            assert stage.held == [{7}, {7}, {3, 7}, {3, 4}]

    runner.run(main())


async def ended_or_answers(node: Node[Any], control: Link, number: int) -> None:
    answered = asyncio.get_running_loop().create_future()

    def hear(message: Message) -> None:
        if isinstance(message, Pong) and message.number == -1 and not answered.done():
            answered.set_result(None)

    reading = asyncio.create_task(control.receive(hear))
    for sequence in range(number + 1):  # it may have taken any number of what was sent
        control._carrier.write(encode(Envelope(0, sequence, Ping(-1))))
    await asyncio.wait([reading, answered], return_when=asyncio.FIRST_COMPLETED)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_decoder_and_parser_stand_what_a_fuzzer_led_by_coverage_makes_up(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    seeds: list[Message] = [RunPass(run_of(0, 1, 2)), Ping(1), Failed("why")]
    for number, message in enumerate(seeds):
        (frame,) = encode(Envelope(0, 0, message))
        (corpus / f"decoded-{number}").write_bytes(b"\0" + frame)
        (corpus / f"streamed-{number}").write_bytes(streamed([bytes(frame)]))
    target = Path(__file__).with_name("atheris_target.py")
    limits = ["-runs=50000", "-seed=1", "-timeout=5", "-rss_limit_mb=2048"]
    ran = subprocess.run(
        [sys.executable, target, *limits, corpus], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Done 50000 runs" in ran.stderr
