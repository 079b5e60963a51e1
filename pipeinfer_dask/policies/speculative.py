"""`speculative`: standard synchronous speculation, with a chain or a tree of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import DraftChoice, Policy
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.policies.common import depth_left, fill_cache, whole
from pipeinfer_dask.protocol.messages import DraftPlan, TreePlan


@dataclass(slots=True)
class Speculative(Policy):
    """Standard speculation: draft, verify all of it in one run, repeat.

    The target waits while the draft model works, and the other way round.

    Attributes
    ----------
    k : int
        Drafted tokens in each run.
    depth : int
        0: a chain of k. Above: the k tokens that the text reaches most likely, of a tree that
        the draft model grows best-first in so many passes.
    breadth, width : int
        Of a tree: tokens extended in each pass, and choices for each.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    name: ClassVar[str] = "speculative"
    k: int = 4
    depth: int = 0
    breadth: int = 4
    width: int = 4
    _tried: Node | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("depth", 0), ("breadth", 1), ("width", 1)):
            whole(self, name, least)

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        if not machine.root_waits or machine.drafting:
            return []
        if self._tried is not machine.root and depth_left(machine, machine.root) > 0:
            return []  # its draft comes first
        # A child is never likelier than its parent, and comes behind it where it's as likely.
        likeliest = sorted(machine.fresh, key=lambda node: -node.reach)[: self.k]
        return [machine.root, *likeliest]

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        if machine.prefilling:
            return fill_cache(machine)
        if not machine.root_waits or self._tried is machine.root:
            return None
        self._tried = machine.root
        if not self.depth:
            return DraftPlan(size=self.k), [machine.root]
        # One slot for the run at least: what is proposed last needs one there.
        size = max(1, self.breadth * (self.depth - 1))
        plan = TreePlan(size, self.depth, self.breadth, self.width, 0.0, (1.0,))
        return plan, [machine.root]
