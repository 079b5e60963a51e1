"""Rows for the views: each is packed once, and all of them are the history."""

from __future__ import annotations

import struct
from threading import Event
from typing import Any

import pytest

from pipeinfer_dask.protocol.messages import Drafted, RunDone
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import Fate, History, Trace
from pipeinfer_dask.trace.picture import LOOKS
from pipeinfer_dask.widgets import DraftTree, Feed, Metrics, Timeline, TokenStream
from pipeinfer_dask.widgets.feed import TABLES

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
    looks = [list(LOOKS)[work["look"]] for work in works]
    assert looks.count("cancelled") == TRACE.metrics().runs_cancelled > 0
    assert set(looks) <= {*map(str, Fate), "draft"}
    texts = feed.rows("works").texts
    assert texts is not None and len(texts) == len(works)
    guesses = [guess for draft in History(TRACE).drafts.values() for guess in draft.guesses]
    assert "".join(f"#{g.token}" for g in guesses) == "".join(
        text for text, look in zip(texts, looks, strict=True) if look == "draft"
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
def test_a_view_of_what_is_over_has_all_rows_as_its_state(kind: Any) -> None:
    view = kind(TRACE)
    assert view.complete
    assert set(view.rows) == set(kind.shows)
    for name, packed in view.rows.items():
        (columns,) = [view.about["schema"][name]]
        size = struct.calcsize(
            "<" + "".join({"u1": "B", "u2": "H"}.get(type_, "I") for _, type_ in columns)
        )
        assert len(packed) == view.feed.count(name) * size
    bundle, _ = view._repr_mimebundle_()
    assert bundle["text/html"] == view.freeze().data == view.to_html()


class Recorded(Timeline):
    """A timeline that keeps what it sends."""

    def __init__(self, source: Any) -> None:
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        self.told = Event()
        super().__init__(source)

    def send(self, content: Any, buffers: Any = None) -> None:
        self.sent.append((content, buffers or []))
        self.told.set()


def test_a_live_view_is_sent_each_row_once_and_all_of_them_when_it_asks() -> None:
    source = Growing(TRACE)
    view = Recorded(source)
    assert view.sent[0][0] == {"kind": "rows", "reset": True, "now": 0.0, "tables": []}
    for upto in (100, 400, 900):
        view.told.clear()
        source.grow(upto)
        assert view.told.wait(30)
    rows = [
        (name, first, len(buffer))
        for content, buffers in view.sent
        for (name, first, *_), buffer in zip(content["tables"], buffers, strict=True)
        if name == "bars"
    ]
    size = TABLES["bars"].packer.size
    assert len(rows) > 1
    assert [first for _, first, _ in rows] == [
        sum(length for _, _, length in rows[:at]) // size for at in range(len(rows))
    ]
    view.sent.clear()
    view._asked(view, {"kind": "resync"}, [])
    (content, buffers), *_ = view.sent
    assert content["reset"] is True
    assert len(buffers[1]) == view.feed.count("bars") * size
    source.end()
    assert view.feed.wait(30)
    assert view.complete and len(view.rows["bars"]) == view.feed.count("bars") * size


def test_a_view_can_turn_to_another_trace() -> None:
    view = Recorded(Growing(TRACE))
    left = view.feed
    other = simulate("iterative", stages=2, max_new_tokens=5)
    view.show(other)
    assert view.complete and view.about["title"] == "iterative"
    assert len(view.about["nodes"]) == 3
    view.sent.clear()
    left._over.__self__.end()  # type: ignore[attr-defined]
    assert left.wait(30)
    assert view.sent == [] and view.about["title"] == "iterative"
