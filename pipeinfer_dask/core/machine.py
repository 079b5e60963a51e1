"""The machine: one request from prompt to end, as events in and commands out.

It keeps the token tree, the runs in flight and the draft under way. A policy says
what to run and what to draft next; the machine sees to it that whatever the
policy chooses, the committed text is the target's own:

- only a token that the target picked is ever committed;
- a run is cancelled when none of its tokens can become part of the text, and
  never before, because later runs attend to the K/V that it writes; of a run that
  goes on, single tokens may be pruned by the same rule;
- a slot is given out again only when its token is pruned, and every run that
  attended to it is ahead of the new one on every stage.

No clock, no thread, no socket: a driver carries out the commands and reports
events, and may be the real cluster or virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeinfer_dask.core.drafts import Draft, ProtocolError, unevaluated
from pipeinfer_dask.core.ending import Ending
from pipeinfer_dask.core.runs import RunFuture, runs_before
from pipeinfer_dask.core.tree import Node, Tree, batch_of
from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    NO_SLOT,
    Begin,
    CancelDraft,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DraftPlan,
    Event,
    Finish,
    Kind,
    Origin,
    Prune,
    RunDone,
    RunTaken,
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
    """Drives one request.

    Parameters
    ----------
    request : Request
    policy : Policy
        Fresh: a policy counts what it sees.
    generation : int
        Of the pipeline. Events of another generation are stale: dropped and counted.
    stops : callable, optional
        Told of each committed token: whether the text ends with it; see `Ending`.

    Attributes
    ----------
    tree : Tree
    runs : dict of int to RunFuture
        In flight, the cancelled ones too, until they have left the pipeline.
    generated : int
        Tokens committed so far.
    finished : str or None
        Why the text ended: "length", "end_token", "stop_string" or "stopped".
    stale : int
        Events dropped because they belong to another request or generation.
    """

    def __init__(
        self,
        request: Request,
        policy: Policy,
        *,
        generation: int = 0,
        stops: Callable[[int], bool] | None = None,
    ) -> None:
        self.request = request
        self.policy = policy
        self.generation = generation
        self.tree = Tree(request.prompt, request.capacity)
        self.runs: dict[int, RunFuture] = {}
        self.generated = 0
        self.finished: str | None = None
        self.stale = 0
        self.now = 0.0
        self._ending = Ending(request, stops)
        self._how = request.sampling, request.cache_id
        self._draft: Draft | None = None
        self._prefill: deque[list[Node]] = deque()
        # In order of arrival. A dictionary, so that one leaves without the others being touched.
        self._fresh: dict[Node, None] = {}
        self._waiting: set[int] = set()
        self._stages = 1
        self._wake: float | None = None
        self._run_ids = 0
        self._draft_ids = 0
        self._begun = self._over = False
        self._commands: list[Command] = []

    # --- what a policy looks at ---------------------------------------------

    @property
    def root(self) -> Node:
        return self.tree.root

    @property
    def root_waits(self) -> bool:
        """Whether no run in flight will tell the token after the root."""
        return self.root.run is None and not self._prefill

    @property
    def prefilling(self) -> bool:
        """Whether the first token is still to come."""
        return self.generated == 0

    @property
    def has_room(self) -> bool:
        """Whether the pipeline can take a run: one waits at most, and not too many are on the way.

        More than two for each stage are queueing somewhere: before a slow stage, or a slow link.
        """
        return not self._waiting and len(self.runs) <= 2 * self._stages + 2

    @property
    def drafting(self) -> bool:
        return self._draft is not None

    @property
    def idle(self) -> bool:
        """Whether the target's pipeline is empty."""
        return not self.runs

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
        now : float
            Seconds, on any clock that does not go back.

        Raises
        ------
        ProtocolError
            If the event can't have happened.
        """
        self.now = now
        commands = self._commands = list[Command]()
        if event.request != self.request.id or self._over:
            self.stale += 1
            return commands
        match event:
            case Begin():
                self._begin()
            case Stop():
                if self.finished is None:
                    self._end("stopped")
            case RunTaken() | RunDone() | Drafted() if event.generation != self.generation:
                self.stale += 1
            case RunTaken():
                self._waiting.discard(event.run)
                if (taken := self.runs.get(event.run)) is not None:
                    self.policy.taken(self, taken)
            case RunDone():
                self._run_done(event)
            case Drafted():
                self._drafted(event)
            case Woken():
                pass  # the policy is asked below, as after every event
        if self.finished is None:
            self._plan()
            wake = self.policy.wake_at(self)
            if wake is not None and wake != self._wake:
                commands.append(WakeAt(self.request.id, wake))
            self._wake = wake
        elif not self.runs and self._draft is None:
            self._over = True
            commands.append(Finish(self.request.id, self.finished))
        return commands

    # --- events -----------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun:
            raise ProtocolError("the request has begun already")
        self._begun = True
        prompt, chunk = self.tree.prompt, self.request.prefill_chunk
        self._prefill.extend(prompt[i : i + chunk] for i in range(0, len(prompt), chunk))

    def _run_done(self, event: RunDone) -> None:
        run = self.runs.pop(event.run, None)
        if run is None:
            raise ProtocolError(f"run {event.run} is not in flight")
        self._waiting.discard(run.id)
        self._stages = max(self._stages, len(event.spans))
        if run.cancelled():
            return
        if event.tokens is None:
            raise ProtocolError(f"run {run.id} was skipped, but nobody had cancelled it")
        if len(event.tokens) != run.picks:
            raise ProtocolError(
                f"run {run.id} was asked for {run.picks} tokens and came with {len(event.tokens)}"
            )
        run.finish(event.tokens)
        picked = run.nodes[len(run.nodes) - run.picks :]
        asked = event.logprobs or (None,) * run.picks
        for node, token, logprobs in zip(picked, event.tokens, asked, strict=True):
            if token != LEFT_OUT:
                node.next, node.next_logprobs = token, logprobs
            elif node.alive:
                raise ProtocolError(f"run {run.id} left out token {node.token}, which is alive")
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
            self.policy.drafted(self, added, cancelled=draft.cancelled)

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
        self._cancel(dead, CancelReason.INVALID)
        self._prune(thinned)
        draft = self._draft
        if draft is not None and draft.frontier and not any(n.alive for n in draft.frontier):
            self._cancel_draft()
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
        if not self.policy.cancellation:
            return
        pending = [run for run in self.runs.values() if not run.done()]
        for run in runs:
            run.cancel(reason)
        cancelled = tuple(run.id for run in pending if run.cancelled())
        if cancelled:
            self._waiting.difference_update(cancelled)
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

    def _cancel_draft(self) -> None:
        draft = self._draft
        if draft is not None and not draft.cancelled and self.policy.cancellation:
            draft.cancelled = True
            self._commands.append(CancelDraft(self.request.id, self.generation, draft.id))

    # --- what to do next --------------------------------------------------------

    def _plan(self) -> None:
        while self._prefill and self.has_room:
            self._start_run(self._prefill.popleft(), Kind.PREFILL)
        self._plan_runs()
        if self._draft is None and (choice := self.policy.choose_draft(self)) is not None:
            self._start_draft(*choice)
            if self._draft is None:
                # Nothing to draft, or no slot for it: whoever waits for it must not wait on.
                self._plan_runs()

    def _plan_runs(self) -> None:
        while nodes := self._placed(self.policy.choose_run(self)):
            speculative = len(nodes) > 1 or nodes[0] is not self.root
            self._start_run(nodes, Kind.SPECULATIVE if speculative else Kind.SINGLE)

    def _placed(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Give each node of a run a slot; return the first ones for which there are enough."""
        spare = self.spare_slots
        for count, node in enumerate(nodes):
            if node.slot == NO_SLOT:
                if spare <= 0:
                    return nodes[:count]
                spare -= 1
                self.tree.place(node)
        return nodes

    def _start_run(self, nodes: Sequence[Node], kind: Kind) -> None:
        run_id = self._run_ids
        self._run_ids += 1
        for node in nodes:
            node.run = run_id
            self._fresh.pop(node, None)
        last = kind is not Kind.PREFILL or nodes[-1] is self.root
        run = RunFuture(
            run_id,
            kind,
            tuple(nodes),
            parents=runs_before(run_id, nodes, self.runs),
            picks=(1 if kind is Kind.PREFILL else len(nodes)) if last else 0,
            started=self.now,
        )
        self.runs[run_id] = run
        self._waiting.add(run_id)
        batch = batch_of(run.nodes)
        self._commands.append(
            StartRun(self.request.id, self.generation, run_id, kind, batch, run.picks, *self._how)
        )

    def _start_draft(self, plan: DraftPlan | TreePlan, frontier: Sequence[Node]) -> None:
        spare = self.spare_slots - sum(node.slot == NO_SLOT for node in frontier)
        size = max(0, min(plan.size, spare))
        if spare < 0 or (size == 0 and plan.size > 0):
            return
        nodes = unevaluated(frontier, self.root)
        if not nodes:
            return
        for node in nodes:
            self.tree.place(node)
        slots = tuple(self.tree.slots.take() for _ in range(size))
        known = {node.slot: node for node in nodes}
        draft = self._draft = Draft(self._draft_ids, tuple(frontier), known, slots)
        self._draft_ids += 1
        self._commands.append(
            StartDraft(
                self.request.id,
                self.generation,
                draft.id,
                batch_of(nodes),
                len(frontier),
                slots,
                replace(plan, size=size, last_position=self.last_position),
                *self._how,
            )
        )

    # --- for tests ------------------------------------------------------------------

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            Which one does not hold.
        """
        live = [*self.tree.committed(), *self.tree.speculation()]
        held = [node.slot for node in live if node.slot != NO_SLOT]
        if self._draft is not None:
            held.extend(self._draft.slots)
        assert len(held) == len(set(held)), "a slot is held twice"
        assert set(held) == self.tree.slots.taken(), "a slot is lost, or given back too early"
        assert all(node.alive for node in live), "a pruned node is still in the tree"
        assert self.spare_slots >= 0, "speculation has taken slots that the text needs"
        assert self._waiting <= self.runs.keys(), "a run waits that is not in flight"
        assert self.generated <= self.request.max_new_tokens, "more tokens than asked for"
        for node in live:
            if node.parent is None:
                continue
            assert node in node.parent.children, "parent and child don't know each other"
            assert not node.drafted or node.parent.drafted, "drafted without its prefix"
            if node.slot == NO_SLOT:
                assert not node.drafted and node.run is None, "evaluated without a slot"
                assert not node.children, "a slot is needed to be anybody's parent"
            if node.run is not None:
                assert node.parent.run is not None, "a run attends to what no run evaluates"
                assert node.parent.run <= node.run, "a run attends to what comes after it"
        for run in self.runs.values():
            alive = sum(node.alive for node in run.nodes)
            assert run.live == alive, "a run miscounts its live nodes"
            if self.finished is None and self.policy.cancellation:
                assert run.cancelled() == (alive == 0), "cancelled too early, or too late"
        for node in self._fresh:
            assert node.alive and node.run is None and node is not self.root, "not fresh"
