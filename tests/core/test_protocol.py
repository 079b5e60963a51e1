"""What may not happen is refused by name, and what nobody waits for any more is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from pipeinfer_dask.core.drafts import ProtocolError
from pipeinfer_dask.core.ending import Ending
from pipeinfer_dask.core.flight import Flight, runs_before
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.runs import RunFuture
from pipeinfer_dask.core.tree import Held, Node, Slots, Tree, run_of
from pipeinfer_dask.policies import Adaptive, Iterative, Policy, Speculative
from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    NO_SLOT,
    Begin,
    Command,
    Drafted,
    DrafterBack,
    DraftPlan,
    Event,
    Kind,
    Proposal,
    RunDone,
    StagesBack,
    StartDraft,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request

REQUEST = Request(0, (1, 2, 3), 5, 40, frozenset({6}), 8)


def begun(policy: Policy) -> tuple[Machine, Sequence[Command]]:
    machine = Machine(REQUEST, policy)
    return machine, machine.handle(Begin(0))


def test_a_request_begins_once() -> None:
    machine, _ = begun(Iterative())
    with pytest.raises(ProtocolError, match="begun already"):
        machine.handle(Begin(0))


def test_what_was_never_sent_can_not_come_back() -> None:
    machine, _ = begun(Iterative())
    with pytest.raises(ProtocolError, match="run 7 is not in flight"):
        machine.handle(RunDone(0, 0, 7, (1,)))
    with pytest.raises(ProtocolError, match="draft 7 is not in flight"):
        machine.handle(Drafted(0, 0, 7, (), ()))


@pytest.mark.parametrize(("slot", "parent"), [(39, 0), (NO_SLOT, 39)])
def test_a_draft_may_use_its_own_slots_and_parents_only(slot: int, parent: int) -> None:
    machine, _ = begun(Speculative(k=2))
    commands = machine.handle(RunDone(0, 0, 0, (4,)))
    (draft,) = (c for c in commands if isinstance(c, StartDraft))
    proposal = Proposal(4, parent if parent == 39 else 2, slot, 0.5)
    with pytest.raises(ProtocolError, match=f"draft {draft.draft} had no right to propose"):
        machine.handle(Drafted(0, 0, draft.draft, (proposal,), ()))


def test_news_of_nodes_that_were_not_lost_are_counted_and_change_nothing() -> None:
    machine, _ = begun(Iterative())
    news: tuple[Event, ...] = (StagesBack(3), DrafterBack(3))
    for number, event in enumerate(news, 1):
        assert not machine.handle(event)
        assert machine.stale == number
    assert machine.generation == 0


class Sleepy(Iterative):
    """Asks to be woken."""

    def wake_at(self, machine: Machine) -> float | None:
        return 5.0


def test_a_policy_is_woken_when_it_asks_and_asks_once_for_one_time() -> None:
    machine, commands = begun(Sleepy())
    assert [c for c in commands if isinstance(c, WakeAt)] == [WakeAt(0, 5.0)]
    assert not machine.handle(Woken(0))


@pytest.mark.parametrize(
    ("run", "draft", "told"),
    [
        (["x"], None, r"choose_run to return nodes of the machine's tree, got \['x'\]"),
        (7, None, "choose_run to return nodes of the machine's tree, got 7"),
        ([], 7, "choose_draft to return a plan and the nodes to extend, or None, got 7"),
        ([], (DraftPlan(1), ["x"]), r"choose_draft to return nodes of .* got \['x'\]"),
    ],
)
def test_what_is_no_answer_of_a_policy_is_refused_by_its_name(
    run: Any, draft: Any, told: str
) -> None:
    class Wrong(Iterative):
        name: ClassVar[str] = "wrong"

        def choose_run(self, machine: Machine) -> Any:
            return run

        def choose_draft(self, machine: Machine) -> Any:
            return draft

    with pytest.raises(ValueError, match=f"policy 'wrong': expected {told}"):
        begun(Wrong())


def test_a_run_has_nodes_that_no_run_has_each_behind_its_parent() -> None:
    root = Node(7, 3, 0, None, run=0)
    child = Node(8, 4, 1, root)
    grandchild = Node(9, 5, 2, child)
    assert run_of([child, grandchild], "right") == [child, grandchild]
    again = "policy 'wrong': expected choose_run to return nodes that are in no run yet, got token"
    for nodes in ([root], [child, root]):
        with pytest.raises(ValueError, match=f"{again} 7 at position 3 again: take those of"):
            run_of(nodes, "wrong")
    with pytest.raises(ValueError, match=f"{again} 8 at position 4 again: take those of"):
        run_of([child, child], "wrong")
    first = "expected choose_run to return parents first, got token 9 at position 5 before what it"
    for nodes in ([grandchild, child], [grandchild]):
        with pytest.raises(ValueError, match=f"{first} follows: put that before it, or wait"):
            run_of(nodes, "wrong")


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (None, "run 4 was skipped, but nobody had cancelled it"),
        ((1, 2), "run 4 was asked for 1 tokens and came with 2"),
        ((LEFT_OUT,), "run 4 left out token 8, which is alive"),
    ],
)
def test_a_run_gives_what_it_was_asked_for(tokens: tuple[int, ...] | None, told: str) -> None:
    run = RunFuture(4, Kind.SPECULATIVE, (Node(8, 0, 0, None),), picks=1)
    with pytest.raises(ProtocolError, match=told):
        run.picked(tokens)


def test_a_run_begins_behind_what_is_evaluated() -> None:
    flight = Flight()
    node = Node(8, 1, 1, Node(7, 0, 0, None))
    with pytest.raises(ProtocolError, match="token 8 at position 1 was chosen for run 0"):
        runs_before(0, [node], flight.runs)


def test_slots_do_not_become_more_than_there_are() -> None:
    slots = Slots(2)
    assert [slots.take(), slots.take()] == [0, 1]
    with pytest.raises(OverflowError, match="all 2 slots are in use"):
        slots.take()
    slots.give_back(0)
    assert slots.take() == 0


def test_a_text_goes_on_with_the_slots_that_its_beginning_has_had() -> None:
    tree = Tree((1, 2, 3), 9, [Held(1, 4, drafted=True), Held(7, 5, drafted=True)])
    first, second, third = tree.prompt
    assert (first.slot, first.drafted) == (4, True)
    assert len({first.slot, second.slot, third.slot}) == 3
    assert tree.held() == [
        Held(1, 4, drafted=True),
        Held(2, second.slot, drafted=second.drafted),
    ]


def test_a_text_ends_with_its_end_token_before_all_else() -> None:
    ending = Ending(REQUEST, stops=lambda token: token == 5)
    assert ending.after(6, 5) == "end_token"
    assert ending.after(5, 5) == "stop_string"
    assert ending.after(4, 5) == "length"
    assert ending.after(4, 4) is None


def test_guesses_get_slots_only_as_far_as_spare_ones_go() -> None:
    tree = Tree((1, 2), 4)
    first = tree.add(tree.root, 5, NO_SLOT, 0.9)
    second = tree.add(first, 6, NO_SLOT, 0.9)
    assert tree.placed([first, second], spare=1) == [first]
    assert first.slot != NO_SLOT and second.slot == NO_SLOT
    assert tree.placed([first, second], spare=1) == [first, second]
    assert second.slot not in (NO_SLOT, first.slot)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"micro_batch": -1}, "expected micro_batch as a whole number from 0 to 256, got -1"),
        ({"micro_batch": True}, "expected micro_batch as a whole number from 0 to 256, got True"),
        ({"floor": 1.5}, "expected floor as a number from 0 to 1, got 1.5"),
        ({"tree": 1}, "expected tree to be true or false, got 1"),
    ],
)
def test_settings_of_policies_are_checked(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Adaptive(**settings)  # type: ignore[arg-type]
