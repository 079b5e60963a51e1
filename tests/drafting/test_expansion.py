"""How a draft grows on the drafter."""

from __future__ import annotations

from typing import Any

from pipeinfer_dask.drafting.expansion import Expansion, expansion_of
from pipeinfer_dask.protocol.messages import (
    NO_SLOT,
    Batch,
    DraftPlan,
    Proposal,
    StartDraft,
    TreePlan,
)


def expansion(
    plan: DraftPlan | TreePlan, frontier: int = 1, positions: tuple[int, ...] = (3, 4)
) -> Expansion:
    batch = Batch((10, 11), positions, (0, 1), (-1, 0))
    return expansion_of(StartDraft(0, 0, 0, batch, frontier, tuple(range(5, 5 + plan.size)), plan))


def test_the_first_batch_is_what_the_drafter_lacks_and_only_its_end_is_extended() -> None:
    draft = expansion(DraftPlan(2))
    step = draft.next_batch()
    assert step is not None
    assert step[0].slots == (0, 1)
    assert step[1] == 1


def test_a_chain_grows_until_it_has_its_size_and_its_last_token_is_left_unevaluated() -> None:
    draft = expansion(DraftPlan(2))
    draft.grow([[(7, 0.9)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0] == Batch((7,), (5,), (5,), (1,))
    draft.grow([[(8, 0.8)]])
    assert draft.next_batch() is None
    assert draft.proposals == [Proposal(7, 1, 5, 0.9), Proposal(8, 5, 6, 0.8)]
    assert draft.evaluated == [0, 1, 5]


def test_a_branch_ends_below_the_cutoff() -> None:
    draft = expansion(DraftPlan(4, cutoff=0.5))
    draft.grow([[(7, 0.49)]])
    assert draft.next_batch() is None
    assert draft.proposals == []
    assert draft.evaluated == [0, 1]


def test_a_probable_second_choice_opens_a_branch() -> None:
    draft = expansion(DraftPlan(4, cutoff=0.3, split=0.4, branches=2))
    assert draft.width == 2
    draft.grow([[(7, 0.5), (8, 0.45)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0] == Batch((7, 8), (5, 5), (5, 6), (1, 1))
    draft.grow([[(1, 0.5), (2, 0.45)], [(3, 0.5), (4, 0.45)]])
    assert [(p.token, p.parent) for p in draft.proposals] == [(7, 1), (8, 1), (1, 5), (3, 6)]


def test_an_improbable_second_choice_opens_none() -> None:
    draft = expansion(DraftPlan(4, split=0.4, branches=2))
    draft.grow([[(7, 0.6), (8, 0.39)]])
    assert [p.token for p in draft.proposals] == [7]


def test_a_branch_that_ends_splits_no_more() -> None:
    draft = expansion(DraftPlan(4, cutoff=0.5, split=0.1, branches=4))
    draft.grow([[(7, 0.45), (8, 0.4)]])
    assert draft.proposals == []


def test_depth_comes_before_breadth_when_room_is_short() -> None:
    draft = expansion(DraftPlan(2, split=0.1, branches=4), frontier=2)
    draft.grow([[(7, 0.5), (8, 0.45)], [(9, 0.5), (6, 0.45)]])
    assert [p.token for p in draft.proposals] == [7, 9]


def test_nothing_is_proposed_behind_the_end_of_the_text() -> None:
    draft = expansion(DraftPlan(4, last_position=5))
    draft.grow([[(7, 0.9)]])
    draft.grow([[(8, 0.9)]])
    assert [p.token for p in draft.proposals] == [7]
    assert draft.next_batch() is None


def test_a_draft_of_size_nought_only_fills_the_cache() -> None:
    draft = expansion(DraftPlan(0), frontier=0)
    step = draft.next_batch()
    assert step is not None
    assert step[1] == 0
    draft.grow([])
    assert draft.next_batch() is None
    assert draft.evaluated == [0, 1]


def tree(passes: int, breadth: int = 2, width: int = 2, **plan: Any) -> TreePlan:
    chances = plan.pop("chances", (1.0,))
    size = plan.pop("size", breadth * (passes - 1))
    return TreePlan(size, passes, breadth, width, plan.pop("floor", 0.0), chances, **plan)


def test_a_tree_evaluates_what_is_reached_most_likely_and_only_that_has_slots() -> None:
    draft = expansion(tree(passes=2))
    assert draft.width == 2
    draft.grow([[(7, 0.6), (8, 0.3)]])
    step = draft.next_batch()
    assert step == (Batch((7, 8), (5, 5), (5, 6), (1, 1)), 2)
    draft.grow([[(20, 0.9), (21, 0.1)], [(22, 0.5), (23, 0.4)]])
    assert draft.next_batch() is None
    assert draft.proposals == [
        Proposal(7, 1, 5, 0.6),
        Proposal(8, 1, 6, 0.3),
        Proposal(20, 5, NO_SLOT, 0.9),
        Proposal(21, 5, NO_SLOT, 0.1),
        Proposal(22, 6, NO_SLOT, 0.5),
        Proposal(23, 6, NO_SLOT, 0.4),
    ]
    assert draft.evaluated == [0, 1, 5, 6]


def test_a_tree_prefers_a_sure_branch_to_an_unsure_one_nearer_to_the_root() -> None:
    draft = expansion(tree(passes=3, breadth=1))
    draft.grow([[(7, 0.6), (8, 0.4)]])
    draft.grow([[(20, 0.95), (21, 0.01)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0].tokens == (20,)  # 0.6 x 0.95 against 0.4


def test_a_tree_weighs_frontiers_by_their_own_chances() -> None:
    draft = expansion(tree(passes=2, breadth=1, chances=(0.1, 0.9)), frontier=2)
    draft.grow([[(7, 0.9)], [(8, 0.5)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0].tokens == (8,)


def test_a_tree_takes_confidences_for_what_they_are_worth() -> None:
    boastful = (0.0, 0.1, 0.2)  # for confidences of 0, 0.5 and 1
    draft = expansion(
        tree(passes=2, breadth=1, chances=(0.5, 1.0), calibration=boastful), frontier=2
    )
    draft.grow([[(7, 1.0)], [(8, 0.45)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0].tokens == (7,)  # 0.5 x 0.2 against 1.0 x 0.09


def test_an_improbable_second_choice_is_not_proposed_but_a_first_choice_always_is() -> None:
    draft = expansion(tree(passes=1, width=3, floor=0.2))
    draft.grow([[(7, 0.1), (8, 0.3), (9, 0.1)]])
    assert [proposal.token for proposal in draft.proposals] == [7, 8]


def test_a_tree_ends_where_nothing_is_reached_likely_enough_any_more() -> None:
    draft = expansion(tree(passes=4, breadth=1, width=1, least=0.5))
    draft.grow([[(7, 0.8)]])
    assert draft.next_batch() is not None
    draft.grow([[(8, 0.6)]])  # 0.48 of all texts come here
    assert draft.next_batch() is None
    assert [p.token for p in draft.proposals] == [7, 8]


def test_a_tree_stops_where_the_text_will_end() -> None:
    draft = expansion(tree(passes=3, last_position=5))
    draft.grow([[(7, 0.6), (8, 0.3)]])
    draft.grow([[(9, 0.9)], [(10, 0.9)]])
    assert draft.next_batch() is None
    assert [proposal.token for proposal in draft.proposals] == [7, 8]


def test_a_tree_evaluates_no_more_than_it_has_slots_for() -> None:
    draft = expansion(tree(passes=9, breadth=4, size=1))
    draft.grow([[(7, 0.6), (8, 0.3)]])
    step = draft.next_batch()
    assert step is not None
    assert step[0].tokens == (7,)
    draft.grow([[(9, 0.6), (10, 0.3)]])
    assert draft.next_batch() is None
