"""The policies: what to run next, and what to draft next.

A policy looks at the machine and chooses; it changes nothing. It is asked after
every event, with what it was told in between. One policy object serves one
request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.messages import DraftPlan, Origin
from pipeinfer_dask.core.tree import Node

DraftChoice = tuple[DraftPlan, Sequence[Node]]
"""How to draft, and which leaves of the tree to extend."""

SHORT_PROMPT = 64
"""Tokens that a draft model reads in about the time of one pass."""

FILL_CACHE: DraftChoice = (DraftPlan(size=0), ())
"""Let the draft model read the prompt while the target does."""


class Policy(ABC):
    """What a strategy is: two choices, and what it learns in between."""

    name: ClassVar[str]
    needs_draft: ClassVar[bool] = True
    cancellation: bool = True
    """Whether runs that nobody needs are cancelled (the paper's early inference cancellation)."""

    @abstractmethod
    def choose_run(self, machine: Machine) -> Sequence[Node]:
        """Return the nodes of a run to start now, parents first; none to wait.

        Called again until it returns none.
        """

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        """Return what to draft now, or None. Called only while no draft is under way."""
        return None

    def fresh(self) -> Self:
        """Return a policy with the same settings that has heard nothing yet."""
        return replace(self)  # type: ignore[type-var]

    def committed(self, origins: Sequence[Origin]) -> None:
        """Hear where the tokens that were just committed came from."""

    def drafted(self, added: int) -> None:
        """Hear how many tokens the last draft added to the tree."""


@dataclass(slots=True)
class Iterative(Policy):
    """Plain decoding: one token, one run."""

    name: ClassVar[str] = "iterative"
    needs_draft: ClassVar[bool] = False

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return [machine.root] if machine.root_waits else []


@dataclass(slots=True)
class Speculative(Policy):
    """Standard speculation: draft a chain, verify it in one run, repeat.

    The target waits while the draft model works, and the other way round.

    Attributes
    ----------
    k : int
        Length of the chain.

    Raises
    ------
    ValueError
        If ``k`` is less than 1.
    """

    name: ClassVar[str] = "speculative"
    k: int = 4
    _tried: Node | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _at_least(self, "k", 1)

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        if not machine.root_waits or machine.drafting:
            return []
        if self._tried is not machine.root and _depth_left(machine, machine.root) > 0:
            return []  # its draft comes first
        return [machine.root, *machine.fresh]

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        if machine.prefilling:
            return _fill_cache(machine)
        if not machine.root_waits or self._tried is machine.root:
            return None
        self._tried = machine.root
        return DraftPlan(size=self.k), [machine.root]


@dataclass(slots=True)
class PipeInfer(Policy):
    """The paper's method (arXiv 2407.11798); in brackets, its reference code's flags.

    Attributes
    ----------
    micro_batch : int
        Most drafted tokens in a speculative run (``--draft``).
    cutoff : float
        A branch ends where the draft model's first choice is less probable (``-pa``).
    recovery : float
        Added to the cutoff for each speculative run started since the last
        commitment: a long unconfirmed chain is likely wrong (``-pr``).
    decay : float
        Taken from it for each draft since then that gave nothing (``-pd``).
    split : float
        A second choice at least this probable opens a branch (``-ps``).
    sequences : int
        Most branches (``-np``).
    asynchronous : bool
        Draft while the target works. If not, they take turns.
    continuous : bool
        Keep drafting behind what is in flight. If not, there is one speculative
        micro-batch at a time.
    cancellation : bool
        Cancel runs as soon as they are of no use. If not, they run to the end.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    name: ClassVar[str] = "pipeinfer"
    micro_batch: int = 4
    cutoff: float = 0.1
    recovery: float = 0.02
    decay: float = 0.1
    split: float = 0.1
    sequences: int = 4
    asynchronous: bool = True
    continuous: bool = True
    cancellation: bool = True
    _started: int = field(default=0, init=False)
    _empty: int = field(default=0, init=False)
    _tried: Node | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _at_least(self, "micro_batch", 1)
        _at_least(self, "sequences", 1)
        for name in ("cutoff", "recovery", "decay", "split"):
            _probability(self, name)

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        if not self.asynchronous and self._target_must_wait(machine):
            return []
        if machine.root_waits:
            return [machine.root]
        if machine.prefilling or not machine.has_room or not machine.fresh:
            return []
        self._started += 1
        return machine.fresh[: self.micro_batch]

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        if machine.prefilling:
            # No guess yet: where nodes share cores, it would make the first token late.
            return _fill_cache(machine)
        if len(machine.fresh) >= self.micro_batch:
            return None  # the pipeline is behind: a later choice is a better one
        if not self.asynchronous and not machine.idle:
            return None
        if not self.continuous and machine.root.children:
            return None
        if self._empty and self.decay == 0:
            return None  # the same cutoff would end the same draft again
        leaves = [leaf for leaf in machine.tree.leaves() if _depth_left(machine, leaf) > 0]
        if not leaves:
            return None
        if len(leaves) > self.sequences:
            leaves.sort(key=lambda leaf: _path_probability(machine.root, leaf), reverse=True)
            del leaves[self.sequences :]
        self._tried = machine.root
        cutoff = self.cutoff + self.recovery * self._started - self.decay * self._empty
        return DraftPlan(self.micro_batch, cutoff, self.split, self.sequences), leaves

    def committed(self, origins: Sequence[Origin]) -> None:
        self._started = self._empty = 0

    def drafted(self, added: int) -> None:
        self._empty += added == 0

    def _target_must_wait(self, machine: Machine) -> bool:
        """Whether it is the draft model's turn, where the two take turns."""
        if machine.drafting:
            return True
        untried = self._tried is not machine.root and _depth_left(machine, machine.root) > 0
        return machine.root_waits and machine.idle and not machine.root.children and untried


STRATEGIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Iterative, Speculative, PipeInfer)
}


def make_policy(strategy: str, /, **knobs: Any) -> Policy:
    """Return a fresh policy by name.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`.
    **knobs
        The policy's own attributes.

    Raises
    ------
    ValueError
        If there is no such strategy, or it has no such knob, or a value is out of range.
    """
    try:
        kind = STRATEGIES[strategy]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}"
        ) from None
    known = [knob.name for knob in fields(kind) if knob.init]  # type: ignore[arg-type]
    if unknown := [name for name in knobs if name not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"strategy {strategy!r} has no knob {unknown[0]!r}: {has}")
    return kind(**knobs)


def _fill_cache(machine: Machine) -> DraftChoice | None:
    """Return what the draft model does before the first token: read a long prompt, if it's of use.

    It reads a short one along with its first draft, at the cost of one pass either way.
    """
    long = len(machine.request.prompt) > SHORT_PROMPT
    useful = not machine.root.drafted and _depth_left(machine, machine.root) > 0
    return FILL_CACHE if long and useful else None


def _depth_left(machine: Machine, node: Node) -> int:
    """Return how many tokens below ``node`` could be of use."""
    return machine.last_position - node.position


def _path_probability(root: Node, leaf: Node) -> float:
    """Return the product of the draft model's confidences on the way from ``root``."""
    probability = 1.0
    node: Node | None = leaf
    while node is not None and node is not root:
        probability *= node.confidence
        node = node.parent
    return probability


def _at_least(policy: Policy, name: str, least: int) -> None:
    value = getattr(policy, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _probability(policy: Policy, name: str) -> None:
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")
