"""A trace as rows for the views: each is packed once, and none is ever changed.

What a view shows at any moment follows from the rows up to it, so a view that follows a
generation and one that steps through an old one are the same. Times are seconds from the begin.
"""

from __future__ import annotations

import math
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from threading import RLock, Thread
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace import Draft, History, Run, Trace
from pipeinfer_dask.trace.picture import LOOKS, look_of
from pipeinfer_dask.trace.record import trace_of
from pipeinfer_dask.trace.tables import work_of

T = TypeVar("T")

PERIOD_S = 0.1
"""What happens in so many seconds travels as one message."""
LABEL = 60
"""Most characters of a run's text that are sent."""

LOOK_NUMBERS = {name: number for number, name in enumerate(LOOKS)}
ORIGIN_NUMBERS = {origin: number for number, origin in enumerate(Origin)}


class Schema(NamedTuple):
    """The columns of a table, each with its type as NumPy writes it; and whether rows have text."""

    columns: dict[str, str]
    texts: bool = False

    @property
    def packer(self) -> struct.Struct:
        codes = {"u1": "B", "u2": "H", "u4": "I", "i4": "i", "f4": "f"}
        return struct.Struct("<" + "".join(codes[kind] for kind in self.columns.values()))


TABLES = {
    # A run or a draft that is done; `number` counts each of the two kinds from 0. What it came to
    # was open until it was `decided`.
    "works": Schema(
        {
            "number": "u4",
            "size": "u2",
            "kept": "u2",
            "started": "f4",
            "done": "f4",
            "decided": "f4",
        },
        texts=True,
    ),
    # What one node did of it. Row 0 is the drafter; `spared` are layers not computed.
    "bars": Schema(
        {
            "work": "u4",
            "row": "u2",
            "look": "u1",
            "layers": "u2",
            "spared": "u2",
            "began": "f4",
            "ended": "f4",
        }
    ),
    "waves": Schema({"time": "f4", "runs": "u2"}),
    "tokens": Schema({"guess": "u4", "time": "f4", "position": "u4", "origin": "u1"}, texts=True),
    # Their row is their id.
    "guesses": Schema(
        {
            "parent": "i4",
            "position": "u4",
            "made": "f4",
            "confidence": "f4",
            "ahead": "u2",
        },
        texts=True,
    ),
    "placed": Schema({"guess": "u4", "time": "f4", "run": "u4", "slot": "i4"}),
    "settled": Schema({"guess": "u4", "time": "f4", "kept": "u1"}),
    # The figures at each commitment.
    "figures": Schema(
        {
            "time": "f4",
            "tokens": "u4",
            "drafted": "u4",
            "accepted": "u4",
            "computed": "u4",
            "wasted": "u4",
        }
    ),
    # What each node has computed until then, in seconds: one row for each node and commitment.
    "busy": Schema({"seconds": "f4"}),
}


class Rows(NamedTuple):
    """Rows of a table from ``first`` up to ``end``, packed, and their texts if it has any."""

    first: int
    packed: bytes
    texts: list[str] | None
    end: int


class View(Protocol):
    """Whoever wants to hear of new rows."""

    def push(self) -> None:
        """Take what is new."""
        ...

    def finish(self) -> None:
        """Take all: nothing will be new any more."""
        ...

    def over(self) -> None:
        """Do what takes its time at the end: the feed's lock is not held."""
        ...


class Feed:
    """The rows of a trace, and a thread that adds to them while a generation goes on.

    Parameters
    ----------
    source : Trace, Generation, Result or Simulation
        Whatever has a trace. What has a method ``done`` that returns False is followed until it
        returns True.

    Attributes
    ----------
    trace : Trace
    history : History
    title : str
        The strategy, if the source knows it.
    live : bool
        Whether there may be more.
    lock : RLock
        Held while rows are added or sent.

    Raises
    ------
    ValueError
        If the source has no trace.
    """

    def __init__(self, source: Any) -> None:
        self.trace: Trace = trace_of(source)
        self.history = History(self.trace)
        self.title = str(getattr(source, "strategy", ""))
        self.lock = RLock()
        self._over: Callable[[], bool] = getattr(source, "done", lambda: True)
        self.live = True
        self._packed = {name: bytearray() for name in TABLES}
        self._texts: dict[str, list[str]] = {name: [] for name, t in TABLES.items() if t.texts}
        self._packers = {name: schema.packer for name, schema in TABLES.items()}
        self._next = defaultdict[str, int](int)
        self._fill: dict[str, Callable[[], None]] = {
            "works": self._fill_works,
            "bars": self._fill_works,
            "waves": self._fill_waves,
            "tokens": self._fill_tokens,
            "guesses": self._fill_guesses,
            "placed": self._fill_placed,
            "settled": self._fill_settled,
            "figures": self._fill_figures,
            "busy": self._fill_figures,
        }
        self._views: list[View] = []
        if self._over():
            self._finish()
        else:
            self._thread = Thread(target=self._follow, name="pipeinfer-views", daemon=True)
            self._thread.start()

    @property
    def now(self) -> float:
        """The last moment that is known of, in seconds from the begin."""
        return self.history.ended - self.history.began

    def subscribe(self, view: View) -> None:
        """Have a view hear of what is new, and of the end."""
        with self.lock:
            self._views.append(view)

    def unsubscribe(self, view: View) -> None:
        """Have a view hear of nothing any more."""
        with self.lock:
            if view in self._views:
                self._views.remove(view)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is nothing more to come; return whether that is so."""
        if self.live:
            self._thread.join(timeout)
        return not self.live

    def rows(self, name: str, first: int = 0) -> Rows:
        """Return the rows of a table from ``first`` on."""
        with self.lock:
            self._fill[name]()  # tables that no view needs are not packed
            packed, texts = self._packed[name], self._texts.get(name)
            size = self._packers[name].size
            return Rows(
                first,
                bytes(packed[first * size :]),
                texts[first:] if texts is not None else None,
                len(packed) // size,
            )

    def count(self, name: str) -> int:
        """Return how many rows a table has."""
        with self.lock:
            self._fill[name]()
            return len(self._packed[name]) // self._packers[name].size

    # --- following ------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._over():
            time.sleep(PERIOD_S)
            with self.lock:
                if self.history.update():
                    for view in self._views:
                        view.push()
        self._finish()

    def _finish(self) -> None:
        with self.lock:
            self.history.update()
            self.live = False
            if self._texts["tokens"]:
                # The end of the text may have completed a character.
                self._texts["tokens"][-1] = self._piece(len(self._texts["tokens"]) - 1)
            for view in self._views:
                view.finish()
        for view in list(self._views):
            view.over()

    # --- packing --------------------------------------------------------------------

    def _fill_works(self) -> None:
        for done in self._new("works", self.history.done):
            if isinstance(done, Run) and done.fate is None and self.live:
                break  # the commitment that tells is being recorded by another thread
            self._next["works"] += 1
            self._add_work(done)

    def _add_work(self, done: Run | Draft) -> None:
        assert done.done is not None
        if isinstance(done, Run):
            tokens, late = list(done.tokens), 0
        else:
            tokens, late = done.guesses, done.late
        # What becomes of a draft's guesses is known only later: see the guesses themselves.
        kept = sum(token.kept for token in tokens) if isinstance(done, Run) else 0
        text = ""
        for token in tokens:
            text += self.trace.text_of(token.token)
            if len(text) >= LABEL:
                break
        decided = done.decided if isinstance(done, Run) else done.started
        times = (
            self._at(done.started),
            self._at(done.done),
            self._at(math.inf if decided is None else decided),
        )
        number = len(self._texts["works"])
        size = (len(tokens) + late, kept)
        self._add("works", done.id, *size, *times, text=text[:LABEL])
        cancelled = isinstance(done, Run) and done.cancelled is not None
        bars, pack = self._packed["bars"], self._packers["bars"].pack
        layers = self.history.layers
        for work in work_of(done):
            row, span, look = work.row, work.span, LOOK_NUMBERS[look_of(work)]
            spared = layers[row - 1] - span.layers if cancelled else 0
            lasted = (self._at(span.began), self._at(span.ended))
            bars += pack(number, row, look, span.layers, spared, *lasted)

    def _fill_waves(self) -> None:
        for wave in self._taken("waves", self.history.waves):
            self._add("waves", self._at(wave.time), len(wave.runs))

    def _fill_tokens(self) -> None:
        for token in self._taken("tokens", self.history.tokens):
            where = (token.guess.id, self._at(token.time), token.guess.position)
            text = self._piece(len(self._texts["tokens"]))
            self._add("tokens", *where, ORIGIN_NUMBERS[token.origin], text=text)

    def _fill_guesses(self) -> None:
        for guess in self._taken("guesses", self.history.guesses):
            parent = -1 if guess.parent is None else guess.parent.id
            row = (parent, guess.position, self._at(guess.made), guess.confidence, guess.ahead)
            self._add("guesses", *row, text=self.trace.text_of(guess.token)[:LABEL])

    def _fill_placed(self) -> None:
        for guess in self._taken("placed", self.history.placed):
            assert guess.placed is not None and guess.run is not None
            self._add("placed", guess.id, self._at(guess.placed), guess.run, guess.slot)

    def _fill_settled(self) -> None:
        for guess in self._taken("settled", self.history.settled):
            assert guess.settled is not None
            self._add("settled", guess.id, self._at(guess.settled), guess.kept)

    def _fill_figures(self) -> None:
        for figures in self._taken("figures", self.history.figures):
            self._add("figures", self._at(figures.time), *figures[1:-1])
            for seconds in figures.busy:
                self._add("busy", seconds)

    def _piece(self, number: int) -> str:
        """Return what a token added to the text."""
        pieces = self.trace.pieces
        if number < len(pieces):
            return pieces[number]
        return self.trace.text_of(self.history.tokens[number].guess.token)

    def _at(self, moment: float) -> float:
        return moment - self.history.began

    def _new(self, name: str, rows: list[T]) -> list[T]:
        return rows[self._next[name] :]

    def _taken(self, name: str, rows: list[T]) -> list[T]:
        new = self._new(name, rows)
        self._next[name] += len(new)
        return new

    def _add(self, name: str, *values: float, text: str | None = None) -> None:
        self._packed[name] += self._packers[name].pack(*values)
        if text is not None:
            self._texts[name].append(text)
