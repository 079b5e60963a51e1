"""What a record comes to: each run with its fate, each draft, each guess, each token.

A fold over the record in which an entry costs the same however long it has become, so that
a picture can follow a generation that goes on. All times are those of the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pipeinfer_dask.protocol.messages import (
    NO_PARENT,
    NO_SLOT,
    Batch,
    Begin,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    Event,
    Finish,
    Kind,
    Origin,
    Prune,
    RunDone,
    Span,
    StartDraft,
    StartRun,
    Stop,
)
from pipeinfer_dask.trace.metrics import Figures, Tally
from pipeinfer_dask.trace.record import Trace


class Fate(StrEnum):
    """What a run has come to."""

    PREFILL = "prefill"
    """It read the prompt."""
    SINGLE = "single"
    """It held one token of the text itself: nothing was guessed."""
    ACCEPTED = "accepted"
    """It held guesses, and some of them have become text."""
    REJECTED = "rejected"
    """It held guesses, and none of them has become text."""
    CANCELLED = "cancelled"
    """It was called off: what was left of it was not computed."""

    @property
    def meaning(self) -> str:
        """The same in a legend's words."""
        return _MEANINGS[self]


_MEANINGS = {
    Fate.PREFILL: "reading the prompt",
    Fate.SINGLE: "one token, nothing guessed",
    Fate.ACCEPTED: "guesses, some right",
    Fate.REJECTED: "guesses, all wrong",
    Fate.CANCELLED: "called off",
}


@dataclass(slots=True, eq=False)
class Guess:
    """A token of the tree: of the text, or proposed by the draft model to become text.

    Attributes
    ----------
    id : int
        Counts from 0. A parent's is lower than its children's.
    token, position : int
    parent : Guess or None
    confidence : float
        What the draft model gave it after its parent; 1 for the text's own.
    made : float, seconds
        When it was proposed, or else became known.
    ahead : int
        How many places it was ahead of the text then; 0 for the text's own.
    draft, run : int or None
        The draft that proposed it, the run that evaluates it on the target.
    slot : int
        `NO_SLOT` until a model is to evaluate it.
    placed : float or None, seconds
        When its run was started.
    settled : float or None, seconds
        When it became text, or could no longer.
    kept : bool
        Whether it is text. Of the tokens that are not settled, none is.
    """

    id: int
    token: int
    position: int
    parent: Guess | None
    confidence: float
    made: float
    ahead: int = 0
    draft: int | None = None
    run: int | None = None
    slot: int = NO_SLOT
    placed: float | None = None
    settled: float | None = None
    kept: bool = False
    children: list[Guess] = field(default_factory=list)

    @property
    def ruled_out(self) -> bool:
        """Whether it can't become text any more."""
        return self.settled is not None and not self.kept

    def child(self, token: int) -> Guess | None:
        """Return the guess right below this one that is of a token, if there is one."""
        for child in self.children:  # there are few, and mostly none
            if child.token == token:
                return child
        return None

    def subtree(self) -> Iterator[Guess]:
        """Yield this guess and all below it, parents first."""
        stack = [self]
        while stack:
            guess = stack.pop()
            yield guess
            stack.extend(reversed(guess.children))


@dataclass(slots=True, eq=False)
class Run:
    """A run, from its start to what it came to.

    Attributes
    ----------
    id : int
    kind : Kind
    tokens : tuple of Guess
    guesses : tuple of Guess
        Those tokens of it that were not text when it started.
    started : float, seconds
    done : float or None, seconds
        When its result was back.
    cancelled : float or None, seconds
    reason : CancelReason or None
    spans : tuple of Span
        Its work on each stage, once it is done.
    left_out : int
        Tokens that were pruned on the way.
    """

    id: int
    kind: Kind
    tokens: tuple[Guess, ...]
    guesses: tuple[Guess, ...]
    started: float
    done: float | None = None
    cancelled: float | None = None
    reason: CancelReason | None = None
    spans: tuple[Span, ...] = ()
    left_out: int = 0

    @property
    def kept(self) -> int:
        """Guesses of it that have become text."""
        return sum(guess.kept for guess in self.guesses)

    @property
    def fate(self) -> Fate | None:
        """What it came to; None while that is open."""
        if self.cancelled is not None:
            return Fate.CANCELLED
        if self.kind is Kind.PREFILL:
            return Fate.PREFILL
        if not self.guesses:
            return Fate.SINGLE
        if any(guess.kept for guess in self.guesses):
            return Fate.ACCEPTED
        return Fate.REJECTED if all(guess.settled is not None for guess in self.guesses) else None


@dataclass(slots=True, eq=False)
class Draft:
    """What the drafter was asked for, and what it gave.

    Attributes
    ----------
    id : int
    started : float, seconds
    done : float or None, seconds
    span : Span or None
        Its work; ``layers`` counts passes of the draft model.
    guesses : list of Guess
        What came in time; each has its confidence.
    late : int
        Proposals that were of no use any more when they came.
    """

    id: int
    started: float
    done: float | None = None
    span: Span | None = None
    guesses: list[Guess] = field(default_factory=list)
    late: int = 0
    _known: dict[int, Guess | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text: where it came from, and when."""

    guess: Guess
    origin: Origin
    time: float


@dataclass(frozen=True, slots=True)
class Wave:
    """Runs that were cancelled at once."""

    time: float
    reason: CancelReason
    runs: tuple[Run, ...]


class History:
    """The story of a trace, which may still grow: `update` takes what is new.

    Parameters
    ----------
    trace : Trace

    Attributes
    ----------
    began : float, seconds
        When the request began.
    ended : float, seconds
        The last moment that is known of.
    finished : str or None
        Why the text ended, once it has.
    runs, drafts : dict of int to Run, Draft
    done : list of Run or Draft
        Those whose work is done, in that order.
    tokens : list of Token
        The text.
    guesses : list of Guess
        All tokens of the tree there ever were, the prompt's too, by id.
    placed, settled : list of Guess
        Those that a run was started for; those that became text, or no longer could, in that order.
    waves : list of Wave
    layers : list of int, [stages]
        What each stage has, as far as seen.
    tally : Tally
        Counts so far.
    figures : list of Figures
        The counts at each commitment.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.began = self.ended = 0.0
        self.finished: str | None = None
        self.runs: dict[int, Run] = {}
        self.drafts: dict[int, Draft] = {}
        self.done: list[Run | Draft] = []
        self.tokens: list[Token] = []
        self.guesses: list[Guess] = []
        self.placed: list[Guess] = []
        self.settled: list[Guess] = []
        self.waves: list[Wave] = []
        self.layers = [0] * trace.stages
        self.tally = Tally(trace.stages)
        self.figures: list[Figures] = []
        self._seen = 0
        self._root: Guess | None = None
        self._at: dict[int, Guess] = {}  # by slot; what the slot held last
        self._stopped = False
        self.update()

    def update(self) -> bool:
        """Take the entries that have come since; return whether there were any."""
        new = self.trace.records[self._seen :]
        for time, what in new:
            self._seen += 1
            self._take(time, what)
        return bool(new)

    @property
    def root(self) -> Guess | None:
        """The last token of the text, with all that is guessed below it."""
        return self._root

    def saved(self, run: Run) -> int:
        """Return how many layers a cancelled run was spared."""
        if run.cancelled is None:
            return 0
        done = zip(run.spans, self.layers, strict=False)
        return sum(layers - span.layers for span, layers in done)

    # --- entries ------------------------------------------------------------------

    def _take(self, time: float, what: Event | Command) -> None:
        self.tally.add(time, what)
        self.ended = max(self.ended, time)
        match what:
            case Begin():
                self.began = self.ended = time
            case StartRun():
                self._start_run(time, what)
            case RunDone():
                self._run_done(time, what)
            case CancelRuns():
                runs = tuple(self.runs[run] for run in what.runs)
                for run in runs:
                    run.cancelled, run.reason = time, what.reason
                self.waves.append(Wave(time, what.reason, runs))
            case Prune():
                for number, places in zip(what.runs, what.tokens, strict=True):
                    self.runs[number].left_out += len(places)
            case StartDraft():
                draft = self.drafts[what.draft] = Draft(what.draft, time)
                draft._known = {guess.slot: guess for guess in self._place(time, what.batch)}
            case Drafted():
                self._drafted(time, what)
            case Commit():
                for token, origin in zip(what.tokens, what.origins, strict=True):
                    self._commit(time, token, origin)
                self.figures.append(self.tally.figures(time))
            case Stop():
                self._stopped = True
            case Finish():
                self.finished = what.reason
                self._end(time)

    def _start_run(self, time: float, what: StartRun) -> None:
        nodes = tuple(self._place(time, what.batch))
        if what.kind is Kind.PREFILL:
            for node in nodes:
                self._settle(time, node, kept=True)
            self._root = max(nodes, key=lambda node: node.position)
        for node in nodes:
            node.run, node.placed = what.run, time
        self.placed.extend(nodes)
        guesses = tuple(node for node in nodes if node.settled is None)
        self.runs[what.run] = Run(what.run, what.kind, nodes, guesses, time)

    def _run_done(self, time: float, what: RunDone) -> None:
        run = self.runs[what.run]
        run.done, run.spans = time, what.spans
        for stage, span in enumerate(what.spans[: len(self.layers)]):
            self.layers[stage] = max(self.layers[stage], span.layers)
        self.done.append(run)

    def _drafted(self, time: float, what: Drafted) -> None:
        draft = self.drafts[what.draft]
        draft.done, draft.span = time, what.span
        known, draft._known = draft._known, {}
        for proposal in what.proposals:
            parent = known.get(proposal.parent)
            guess = None
            if parent is not None and not parent.ruled_out and not self._stopped:
                guess = parent.child(proposal.token)
                if guess is None and (parent is self._root or parent.settled is None):
                    guess = self._new(time, proposal.token, parent, proposal.confidence)
                    guess.draft = what.draft
                    guess.ahead = guess.position - (self._root.position if self._root else 0)
                    draft.guesses.append(guess)
                else:
                    draft.late += 1
            else:
                draft.late += 1
            if guess is not None and guess.slot == NO_SLOT and proposal.slot != NO_SLOT:
                self._hold(guess, proposal.slot)
            if proposal.slot != NO_SLOT:
                known[proposal.slot] = guess
        self.done.append(draft)

    def _commit(self, time: float, token: int, origin: Origin) -> None:
        root = self._root
        assert root is not None, "text without a prompt"
        kept = root.child(token)
        for child in root.children:
            if child is not kept:
                for guess in child.subtree():
                    self._settle(time, guess, kept=False)
        if kept is None:
            kept = self._new(time, token, root, 1.0)
        self._settle(time, kept, kept=True)
        self._root = kept
        self.tokens.append(Token(kept, origin, time))

    def _end(self, time: float) -> None:
        """Settle what is open at the end: it stays out of the text."""
        if self._root is not None:
            for child in self._root.children:
                for guess in child.subtree():
                    self._settle(time, guess, kept=False)

    # --- the tree -----------------------------------------------------------------

    def _new(self, time: float, token: int, parent: Guess | None, confidence: float) -> Guess:
        position = 0 if parent is None else parent.position + 1
        guess = Guess(len(self.guesses), token, position, parent, confidence, time)
        self.guesses.append(guess)
        if parent is not None:
            parent.children.append(guess)
        return guess

    def _hold(self, guess: Guess, slot: int) -> None:
        guess.slot = slot
        self._at[slot] = guess

    def _place(self, time: float, batch: Batch) -> Iterator[Guess]:
        """Yield the tokens of a batch, each found by its slot or below its parent, or new."""
        rows = zip(batch.tokens, batch.positions, batch.slots, batch.parents, strict=True)
        for token, position, slot, parent_slot in rows:
            held = self._at.get(slot)
            if held is None or held.ruled_out or (held.token, held.position) != (token, position):
                parent = None if parent_slot == NO_PARENT else self._at[parent_slot]
                siblings = [] if parent is None else parent.children
                held = next(
                    (c for c in siblings if c.token == token and not c.ruled_out), None
                ) or self._new(time, token, parent, 1.0)
                self._hold(held, slot)
            yield held

    def _settle(self, time: float, guess: Guess, *, kept: bool) -> None:
        if guess.settled is None:
            guess.settled, guess.kept = time, kept
            self.settled.append(guess)
