"""What the policies choose."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.policies import PipeInfer, Policy, make_policy
from pipeinfer_dask.protocol.messages import (
    Begin,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DraftPlan,
    Kind,
    Origin,
    Proposal,
    RunDone,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.protocol.request import Request
from tests.core.invariants import validate
from tests.core.world import World


class Pipeline:
    """A machine, and the commands that it has given."""

    def __init__(self, policy: Policy, **request: Any) -> None:
        fields: dict[str, Any] = {"prompt": (1, 2), "max_new_tokens": 20, "capacity": 60} | request
        self.machine = Machine(Request(id=0, **fields), policy)
        self.commands: list[Command] = []
        self.tell(Begin(0))

    def tell(self, event: Any) -> list[Command]:
        new = self.machine.handle(event)
        validate(self.machine)
        self.commands.extend(new)
        for command in new:
            if isinstance(command, StartRun):
                new = new + self.tell(RunTaken(0, 0, command.run))
        return new

    def result(self, run: int, *tokens: int) -> list[Command]:
        return self.tell(RunDone(0, 0, run, tokens))

    def cutoff(self) -> float:
        plan = self.draft().plan
        assert isinstance(plan, DraftPlan)
        return plan.cutoff

    def draft(self) -> StartDraft:
        return next(c for c in reversed(self.commands) if isinstance(c, StartDraft))

    def answer(self, *tokens: int, confidence: float = 0.9) -> list[Command]:
        """Let the drafter propose a chain."""
        draft = self.draft()
        parent, proposals = draft.batch.slots[-1], []
        for slot, token in zip(draft.slots, tokens, strict=False):
            proposals.append(Proposal(token, parent, slot, confidence))
            parent = slot
        evaluated = (*draft.batch.slots, *(p.slot for p in proposals[:-1]))
        return self.tell(Drafted(0, 0, draft.draft, tuple(proposals), evaluated))


def runs(commands: list[Command]) -> list[StartRun]:
    return [command for command in commands if isinstance(command, StartRun)]


def test_plain_decoding_has_one_run_of_one_token_at_a_time() -> None:
    pipeline = Pipeline(make_policy("iterative"))
    assert [r.kind for r in runs(pipeline.commands)] == [Kind.PREFILL]
    (single,) = runs(pipeline.result(0, 7))
    assert single.kind is Kind.SINGLE
    assert single.batch.tokens == (7,)


def test_prompts_are_prefilled_in_chunks_and_only_the_last_one_picks() -> None:
    pipeline = Pipeline(make_policy("iterative"), prompt=(1, 2, 3, 4, 5), prefill_chunk=2)
    assert [(r.batch.tokens, r.picks) for r in runs(pipeline.commands)] == [
        ((1, 2), 0),
        ((3, 4), 0),
        ((5,), 1),
    ]


def test_standard_speculation_verifies_the_root_and_its_chain_in_one_run() -> None:
    pipeline = Pipeline(make_policy("speculative", k=2))
    assert not runs(pipeline.result(0, 7))
    assert pipeline.draft().plan.size == 2
    (run,) = runs(pipeline.answer(8, 9))
    assert run.batch.tokens == (7, 8, 9)
    assert run.picks == 3
    commands = pipeline.result(run.run, 8, 5, 6)
    assert Commit(0, (8, 5), (Origin.ACCEPTED, Origin.CORRECTED)) in commands


def test_pipeinfer_starts_the_single_run_at_once_and_drafts_meanwhile() -> None:
    pipeline = Pipeline(PipeInfer())
    commands = pipeline.result(0, 7)
    assert [r.batch.tokens for r in runs(commands)] == [(7,)]
    assert pipeline.machine.drafting


def test_the_draft_model_reads_a_long_prompt_meanwhile_but_guesses_nothing_yet() -> None:
    long: dict[str, Any] = {"prompt": tuple(range(100)), "capacity": 200}
    pipeline = Pipeline(PipeInfer(), **long, reads_ahead=True)
    assert pipeline.draft().plan.size == 0
    pipeline.answer()
    assert not pipeline.machine.drafting


def test_a_draft_model_that_shares_the_stages_cores_reads_nothing_before_the_first_token() -> None:
    pipeline = Pipeline(PipeInfer(), prompt=tuple(range(100)), capacity=200)
    assert not pipeline.machine.drafting
    pipeline.result(0, 7)
    assert len(pipeline.draft().batch) == 101


def test_a_short_prompt_is_read_with_the_first_draft() -> None:
    pipeline = Pipeline(PipeInfer(), reads_ahead=True)
    assert not pipeline.machine.drafting
    pipeline.result(0, 7)
    assert pipeline.draft().batch.tokens == (1, 2, 7)


def test_pipeinfer_speculates_behind_the_single_run_and_behind_itself() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2))
    pipeline.result(0, 7)
    first = runs(pipeline.answer(8, 9))
    second = runs(pipeline.answer(10, 11))
    assert [r.batch.tokens for r in (*first, *second)] == [(8, 9), (10, 11)]
    chain = [pipeline.machine.runs[r.run] for r in (*first, *second)]
    assert chain[1].parent is chain[0]


def test_a_mismatch_cancels_the_chain_as_invalid_and_starts_a_single_run() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2))
    pipeline.result(0, 7)
    first = runs(pipeline.answer(8, 9))
    second = runs(pipeline.answer(10, 11))
    commands = pipeline.result(1, 5)
    assert CancelRuns(0, 0, (first[0].run, second[0].run), CancelReason.INVALID) in commands
    assert runs(commands)[0].batch.tokens == (5,)


def test_no_single_run_is_started_for_a_token_that_is_in_flight() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2))
    pipeline.result(0, 7)
    pipeline.answer(8, 9)
    commands = pipeline.result(1, 8)
    assert Commit(0, (8,), (Origin.ACCEPTED,)) in commands
    assert not [r for r in runs(commands) if r.kind is Kind.SINGLE]


def test_the_cutoff_rises_with_unconfirmed_runs_and_falls_with_empty_drafts() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2, cutoff=0.4, recovery=0.1, decay=0.2))
    pipeline.result(0, 7)
    pipeline.answer()  # empty
    assert pipeline.cutoff() == pytest.approx(0.2)
    pipeline.answer(8, 9)
    assert pipeline.cutoff() == pytest.approx(0.3)
    pipeline.result(1, 8)
    pipeline.answer(10, 11)
    assert pipeline.cutoff() == pytest.approx(0.5)


def test_not_continuous_means_one_speculative_run_at_a_time() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2, continuous=False))
    pipeline.result(0, 7)
    pipeline.answer(8, 9)
    assert not pipeline.machine.drafting


def test_not_asynchronous_means_that_draft_and_target_take_turns() -> None:
    world = World(PipeInfer(asynchronous=False), max_new_tokens=30, spare=40)
    while world.finished is None:
        moves = world.moves()
        moves[0]()
        if not world.machine.prefilling:
            assert not (world.machine.drafting and world.machine.runs)


def test_without_cancellation_nothing_is_cancelled() -> None:
    world = World(PipeInfer(cancellation=False), quality=0.3, max_new_tokens=30, spare=40)
    world.run(random.Random(0).randrange)
    world.check_end()
    assert world.skipped == 0
    assert not [c for c in world.commands if isinstance(c, CancelRuns)]


def test_cancelled_runs_are_skipped_by_the_stages() -> None:
    world = World(PipeInfer(), quality=0.3, max_new_tokens=30, spare=40, stages=4)
    world.run(random.Random(0).randrange)
    world.check_end()
    assert world.skipped > 0


def test_at_the_end_of_the_text_what_is_in_flight_is_superfluous() -> None:
    pipeline = Pipeline(PipeInfer(micro_batch=2), end_tokens=frozenset({8}))
    pipeline.result(0, 7)
    (speculative,) = runs(pipeline.answer(8, 9))
    commands = pipeline.result(1, 8)
    assert CancelRuns(0, 0, (speculative.run,), CancelReason.SUPERFLUOUS) in commands
    assert pipeline.machine.finished == "end_token"


def test_without_spare_slots_every_policy_decodes_plainly() -> None:
    for policy in (make_policy("speculative"), PipeInfer(), PipeInfer(asynchronous=False)):
        world = World(policy, spare=0)
        world.run()
        world.check_end()
        assert set(world.origins) == {Origin.PLAIN}


@pytest.mark.parametrize(
    ("strategy", "knobs", "message"),
    [
        ("fastest", {}, "unknown strategy 'fastest': choose one of iterative, speculative"),
        ("adaptiv", {}, "unknown strategy 'adaptiv': did you mean 'adaptive'?"),
        (["pipeinfer"], {}, "unknown strategy"),
        ("iterative", {"k": 2}, "'iterative' has no knob 'k': it has none"),
        (
            "speculative",
            {"length": 2},
            "'speculative' has no knob 'length': it has k, depth,",
        ),
        ("speculative", {"k": 0}, "expected k as a whole number from 1 to 256, got 0"),
        ("speculative", {"k": 2.5}, "k as a whole number from"),
        ("pipeinfer", {"micro_batch": True}, "micro_batch as a whole number"),
        ("pipeinfer", {"cutoff": 1.5}, "expected cutoff as a number from 0 to 1, got 1.5"),
        ("pipeinfer", {"split": "much"}, "expected split as a number from 0 to 1, got 'much'"),
        ("pipeinfer", {"decay": float("nan")}, "expected decay as a number from 0 to 1, got nan"),
        ("pipeinfer", {"_started": 3}, "has no knob '_started'"),
    ],
)
def test_an_unknown_strategy_or_setting_is_refused_with_what_there_is(
    strategy: Any, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(strategy, **knobs)
