"""`pipeinfer`: the paper's method, each mechanism of which can be switched off alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import DraftChoice, Policy
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.policies.common import depth_left, fill_cache, probability, switch, whole
from pipeinfer_dask.protocol.messages import DraftPlan, Origin, Span


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
        whole(self, "micro_batch", 1)
        whole(self, "sequences", 1)
        for name in ("cutoff", "recovery", "decay", "split"):
            probability(self, name)
        for name in ("asynchronous", "continuous", "cancellation"):
            switch(self, name)

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        if not self.asynchronous and self._target_must_wait(machine):
            return []
        if machine.root_waits:
            return [machine.root]
        if machine.prefilling or not machine.has_room or not machine.fresh:
            return []
        self._started += 1
        return list(islice(machine.fresh, self.micro_batch))

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        if machine.prefilling:
            # No guess yet: where nodes share cores, it would make the first token late.
            return fill_cache(machine)
        if len(machine.fresh) >= self.micro_batch:
            return None  # the pipeline is behind: a later choice is a better one
        if not self.asynchronous and not machine.idle:
            return None
        if not self.continuous and machine.root.children:
            return None
        cutoff = self.cutoff + self.recovery * self._started - self.decay * self._empty
        again = self._empty > 0 and self._tried is machine.root
        if again and (self.decay == 0 or cutoff + self.decay <= 0):
            return None  # the last draft gave nothing, and this cutoff lets through no more
        leaves = [leaf for leaf in machine.tree.leaves() if depth_left(machine, leaf) > 0]
        if not leaves:
            return None
        if len(leaves) > self.sequences:
            leaves.sort(key=lambda leaf: leaf.reach, reverse=True)
            del leaves[self.sequences :]
        self._tried = machine.root
        return DraftPlan(self.micro_batch, cutoff, self.split, self.sequences), leaves

    def committed(self, machine: Machine, origins: Sequence[Origin]) -> None:
        self._started = self._empty = 0

    def drafted(
        self, machine: Machine, added: Sequence[Node], *, cancelled: bool, span: Span | None = None
    ) -> None:
        self._empty += not added and not cancelled

    def _target_must_wait(self, machine: Machine) -> bool:
        """Whether it is the draft model's turn, where the two take turns."""
        if machine.drafting:
            return True
        untried = self._tried is not machine.root and depth_left(machine, machine.root) > 0
        return machine.root_waits and machine.idle and not machine.root.children and untried
