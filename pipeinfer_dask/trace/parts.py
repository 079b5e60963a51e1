"""What a history is made of: runs with their fate, drafts, guesses, tokens, losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pipeinfer_dask.protocol.messages import NO_SLOT, CancelReason, Kind, Origin, Span


class Fate(StrEnum):
    """What a run has come to, or a stage's work on it."""

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
    SAVED = "saved"
    """Of a stage's work alone: the run was called off before the stage computed any of it."""

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
    Fate.SAVED: "saved by calling off",
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
    children : list of Guess
        What is guessed to follow it.
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
    def fate(self) -> str | None:
        """What it came to: accepted, rejected, or unused, as no run was started for it."""
        if self.settled is None:
            return None
        if self.kept:
            return "accepted"
        return "unused" if self.run is None else "rejected"

    @property
    def ruled_out(self) -> bool:
        """Whether it can't become text any more."""
        return self.settled is not None and not self.kept

    def child(self, token: int) -> Guess | None:
        """Return the guess right below this one that is of a token, if there is one.

        Parameters
        ----------
        token : int
            A token's id.

        Returns
        -------
        Guess or None
            None where nobody has guessed it.
        """
        for child in self.children:  # there are few, and mostly none
            if child.token == token:
                return child
        return None

    def subtree(self) -> Iterator[Guess]:
        """Yield this guess and all below it, parents first.

        Yields
        ------
        Guess
        """
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
    def parents(self) -> list[int]:
        """The runs that hold what comes right before its tokens, in order."""
        before = {guess.parent.run for guess in self.tokens if guess.parent is not None}
        return sorted(run for run in before if run is not None and run != self.id)

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

    @property
    def decided(self) -> float | None:
        """When its fate was known, in seconds; None while that is open."""
        if self.cancelled is not None:
            return self.cancelled
        if self.kind is Kind.PREFILL or not self.guesses:
            return self.started
        settled = [guess.settled for guess in self.guesses if guess.settled is not None]
        kept = [g.settled for g in self.guesses if g.kept and g.settled is not None]
        if kept:
            return min(kept)
        return max(settled) if len(settled) == len(self.guesses) else None


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
    """A token of the text: where it came from, and when.

    Attributes
    ----------
    guess : Guess
        What it is in the tree.
    origin : Origin
    time : float, seconds
        When it was committed.
    """

    guess: Guess
    origin: Origin
    time: float

    @property
    def decided(self) -> int | None:
        """The run whose result it is: the one that evaluated what is before it."""
        return None if self.guess.parent is None else self.guess.parent.run


@dataclass(frozen=True, slots=True)
class Wave:
    """Runs that were cancelled at once.

    Attributes
    ----------
    time : float, seconds
    reason : CancelReason
    runs : tuple of Run
    """

    time: float
    reason: CancelReason
    runs: tuple[Run, ...]


@dataclass(slots=True)
class Loss:
    """A node that was lost.

    Attributes
    ----------
    time : float, seconds
    reason : str
        Which it was, and why.
    drafter : bool
        Whether it was the drafter. If not, the text could not go on meanwhile.
    back : float or None, seconds
        When another one had taken over.
    """

    time: float
    reason: str
    drafter: bool
    back: float | None = None
