"""How a draft grows: which tokens the draft model evaluates next, and when it stops.

The drafter runs this next to the model, pass by pass, so that a draft of k tokens
costs one message and not k. The simulator runs the very same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeinfer_dask.core.messages import Batch, Proposal, StartDraft

Candidate = tuple[int, float]
"""(token, probability under the draft model)."""


@dataclass(slots=True)
class Expansion:
    """One draft on its way: alternate `next_batch` and `grow` until `next_batch` gives None.

    Attributes
    ----------
    proposals : list of Proposal
        All tokens proposed so far, parents first.
    evaluated : list of int
        Slots that the draft model's cache holds because of this draft.
    """

    draft: StartDraft
    proposals: list[Proposal] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    _batch: Batch | None = field(init=False)
    _frontier: list[int] = field(init=False)
    _position: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        batch = self.draft.batch
        self._batch = batch
        self._frontier = list(batch.slots[len(batch) - self.draft.frontier :])
        self._position = dict(zip(batch.slots, batch.positions, strict=True))

    @property
    def width(self) -> int:
        """Candidates to report for each frontier token, best first."""
        return 2 if self.draft.plan.branches > 1 else 1

    def next_batch(self) -> tuple[Batch, int] | None:
        """Return a batch to evaluate and how many of its last tokens to extend; None at the end."""
        return None if self._batch is None else (self._batch, len(self._frontier))

    def grow(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """Take the candidates [frontier][width] after the tokens of the last batch."""
        assert self._batch is not None
        self.evaluated.extend(self._batch.slots)
        plan = self.draft.plan
        grown: list[Proposal] = []
        branches = len(self._frontier)

        def propose(parent: int, token: int, confidence: float, threshold: float) -> bool:
            position = self._position[parent] + 1
            if (
                confidence < threshold
                or len(self.proposals) + len(grown) >= plan.size
                or (plan.last_position is not None and position > plan.last_position)
            ):
                return False
            slot = self.draft.slots[len(self.proposals) + len(grown)]
            self._position[slot] = position
            grown.append(Proposal(token, parent, slot, confidence))
            return True

        # All first choices before any second one: when room is short, depth pays more than breadth.
        going_on = [
            (parent, choices)
            for parent, choices in zip(self._frontier, candidates, strict=True)
            if propose(parent, *choices[0], plan.cutoff)
        ]
        for parent, choices in going_on:
            for token, confidence in choices[1:]:
                if branches < plan.branches and propose(parent, token, confidence, plan.split):
                    branches += 1
        self.proposals.extend(grown)
        self._frontier = [p.slot for p in grown]
        if not grown or len(self.proposals) >= plan.size:
            # The newest tokens are evaluated by the draft that extends them.
            self._batch = None
            return
        self._batch = Batch(
            tuple(p.token for p in grown),
            tuple(self._position[p.slot] for p in grown),
            tuple(p.slot for p in grown),
            tuple(p.parent for p in grown),
        )
