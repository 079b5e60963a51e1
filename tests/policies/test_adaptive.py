"""What `adaptive` chooses, on a pipeline that is told what to answer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pipeinfer_dask.core.drafts import ProtocolError
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.policies import Adaptive
from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    NO_SLOT,
    Begin,
    Command,
    Drafted,
    Kind,
    Proposal,
    Prune,
    RunDone,
    RunTaken,
    Span,
    StartDraft,
    StartRun,
    TreePlan,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from tests.core.invariants import validate
from tests.core.world import World


class Pipeline:
    """A machine behind which nothing happens but what a test says."""

    def __init__(self, policy: Adaptive, **request: Any) -> None:
        fields: dict[str, Any] = {"prompt": (1, 2), "max_new_tokens": 20, "capacity": 90} | request
        self.machine = Machine(Request(id=0, **fields), policy)
        self.now = 0.0
        self.commands: list[Command] = []
        self.tell(Begin(0))

    def tell(self, event: Any, now: float | None = None) -> list[Command]:
        self.now = self.now if now is None else now
        new = self.machine.handle(event, self.now)
        validate(self.machine)
        self.commands.extend(new)
        return new

    def runs(self) -> list[StartRun]:
        return [command for command in self.commands if isinstance(command, StartRun)]

    def take(self, run: int, now: float | None = None) -> list[Command]:
        return self.tell(RunTaken(0, 0, run), now)

    def result(self, run: int, *tokens: int, now: float | None = None) -> list[Command]:
        return self.tell(RunDone(0, 0, run, tokens), now)

    def draft(self) -> StartDraft:
        return next(c for c in reversed(self.commands) if isinstance(c, StartDraft))

    def answer(self, *choices: tuple[int, float]) -> list[Command]:
        """Let the drafter propose these after the first token of its frontier."""
        draft = self.draft()
        parent = draft.batch.slots[len(draft.batch) - draft.frontier]
        proposals = tuple(Proposal(token, parent, NO_SLOT, chance) for token, chance in choices)
        return self.tell(Drafted(0, 0, draft.draft, proposals, draft.batch.slots))


def begun(policy: Adaptive, **request: Any) -> Pipeline:
    """Return a pipeline whose first token (7) is there and runs by itself."""
    pipeline = Pipeline(policy, **request)
    pipeline.take(0)
    pipeline.result(0, 7)
    pipeline.take(1)
    return pipeline


def test_the_first_run_after_a_fresh_start_waits_for_nothing() -> None:
    pipeline = begun(Adaptive())
    assert [(run.kind, run.batch.tokens) for run in pipeline.runs()[1:]] == [(Kind.SINGLE, (7,))]
    plan = pipeline.draft().plan
    assert isinstance(plan, TreePlan)
    assert plan.chances == (1.0,)


def test_the_likeliest_tokens_run_first_whether_deep_or_broad() -> None:
    pipeline = begun(Adaptive(micro_batch=2, ramp=2))
    pipeline.answer((8, 0.6), (9, 0.3), (10, 0.05))
    (first,) = pipeline.runs()[2:]
    assert first.batch.tokens == (8, 9)


def test_a_token_whose_result_decides_much_runs_before_a_likelier_one_that_decides_little() -> None:
    pipeline = begun(Adaptive(micro_batch=1, calibrate=False))
    draft = pipeline.draft()
    root = draft.batch.slots[-1]
    sure, unsure = draft.slots[:2]
    proposals = (
        Proposal(8, root, sure, 0.55),
        Proposal(9, root, unsure, 0.45),
        Proposal(20, sure, NO_SLOT, 0.99),
        Proposal(21, unsure, NO_SLOT, 0.4),
    )
    evaluated = (*draft.batch.slots, sure, unsure)
    pipeline.tell(Drafted(0, 0, draft.draft, proposals, evaluated))
    (first,) = pipeline.runs()[2:]
    assert first.batch.tokens == (9,)


def test_what_a_token_decides_is_weighed_when_its_followers_come_later() -> None:
    pipeline = begun(Adaptive(micro_batch=1, calibrate=False))
    pipeline.answer((7, 0.6), (8, 0.21), (9, 0.19))
    draft = pipeline.draft()
    frontier = draft.batch.slots[len(draft.batch) - draft.frontier :]
    tokens = draft.batch.tokens[len(draft.batch) - draft.frontier :]
    likely = {7: 0.01, 8: 0.99, 9: 0.5}  # the first one runs already: its followers are worst
    proposals = tuple(
        Proposal(20 + token, slot, NO_SLOT, likely[token])
        for token, slot in zip(tokens, frontier, strict=True)
    )
    pipeline.tell(Drafted(0, 0, draft.draft, proposals, draft.batch.slots))
    pipeline.take(2)
    assert [run.batch.tokens for run in pipeline.runs()[2:]] == [(7,), (9,)]


@pytest.mark.parametrize(
    ("stages", "agreement", "share", "size"),
    [
        (16, 0.79, 0.3, 1),
        (4, 0.79, 0.3, 2),
        (4, 0.95, 0.3, 4),
        (32, 0.95, 0.3, 1),
        (8, 0.79, 0.15, 3),
        (8, 0.79, 0.05, 12),
        (8, 0.79, 0.0, 16),
        (8, 0.79, 1.5, 1),
    ],
)
def test_runs_are_large_where_tokens_are_cheap_and_few_errors_lie_on_the_way(
    stages: int, agreement: float, share: float, size: int
) -> None:
    policy = Adaptive()
    policy._pace.stages, policy._pace.share = stages, share
    policy._agreement = agreement
    assert policy._largest() == size


def test_the_prompt_tells_how_many_stages_there_are() -> None:
    policy = Adaptive()
    pipeline = Pipeline(policy)
    pipeline.take(0)
    spans = tuple(Span(at, at + 1.0, 2) for at in range(5))
    pipeline.tell(RunDone(0, 0, 0, (7,), spans))
    assert policy._pace.stages == 5


def test_a_run_grows_from_the_ramp_to_its_largest_size() -> None:
    pipeline = begun(Adaptive(micro_batch=4, ramp=1))
    pipeline.answer((8, 0.4), (9, 0.3), (10, 0.2), (11, 0.1))
    pipeline.take(2)
    sizes = [len(run.batch) for run in pipeline.runs()[1:]]
    assert sizes == [1, 2, 2]


def test_what_no_model_evaluates_takes_no_slot() -> None:
    pipeline = begun(Adaptive(micro_batch=1))
    before = pipeline.machine.tree.slots.free
    pipeline.answer((8, 0.6), (9, 0.3), (10, 0.05))
    # one for the token in the run (it is the next draft's frontier, too), two for the other
    # frontier tokens, and those reserved for the next draft
    reserved = len(pipeline.draft().slots)
    assert before - pipeline.machine.tree.slots.free <= 3
    assert reserved == 4


def test_a_second_choice_is_kept_apart_when_only_a_chain_is_wanted() -> None:
    pipeline = begun(Adaptive(tree=False))
    plan = pipeline.draft().plan
    assert isinstance(plan, TreePlan)
    assert plan.width == 1


def test_dead_tokens_are_pruned_from_a_run_that_goes_on() -> None:
    pipeline = begun(Adaptive(micro_batch=2, ramp=2))
    pipeline.answer((8, 0.6), (9, 0.3))
    commands = pipeline.result(1, 8)
    assert Prune(0, 0, (2,), ((1,),)) in commands
    pipeline.result(2, 5, LEFT_OUT)
    assert pipeline.machine.root.token == 5


def test_a_live_token_must_not_be_left_out() -> None:
    pipeline = begun(Adaptive(micro_batch=2, ramp=2))
    pipeline.answer((8, 0.6), (9, 0.3))
    with pytest.raises(ProtocolError, match="left out token 8, which is alive"):
        pipeline.result(2, LEFT_OUT, 4)


def test_without_pruning_nothing_is_pruned() -> None:
    pipeline = begun(Adaptive(micro_batch=2, ramp=2, pruning=False))
    pipeline.answer((8, 0.6), (9, 0.3))
    assert not [c for c in pipeline.result(1, 8) if isinstance(c, Prune)]


def test_the_next_run_is_chosen_when_the_first_stage_is_about_to_be_free() -> None:
    pipeline = Pipeline(Adaptive(micro_batch=1))
    pipeline.take(0, now=0.1)
    pipeline.result(0, 7, now=1.0)
    pipeline.take(1, now=1.1)
    policy = pipeline.machine.policy
    assert isinstance(policy, Adaptive)
    policy._pace.first = 2.0  # as after a few runs
    pipeline.answer((8, 0.6), (9, 0.3))
    pipeline.take(2, now=1.2)
    wake = next(c for c in pipeline.commands if isinstance(c, WakeAt))
    assert wake.time == pytest.approx(3.1, abs=1e-3)
    assert len(pipeline.runs()) == 3
    pipeline.tell(Woken(0), now=wake.time)
    assert len(pipeline.runs()) == 4


def test_a_first_stage_that_is_known_to_be_free_is_not_waited_for() -> None:
    pipeline = begun(Adaptive(micro_batch=1))
    policy = pipeline.machine.policy
    assert isinstance(policy, Adaptive)
    policy._pace.first = 100.0  # far too long
    pipeline.answer((8, 0.6), (9, 0.3))
    pipeline.take(2, now=1.0)
    assert policy._first_free_at > 50
    pipeline.result(1, 8, now=2.0)
    pipeline.result(2, 5, now=3.0)
    assert policy._first_free_at <= 3.0


def test_drafts_of_one_pass_leave_the_text_its_slots() -> None:
    for seed in range(40):
        world = World(
            Adaptive(passes=1, breadth=8), quality=0.5, stages=3, max_new_tokens=30, spare=seed % 4
        )
        world.run(random.Random(seed).randrange)
        world.check_end()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"micro_batch": -1}, "expected micro_batch as a whole number from 0 to 256, got -1"),
        ({"ramp": 0}, "expected ramp as a whole number from 1 to 256, got 0"),
        ({"passes": 0}, "expected passes as"),
        ({"breadth": 1.5}, "expected breadth as"),
        ({"width": True}, "expected width as"),
        ({"width": 257}, "expected width as a whole number from 1 to 256, got 257"),
        ({"floor": 2}, "expected floor as a number from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(**knobs)


def test_tokens_are_really_left_out_and_the_text_stays_the_same() -> None:
    left_out = 0
    for seed in range(20):
        world = World(
            Adaptive(micro_batch=6, ramp=6), quality=0.6, stages=4, max_new_tokens=40, spare=200
        )
        world.run(random.Random(seed).randrange)
        world.check_end()
        left_out += world.left_out
    assert left_out > 100


def test_a_tree_and_a_chain_are_learned_from() -> None:
    world = World(Adaptive(), quality=0.9, max_new_tokens=60, spare=200)
    world.run(random.Random(0).randrange)
    world.check_end()
    policy = world.machine.policy
    assert isinstance(policy, Adaptive)
    assert policy._calibration.table
