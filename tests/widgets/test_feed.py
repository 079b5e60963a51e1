"""Rows for the views: each is packed once, and all of them are the history."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest

from pipeinfer_dask.protocol.messages import Drafted, RunDone
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import Fate, History, Trace
from pipeinfer_dask.trace.picture import LOOKS
from pipeinfer_dask.widgets import Channel, DraftTree, Metrics, Timeline, TokenStream
from pipeinfer_dask.widgets.channel import HEAD, PART
from pipeinfer_dask.widgets.feed import TABLES, Feed

TRACE = simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=60).trace


class Growing:
    """A recorded generation that goes on as it is told to."""

    def __init__(self, recorded: Trace) -> None:
        self.recorded = recorded
        self.trace = Trace(recorded.stages)
        self.strategy = "recorded"
        self._over = Event()

    def grow(self, upto: int) -> None:
        for entry in self.recorded.records[len(self.trace) : upto]:
            self.trace.add(*entry)

    def end(self) -> None:
        self.grow(len(self.recorded))
        self._over.set()

    def done(self) -> bool:
        return self._over.is_set()


class Listener:
    """Takes rows as a view does, and says when it has had some."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.heard = Event()
        self.finished = Event()
        self.counts = dict.fromkeys(TABLES, 0)

    def push(self) -> None:
        for name in TABLES:
            count = self.feed.count(name)
            assert count >= self.counts[name]
            self.counts[name] = count
        self.heard.set()

    def finish(self) -> None:
        assert not self.feed.live

    def over(self) -> None:
        self.finished.set()


def unpacked(feed: Feed, name: str) -> list[dict[str, Any]]:
    columns = TABLES[name].columns
    return [
        dict(zip(columns, values, strict=True))
        for values in TABLES[name].packer.iter_unpack(feed.rows(name).packed)
    ]


def test_bars_are_what_the_nodes_did() -> None:
    feed = Feed(TRACE)
    began = feed.history.began
    expected = []
    for _, what in TRACE:
        if isinstance(what, RunDone):
            expected += [(row + 1, span) for row, span in enumerate(what.spans)]
        elif isinstance(what, Drafted) and what.span is not None:
            expected.append((0, what.span))
    bars = unpacked(feed, "bars")
    assert [(bar["row"], bar["layers"]) for bar in bars] == [(r, s.layers) for r, s in expected]
    assert [bar["began"] for bar in bars] == pytest.approx([s.began - began for _, s in expected])
    assert sum(bar["spared"] for bar in bars) == TRACE.metrics().layers_saved


def test_works_have_their_fates_and_texts() -> None:
    feed = Feed(TRACE)
    works = unpacked(feed, "works")
    looks: dict[int, str] = {}
    called_off, saved = set(), 0
    for bar in unpacked(feed, "bars"):
        work, look = bar["work"], list(LOOKS)[bar["look"]]
        if look in ("cancelled", "saved"):
            called_off.add(work)
            assert (look == "saved") is (bar["layers"] == 0)
            saved += look == "saved"
        else:
            assert looks.setdefault(work, look) == look
    assert len(called_off) == TRACE.metrics().runs_cancelled > 0 and saved > 0
    assert called_off.isdisjoint(looks)
    assert set(looks.values()) <= {*map(str, Fate), "draft"}
    texts = feed.rows("works").texts
    assert texts is not None and len(texts) == len(works)
    guesses = [guess for draft in History(TRACE).drafts.values() for guess in draft.guesses]
    assert "".join(f"#{g.token}" for g in guesses) == "".join(
        text for work, text in enumerate(texts) if looks.get(work) == "draft"
    )


def test_guesses_tokens_and_figures_are_those_of_the_history() -> None:
    feed, history = Feed(TRACE), History(TRACE)
    assert [row["parent"] for row in unpacked(feed, "guesses")] == [
        -1 if guess.parent is None else guess.parent.id for guess in history.guesses
    ]
    assert [(row["guess"], row["kept"]) for row in unpacked(feed, "settled")] == [
        (guess.id, guess.kept) for guess in history.settled
    ]
    assert [row["guess"] for row in unpacked(feed, "tokens")] == [
        t.guess.id for t in history.tokens
    ]
    assert unpacked(feed, "figures")[-1]["tokens"] == 60
    assert feed.count("busy") == feed.count("figures") * (1 + TRACE.stages)
    assert feed.count("waves") == len(history.waves)


def test_rows_that_come_bit_by_bit_are_those_that_come_at_once() -> None:
    source = Growing(TRACE)
    feed = Feed(source)
    listener = Listener(feed)
    feed.subscribe(listener)
    for upto in range(0, len(TRACE), 150):
        listener.heard.clear()
        source.grow(upto + 1)
        assert listener.heard.wait(30)
    source.end()
    assert feed.wait(30) and listener.finished.is_set()
    whole = Feed(TRACE)
    for name in TABLES:
        assert feed.rows(name) == whole.rows(name)


def test_who_has_gone_hears_of_nothing() -> None:
    source = Growing(TRACE)
    feed = Feed(source)
    listener = Listener(feed)
    feed.subscribe(listener)
    feed.unsubscribe(listener)
    source.end()
    assert feed.wait(30)
    assert not listener.heard.is_set() and not listener.finished.is_set()


@pytest.mark.parametrize("source", [None, 3, "trace"])
def test_what_has_no_trace_can_not_be_shown(source: object) -> None:
    with pytest.raises(ValueError, match="expected a trace"):
        Timeline(source)


def test_text_of_a_generation_is_its_own_and_not_that_of_single_tokens() -> None:
    trace = simulate("adaptive", stages=2, max_new_tokens=6).trace
    trace.pieces = ["", "é", " 日", "", "", "本"]
    assert Feed(trace).rows("tokens").texts == trace.pieces


@pytest.mark.parametrize("kind", [Timeline, Metrics, TokenStream, DraftTree])
def test_the_channel_of_what_is_over_has_all_rows_as_its_state(kind: Any) -> None:
    channel = kind(TRACE).channel
    assert channel.complete
    assert set(channel.rows) == {name for name, _ in channel.about["schema"]} == set(kind.shows)
    for name, columns in channel.about["schema"]:
        codes = ({"u1": "B", "u2": "H"}.get(type_, "I") for _, type_ in columns)
        size = struct.calcsize("<" + "".join(codes))
        assert len(channel.rows[name]) == channel.feed.count(name) * size


@pytest.mark.parametrize("kind", [Timeline, Metrics, TokenStream, DraftTree])
def test_a_view_that_is_alone_can_be_stepped_through_once_it_is_over(kind: Any) -> None:
    source = Growing(TRACE)
    view = kind(source)
    source.grow(400)
    assert view.alone and view.last == 0 and view.steps == []
    source.end()
    assert view.feed.wait(30)
    assert view.last >= view.feed.now and len(view.steps) > 60 and view.moment == -1
    assert kind(TRACE, moment=2.0).moment == 2
    shared = kind(Channel(TRACE))
    assert not shared.alone and shared.last == 0  # its clock is that of whoever put it together
    another = Growing(TRACE)
    view.show(another)
    assert view.last == 0
    another.end()
    assert view.feed.wait(30) and view.last > 0


class Recorded(Channel):
    """A channel that keeps what it sends."""

    def __init__(self, source: Any) -> None:
        self.sent: list[bytes] = []
        self.told = Event()
        super().__init__(source)

    def send(self, content: Any, buffers: Any = None) -> None:
        assert content == {"kind": "rows"}
        self.sent += buffers
        self.told.set()

    def take(self) -> Iterator[tuple[bool, str, int, bytes, list[str]]]:
        """Yield of each table that was sent: is it all, its name, where it begins, and the rows."""
        for message in self.sent:
            _, reset = HEAD.unpack_from(message)
            at = HEAD.size
            while at < len(message):
                number, first, rows, texts = PART.unpack_from(message, at)
                at += PART.size
                packed, said = message[at : at + rows], message[at + rows : at + rows + texts]
                yield reset, self.tables[number], first, packed, json.loads(said or "[]")
                at += rows + texts
        self.sent.clear()


def test_live_views_are_sent_each_row_once_and_all_of_them_when_they_ask() -> None:
    source = Growing(TRACE)
    channel = Recorded(source)
    views = [kind(channel) for kind in (Timeline, Metrics, TokenStream, DraftTree)]
    assert channel.sent == [HEAD.pack(0.0, True)]
    for upto in (100, 400, 900):
        channel.told.clear()
        source.grow(upto)
        assert channel.told.wait(30)
    packed = dict.fromkeys(TABLES, b"")
    texts: dict[str, list[str]] = {name: [] for name, table in TABLES.items() if table.texts}
    for reset, name, first, rows, said in channel.take():
        assert not reset
        assert first == len(packed[name]) // TABLES[name].packer.size
        packed[name] += rows
        texts[name] = texts.get(name, []) + said
    channel._asked(channel, {"kind": "resync"}, [])
    again = {name: (rows, said) for _, name, _, rows, said in channel.take()}
    assert again == {name: (rows, texts.get(name, [])) for name, rows in packed.items() if rows}
    source.end()
    assert channel.feed.wait(30)
    assert channel.complete and channel.rows["bars"].startswith(packed["bars"])
    for view in views:
        assert view.channel is channel


def test_views_of_a_channel_turn_to_another_trace_together() -> None:
    channel = Recorded(Growing(TRACE))
    view = Timeline(channel)
    left = view.feed
    other = simulate("iterative", stages=2, max_new_tokens=5)
    view.show(other)
    assert channel.complete and channel.about["title"] == "iterative"
    assert view.feed.trace is other.trace and len(channel.about["nodes"]) == 3
    channel.sent.clear()
    left._over.__self__.end()  # type: ignore[attr-defined]
    assert left.wait(30)
    assert channel.sent == [] and channel.about["title"] == "iterative"


def test_a_channel_without_what_a_view_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="got one without bars, waves, works"):
        Timeline(Channel(TRACE, ["tokens"]))


def test_what_is_to_be_done_at_the_end_is_done_for_each_trace() -> None:
    source = Growing(TRACE)
    channel = Channel(source)
    ends: list[int] = []
    channel.at_end.append(lambda: ends.append(channel.feed.count("tokens")))
    source.end()
    assert channel.feed.wait(30)
    channel.show(simulate("iterative", stages=2, max_new_tokens=5))
    assert ends == [60, 5]
