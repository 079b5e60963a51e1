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

SHORT_PROMPT = 64
"""Tokens that a draft model reads in about the time of one pass."""

LARGEST_SETTING = 256
"""No count that a policy is set to is larger: beyond it are only time and memory for nothing."""

FILL_CACHE: DraftChoice = (DraftPlan(size=0), ())
"""Let the draft model read the prompt while the target does."""


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


def fill_cache(machine: Machine) -> DraftChoice | None:
    """Return what the draft model does before the first token: read a long prompt, if it may.

    It reads a short one along with its first draft, at the cost of one pass either way.
    """
    request = machine.request
    long = request.reads_ahead and len(request.prompt) > SHORT_PROMPT
    useful = not machine.root.drafted and depth_left(machine, machine.root) > 0
    return FILL_CACHE if long and useful else None


def depth_left(machine: Machine, node: Node) -> int:
    """Return how many tokens below ``node`` could be of use."""
    return machine.last_position - node.position


def whole(policy: Policy, name: str, least: int) -> None:
    """Raise a ValueError unless this is a whole number from ``least`` to `LARGEST_SETTING`."""
    value = getattr(policy, name)
    known = isinstance(value, int) and not isinstance(value, bool)
    if not known or not least <= value <= LARGEST_SETTING:
        raise ValueError(
            f"expected {name} as a whole number from {least} to {LARGEST_SETTING}, got {value!r}"
        )


def probability(policy: Policy, name: str) -> None:
    """Raise a ValueError unless this setting is a number from 0 to 1."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"expected {name} as a number from 0 to 1, got {value!r}")


def switch(policy: Policy, name: str) -> None:
    """Raise a ValueError unless this setting is on or off."""
    value = getattr(policy, name)
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {value!r}")
