"""How a draft grows: which tokens the draft model evaluates next, and when it stops.

The drafter runs this next to the model, pass by pass, so that a draft of k tokens
costs one message and not k. The simulator runs the very same code.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence

from pipeinfer_dask.drafting.calibration import worth
from pipeinfer_dask.protocol.messages import (
    NO_SLOT,
    Batch,
    DraftPlan,
    Proposal,
    StartDraft,
    TreePlan,
)

Candidate = tuple[int, float]
"""(token, probability under the draft model)."""


class Expansion(ABC):
    """One draft on its way: alternate `next_batch` and `grow` until `next_batch` gives None.

    Attributes
    ----------
    draft : StartDraft
    proposals : list of Proposal
        All tokens proposed so far, parents first.
    evaluated : list of int
        Slots that the draft model's cache holds because of this draft.
    width : int
        Candidates to report for each frontier token, best first.
    """

    width: int

    def __init__(self, draft: StartDraft) -> None:
        batch = draft.batch
        self.draft = draft
        self.proposals: list[Proposal] = []
        self.evaluated: list[int] = []
        self._batch: Batch | None = batch
        self._frontier = list(batch.slots[len(batch) - draft.frontier :])
        self._position = dict(zip(batch.slots, batch.positions, strict=True))

    def next_batch(self) -> tuple[Batch, int] | None:
        """Return a batch to evaluate and how many of its last tokens to extend; None at the end."""
        return None if self._batch is None else (self._batch, len(self._frontier))

    def grow(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """Take the candidates, at most [frontier][width], after the tokens of the last batch."""
        assert self._batch is not None
        self.evaluated.extend(self._batch.slots)
        following = self._follow(candidates)
        self._frontier = [proposal.slot for proposal in following]
        self._batch = self._batch_of(following) if following else None

    @abstractmethod
    def _follow(self, candidates: Sequence[Sequence[Candidate]]) -> list[Proposal]:
        """Propose what follows the frontier; return what to evaluate and to extend next."""

    def _fits(self, position: int) -> bool:
        last = self.draft.plan.last_position
        return last is None or position <= last

    def _batch_of(self, proposals: Sequence[Proposal]) -> Batch:
        return Batch(
            tuple(p.token for p in proposals),
            tuple(self._position[p.slot] for p in proposals),
            tuple(p.slot for p in proposals),
            tuple(p.parent for p in proposals),
        )


class LevelByLevel(Expansion):
    """Extends every branch by one token a pass: the draft of a `DraftPlan`."""

    def __init__(self, draft: StartDraft, plan: DraftPlan) -> None:
        super().__init__(draft)
        self._plan = plan
        self.width = 2 if plan.branches > 1 else 1

    def _follow(self, candidates: Sequence[Sequence[Candidate]]) -> list[Proposal]:
        plan = self._plan
        grown: list[Proposal] = []
        branches = len(self._frontier)

        def propose(parent: int, token: int, confidence: float, threshold: float) -> bool:
            position = self._position[parent] + 1
            full = len(self.proposals) >= plan.size
            if confidence < threshold or full or not self._fits(position):
                return False
            slot = self.draft.slots[len(self.proposals)]
            self._position[slot] = position
            grown.append(Proposal(token, parent, slot, confidence))
            self.proposals.append(grown[-1])
            return True

        # All first choices before any second one: when room is short, depth pays more than breadth.
        going_on = [
            (parent, choices)
            for parent, choices in zip(self._frontier, candidates, strict=True)
            if choices and propose(parent, *choices[0], plan.cutoff)
        ]
        for parent, choices in going_on:
            for token, confidence in choices[1:]:
                if branches < plan.branches and propose(parent, token, confidence, plan.split):
                    branches += 1
        # The newest tokens are evaluated by the draft that extends them.
        return grown if len(self.proposals) < plan.size else []


class BestFirst(Expansion):
    """Extends what the text reaches most likely: the draft of a `TreePlan`."""

    def __init__(self, draft: StartDraft, plan: TreePlan) -> None:
        super().__init__(draft)
        self._plan = plan
        self.width = plan.width
        self._passes = 0
        self._chance = dict(zip(self._frontier, plan.chances, strict=True))
        self._slots = list(reversed(draft.slots))
        # (-chance, number of the proposal): what may be evaluated next.
        self._open: list[tuple[float, int]] = []

    def _follow(self, candidates: Sequence[Sequence[Candidate]]) -> list[Proposal]:
        plan = self._plan
        self._passes += 1
        for parent, choices in zip(self._frontier, candidates, strict=True):
            if not self._fits(self._position[parent] + 1):
                continue
            for rank, (token, confidence) in enumerate(choices):
                # Without its first choice, what is below a token would be lost for good.
                if rank > 0 and confidence < plan.floor:
                    continue
                chance = self._chance[parent] * worth(confidence, plan.calibration)
                heapq.heappush(self._open, (-chance, len(self.proposals)))
                self.proposals.append(Proposal(token, parent, NO_SLOT, confidence))
        if self._passes >= plan.passes:
            return []
        chosen: list[Proposal] = []
        while self._open and self._slots and len(chosen) < plan.breadth:
            if -self._open[0][0] < plan.least:
                break
            chosen.append(self._place(*heapq.heappop(self._open)))
        return chosen

    def _place(self, negative: float, number: int) -> Proposal:
        """Give a proposal a slot: it is evaluated next."""
        unplaced = self.proposals[number]
        slot = self._slots.pop()
        placed = Proposal(unplaced.token, unplaced.parent, slot, unplaced.confidence)
        self.proposals[number] = placed
        self._position[slot] = self._position[placed.parent] + 1
        self._chance[slot] = -negative
        return placed


def expansion_of(draft: StartDraft) -> Expansion:
    """Return how a draft grows by its plan."""
    if isinstance(draft.plan, TreePlan):
        return BestFirst(draft, draft.plan)
    return LevelByLevel(draft, draft.plan)
