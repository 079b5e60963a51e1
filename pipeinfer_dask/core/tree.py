"""The token tree: what is committed, what is hoped for, and the slot of each token.

The root is the last committed token; what hangs below it is speculation. A slot
is a token's place in every KV cache, the same on all stages and in the drafter.
A committed token stays where it is, so nothing is ever copied; a pruned one gives
its slot back, and the lowest free slot is used first, so the caches stay dense.
"""

from __future__ import annotations

import heapq
import math
import reprlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from pipeinfer_dask.protocol.messages import NO_PARENT, NO_SLOT, Batch, Origin
from pipeinfer_dask.protocol.sampling import Logprobs

BEFORE = -1
"""The run of a token that was evaluated before the request began."""


@dataclass(frozen=True, slots=True)
class Held:
    """A token that the caches still hold when a text is gone on with.

    ``drafted`` is as of a `Node`.
    """

    token: int
    slot: int
    drafted: bool


@dataclass(slots=True, eq=False)
class Node:
    """A token at a place in the text.

    Attributes
    ----------
    token, position : int
        Its id, and its place.
    parent : Node or None
        The token before it; None for the first one.
    children : list of Node
        What is proposed to follow it; of a committed token, only the token that did.
    slot : int
        `NO_SLOT` until a model is to evaluate it.
    confidence : float
        Probability that the draft model gave it after its parent; 1 for a committed token.
    reach : float
        Logarithm of the chance that the text gets here from the prompt; only differences count.
    run : int or None
        The run that evaluates it on the target, once started.
    next : int or None
        The token that the target puts after it, once known.
    next_logprobs : Logprobs or None
        How probable that token is, if this was asked for.
    drafted : bool
        Whether the draft model's cache holds it.
    alive : bool
        False once pruned: it can't become part of the text any more.
    """

    token: int
    position: int
    slot: int
    parent: Node | None
    confidence: float = 1.0
    reach: float = 0.0
    run: int | None = None
    next: int | None = None
    next_logprobs: Logprobs | None = None
    drafted: bool = False
    alive: bool = True
    children: list[Node] = field(default_factory=list)

    def subtree(self) -> Iterator[Node]:
        """Yield this node and all below it, parents first.

        Yields
        ------
        Node
        """
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


def log_chance(probability: float) -> float:
    """Return the logarithm of a probability; of zero, that of next to nothing."""
    return math.log(max(probability, 1e-12))


def batch_of(nodes: Sequence[Node]) -> Batch:
    """Return the nodes, parents first, as a batch."""
    return Batch(
        tuple(node.token for node in nodes),
        tuple(node.position for node in nodes),
        tuple(node.slot for node in nodes),
        tuple(NO_PARENT if node.parent is None else node.parent.slot for node in nodes),
    )


class Slots:
    """Gives out slot numbers below ``capacity``, the lowest free one first.

    Those in ``taken`` are in use from the first; there may be higher ones among them.
    """

    def __init__(self, capacity: int, taken: Collection[int] = ()) -> None:
        self._fresh = max(taken, default=-1) + 1
        self._returned = sorted(set(range(self._fresh)).difference(taken))
        self.capacity = max(capacity, self._fresh)

    @property
    def free(self) -> int:
        return self.capacity - self._fresh + len(self._returned)

    def take(self) -> int:
        """Return a slot.

        Raises
        ------
        OverflowError
            If none is free. The machine counts before it asks, so this is a bug.
        """
        if self._returned:
            return heapq.heappop(self._returned)
        if self._fresh == self.capacity:
            raise OverflowError(f"all {self.capacity} slots are in use")
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._returned, slot)

    def taken(self) -> set[int]:
        """Return the slots in use."""
        return set(range(self._fresh)) - set(self._returned)


class Tree:
    """The committed text as a chain, and below its last token a tree of drafts.

    Parameters
    ----------
    prompt : sequence of int
        At least one token id.
    capacity : int
        Slots in all: for the prompt, all new tokens and the speculation at any one time.
    held : sequence of Held
        A text from its first token on, as far as the caches hold it. What the prompt begins with
        of it need not be evaluated again, and the slots of the rest are free.
    """

    def __init__(self, prompt: Sequence[int], capacity: int, held: Sequence[Held] = ()) -> None:
        # What comes after the prompt is told by a run of its last token.
        pairs = zip(prompt[:-1], held, strict=False)
        kept = [one for _, one in takewhile(lambda pair: pair[0] == pair[1].token, pairs)]
        self.slots = Slots(capacity, [one.slot for one in kept])
        self.prompt: list[Node] = []
        parent: Node | None = None
        for position, token in enumerate(prompt):
            if position < len(kept):
                node = Node(token, position, kept[position].slot, parent, run=BEFORE)
                node.drafted = kept[position].drafted
            else:
                node = Node(token, position, self.slots.take(), parent)
            if parent is not None:
                parent.children.append(node)
            self.prompt.append(node)
            parent = node
        self.root = self.prompt[-1]

    def add(self, parent: Node, token: int, slot: int, confidence: float) -> Node:
        """Hang a drafted token below ``parent``; ``slot``, if it has one, has been taken for it."""
        reach = parent.reach + log_chance(confidence)
        node = Node(token, parent.position + 1, slot, parent, confidence, reach)
        parent.children.append(node)
        return node

    def place(self, node: Node) -> None:
        """Give a node a slot, if it has none yet."""
        if node.slot == NO_SLOT:
            node.slot = self.slots.take()

    def placed(self, nodes: Sequence[Node], spare: int) -> Sequence[Node]:
        """Give nodes a slot; return the first ones for which ``spare`` slots are enough."""
        for count, node in enumerate(nodes):
            if node.slot == NO_SLOT:
                if spare <= 0:
                    return nodes[:count]
                spare -= 1
                self.place(node)
        return nodes

    def advance(self) -> tuple[Origin, list[Node]]:
        """Commit the token that the target put after the root; it becomes the new root.

        Returns
        -------
        origin : Origin
        pruned : list of Node
            What can't be reached any more. Their slots are free again.
        """
        old = self.root
        token = old.next
        assert token is not None
        kept = next((child for child in old.children if child.token == token), None)
        others = [child for child in old.children if child is not kept]
        if kept is not None:
            origin = Origin.ACCEPTED
        else:
            origin = Origin.CORRECTED if others else Origin.PLAIN
        pruned = [node for child in others for node in self.drop(child)]
        if kept is None:
            kept = Node(token, old.position + 1, NO_SLOT, old, reach=old.reach)
        self.place(kept)
        kept.confidence = 1.0
        old.children = [kept]
        self.root = kept
        return origin, pruned

    def drop(self, node: Node) -> list[Node]:
        """Prune a node below the root and all below it, and return them: their slots are free."""
        assert node.parent is not None
        node.parent.children.remove(node)
        pruned = list(node.subtree())
        for one in pruned:
            one.alive = False
            if one.slot != NO_SLOT:
                self.slots.give_back(one.slot)
        return pruned

    def held(self) -> list[Held]:
        """Return the text as far as the caches hold it for sure: all but the root."""
        text = list(self.committed())[:0:-1]
        return [Held(node.token, node.slot, node.drafted) for node in text]

    def committed(self) -> Iterator[Node]:
        """Yield the text's nodes, from the root back to the prompt's first token."""
        node: Node | None = self.root
        while node is not None:
            yield node
            node = node.parent

    def speculation(self) -> Iterator[Node]:
        """Yield the nodes below the root, parents first."""
        nodes = self.root.subtree()
        next(nodes)
        return nodes

    def leaves(self) -> Iterator[Node]:
        """Yield the nodes that nothing hangs below; the root, when there is no speculation."""
        return (node for node in self.root.subtree() if not node.children)


def nodes_of(answer: object, policy: str, method: str) -> Sequence[Node]:
    """Return the nodes that a policy's method has answered with.

    Raises
    ------
    ValueError
        If the answer is something else, or what can't become text any more.
    """
    if isinstance(answer, Sequence) and all(isinstance(n, Node) and n.alive for n in answer):
        return answer
    raise ValueError(
        f"policy {policy!r}: expected {method} to return nodes of the machine's tree, got "
        f"{reprlib.repr(answer)}"
    )


def run_of(answer: object, policy: str) -> Sequence[Node]:
    """Return the nodes that a policy has chosen for a run.

    Raises
    ------
    ValueError
        If the answer is something else, a run has one of them already, or no run the token before.
    """
    nodes, before = nodes_of(answer, policy, "choose_run"), set[Node]()
    for node in nodes:
        got = f"got token {node.token} at position {node.position}"
        if node.run is not None or node in before:
            raise ValueError(
                f"policy {policy!r}: expected choose_run to return nodes that are in no run yet, "
                f"{got} again: take those of machine.fresh, and the root while machine.root_waits"
            )
        if node.parent is not None and node.parent.run is None and node.parent not in before:
            raise ValueError(
                f"policy {policy!r}: expected choose_run to return parents first, {got} before "
                f"what it follows: put that before it, or wait until a run holds it"
            )
        before.add(node)
    return nodes
