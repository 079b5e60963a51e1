"""The machine, driven through results, drafts, cancellations and stops in any legal order."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.policies import Adaptive, Iterative, PipeInfer, Policy, Speculative
from pipeinfer_dask.protocol.messages import Begin, CancelReason, Kind, StartRun
from tests.core.world import World, plain_text


class Greedy(PipeInfer):
    """Starts a run for each guess, whatever is under way."""

    def choose_run(self, machine: Machine) -> list[Node]:
        if machine.root_waits:
            return [machine.root]
        return [] if machine.prefilling else [*machine.fresh][:1]


POLICIES: dict[str, Policy] = {
    "iterative": Iterative(),
    "speculative": Speculative(k=3),
    "speculative with a tree": Speculative(k=5, depth=3, breadth=2),
    "pipeinfer": PipeInfer(),
    "pipeinfer with branches": PipeInfer(sequences=3, split=0.1, micro_batch=5),
    "pipeinfer with micro-batches of one": PipeInfer(micro_batch=1, cutoff=0.0),
    "pipeinfer with no decay": PipeInfer(cutoff=0.8, decay=0.0),
    "not asynchronous": PipeInfer(asynchronous=False),
    "not continuous": PipeInfer(continuous=False),
    "not cancelling": PipeInfer(cancellation=False),
    "adaptive": Adaptive(),
    "adaptive with runs of one": Adaptive(micro_batch=1),
    "adaptive with large runs": Adaptive(micro_batch=8, ramp=8, passes=3),
    "adaptive with drafts of one pass": Adaptive(passes=1, breadth=8),
    "adaptive with a chain": Adaptive(tree=False, calibrate=False),
    "adaptive, not pruning": Adaptive(micro_batch=6, pruning=False),
    "adaptive, not cancelling": Adaptive(micro_batch=6, cancellation=False),
    "greedy": Greedy(cutoff=0.0),
    "nothing but speculation": PipeInfer(asynchronous=False, continuous=False, cancellation=False),
}


def fresh(name: str) -> Policy:
    return POLICIES[name].fresh()


class AnyOrder(RuleBasedStateMachine):
    """Hypothesis chooses the policy, the world's shape, and what happens when."""

    @initialize(
        name=st.sampled_from(sorted(POLICIES)),
        prompt=st.one_of(
            st.lists(st.integers(0, 6), min_size=1, max_size=5),
            st.lists(st.integers(0, 6), min_size=66, max_size=68),
        ),
        max_new_tokens=st.integers(1, 14),
        stages=st.integers(1, 4),
        quality=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
        spare=st.sampled_from([0, 1, 3, 8, 40]),
        chunk=st.sampled_from([1, 3, 6, 40]),
        end_tokens=st.frozensets(st.integers(0, 6), max_size=1),
        stop=st.just(()) | st.lists(st.integers(0, 6), min_size=1, max_size=2).map(tuple),
    )
    def begin(
        self,
        name: str,
        prompt: list[int],
        max_new_tokens: int,
        stages: int,
        quality: float,
        spare: int,
        chunk: int,
        end_tokens: frozenset[int],
        stop: tuple[int, ...],
    ) -> None:
        self.world = World(
            fresh(name),
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            stages=stages,
            quality=quality,
            spare=spare,
            prefill_chunk=chunk,
            end_tokens=end_tokens,
            stop=stop,
        )

    @rule(data=st.data())
    def anything_happens(self, data: st.DataObject) -> None:
        moves = self.world.moves()
        if moves:
            moves[data.draw(st.integers(0, len(moves) - 1))]()

    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 60))
    def much_happens(self, seed: int, steps: int) -> None:
        order = random.Random(seed)
        for _ in range(steps):
            if moves := self.world.moves():
                order.choice(moves)()

    @precondition(lambda self: self.world.finished is None)
    @rule(sure=st.integers(0, 9))
    def the_user_stops(self, sure: int) -> None:
        if sure == 0:
            self.world.stop()

    @precondition(lambda self: self.world.finished is None and not self.world.lost_stages)
    @rule(sure=st.integers(0, 3))
    def a_stage_is_lost(self, sure: int) -> None:
        if sure == 0:
            self.world.lose_stages()

    @precondition(lambda self: self.world.finished is None and not self.world.lost_drafter)
    @rule(sure=st.integers(0, 3))
    def the_drafter_is_lost(self, sure: int) -> None:
        if sure == 0:
            self.world.lose_drafter()

    @precondition(
        lambda self: (
            self.world.finished is None
            and not self.world.lost_stages
            and self.world.silent_stage is None
        )
    )
    @rule(stage=st.integers(0, 9), sure=st.integers(0, 3))
    def a_stage_falls_silent(self, stage: int, sure: int) -> None:
        if sure == 0:
            self.world.silence_stage(stage % self.world.count)

    @precondition(lambda self: self.world.finished is None and not self.world.lost_drafter)
    @rule(sure=st.integers(0, 3))
    def the_drafter_falls_silent(self, sure: int) -> None:
        if sure == 0:
            self.world.silence_drafter()

    @precondition(lambda self: self.world.lost_stages or self.world.lost_drafter)
    @rule()
    def one_more_is_lost_while_others_are_replaced(self) -> None:
        self.world.lose_more()

    @precondition(
        lambda self: (
            self.world.finished is None
            and not self.world.lost_stages
            and not self.world.lost_drafter
        )
    )
    @rule(sure=st.integers(0, 3))
    def all_are_lost_at_once(self, sure: int) -> None:
        if sure == 0:
            self.world.lose_all()

    @precondition(lambda self: self.world.finished is None and self.world.lost_stages)
    @rule(again=st.integers(1, 3))
    def what_is_back_is_lost_at_once(self, again: int) -> None:
        for _ in range(again):
            self.world.rebuild_stages()
            if self.world.finished is None:
                self.world.lose_stages()

    @precondition(lambda self: self.world.finished is None)
    @rule()
    def old_news_comes_again(self) -> None:
        self.world.old_news()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()
            self.world.check_end()


@pytest.mark.timeout(300)  # for the many cases, on a machine that does much else
def test_the_text_is_the_targets_own_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=1000,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_text_ends_within_a_commit_of_several_tokens(name: str) -> None:
    text = plain_text((1, 2, 3), 40)
    for end in (2, 7, 12):
        stop = text[end - 2 : end]
        first = next(i for i in range(2, 41) if text[i - 2 : i] == stop)
        world = World(fresh(name), quality=1.0, max_new_tokens=40, spare=60, stop=stop)
        world.run(random.Random(end).randrange)
        world.check_end()
        assert (world.finished, tuple(world.tokens)) == ("stop_string", text[:first])


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("quality", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_policy_gives_the_plain_text(name: str, quality: float, stages: int) -> None:
    for seed in range(5):
        world = World(fresh(name), stages=stages, quality=quality, max_new_tokens=40, spare=60)
        order = random.Random(seed)
        world.run(order.randrange)
        world.check_end()
        assert tuple(world.tokens) == plain_text((1, 2, 3), 40)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("quality", [0.3, 0.9])
def test_losses_leave_the_text_as_it_is(name: str, quality: float) -> None:
    for seed in range(6):
        order = random.Random(seed)
        world = World(fresh(name), quality=quality, max_new_tokens=40, spare=60)
        while moves := world.moves():
            order.choice(moves)()
            if world.finished is None and order.random() < 0.03 and not world.lost_stages:
                world.lose_stages()
            if world.finished is None and order.random() < 0.03 and not world.lost_drafter:
                world.lose_drafter()
        world.check_end()
        assert tuple(world.tokens) == plain_text((1, 2, 3), 40)
        assert world.losses > 0


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_falls_silent_before_that_is_noticed_leaves_the_text_as_it_is(
    name: str, stage: int
) -> None:
    for seed in range(4):
        order = random.Random(seed)
        world = World(fresh(name), stages=3, quality=0.9, max_new_tokens=40, spare=60)
        while moves := world.moves():
            order.choice(moves)()
            # Not for ever: what is read anew would be lost anew before it is read.
            if world.finished is None and world.losses < 8 and order.random() < 0.05:
                if not world.lost_stages:
                    world.silence_stage(stage)
                if not world.lost_drafter:
                    world.silence_drafter()
        world.check_end()
        assert tuple(world.tokens) == plain_text((1, 2, 3), 40)
        assert world.losses > 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_target_never_waits_for_a_lost_drafter(name: str) -> None:
    world = World(fresh(name), quality=0.9, max_new_tokens=30, spare=60)
    order = random.Random(1)
    for _ in range(60):
        order.choice(world.moves())()
    world.lose_drafter()
    while moves := [move for move in world.moves() if move != world.rebuild_drafter]:
        order.choice(moves)()
    world.check_end()


def test_a_text_is_read_anew_in_chunks_and_nothing_of_it_is_lost() -> None:
    world = World(fresh("adaptive"), quality=0.9, max_new_tokens=20, spare=60)
    while len(world.tokens) < 7:
        world.moves()[-1]()
    text = (*world.request.prompt, *world.tokens)
    world.lose_stages()
    before = len(world.commands)
    world.run()
    world.check_end()
    read = [run for run in world.commands[before:] if isinstance(run, StartRun)]
    again = [run.batch for run in read if run.kind is Kind.PREFILL]
    assert tuple(token for batch in again for token in batch.tokens) == text
    assert {len(batch) for batch in again[:-1]} == {world.request.prefill_chunk}
    assert {run.generation for run in read} == {1}


def test_a_request_that_begins_while_a_stage_is_lost_waits_for_it() -> None:
    world = World(fresh("iterative"), begun=False)
    world.lose_stages()
    world.tell(Begin(0))
    assert not world.commands
    world.run()
    world.check_end()


def test_a_lost_run_is_a_cancelled_one() -> None:
    world = World(fresh("not cancelling"), quality=0.9, max_new_tokens=20, spare=60)
    while len(world.machine.runs) < 2:
        world.moves()[-1]()
    runs = list(world.machine.runs.values())
    world.lose_stages()
    assert all(run.cancelled() and run.reason is CancelReason.LOST for run in runs)
    assert not world.machine.runs
    world.run()
    world.check_end()
    assert world.trace.metrics().runs_cancelled_lost == len(runs)
