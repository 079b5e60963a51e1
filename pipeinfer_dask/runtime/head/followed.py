"""A generation that a head on a worker drives, as its client follows it: through that head's loss.

What a head held of a text is lost with it, but for what the client has received. The next head
reads prompt and text so far as one prompt; its runs and drafts get numbers of their own, so that
the trace goes on as if one head had done it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeinfer_dask.core.ending import Ending
from pipeinfer_dask.protocol.messages import (
    AWAY,
    Begin,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Command,
    Drafted,
    DrafterBack,
    DrafterLost,
    Event,
    Finish,
    Prune,
    RunDone,
    RunTaken,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.text import text_of
from pipeinfer_dask.trace.entries import earlier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Followed:
    """A generation on its way on a worker.

    Parameters
    ----------
    generation : Generation
    policy : bytes
        Its policy, fresh: that may be of any class.

    Attributes
    ----------
    stopping : bool
        Whether its caller wants no more of it.
    """

    def __init__(self, generation: Generation, policy: bytes) -> None:
        self.generation = generation
        self.policy = policy
        self.stopping = False
        # Heads that were lost have had so many runs and drafts of it.
        self._runs = self._drafts = 0
        self._ahead = 0.0
        self._newest = 0
        self._drafter_lost = False

    def begin(self, ahead: float, generation: int) -> Request:
        """Return what a head is to be asked for: what is left of the request.

        Parameters
        ----------
        ahead : float, seconds
            Of the head's clock on ours. A trace keeps one clock.
        generation : int
            Of its pipeline, if another head was lost.
        """
        self._ahead, self._newest = ahead, generation
        request, tokens = self.generation.request, self.generation.token_ids
        if not tokens:
            return request
        return replace(
            request,
            prompt=(*request.prompt, *tokens),
            max_new_tokens=request.max_new_tokens - len(tokens),
        )

    def note(self, time: float, what: Event | Command) -> None:
        """Take an entry of the head's trace, with times of its clock."""
        for entry in self._renumbered(earlier(what, self._ahead)):
            self.generation.record(time - self._ahead, entry)

    def lose(self, time: float, reason: str) -> None:
        """Take note that the head is lost, and its pipeline with it.

        Parameters
        ----------
        time : float, seconds
            On our clock.
        reason : str
        """
        records, request = self.generation.trace.records, self.generation.request.id
        if not records:
            return  # it has waited in line, and waits on
        running: dict[int, None] = {}
        generation = draft_generation = 0
        for _, what in records:
            match what:
                case StartRun():
                    running[what.run] = None
                    generation, self._runs = what.generation, max(self._runs, what.run + 1)
                case RunDone():
                    running.pop(what.run, None)
                case CancelRuns():
                    for run in what.runs:
                        running.pop(run, None)
                case StartDraft():
                    draft_generation = what.generation
                    self._drafts = max(self._drafts, what.draft + 1)
                case StageLost():
                    generation = AWAY
                case StagesBack():
                    generation = what.generation
                case DrafterLost():
                    draft_generation = AWAY
                case DrafterBack():
                    draft_generation = what.generation
        if generation != AWAY:
            self.generation.record(time, StageLost(generation, reason))
            if running:
                lost = CancelRuns(request, generation, tuple(running), CancelReason.LOST)
                self.generation.record(time, lost)
        if self._drafts and draft_generation != AWAY:
            self.generation.record(time, DrafterLost(draft_generation, reason))
        self._drafter_lost = self._drafts > 0
        self.generation.recover()

    def over(self, tokenizer: PreTrainedTokenizerBase | None) -> bool:
        """Finish it, if nothing is to come but the word that it is finished; return whether."""
        reason = "stopped" if self.stopping else self._ending(tokenizer)
        if reason is None:
            return False
        records = self.generation.trace.records
        if records and not isinstance(records[-1][1], Finish):
            self.generation.record(records[-1][0], Finish(self.generation.request.id, reason))
        self.generation.finish(reason)
        return True

    def _ending(self, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
        request, tokens = self.generation.request, self.generation.token_ids
        stops = None
        if request.stop_strings and tokenizer is not None:
            _, stops = text_of(request, tokenizer)
        ending, reason = Ending(request, stops), None
        for count, token in enumerate(tokens, 1):
            reason = ending.after(token, count)
        return reason

    def _renumbered(self, what: Event | Command) -> Iterator[Event | Command]:
        match what:
            case Begin() if self.generation.trace.records:
                yield StagesBack(self._newest)
            case StartRun() | RunTaken() | RunDone():
                yield replace(what, run=what.run + self._runs)
            case CancelRuns() | Prune():
                yield replace(what, runs=tuple(run + self._runs for run in what.runs))
            case StartDraft() if self._drafter_lost:
                self._drafter_lost = False
                yield DrafterBack(what.generation)
                yield replace(what, draft=what.draft + self._drafts)
            case StartDraft() | Drafted() | CancelDraft():
                yield replace(what, draft=what.draft + self._drafts)
            case _:
                if isinstance(what, DrafterBack):
                    self._drafter_lost = False
                yield what
