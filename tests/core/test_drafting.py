"""How a draft grows on the drafter."""

from __future__ import annotations

from pipeinfer_dask.core.drafting import Expansion, expansion_of
from pipeinfer_dask.core.messages import Batch, DraftPlan, Proposal, StartDraft


def expansion(plan: DraftPlan, frontier: int = 1, positions: tuple[int, ...] = (3, 4)) -> Expansion:
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
