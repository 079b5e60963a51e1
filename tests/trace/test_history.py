"""The story that a record tells: held against the machine that the record is of."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.policies import make_policy
from pipeinfer_dask.protocol.messages import (
    CancelReason,
    Command,
    Drafted,
    Event,
    Finish,
    Kind,
    RunDone,
    Stop,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.simulation import Costs, simulate
from pipeinfer_dask.simulation.faults import Loss
from pipeinfer_dask.simulation.truth import SyntheticPair
from pipeinfer_dask.simulation.world import World
from pipeinfer_dask.trace import Draft, Fate, History, Run, Trace

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("iterative", {}),
    ("speculative", {}),
    ("pipeinfer", {}),
    ("pipeinfer", {"sequences": 1, "micro_batch": 2}),
    ("adaptive", {}),
    ("adaptive", {"micro_batch": 2}),
]


class WatchedMachine(Machine):
    """Tells a history of its own what happens, and holds its tree against the history's."""

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        if not hasattr(self, "story"):
            self.story = History(Trace(4))
        commands = super().handle(event, now)
        trace = self.story.trace
        for what in (event, *commands):
            trace.add(now, what)
        assert self.story.update()
        if self.finished is None and not self.prefilling:
            self.compare()
        return commands

    def compare(self) -> None:
        root = self.story.root
        assert root is not None
        ours = [
            (node.token, node.position, node.slot, node.run, node.confidence)
            for node in self.tree.speculation()
        ]
        told = [
            (guess.token, guess.position, guess.slot, guess.run, guess.confidence)
            for child in root.children
            for guess in child.subtree()
        ]
        assert told == ours
        assert (root.token, root.position) == (self.root.token, self.root.position)
        assert len(self.story.tokens) == self.generated


@pytest.mark.parametrize(("strategy", "knobs"), STRATEGIES)
@pytest.mark.parametrize("acceptance", [0.5, 0.9])
@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("lossy", [False, True], ids=["", "with losses"])
def test_the_tree_of_the_story_is_the_machines_own_after_every_event(
    strategy: str, knobs: dict[str, Any], acceptance: float, stages: int, lossy: bool
) -> None:
    pair = SyntheticPair(acceptance, 3)
    request = Request(0, pair.text(40), 60, 2000, prefill_chunk=16, reads_ahead=True)
    machine = WatchedMachine(request, make_policy(strategy, **knobs))
    costs = Costs.even(stages, rebuild_s=0.3)
    losses = [Loss(0.5, 0), Loss(0.6, None), Loss(1.2, stages - 1)] if lossy else []
    world = World(request, machine.policy, costs, pair, losses=losses, machine=machine)
    world.run()
    assert [(loss.drafter, loss.back is not None) for loss in machine.story.losses] == [
        *((False, True), (True, True), (False, True))[: len(losses)]
    ]
    assert [token.guess.token for token in machine.story.tokens] == world.outcomes[0].tokens
    assert [token.origin for token in machine.story.tokens] == world.outcomes[0].origins
    assert machine.story.finished == "length"


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_a_record_told_entry_by_entry_is_the_record_told_at_once(strategy: str) -> None:
    trace = simulate(strategy, stages=3, acceptance=0.6, max_new_tokens=40).trace
    growing = Trace(3)
    story = History(growing)
    for time, what in trace:
        growing.add(time, what)
        story.update()
    assert outline(story) == outline(History(trace))
    assert not story.update()


def outline(story: History) -> list[object]:
    return [
        [(run.id, run.fate, run.kept, run.started, run.done) for run in story.runs.values()],
        [(draft.id, draft.late, [g.id for g in draft.guesses]) for draft in story.drafts.values()],
        [(guess.token, guess.made, guess.settled, guess.kept) for guess in story.guesses],
        [guess.id for guess in story.settled],
        story.tally.metrics(),
    ]


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
@pytest.mark.parametrize("losses", [[], [(1.0, 2), (2.1, None)]], ids=["", "with losses"])
def test_every_run_has_a_fate_and_every_guess_is_settled_in_the_end(
    strategy: str, losses: list[tuple[float, int | None]]
) -> None:
    world: dict[str, Any] = {"stages": 4, "acceptance": 0.6, "max_new_tokens": 80}
    story = History(simulate(strategy, losses=losses, **world).trace)
    assert all(run.fate is not None for run in story.runs.values())
    assert len(story.settled) == len(story.guesses)
    assert len({guess.id for guess in story.settled}) == len(story.guesses)
    accepted = sum(token.origin == "accepted" for token in story.tokens)
    assert accepted == story.tally.metrics().accepted_tokens


def test_what_is_called_off_is_told_from_what_was_wrong() -> None:
    trace = simulate("pipeinfer", stages=4, acceptance=0.6).trace
    fates = {run.fate for run in History(trace).runs.values()}
    assert fates == {Fate.PREFILL, Fate.SINGLE, Fate.ACCEPTED, Fate.CANCELLED}
    unstopped = simulate("pipeinfer", stages=4, acceptance=0.6, cancellation=False).trace
    fates = {run.fate for run in History(unstopped).runs.values()}
    assert fates == {Fate.PREFILL, Fate.SINGLE, Fate.ACCEPTED, Fate.REJECTED}


def test_losses_are_told_with_their_reason_and_when_the_node_was_back() -> None:
    costs = Costs.even(3, rebuild_s=2.0)
    trace = simulate("adaptive", costs=costs, losses=[(1.0, 1), (2.5, None)]).trace
    stage, drafter = History(trace).losses
    assert (stage.reason, stage.drafter, drafter.reason, drafter.drafter) == (
        *("stage 1", False),
        *("the drafter", True),
    )
    assert stage.back == pytest.approx(stage.time + 2.0)
    assert drafter.back == pytest.approx(drafter.time + 2.0)
    reasons = {wave.reason for wave in History(trace).waves}
    assert reasons == {CancelReason.INVALID, CancelReason.LOST}


def test_waves_name_the_runs_that_they_cancel_and_what_that_saves() -> None:
    trace = simulate("adaptive", stages=4, acceptance=0.7).trace
    story = History(trace)
    cancelled = [run for wave in story.waves for run in wave.runs]
    assert len(cancelled) == story.tally.metrics().runs_cancelled > 0
    assert {wave.reason for wave in story.waves} == {CancelReason.INVALID}
    for run in cancelled:
        assert run.cancelled is not None
        computed = sum(span.layers for span in run.spans)
        assert story.saved(run) == sum(story.layers) - computed
    saved = sum(story.saved(run) for run in cancelled)
    assert saved == story.tally.metrics().layers_saved > 0
    assert story.saved(story.runs[0]) == 0


def test_drafts_keep_what_they_proposed_and_how_sure_the_model_was() -> None:
    trace = simulate("pipeinfer", stages=4, acceptance=0.6).trace
    story = History(trace)
    proposed = {what.draft: what for _, what in trace if isinstance(what, Drafted)}
    assert story.drafts.keys() == proposed.keys()
    for draft in story.drafts.values():
        answer = proposed[draft.id]
        assert len(draft.guesses) + draft.late == len(answer.proposals)
        assert {(g.token, g.confidence) for g in draft.guesses} <= {
            (p.token, p.confidence) for p in answer.proposals
        }
        assert all(guess.draft == draft.id and guess.ahead > 0 for guess in draft.guesses)


def test_what_is_done_is_in_order_and_has_its_work() -> None:
    trace = simulate("adaptive", stages=3, acceptance=0.7).trace
    story = History(trace)
    done = [what for _, what in trace if isinstance(what, (RunDone, Drafted))]
    assert len(story.done) == len(done)
    for ours, what in zip(story.done, done, strict=True):
        if isinstance(what, RunDone):
            assert isinstance(ours, Run) and (ours.id, ours.spans) == (what.run, what.spans)
        else:
            assert isinstance(ours, Draft) and (ours.id, ours.span) == (what.draft, what.span)


def test_a_story_that_has_not_begun_is_empty() -> None:
    story = History(Trace(2))
    assert story.runs == {} and story.tokens == [] and story.root is None
    assert not story.update()


def test_the_end_settles_what_was_still_open() -> None:
    trace = simulate("adaptive", stages=4, acceptance=0.9, max_new_tokens=30).trace
    cut = Trace(4, trace.records[: len(trace) // 2])
    story = History(cut)
    open_guesses = [guess for guess in story.guesses if guess.settled is None]
    cut.add(story.ended, Stop(0))
    cut.add(story.ended, Finish(0, "stopped"))
    story.update()
    assert open_guesses
    assert all(guess.ruled_out for guess in open_guesses)
    assert all(run.kind is not Kind.PREFILL for run in story.runs.values() if run.cancelled)


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_a_fate_is_decided_when_the_record_first_tells_it(strategy: str) -> None:
    recorded = simulate(strategy, stages=3, acceptance=0.6, max_new_tokens=60).trace
    trace = Trace(recorded.stages)
    history = History(trace)
    known: dict[int, tuple[float, Fate]] = {}
    for time, what in recorded:
        trace.add(time, what)
        history.update()
        for run in history.runs.values():
            if run.fate is not None:
                known.setdefault(run.id, (time, run.fate))
            else:
                assert run.decided is None
    assert known == {run.id: (run.decided, run.fate) for run in history.runs.values()}
    guessing = [run for run in history.runs.values() if run.guesses]
    assert all(run.decided is not None and run.decided > run.started for run in guessing)
