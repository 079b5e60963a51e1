"""The draft under way: what the drafter was asked, and how its answer is grafted onto the tree.

While the drafter works the tree may move on. A proposal whose parent is gone is dropped.
Where the target was faster and has put the very same token there, its node takes the
proposal's place; what hangs below it is kept, but the draft model knows it under another
slot and evaluates it anew.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeinfer_dask.core.tree import Node, Tree, nodes_of
from pipeinfer_dask.protocol.messages import NO_SLOT, Drafted, DraftPlan, TreePlan


class ProtocolError(RuntimeError):
    """A driver reported something that can't have happened."""


@dataclass(slots=True)
class Draft:
    """A draft that the drafter works on.

    Attributes
    ----------
    frontier : tuple of Node
        What it extends.
    nodes : dict of int to Node
        What it evaluates, by slot, as it was when the draft started: a slot may change
        hands meanwhile.
    slots : tuple of int
        Reserved for what it proposes.
    cancelled : bool
    """

    id: int
    frontier: tuple[Node, ...]
    nodes: dict[int, Node]
    slots: tuple[int, ...]
    cancelled: bool = False

    @classmethod
    def begin(
        cls, number: int, size: int, frontier: Sequence[Node], tree: Tree, spare: int
    ) -> Self | None:
        """Take slots for a new draft; None if there is nothing to draft, or no slot for it.

        Parameters
        ----------
        number : int
        size : int
            Most tokens to propose; 0 only fills the draft model's cache.
        frontier : sequence of Node
        tree : Tree
        spare : int
            Slots that it may take.
        """
        spare -= sum(node.slot == NO_SLOT for node in frontier)
        granted = max(0, min(size, spare))
        nodes = unevaluated(frontier, tree.root)
        if spare < 0 or (granted == 0 and size > 0) or not nodes:
            return None
        for node in nodes:
            tree.place(node)
        slots = tuple(tree.slots.take() for _ in range(granted))
        return cls(number, tuple(frontier), {node.slot: node for node in nodes}, slots)

    def give_up(self, tree: Tree) -> None:
        """Give the slots back: there will be no answer."""
        for slot in self.slots:
            tree.slots.give_back(slot)

    def graft(self, answer: Drafted, tree: Tree, *, growing: bool) -> list[Node]:
        """Take the answer into the tree; return the nodes that are new.

        Parameters
        ----------
        answer : Drafted
        tree : Tree
        growing : bool
            Whether proposals are still wanted. If not, only slots are given back.

        Raises
        ------
        ProtocolError
            If the answer proposes what it had no right to.
        """
        unused = set(self.slots)
        nodes: dict[int, Node | None] = dict(self.nodes)
        in_place = set(self.nodes)  # slots whose whole path is in the tree as the drafter knows it
        added: list[Node] = []
        for proposal in answer.proposals:
            slot = proposal.slot
            if (slot != NO_SLOT and slot not in unused) or proposal.parent not in nodes:
                raise ProtocolError(f"draft {self.id} had no right to propose {proposal}")
            parent = nodes[proposal.parent]
            node = None
            if growing and parent is not None and parent.alive:
                node = next((c for c in parent.children if c.token == proposal.token), None)
                if node is None and parent.next is None:
                    node = tree.add(parent, proposal.token, slot, proposal.confidence)
                    added.append(node)
                elif node is not None and node.slot == NO_SLOT:
                    node.slot = slot
            if slot == NO_SLOT:
                continue
            if node is not None and node.slot == slot:
                unused.discard(slot)
                if proposal.parent in in_place:
                    in_place.add(slot)
            nodes[slot] = node
        for slot in unused:
            tree.slots.give_back(slot)
        for slot in answer.evaluated:
            node = nodes.get(slot)
            if node is not None and slot in in_place:
                node.drafted = True
        return added


def unevaluated(frontier: Sequence[Node], root: Node) -> list[Node]:
    """Return what the draft model must evaluate, parents first, to extend the frontier.

    That is the frontier, or without one the root, and before it all that the draft model
    does not hold yet. No frontier node may be before another one.
    """
    before: dict[Node, None] = {}
    for leaf in frontier or [root]:
        node = leaf.parent if frontier else leaf
        while node is not None and not node.drafted and node not in before:
            before[node] = None
            node = node.parent
    return [*sorted(before, key=lambda node: node.position), *frontier]


def choice_of(answer: object, policy: str) -> tuple[DraftPlan | TreePlan, Sequence[Node]]:
    """Return the plan, and the nodes to extend, that a policy has answered with.

    Raises
    ------
    ValueError
        If the answer is something else.
    """
    match answer:
        case (DraftPlan() | TreePlan() as plan, nodes):
            return plan, nodes_of(nodes, policy, "choose_draft")
    raise ValueError(
        f"policy {policy!r}: expected choose_draft to return a plan and the nodes to extend, or "
        f"None, got {reprlib.repr(answer)}"
    )
