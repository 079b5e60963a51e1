"""`adaptive`: a token tree that grows where the text most likely goes, fed by measured costs.

Three questions, each asked as late as possible:

- *What to draft?* The tokens that the text reaches most likely and that the draft model
  has not evaluated yet, several in one pass.
- *What to run?* When the first stage is about to be free: the tokens that the text
  reaches most likely and that are in no run yet, those first whose results decide most.
  Depth and breadth compete on equal terms: a second choice near the root wins over a first
  choice far below it when its chance is the better one.
- *How many in one run?* Each token more makes the run, and all behind it, slower on every
  stage. So the size follows from what a token costs here (measured) and grows from run to
  run behind a fresh start, when the first answers are needed soonest.

Chances are products of the draft model's confidences, calibrated by what the target made
of earlier ones. Where speculation turns out slower than plain decoding, it pauses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import DraftChoice, Policy
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.core.tree import Node, log_chance
from pipeinfer_dask.drafting.calibration import Calibration, worth
from pipeinfer_dask.policies.common import depth_left, fill_cache, probability, switch, whole
from pipeinfer_dask.policies.crowd import AGAIN, Crowd
from pipeinfer_dask.policies.pace import Pace
from pipeinfer_dask.policies.trial import Trial
from pipeinfer_dask.policies.turns import Turns
from pipeinfer_dask.protocol.messages import Kind, Origin, RunDone, Span, TreePlan

LARGEST = 16
"""Most tokens of one run, however cheap."""
DEEPEST = 12
"""Most passes of the draft model before a run, where the two take turns."""
AGREEMENT_STEP = 0.03
"""How fast the share of the draft model's right first choices is learned."""
NEWS = 4.0
"""So many times more is a token worth, at most, whose result tells what nobody can guess."""


@dataclass(slots=True)
class Adaptive(Policy):
    """Ours: a tree of guesses that grows where the text most likely goes, fed by measured costs.

    Attributes
    ----------
    micro_batch : int
        Most tokens of a run; 0: as many as pay.
    ramp : int
        By so many tokens a run may be larger than the largest one before it in the pipeline.
    passes, breadth, width : int
        Of a draft: passes of the draft model, tokens extended in each, choices for each.
    floor : float
        A second choice less probable than this is not considered.
    tree : bool
        Whether second choices are considered at all. If not, there is one chain.
    calibrate : bool
        Whether confidences are calibrated. If not, they are taken at their word.
    cancellation : bool
        Cancel runs as soon as they are of no use. If not, they run to the end.
    pruning : bool
        Leave out of a run what has become useless, while the rest goes on.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    name: ClassVar[str] = "adaptive"
    micro_batch: int = 0
    ramp: int = 3
    passes: int = 2
    breadth: int = 4
    width: int = 4
    floor: float = 0.01
    tree: bool = True
    calibrate: bool = True
    cancellation: bool = True
    pruning: bool = True
    _pace: Pace = field(default_factory=Pace, init=False)
    _calibration: Calibration = field(default_factory=Calibration, init=False)
    _trial: Trial = field(default_factory=Trial, init=False)
    _turns: Turns = field(default_factory=Turns, init=False)
    _crowd: Crowd = field(default_factory=Crowd, init=False)
    _agreement: float = field(default=0.75, init=False)
    _count: int = field(default=0, init=False)
    # Heaps of (-reach, number, node) and (-value, number, node). What the text has passed by
    # comes up first and is dropped then. A value grows once, when followers are proposed: the
    # node is put in again, and its older entry is dropped when the node is in a run.
    _unevaluated: list[tuple[float, int, Node]] = field(default_factory=list, init=False)
    _ready: list[tuple[float, int, Node]] = field(default_factory=list, init=False)
    _on_first: RunFuture | None = field(default=None, init=False)
    _first_free_at: float = field(default=0.0, init=False)
    _tried: Node | None = field(default=None, init=False)
    _drafting_since: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        whole(self, "micro_batch", 0)
        for name in ("ramp", "passes", "breadth", "width"):
            whole(self, name, 1)
        probability(self, "floor")
        for name in ("tree", "calibrate", "cancellation", "pruning"):
            switch(self, name)

    # --- what to run ------------------------------------------------------------------

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        if self._crowded(machine):
            return self._one_of_many(machine)
        if self._shares(machine):
            return self._turn(machine)
        if machine.root_waits and not self._trial.speculate:
            return [machine.root]
        if machine.root_waits:
            return self._grown([machine.root], self._largest(), machine)
        if self._quiet(machine) or self.wake_at(machine) is not None:
            return []
        ahead = max((run.live for run in machine.runs.values() if not run.done()), default=0)
        return self._grown([], min(self._largest(), ahead + self.ramp), machine)

    def wake_at(self, machine: Machine) -> float | None:
        # When the first stage is about to be free, if there is something to choose then.
        if self._quiet(machine) or self._crowded(machine):
            return None
        at = self._first_free_at - self._pace.trip / 2
        return at if machine.now < at - 1e-9 else None

    def _quiet(self, machine: Machine) -> bool:
        """Whether there is nothing to choose a speculative run from, or no use in one now."""
        waiting = machine.prefilling or not machine.has_room or machine.request.shares_cores
        return waiting or not machine.fresh or not self._trial.speculate

    def _grown(self, nodes: list[Node], size: int, machine: Machine) -> list[Node]:
        """Add the likeliest tokens to a run, each behind its parent, until it has this size."""
        for node in nodes:
            self._open_children(node)
        size = min(size, len(nodes) + max(0, machine.spare_slots))
        while self._ready and len(nodes) < size:
            node = heapq.heappop(self._ready)[2]
            if node.alive and node.run is None and node is not machine.root and node not in nodes:
                nodes.append(node)
                self._open_children(node)
        nodes.sort(key=lambda node: node.position)
        return nodes

    def _largest(self) -> int:
        """Return how many tokens of a run pay.

        A token more makes the way through the pipeline longer for this run and all behind it;
        what it adds becomes less and less. The optimum is flat: the less a token costs, the
        larger, and larger still where fewer errors are to be expected on the way through the
        pipeline, since then it's throughput that counts. Fitted to simulations: see
        docs/policies.md.
        """
        if self.micro_batch:
            return self.micro_batch
        errors = self._pace.stages * max(1 - self._agreement, 0.03)
        pays = (0.46 + 0.26 / errors) * (1 / max(self._pace.share, 1e-3) - 1)
        return max(1, min(LARGEST, round(pays)))

    def _open_children(self, node: Node) -> None:
        for child in node.children:
            if child.run is None:
                self._offer(child)

    def _offer(self, node: Node) -> None:
        """Make a node whose parent is in a run known as one to choose from.

        Its value is its chance, and more where it is uncertain what follows: that result
        decides most, and a chain that goes on for sure loses little by coming later.
        """
        value = node.reach
        if node.children:
            best = max(child.reach for child in node.children)
            value += math.log1p(NEWS * max(0.0, 1 - math.exp(best - node.reach)))
        heapq.heappush(self._ready, (-value, self._next_number(), node))

    def _next_number(self) -> int:
        self._count += 1
        return self._count

    # --- what to draft ----------------------------------------------------------------

    def choose_draft(self, machine: Machine) -> DraftChoice | None:
        if machine.prefilling:
            return fill_cache(machine)
        if self._crowded(machine):
            return self._draft_for_one(machine)
        if not self._trial.speculate:
            return None
        if self._shares(machine):
            if not machine.idle or not self._draft_comes_first(machine):
                return None
            self._tried, self._drafting_since = machine.root, machine.now
            # Two tokens so likely that both are worth extending are rarely there.
            return self._plan(machine, self._frontier(machine, 1), DEEPEST, 1, self._least())
        frontier = self._frontier(machine, self.breadth)
        if not frontier or self._enough(machine, frontier[0]):
            return None
        return self._plan(machine, frontier, self.passes, self.breadth, 0.0)

    def _plan(
        self,
        machine: Machine,
        frontier: Sequence[Node],
        passes: int,
        breadth: int,
        least: float,
    ) -> DraftChoice:
        root = machine.root.reach
        plan = TreePlan(
            size=max(1, breadth * (passes - 1)),
            passes=passes,
            breadth=breadth,
            least=least,
            width=self.width if self.tree else 1,
            floor=self.floor,
            chances=tuple(math.exp(node.reach - root) for node in frontier),
            calibration=self._calibration.table if self.calibrate else (),
        )
        return plan, frontier

    def _frontier(self, machine: Machine, most: int) -> list[Node]:
        """Return what to extend next: the likeliest tokens that the draft model does not hold."""
        root = machine.root
        if not root.drafted:
            return [root] if depth_left(machine, root) > 0 else []
        chosen: list[Node] = []
        kept: list[tuple[float, int, Node]] = []
        while self._unevaluated and len(chosen) < most:
            entry = heapq.heappop(self._unevaluated)
            node = entry[2]
            if not node.alive or node.drafted or node.position <= root.position:
                continue
            kept.append(entry)
            assert node.parent is not None
            if node.parent.drafted:
                chosen.append(node)
            elif len(kept) > 4 * most:
                break
        for entry in kept:
            heapq.heappush(self._unevaluated, entry)
        return chosen

    def _enough(self, machine: Machine, likeliest: Node) -> bool:
        """Whether the next two runs are known: no new token could get into them."""
        count = 2 * self._largest()
        if len(machine.fresh) < count:
            return False
        best = heapq.nlargest(count, (node.reach for node in machine.fresh))
        return best[-1] >= likeliest.reach

    # --- where draft model and target take turns ----------------------------------------

    def _shares(self, machine: Machine) -> bool:
        """Whether they do: what ran beside would slow both."""
        return machine.request.shares_cores and not machine.prefilling

    def _turn(self, machine: Machine) -> Sequence[Node]:
        """Return the run that follows a draft: the root, and what is worth its place."""
        if not machine.idle or machine.drafting or self._draft_comes_first(machine):
            return []
        known = self._turns.plain > 0  # what speculation is compared with
        if not known or not self._trial.speculate or not machine.fresh:
            return [machine.root]
        least = machine.root.reach + log_chance(self._turns.least_to_run)
        worthy = (node for node in machine.fresh if node.reach >= least)
        size = min(self.micro_batch or LARGEST, 1 + max(0, machine.spare_slots))
        # A child is never likelier than its parent, and comes behind it where it's as likely.
        return [machine.root, *sorted(worthy, key=lambda node: -node.reach)[: size - 1]]

    def _draft_comes_first(self, machine: Machine) -> bool:
        """Whether it's the draft model's turn."""
        known = self._turns.plain > 0  # what speculation is compared with
        if not known or self._tried is machine.root or not self._trial.speculate:
            return False
        return self._worth_extending(machine, self._frontier(machine, 1), self._least())

    def _worth_extending(self, machine: Machine, frontier: Sequence[Node], least: float) -> bool:
        """Whether the text gets to the likeliest of these, if there are any, so likely."""
        return bool(frontier) and frontier[0].reach >= machine.root.reach + log_chance(least)

    def _least(self) -> float:
        """Return how likely a token has to be that the draft model should go on behind it."""
        return self._turns.least_to_extend(self._agreement)

    # --- where others fill the pipeline ---------------------------------------------------

    def _crowded(self, machine: Machine) -> bool:
        """Whether they do: with more than half as many requests as stages; or on shared cores."""
        if machine.sharers == 1 or machine.prefilling:
            return False
        return machine.request.shares_cores or 2 * machine.sharers > self._pace.stages

    def _one_of_many(self, machine: Machine) -> Sequence[Node]:
        """Return the root, and each token below it that is worth what it makes others wait."""
        if not machine.root_waits or machine.drafting or self._draft_due(machine):
            return []
        root, share = machine.root, self._pace.share
        nodes, skipped = [root], []
        expected = size = 1.0
        self._open_children(root)
        most = min(self.micro_batch or LARGEST, 1 + max(0, machine.spare_slots))
        while self._ready and len(nodes) < most:
            entry = heapq.heappop(self._ready)
            node = entry[2]
            if not node.alive or node.run is not None or node is root or node in nodes:
                continue
            chance = math.exp(node.reach - root.reach)
            if chance * size < share * expected:
                skipped.append(entry)
                continue
            nodes.append(node)
            expected, size = expected + chance, size + share
            self._open_children(node)
        for entry in skipped:
            heapq.heappush(self._ready, entry)
        nodes.sort(key=lambda node: node.position)
        return nodes

    def _draft_due(self, machine: Machine) -> bool:
        """Whether a draft comes before the run of this root."""
        root = machine.root
        if self._tried is root or depth_left(machine, root) <= 0:
            return False
        passes, least = self._passes(machine)
        return passes > 0 and self._worth_extending(machine, self._frontier(machine, 1), least)

    def _draft_for_one(self, machine: Machine) -> DraftChoice | None:
        passes, least = self._passes(machine)
        frontier = self._frontier(machine, self.breadth)
        if not self._worth_extending(machine, frontier, least):
            return None
        if not machine.root_waits:
            # Ahead of the next root, in small steps: others may need the draft model at once.
            return self._plan(machine, frontier, self.passes, self.breadth, least)
        if not self._draft_due(machine):
            return None
        self._tried = machine.root
        return self._plan(machine, frontier, passes, self.breadth, least)

    def _passes(self, machine: Machine) -> tuple[int, float]:
        passes, least = self._crowd.passes(
            self._agreement,
            self._pace,
            machine.sharers,
            shares_cores=machine.request.shares_cores,
        )
        return max(passes, int(machine.generated % AGAIN == 0)), least

    # --- what it learns ------------------------------------------------------------------

    def judged(self, proposed: Sequence[Node], token: int) -> None:
        for node in proposed:
            self._calibration.learn(node.confidence, node.token == token)
        if proposed:
            first = max(proposed, key=lambda node: node.confidence)
            self._agreement += AGREEMENT_STEP * ((first.token == token) - self._agreement)

    def drafted(
        self, machine: Machine, added: Sequence[Node], *, cancelled: bool, span: Span | None = None
    ) -> None:
        if span is not None:
            self._crowd.drafted(span)
        table = self._calibration.table if self.calibrate else ()
        parents: dict[Node, None] = {}
        for node in added:
            assert node.parent is not None
            node.reach = node.parent.reach + log_chance(worth(node.confidence, table))
            parents[node.parent] = None
            if depth_left(machine, node) > 0:
                heapq.heappush(self._unevaluated, (-node.reach, self._next_number(), node))
        if self._shares(machine) and parents and not cancelled:
            self._turns.drafted(len(parents), machine.now - self._drafting_since)
        for parent in parents:
            if parent.run is not None:
                self._open_children(parent)
            elif parent.parent is not None and parent.parent.run is not None:
                self._offer(parent)

    def taken(self, machine: Machine, run: RunFuture) -> None:
        pace = self._pace
        if run.cancelled():
            return
        if run.started >= self._first_free_at and machine.sharers == 1:
            pace.taken_at_once(machine.now - run.started)
        self._on_first = run
        tokens = run.live if run.kind is not Kind.PREFILL else len(run.nodes)
        self._first_free_at = machine.now - pace.trip / 2 + pace.stage_s(tokens)

    def committed(self, machine: Machine, origins: Sequence[Origin]) -> None:
        if machine.sharers > 1:
            # How fast tokens come says more of the others than of us.
            self._turns.interrupted()
            self._trial.interrupted()
        else:
            clear = len(machine.runs) <= 1
            shares = machine.request.shares_cores
            plain = self._turns.plain if shares else self._pace.plain
            self._turns.committed(len(origins), machine.now, speculating=self._trial.speculate)
            self._trial.committed(len(origins), machine.now, plain, clear=clear)
        if self._on_first is not None and self._on_first.cancelled():
            self._first_free_at = machine.now  # it stops at its next layer

    def ran(self, machine: Machine, run: RunFuture, done: RunDone) -> None:
        if run is self._on_first:
            self._first_free_at = min(self._first_free_at, machine.now)
        seconds = machine.now - run.started if machine.sharers == 1 else None
        self._pace.ran(len(run.nodes), seconds, done.spans)
        if run.kind is not Kind.PREFILL and seconds is not None:
            self._turns.ran(len(run.nodes), seconds)

    def rebuilt(self, machine: Machine) -> None:
        self._pace, self._trial, self._turns = Pace(), Trial(), Turns()
        self._on_first, self._first_free_at = None, 0.0
