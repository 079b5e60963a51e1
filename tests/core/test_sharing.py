"""Several requests on one pipeline: whose turn it is, and that each text is what it is alone."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeinfer_dask.core.drafts import ProtocolError
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.sharing import Sharing
from pipeinfer_dask.policies import Adaptive, Iterative, PipeInfer, Speculative
from pipeinfer_dask.protocol.messages import (
    Begin,
    Drafted,
    Proposal,
    RunDone,
    RunTaken,
    Span,
    StartRun,
    Stop,
)
from pipeinfer_dask.protocol.request import Request
from tests.core.shared import SharedWorld, in_turns
from tests.core.test_machine import POLICIES, fresh
from tests.core.world import plain_text

PROMPTS = [(1, 2, 3), (4,), (5, 6), (0, 0, 0, 0, 0), (2, 1), (3, 3, 1)]


@given(
    names=st.lists(st.sampled_from(sorted(POLICIES)), min_size=2, max_size=6),
    stages=st.integers(1, 4),
    quality=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    spare=st.sampled_from([0, 1, 8, 40]),
    lengths=st.lists(st.integers(1, 14), min_size=6, max_size=6),
    late=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    stopped=st.none() | st.tuples(st.integers(0, 5), st.integers(0, 80)),
    shares_cores=st.booleans(),
    losses=st.lists(st.tuples(st.integers(0, 80), st.booleans()), max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=250, deadline=None)
def test_each_text_is_the_targets_own_whoever_comes_and_goes_when(
    names: list[str],
    stages: int,
    quality: float,
    spare: int,
    lengths: list[int],
    late: list[int],
    stopped: tuple[int, int] | None,
    shares_cores: bool,
    losses: list[tuple[int, bool]],
    seed: int,
) -> None:
    world = SharedWorld(stages, quality, shares_cores=shares_cores)
    order = random.Random(seed)
    coming = sorted(zip(late, names, lengths, PROMPTS, strict=False))
    for step in range(100_000):
        while coming and coming[0][0] <= step:
            _, name, length, prompt = coming.pop(0)
            world.ask(fresh(name), prompt, length, spare)
        if stopped is not None and stopped[1] == step and stopped[0] in world.asked:
            world.stop(world.asked[stopped[0]])
        for at, of_drafter in losses:
            if at == step:
                world.lose_drafter() if of_drafter else world.lose_stages()
        moves = world.moves()
        if not moves and not coming:
            break
        if moves:
            moves[order.randrange(len(moves))]()
    world.check_end()


@pytest.mark.parametrize("policy", [Iterative(), Speculative(), Adaptive(), PipeInfer()])
@pytest.mark.parametrize("count", [2, 5])
def test_nobody_is_served_twice_while_another_waits(policy: Iterative, count: int) -> None:
    world = SharedWorld(stages=2, quality=0.0)
    for number in range(count):
        world.ask(policy.fresh(), (number,), 40, spare=60)
    world.run()
    world.check_end()
    # The first ones began alone, and the last ones end so.
    middle = [request for request, _ in world.order[3 * count : 20 * count]]
    assert max(middle.count(n) for n in range(count)) <= 1.3 * min(
        middle.count(n) for n in range(count)
    )


def test_plain_decoding_goes_round() -> None:
    world = SharedWorld(stages=3)
    for number in range(4):
        world.ask(Iterative(), (number,), 20)
    world.run()
    assert in_turns([request for request, _ in world.order[8:60]])


def machine(number: int, policy: Iterative | PipeInfer) -> Machine:
    return Machine(Request(number, (1, 2), 20, 200), policy)


def started(sharing: Sharing, event: Begin | RunTaken | RunDone | Drafted) -> list[tuple[int, int]]:
    commands = sharing.handle(event)
    return [(c.request, c.run) for c in commands if isinstance(c, StartRun)]


def test_one_run_waits_at_most_whoevers_it_is() -> None:
    sharing = Sharing()
    for number in range(3):
        sharing.join(machine(number, Iterative()))
    assert started(sharing, Begin(0)) == [(0, 0)]
    assert started(sharing, Begin(1)) == []
    assert started(sharing, RunTaken(0, 0, 0)) == [(1, 0)]
    assert started(sharing, Begin(2)) == []
    assert started(sharing, RunTaken(1, 0, 0)) == [(2, 0)]


def test_nobody_speculates_deeper_while_another_has_nothing_in_the_pipeline() -> None:
    sharing = Sharing()
    sharing.join(machine(0, PipeInfer(micro_batch=1, cutoff=0.0)))
    assert started(sharing, Begin(0)) == [(0, 0)]
    assert started(sharing, RunTaken(0, 0, 0)) == []
    spans = (Span(0, 1, 1),) * 4
    assert started(sharing, RunDone(0, 0, 0, (7,), spans)) == [(0, 1)]
    drafted = Drafted(0, 0, 0, (Proposal(5, 2, 3, 0.9),), (0, 1, 2))
    assert started(sharing, drafted) == []  # its single token is in the way
    sharing.join(machine(1, Iterative()))
    assert started(sharing, Begin(1)) == []
    assert started(sharing, RunTaken(0, 0, 1)) == [(1, 0)]
    assert started(sharing, RunTaken(1, 0, 0)) == [(0, 2)]  # there are four stages, and two runs


def test_whoever_leaves_makes_room_at_once() -> None:
    sharing = Sharing()
    for number in range(2):
        sharing.join(machine(number, Iterative()))
        list(sharing.handle(Begin(number)))
    assert sharing.machines[1].runs == {}
    sharing.leave(0)
    sharing.leave(0)  # it is gone
    assert sharing.machines.keys() == {1} and sharing.machines[1].sharers == 1
    assert started(sharing, Begin(0)) == [] and sharing.stale == 1


def test_a_stopped_request_gives_its_turn_to_the_next() -> None:
    sharing = Sharing()
    for number in range(2):
        sharing.join(machine(number, Iterative()))
        list(sharing.handle(Begin(number)))
    commands = sharing.handle(Stop(0))
    assert (1, 0) in [(c.request, c.run) for c in commands if isinstance(c, StartRun)]


def test_texts_of_several_requests_are_those_of_one_alone() -> None:
    world = SharedWorld(stages=4, quality=0.8)
    asked = [world.ask(fresh(name), (n, n), 30, 60) for n, name in enumerate(sorted(POLICIES))]
    world.run(random.Random(3).randrange)
    world.check_end()
    for one in asked:
        assert tuple(one.tokens) == plain_text(one.request.prompt, 30)


class Raising(Iterative):
    """Has a mistake of its own."""

    name: ClassVar[str] = "raises"

    def choose_run(self, machine: Machine) -> Any:
        raise KeyError("mine")


def test_a_policy_that_raises_is_named_with_its_method_and_its_error() -> None:
    sharing = Sharing()
    sharing.join(Machine(Request(0, (1,), 3, 9), Raising()))
    told = "policy 'raises' failed in choose_run: KeyError: 'mine'"
    with pytest.raises(RuntimeError, match=f"^{told}$") as caught:
        list(sharing.handle(Begin(0)))
    assert isinstance(caught.value.__cause__, KeyError)


class Idle(Iterative):
    """Waits for a time that was, or for none."""

    name: ClassVar[str] = "idle"
    due: ClassVar[float | None] = None

    def choose_run(self, machine: Machine) -> Any:
        return ()

    def wake_at(self, machine: Machine) -> float | None:
        return self.due


@pytest.mark.parametrize(("due", "end"), [(None, "to come$"), (-1.0, "to come, got -1, which has")])
def test_a_policy_that_waits_for_nothing_is_named(
    due: float | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Idle, "due", due)
    world = SharedWorld(stages=1, quality=1.0)
    world.ask(Idle(), (1,), 3, 9)
    with pytest.raises(RuntimeError, match=f"'idle' planned nothing .* {end}"):
        world.run(random.Random(0).randrange)


def test_what_a_driver_reports_wrongly_is_blamed_on_no_policy() -> None:
    sharing = Sharing()
    sharing.join(Machine(Request(0, (1,), 3, 9), Iterative()))
    list(sharing.handle(Begin(0)))
    with pytest.raises(ProtocolError, match="the request has begun already"):
        list(sharing.handle(Begin(0)))
