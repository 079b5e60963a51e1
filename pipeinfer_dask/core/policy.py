"""What a policy is: what to run next, and what to draft next.

A policy looks at the machine and chooses; it changes nothing. It is asked after
every event, with what it was told in between. One policy object serves one
request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.protocol.messages import DraftPlan, Origin, RunDone, Span, TreePlan

DraftChoice = tuple[DraftPlan | TreePlan, Sequence[Node]]
"""How to draft, and which leaves of the tree to extend."""


class Policy(ABC):
    """What a strategy is: two choices, and what it learns in between.

    Its methods look at the ``machine``. What they hear of besides: ``proposed`` and ``added``
    nodes of its tree; the ``token`` that the target picked; the ``origins`` of what became text;
    a ``run``, with what it is ``done`` with; the drafter's work (its ``span``), and whether that
    was ``cancelled``.
    """

    name: ClassVar[str]
    needs_draft: ClassVar[bool] = True
    cancellation: bool = True
    """Whether runs that nobody needs are cancelled (the paper's early inference cancellation)."""
    pruning: bool = False
    """Whether single tokens that nobody needs are left out of runs that go on."""

    @abstractmethod
    def choose_run(self, machine: Machine) -> Sequence[Node]:
        """Return the nodes of a run to start now, parents first; none to wait.

        Called again until it returns none.
        """

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        """Return what to draft now, or None. Called only while no draft is under way."""
        return None

    def fresh(self) -> Self:
        """Return a policy with the same settings that has heard nothing yet.

        Returns
        -------
        Policy
            Of the same class.
        """
        return replace(self)  # type: ignore[type-var]

    def wake_at(self, machine: Machine) -> float | None:
        """Return when to be asked again, should nothing happen before; None for never."""
        return None

    def judged(self, proposed: Sequence[Node], token: int) -> None:
        """Hear which token the target put where the draft model had proposed these."""

    def committed(self, machine: Machine, origins: Sequence[Origin]) -> None:
        """Hear where the tokens that were just committed came from."""

    def drafted(
        self, machine: Machine, added: Sequence[Node], *, cancelled: bool, span: Span | None = None
    ) -> None:
        """Hear which tokens the last draft added to the tree, parents first, and what it took."""

    def taken(self, machine: Machine, run: RunFuture) -> None:
        """Hear that the first stage has turned to a run."""

    def ran(self, machine: Machine, run: RunFuture, done: RunDone) -> None:
        """Hear of a run that has come to its end without being cancelled."""

    def rebuilt(self, machine: Machine) -> None:
        """Hear that other stages have taken over from lost ones: their pace is not known."""
