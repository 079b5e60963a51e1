"""The machine: one request from prompt to end, as events in and commands out.

It keeps the token tree, the runs in flight and the draft under way. A policy says what to run and
what to draft next; the machine sees to it that whatever the policy chooses, the committed text is
the target's own:

- only a token that the target picked is ever committed;
- a run is cancelled when none of its tokens can become part of the text, and never before, because
  later runs attend to the K/V that it writes; of a run that goes on, single tokens may be pruned by
  the same rule;
- a slot is given out again only when its token is pruned, and every run that attended to it is
  ahead of the new one on every stage;
- when a stage is lost, all that was in flight is lost with it, and nothing of the text: its tokens
  keep their slots, and are read anew by the pipeline that takes over.

No clock, no thread, no socket: a driver carries out the commands and reports events, and may be the
real cluster or virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeinfer_dask.core.drafts import Draft, ProtocolError, choice_of
from pipeinfer_dask.core.ending import Ending
from pipeinfer_dask.core.flight import Flight
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.core.tree import Held, Node, Tree, batch_of, run_of
from pipeinfer_dask.protocol.messages import (
    AWAY,
    Begin,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DrafterBack,
    DrafterLost,
    DraftPlan,
    Event,
    Finish,
    Kind,
    Origin,
    PipelineEvent,
    Prune,
    RunDone,
    RunTaken,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
    Stop,
    TreePlan,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Logprobs

if TYPE_CHECKING:
    from pipeinfer_dask.core.policy import Policy


class Machine:
    """Drives one request. A policy looks at it, and changes nothing.

    Parameters
    ----------
    request : Request
        What is to be generated.
    policy : Policy
        Fresh: a policy counts what it sees.
    generation, draft_generation : int
        Of the stages, and of the drafter. Events of another generation are stale: dropped and
        counted.
    stops : callable, optional
        Told of each committed token: whether the text ends with it; see `Ending`.
    held : sequence of Held
        What the request's cache holds already; see `Tree`.

    Attributes
    ----------
    tree : Tree
    generation, draft_generation : int
        `AWAY` from a loss until what was lost is back.
    generated : int
        Tokens committed so far.
    finished : str or None
        Why the text ended: "length", "end_token", "stop_string" or "stopped".
    stale : int
        Events dropped because they belong to another request or generation.
    sharers : int
        Requests that share the pipeline, this one included; see `Sharing`.
    wake : float or None
    may_run, may_draft : bool
        Whether it is this request's turn. A run uses a turn up, where there are others.
    """

    def __init__(
        self,
        request: Request,
        policy: Policy,
        *,
        generation: int = 0,
        draft_generation: int = 0,
        stops: Callable[[int], bool] | None = None,
        held: Sequence[Held] = (),
    ) -> None:
        self.request = request
        self.policy = policy
        self.generation = generation
        self.draft_generation = draft_generation
        self.tree = Tree(request.prompt, request.capacity, held)
        self.generated = self.stale = self._draft_ids = 0
        self.finished: str | None = None
        self.now = 0.0
        self.sharers = 1
        self.may_run = self.may_draft = True
        self._ending = Ending(request, stops)
        self._how = request.sampling, request.cache_id
        self.flight = Flight()
        self._draft: Draft | None = None
        self._prefill: deque[list[Node]] = deque()
        # In order of arrival. A dictionary, so that one leaves without the others being touched.
        self._fresh: dict[Node, None] = {}
        self.wake: float | None = None
        self._begun = self._over = self._waits = False
        self._reading = True
        self._commands: list[Command] = []

    # --- what a policy looks at ---------------------------------------------

    @property
    def root(self) -> Node:
        """The last token of the text; below it hangs what is proposed."""
        return self.tree.root

    @property
    def root_waits(self) -> bool:
        """Whether no run in flight will tell the token after the root."""
        return self.root.run is None and not self._prefill

    @property
    def runs(self) -> Mapping[int, RunFuture]:
        """What is in flight, the cancelled ones too, until they have left the pipeline."""
        return self.flight.runs

    @property
    def prefilling(self) -> bool:
        """Whether the pipeline still reads the text that there is: no token has come since."""
        return self._reading

    @property
    def has_room(self) -> bool:
        """Whether the pipeline can take a run."""
        return self.may_run and self.flight.has_room

    @property
    def drafting(self) -> bool:
        """Whether a draft is under way."""
        return self._draft is not None

    @property
    def idle(self) -> bool:
        """Whether the target's pipeline is empty."""
        return not self.runs

    @property
    def stuck(self) -> bool:
        """Whether nothing is under way, nor will be: true of a turn that was not used, at most."""
        waits = self.runs or self.drafting or self._waits or self.generation == AWAY
        return self.finished is None and not waits

    @property
    def draft(self) -> Draft | None:
        """The draft under way."""
        return self._draft

    @property
    def fresh(self) -> Collection[Node]:
        """Drafted tokens that are in no run yet, parents first."""
        return self._fresh.keys()

    @property
    def last_position(self) -> int:
        """The last place in the text where a drafted token could be of use."""
        return len(self.request.prompt) + self.request.max_new_tokens - 2

    @property
    def spare_slots(self) -> int:
        """Slots that speculation may take without starving the text itself."""
        return self.tree.slots.free - (self.request.max_new_tokens - self.generated)

    # --- the one door ---------------------------------------------------------

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Take an event; return what is to be done, in order.

        Parameters
        ----------
        event : Event
            Of this request, or of the pipeline; any other is stale.
        now : float
            Seconds, on any clock that does not go back.

        Returns
        -------
        list of Command
            Empty where nothing is to be done.

        Raises
        ------
        ProtocolError
            If the event can't have happened.
        """
        self.now = now
        commands = self._commands = list[Command]()
        ours = isinstance(event, PipelineEvent) or event.request == self.request.id
        if self._over or not ours:
            self.stale += 1
            return commands
        match event:
            case Begin():
                self._begin()
            case Stop():
                if self.finished is None:
                    self._end("stopped")
            case RunTaken() | RunDone() | StageLost() if event.generation != self.generation:
                self.stale += 1
            case Drafted() | DrafterLost() if event.generation != self.draft_generation:
                self.stale += 1
            case RunTaken():
                if (taken := self.flight.taken(event.run)) is not None:
                    self.policy.taken(self, taken)
            case RunDone():
                self._run_done(event)
            case Drafted():
                self._drafted(event)
            case StageLost():
                self._stage_lost()
            case StagesBack() if self.generation == AWAY:
                self._stages_back(event.generation)
            case DrafterLost():
                self._drafter_lost()
            case DrafterBack() if self.draft_generation == AWAY:
                self.draft_generation = event.generation
            case StagesBack() | DrafterBack():
                self.stale += 1
            case Woken():
                pass  # the policy is asked below, as after every event
        if self.finished is None:
            self._plan()
            due = self.policy.wake_at(self)
            self._waits = due is not None and (due > now or due != self.wake)
            if due is not None and due != self.wake:
                commands.append(WakeAt(self.request.id, due))
            self.wake = due
        elif not self.runs and self._draft is None:
            self._over = True
            commands.append(Finish(self.request.id, self.finished))
        return commands

    # --- events -----------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun:
            raise ProtocolError("the request has begun already")
        self._begun = True
        if self.generation != AWAY:
            self._read()

    def _read(self) -> None:
        """Have the pipeline read all of the text that it does not hold."""
        text = [node for node in self.tree.committed() if node.run is None][::-1]
        chunk = self.request.prefill_chunk
        self._prefill.extend(text[i : i + chunk] for i in range(0, len(text), chunk))

    def _run_done(self, event: RunDone) -> None:
        run = self.flight.done(event.run, stages=len(event.spans))
        if run.cancelled():
            return
        run.picked(event.tokens, event.logprobs)
        self.policy.ran(self, run, event)
        if self.finished is None:
            self._commit()

    def _drafted(self, event: Drafted) -> None:
        draft = self._draft
        if draft is None or draft.id != event.draft:
            raise ProtocolError(f"draft {event.draft} is not in flight")
        self._draft = None
        added = draft.graft(event, self.tree, growing=self.finished is None)
        self._fresh.update(dict.fromkeys(added))
        if draft.frontier:
            self.policy.drafted(self, added, cancelled=draft.cancelled, span=event.span)

    def _stage_lost(self) -> None:
        """Give up what is in flight, and all that has not become text."""
        if lost := self.flight.lose():
            ids = self.request.id, self.generation
            self._commands.append(CancelRuns(*ids, lost, CancelReason.LOST))
        self.generation = AWAY
        self._reading = True
        self._prefill.clear()
        self._fresh.clear()
        for child in list(self.root.children):
            self.tree.drop(child)
        for node in self.tree.committed():
            node.run = None
        self._drop_useless_draft()

    def _stages_back(self, generation: int) -> None:
        self.generation = generation
        self.policy.rebuilt(self)
        if self._begun and self.finished is None:
            self._read()

    def _drafter_lost(self) -> None:
        """Give up the draft under way, and what waits for a run: its cache is gone."""
        self.draft_generation = AWAY
        if self._draft is not None:
            self._draft.give_up(self.tree)
            self._draft = None
        for node in [node for node in self._fresh if node.parent not in self._fresh]:
            self.tree.drop(node)
        self._fresh.clear()
        for node in (*self.tree.committed(), *self.tree.speculation()):
            node.drafted = False

    # --- what follows from them ---------------------------------------------------

    def _commit(self) -> None:
        """Move the root along what the target has picked, and cancel what that rules out."""
        tokens: list[int] = []
        origins: list[Origin] = []
        logprobs: list[Logprobs] = []
        dead: list[RunFuture] = []
        thinned: dict[int, list[int]] = {}
        while self.root.next is not None and self.finished is None:
            self.policy.judged(self.root.children, self.root.next)
            if self.root.next_logprobs is not None:
                logprobs.append(self.root.next_logprobs)
            origin, pruned = self.tree.advance()
            tokens.append(self.root.token)
            origins.append(origin)
            self._fresh.pop(self.root, None)
            for node in pruned:
                self._fresh.pop(node, None)
                if node.run is not None and (run := self.runs.get(node.run)) is not None:
                    run.live -= 1
                    thinned.setdefault(run.id, []).append(run.nodes.index(node))
                    if run.live == 0:
                        dead.append(run)
            self.generated += 1
            self.finished = self._ending.after(self.root.token, self.generated)
        if not tokens:
            return
        self._reading = False
        self._cancel(dead, CancelReason.INVALID)
        self._prune(thinned)
        self._drop_useless_draft()
        commit = Commit(self.request.id, tuple(tokens), tuple(origins), tuple(logprobs))
        self._commands.append(commit)
        self.policy.committed(self, origins)
        if self.finished is not None:
            self._end(self.finished)

    def _end(self, reason: str) -> None:
        self.finished = reason
        self._prefill.clear()
        self._cancel(list(self.runs.values()), CancelReason.SUPERFLUOUS)
        self._cancel_draft()

    def _cancel(self, runs: Sequence[RunFuture], reason: CancelReason) -> None:
        """Cancel runs and, with each, the chain that builds on it."""
        if self.policy.cancellation and (cancelled := self.flight.cancel(runs, reason)):
            self._commands.append(CancelRuns(self.request.id, self.generation, cancelled, reason))

    def _prune(self, thinned: dict[int, list[int]]) -> None:
        """Have the stages leave out what died of runs that go on."""
        going_on = {
            run: tuple(places)
            for run, places in thinned.items()
            # Without cancellation what is dead as a whole goes on as it is: no pass may be empty.
            if self.runs[run].live > 0 and self.runs[run].picks == len(self.runs[run].nodes)
        }
        if going_on and self.policy.pruning:
            runs, places = tuple(going_on), tuple(going_on.values())
            self._commands.append(Prune(self.request.id, self.generation, runs, places))

    def _drop_useless_draft(self) -> None:
        draft = self._draft
        if draft is not None and draft.frontier and not any(n.alive for n in draft.frontier):
            self._cancel_draft()

    def _cancel_draft(self) -> None:
        draft = self._draft
        if draft is not None and not draft.cancelled and self.policy.cancellation:
            draft.cancelled = True
            self._commands.append(CancelDraft(self.request.id, self.draft_generation, draft.id))

    # --- what to do next --------------------------------------------------------

    def _plan(self) -> None:
        while self._prefill and self.has_room:
            self._start_run(self._prefill.popleft(), Kind.PREFILL)
        self._plan_runs()
        if self._draft is not None or not self.may_draft or self.draft_generation == AWAY:
            return
        if (choice := self.policy.choose_draft(self)) is not None:
            self._start_draft(*choice_of(choice, self.policy.name))
            if self._draft is None:  # no slot for it, or so: who waits for it must not wait on
                self._plan_runs()

    def _plan_runs(self) -> None:
        while self.may_run and (nodes := self.tree.placed(self._choose_run(), self.spare_slots)):
            speculative = len(nodes) > 1 or nodes[0] is not self.root
            self._start_run(nodes, Kind.SPECULATIVE if speculative else Kind.SINGLE)

    def _choose_run(self) -> Sequence[Node]:
        if self.generation == AWAY or self.flight.full:
            return ()
        if self.draft_generation == AWAY:  # a policy may wait for drafts: till then it is plain
            return [self.root] if self.root_waits else ()
        return run_of(self.policy.choose_run(self), self.policy.name)

    def _start_run(self, nodes: Sequence[Node], kind: Kind) -> None:
        last = kind is not Kind.PREFILL or nodes[-1] is self.root
        picks = (1 if kind is Kind.PREFILL else len(nodes)) if last else 0
        run = self.flight.start(kind, nodes, picks, self.now)
        for node in nodes:
            self._fresh.pop(node, None)
        self.may_run = self.sharers == 1
        ids = self.request.id, self.generation, run.id
        self._commands.append(StartRun(*ids, kind, batch_of(run.nodes), picks, *self._how))

    def _start_draft(self, plan: DraftPlan | TreePlan, frontier: Sequence[Node]) -> None:
        draft = Draft.begin(self._draft_ids, plan.size, frontier, self.tree, self.spare_slots)
        if draft is None:
            return
        self._draft = draft
        self._draft_ids += 1
        ids = self.request.id, self.draft_generation, draft.id
        batch = batch_of(list(draft.nodes.values()))
        plan = replace(plan, size=len(draft.slots), last_position=self.last_position)
        self._commands.append(StartDraft(*ids, batch, len(frontier), draft.slots, plan, *self._how))
