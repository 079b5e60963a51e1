"""Virtual time: stages, links and a drafter that cost what a cost model says.

The machine, its policies and the growing of drafts are the very ones that drive real
clusters. What this world adds is only when things happen.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.sharing import Sharing
from pipeinfer_dask.drafting.expansion import Expansion, expansion_of
from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    Begin,
    CancelDraft,
    CancelRuns,
    Commit,
    Drafted,
    DrafterBack,
    DrafterLost,
    Event,
    Finish,
    Origin,
    PipelineEvent,
    Prune,
    RunDone,
    RunTaken,
    Span,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.simulation.costs import Costs
from pipeinfer_dask.simulation.faults import Loss, Slowdown
from pipeinfer_dask.simulation.truth import SyntheticPair, Texts
from pipeinfer_dask.trace import Trace


class Clock:
    """Virtual seconds, and what will happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []

    def after(self, delay: float, what: Callable[..., None], *arguments: object) -> None:
        """Have ``what(*arguments)`` happen in ``delay`` seconds, behind all that was due then."""
        entry = (self.now + delay, next(self._numbers), what, arguments)
        heapq.heappush(self._agenda, entry)

    def run(self) -> None:
        """Let everything happen, until nothing is left."""
        while self._agenda:
            self.now, _, what, arguments = heapq.heappop(self._agenda)
            what(*arguments)


@dataclass(slots=True)
class Outcome:
    """What becomes of a request."""

    trace: Trace
    tokens: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    finished: str | None = None
    wakes: int = 0


class World:
    """Requests in virtual time, that all begin at once.

    Parameters
    ----------
    request : Request
    policy : Policy
    costs : Costs
    pair : SyntheticPair
        A request that samples gets the text of its seed instead.
    losses : sequence of Loss
        What is lost when; what is lost already is not lost again.
    slowdowns : sequence of Slowdown
        Of who stands then; a node that takes another one's place is as fast as any.
    machine : Machine, optional
        For whoever wants to watch it: of this request, with this policy.
    others : sequence of (Request, Policy)
        More requests on the same pipeline.

    Attributes
    ----------
    outcomes : list of Outcome
        In the order of the requests.
    """

    def __init__(
        self,
        request: Request,
        policy: Policy,
        costs: Costs,
        pair: SyntheticPair,
        *,
        losses: Sequence[Loss] = (),
        slowdowns: Sequence[Slowdown] = (),
        machine: Machine | None = None,
        others: Sequence[tuple[Request, Policy]] = (),
    ) -> None:
        self._sharing = Sharing()
        self._sharing.join(Machine(request, policy) if machine is None else machine)
        for another, its_policy in others:
            self._sharing.join(Machine(another, its_policy))
        self._by_request = {n: Outcome(Trace(len(costs.stages))) for n in self._sharing.machines}
        self._costs = costs
        self._pair = pair
        self._clock = Clock()
        self._generation = self._draft_generation = 0
        self._stages = self._new_stages()
        self._drafter = _Drafter(self._clock, costs, pair, self._tell_later)
        for loss in losses:
            self._clock.after(loss.at_s, self._lose, loss)
        for slowdown in slowdowns:
            self._clock.after(slowdown.at_s, self._slow_down, slowdown)

    def _new_stages(self) -> list[_Stage]:
        """Return stages that hold nothing."""
        texts = Texts(self._pair)

        def pick(passing: _Passing) -> None:
            """Take what has passed the last stage to the client."""
            run, out = passing.run, passing.left_out
            tokens: tuple[int, ...] | None = None
            if not passing.skipped:
                places = texts.places(run.cache, run.sampling)
                reached = places.take(run.batch)
                picked = map(places.pair.target, reached[len(reached) - run.picks :])
                tokens = tuple(LEFT_OUT if i in out else token for i, token in enumerate(picked))
            spans = tuple(passing.spans)
            self._tell_later(RunDone(run.request, run.generation, run.run, tokens, spans))

        onward = pick
        stages: list[_Stage] = []
        for index in reversed(range(len(self._costs.stages))):
            taken = self._taken if index == 0 else None
            stage = _Stage(self._clock, self._costs, index, onward, taken)
            stages.insert(0, stage)
            onward = stage.send
        return stages

    @property
    def outcomes(self) -> list[Outcome]:
        return list(self._by_request.values())

    def run(self) -> None:
        """Live from the requests' begin until nothing happens any more."""
        for request in list(self._by_request):
            self._tell(Begin(request))
        self._clock.run()

    def _tell(self, event: Event) -> None:
        """Hand an event to whom it concerns, and carry out what is answered."""
        clock, hop = self._clock, self._costs.hop_s
        whom = list(self._sharing.machines) if isinstance(event, PipelineEvent) else [event.request]
        for request in whom:
            self._by_request[request].trace.add(clock.now, event)
        for command in self._sharing.handle(event, clock.now):
            outcome = self._by_request[command.request]
            outcome.trace.add(clock.now, command)
            match command:
                case StartRun():
                    # Token ids alone: nothing that would occupy a link.
                    clock.after(hop, self._stages[0].arrive, _Passing(command))
                case CancelRuns():
                    for stage in self._stages:
                        clock.after(hop, stage.cancel, command)
                case Prune():
                    for stage in self._stages:
                        clock.after(hop, stage.prune, command)
                case StartDraft():
                    clock.after(hop, self._drafter.start, command)
                case CancelDraft():
                    clock.after(hop, self._drafter.cancel, command)
                case Commit():
                    outcome.tokens.extend(command.tokens)
                    outcome.origins.extend(command.origins)
                case WakeAt():
                    outcome.wakes += 1
                    in_s = max(0.0, command.time - clock.now)
                    clock.after(in_s, self._wake, command.request, outcome.wakes)
                case Finish():
                    outcome.finished = command.reason

    def _tell_later(self, event: Event) -> None:
        self._clock.after(self._costs.hop_s, self._tell, event)

    def _taken(self, run: StartRun) -> None:
        self._tell_later(RunTaken(run.request, run.generation, run.run))

    def _node(self, node: int | None) -> _Node:
        return self._drafter if node is None else self._stages[node]

    def _slow_down(self, slowdown: Slowdown) -> None:
        node = self._node(slowdown.node)
        node.slowness *= slowdown.factor
        self._clock.after(slowdown.for_s, node.recover, slowdown.factor)

    def _lose(self, loss: Loss) -> None:
        """Have a node fall silent; the news takes a while."""
        node = self._node(loss.node)
        if self._over or node.lost:
            return
        node.lost = True
        late = self._costs.hop_s if loss.noticed_s is None else loss.noticed_s
        self._clock.after(late, self._notice, loss.node, self._stages)

    def _notice(self, number: int | None, stages: list[_Stage]) -> None:
        """Tell of a loss; a new node is there after a while."""
        if self._over or (number is not None and stages is not self._stages):
            return  # it has been replaced along with others
        lost: StageLost | DrafterLost
        if number is None:
            lost = DrafterLost(self._draft_generation, "the drafter")
        else:
            lost = StageLost(self._generation, f"stage {number}")
        self._tell(lost)
        self._clock.after(self._costs.rebuild_s, self._rebuild, type(lost), stages)

    def _rebuild(self, lost: type[StageLost | DrafterLost], stages: list[_Stage]) -> None:
        if self._over:
            return
        newest = max(self._generation, self._draft_generation) + 1
        if lost is DrafterLost:
            self._draft_generation = newest
            self._drafter = _Drafter(self._clock, self._costs, self._pair, self._tell_later)
            self._tell(DrafterBack(newest))
        elif stages is self._stages:
            # Those that were lost since then are rebuilt along with it.
            for stage in stages:
                stage.lost = True
            self._generation = newest
            self._stages = self._new_stages()
            self._tell(StagesBack(newest))

    @property
    def _over(self) -> bool:
        return not self._sharing.machines

    def _wake(self, request: int, wake: int) -> None:
        outcome = self._by_request[request]
        if wake == outcome.wakes and outcome.finished is None:
            self._tell(Woken(request))


@dataclass(slots=True)
class _Passing:
    """A run on its way through the stages."""

    run: StartRun
    spans: list[Span] = field(default_factory=list)
    skipped: bool = False
    left_out: set[int] = field(default_factory=set)

    @property
    def key(self) -> tuple[int, int]:
        return self.run.request, self.run.run

    @property
    def tokens(self) -> int:
        return 0 if self.skipped else len(self.run.batch) - len(self.left_out)


class _Node:
    """What may be slow, or lost.

    Attributes
    ----------
    slowness : float
        Its passes take so many times longer than they should.
    lost : bool
        Then it does nothing more.
    """

    def __init__(self) -> None:
        self.slowness = 1.0
        self.lost = False

    def recover(self, factor: float) -> None:
        """Be faster by a factor by which it was slower."""
        self.slowness /= factor


class _Stage(_Node):
    """Takes one run at a time, in order, and sends it on; the link behind it is its own."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        index: int,
        onward: Callable[[_Passing], None],
        taken: Callable[[StartRun], None] | None,
    ) -> None:
        super().__init__()
        self._clock = clock
        self._costs = costs
        self._curve = costs.stages[index]
        self._onward = onward
        self._taken = taken
        self._queue: deque[_Passing] = deque()
        self._computing: _Passing | None = None
        self._began = self._ends = 0.0
        self._layers = 0
        self._plans = 0
        """Counts the ends that were planned: a cancellation plans an earlier one."""
        # By request and run.
        self._cancelled: set[tuple[int, int]] = set()
        self._pruned: dict[tuple[int, int], set[int]] = {}
        self._link_free = 0.0

    def send(self, passing: _Passing) -> None:
        """Bring a run over the link to here: one message at a time occupies it."""
        clock = self._clock
        self._link_free = max(clock.now, self._link_free) + self._costs.hop(passing.tokens)
        clock.after(self._link_free - clock.now + self._costs.hop_s, self.arrive, passing)

    def arrive(self, passing: _Passing) -> None:
        if self.lost:
            return
        self._queue.append(passing)
        self._turn_to_next()

    def cancel(self, command: CancelRuns) -> None:
        self._cancelled.update((command.request, run) for run in command.runs)
        passing, now = self._computing, self._clock.now
        if passing is None or passing.skipped or passing.key not in self._cancelled:
            return
        # It stops before its next layer.
        passing.skipped = True
        layer_s = (self._ends - self._began) / self._costs.layers
        if layer_s > 0:
            self._layers = min(self._layers, math.ceil((now - self._began) / layer_s))
            self._plan_end(max(now, self._began + self._layers * layer_s))

    def prune(self, command: Prune) -> None:
        for run, tokens in zip(command.runs, command.tokens, strict=True):
            self._pruned.setdefault((command.request, run), set()).update(tokens)

    def _turn_to_next(self) -> None:
        while self._computing is None and self._queue:
            passing, now = self._queue.popleft(), self._clock.now
            if self._taken is not None:
                self._taken(passing.run)
            if passing.skipped or passing.key in self._cancelled:
                passing.skipped = True
                passing.spans.append(Span(now, now, 0))
                self._onward(passing)
                continue
            passing.left_out |= self._pruned.get(passing.key, set())
            self._computing = passing
            self._began, self._layers = now, self._costs.layers
            self._plan_end(now + self._curve(passing.tokens) * self.slowness)

    def _plan_end(self, ends: float) -> None:
        self._ends = ends
        self._plans += 1
        self._clock.after(ends - self._clock.now, self._end, self._plans)

    def _end(self, plan: int) -> None:
        passing = self._computing
        if plan != self._plans or passing is None or self.lost:
            return  # the run was cut short
        self._computing = None
        passing.spans.append(Span(self._began, self._clock.now, self._layers))
        self._onward(passing)
        self._turn_to_next()


class _Drafter(_Node):
    """The draft model: grows one draft at a time, pass by pass."""

    def __init__(
        self, clock: Clock, costs: Costs, pair: SyntheticPair, tell: Callable[[Event], None]
    ) -> None:
        super().__init__()
        self._clock = clock
        self._costs = costs
        self._texts = Texts(pair)
        self._tell = tell
        self._cancelled: set[tuple[int, int]] = set()
        self._began = 0.0
        self._passes = 0

    def start(self, draft: StartDraft) -> None:
        self._began, self._passes = self._clock.now, 0
        self._next_pass(expansion_of(draft))

    def cancel(self, command: CancelDraft) -> None:
        # A pass that has begun is computed to its end: draft models are small.
        self._cancelled.add((command.request, command.draft))

    def _next_pass(self, expansion: Expansion) -> None:
        if self.lost:
            return
        draft = expansion.draft
        step = expansion.next_batch()
        if step is not None and (draft.request, draft.draft) not in self._cancelled:
            takes = self._costs.draft(len(step[0])) * self.slowness
            self._clock.after(takes, self._end_pass, expansion)
            return
        self._tell(
            Drafted(
                draft.request,
                draft.generation,
                draft.draft,
                tuple(expansion.proposals),
                tuple(expansion.evaluated),
                Span(self._began, self._clock.now, self._passes),
            )
        )

    def _end_pass(self, expansion: Expansion) -> None:
        step = expansion.next_batch()
        assert step is not None
        batch, frontier = step
        self._passes += 1
        places = self._texts.places(expansion.draft.cache, expansion.draft.sampling)
        ends = places.take(batch)[len(batch) - frontier :]
        expansion.grow([places.pair.candidates(place, expansion.width) for place in ends])
        self._next_pass(expansion)
