"""What a record comes to: each run with its fate, each draft, each guess, each token.

A fold over the record in which an entry costs the same however long it has become, so that
a picture can follow a generation that goes on. All times are those of the record.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeinfer_dask.protocol.messages import (
    NO_SLOT,
    Batch,
    Begin,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DrafterBack,
    DrafterLost,
    Event,
    Finish,
    Kind,
    Origin,
    Prune,
    RunDone,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
    Stop,
)
from pipeinfer_dask.trace.metrics import Figures, Tally
from pipeinfer_dask.trace.parts import Draft, Guess, Loss, Run, Token, Wave
from pipeinfer_dask.trace.record import Trace


class History:
    """The story of a trace, which may still grow: `update` takes what is new.

    Parameters
    ----------
    trace : Trace
        Of a generation that may still go on.

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
    losses : list of Loss
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
        self.losses: list[Loss] = []
        self.layers = [0] * trace.stages
        self.tally = Tally(trace.stages)
        self.figures: list[Figures] = []
        self._seen = 0
        self._root: Guess | None = None
        self._at: dict[int, Guess] = {}  # by slot; what the slot held last
        self._stopped = False
        self.update()

    def update(self) -> bool:
        """Take the entries that have come since.

        Returns
        -------
        bool
            Whether there were any.
        """
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
        """Return how many layers a cancelled run was spared.

        Parameters
        ----------
        run : Run
            One of `runs`.

        Returns
        -------
        int
            Over all stages; 0 for a run that was not cancelled.
        """
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
            case StageLost() | DrafterLost():
                self._lost(time, what)
            case StagesBack() | DrafterBack():
                for loss in self.losses:
                    if loss.back is None and loss.drafter is isinstance(what, DrafterBack):
                        loss.back = time
            case Stop():
                self._stopped = True
            case Finish():
                self.finished = what.reason
                self._give_up(time)

    def _start_run(self, time: float, what: StartRun) -> None:
        nodes = tuple(self._place(time, what.batch))
        if what.kind is Kind.PREFILL:
            for node in nodes:
                self._settle(time, node, kept=True)
            self._root = max(nodes, key=lambda node: node.position)
        # What is read anew after a loss was placed before.
        placed = [node for node in nodes if node.placed is None]
        for node in placed:
            node.run, node.placed = what.run, time
        self.placed.extend(placed)
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

    def _lost(self, time: float, what: StageLost | DrafterLost) -> None:
        drafter = isinstance(what, DrafterLost)
        self.losses.append(Loss(time, what.reason, drafter))
        # A drafter takes with it what is in no run yet, and its answers.
        self._give_up(time, in_runs=not drafter)
        if drafter:
            for draft in self.drafts.values():
                draft._known.clear()

    def _give_up(self, time: float, *, in_runs: bool = True) -> None:
        """Settle what is open: it stays out of the text."""
        for guess in list(self._root.subtree()) if self._root is not None else ():
            if guess is not self._root and (in_runs or guess.run is None):
                self._settle(time, guess, kept=False)
                assert guess.parent is not None
                if not guess.parent.ruled_out:
                    guess.parent.children.remove(guess)

    # --- the tree -----------------------------------------------------------------

    def _new(
        self, time: float, token: int, parent: Guess | None, confidence: float, position: int = 0
    ) -> Guess:
        position = position if parent is None else parent.position + 1
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
                # Unknown at the beginning of a text, and where the caches held what is before.
                parent = self._at.get(parent_slot)
                siblings = [] if parent is None else parent.children
                held = next(
                    (c for c in siblings if c.token == token and not c.ruled_out), None
                ) or self._new(time, token, parent, 1.0, position)
                self._hold(held, slot)
            yield held

    def _settle(self, time: float, guess: Guess, *, kept: bool) -> None:
        if guess.settled is None:
            guess.settled, guess.kept = time, kept
            self.settled.append(guess)
