from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer_dask.models.ancestry import Ancestry
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch


def batch(*nodes: tuple[int, int, int]) -> Batch:
    """Make a batch of (slot, parent, position)."""
    slots, parents, positions = zip(*nodes, strict=True)
    return Batch((0,) * len(nodes), positions, slots, parents)


def test_a_token_attends_to_its_own_branch_and_not_to_the_other() -> None:
    ancestry = Ancestry()
    ancestry.attend(batch((0, NO_PARENT, 0), (1, 0, 1)))
    attendance = ancestry.attend(batch((2, 1, 2), (3, 1, 2), (4, 3, 3)))
    assert attendance.filled == 5
    assert attendance.mask.astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert attendance.positions.tolist() == [0, 1, 2, 2, 3]


def test_a_token_that_takes_a_freed_slot_replaces_what_was_there() -> None:
    ancestry = Ancestry()
    ancestry.attend(batch((0, NO_PARENT, 0), (1, 0, 1), (2, 0, 1)))
    attendance = ancestry.attend(batch((1, 2, 2)))
    assert attendance.mask.tolist() == [[True, True, True]]
    assert attendance.positions.tolist() == [0, 2, 1]


def test_a_new_text_may_begin_in_any_slot_without_a_reset() -> None:
    ancestry = Ancestry()
    ancestry.attend(batch((0, NO_PARENT, 0), (1, 0, 1)))
    attendance = ancestry.attend(batch((1, NO_PARENT, 0), (0, 1, 1)))
    assert attendance.mask.tolist() == [[False, True], [True, True]]


def test_only_the_slots_that_are_attended_to_are_looked_at() -> None:
    ancestry = Ancestry()
    ancestry.attend(batch((7, NO_PARENT, 0)))
    assert ancestry.attend(batch((2, NO_PARENT, 0))).filled == 3


def test_the_path_to_a_slot_is_its_own_branch_in_the_order_of_the_text() -> None:
    ancestry = Ancestry()
    ancestry.attend(Batch((50, 51, 52, 53), (0, 1, 2, 2), (3, 1, 0, 2), (NO_PARENT, 3, 1, 1)))
    ancestry.attend(Batch((54,), (3,), (7,), (2,)))
    assert ancestry.path(0).tolist() == [50, 51, 52]
    assert ancestry.path(7).tolist() == [50, 51, 53, 54]


def test_a_run_without_its_parent_has_a_path_all_the_same() -> None:
    ancestry = Ancestry()
    ancestry.attend(Batch((54, 55), (8, 9), (1, 0), (5, 1)))
    assert ancestry.path(0).tolist() == [54, 55]


@given(st.data())
def test_rows_agree_with_plain_sets_while_slots_are_used_again(data: st.DataObject) -> None:
    ancestry = Ancestry()
    sets: dict[int, frozenset[int]] = {NO_PARENT: frozenset()}
    positions: dict[int, int] = {NO_PARENT: -1}
    tokens: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        nodes: list[tuple[int, int, int]] = []
        for _ in range(data.draw(st.integers(1, 6))):
            taken = {slot for slot, _, _ in nodes}
            # A parent is still whole while no ancestor of it has been overwritten.
            parent = data.draw(st.sampled_from(sorted(sets)))
            free = set(range(16)) - sets[parent] - taken
            if not free:
                break
            slot = data.draw(st.sampled_from(sorted(free)))
            nodes.append((slot, parent, positions[parent] + 1))
            attended_to = sets[parent] | {slot}
            sets = {key: old for key, old in sets.items() if slot not in old}
            sets[slot] = attended_to
            positions[slot] = positions[parent] + 1
        if not nodes:
            continue
        held = batch(*nodes)
        new = data.draw(st.lists(st.integers(0, 9), min_size=len(nodes), max_size=len(nodes)))
        tokens.update(zip(held.slots, new, strict=True))
        attendance = ancestry.attend(replace(held, tokens=tuple(new)))
        for attended, (slot, _, _) in zip(attendance.mask, nodes, strict=True):
            # A later node of the same batch may have taken the slot of an ancestor.
            if row := sets.get(slot):
                in_order = sorted(row, key=positions.__getitem__)
                assert ancestry.path(slot).tolist() == [tokens[held] for held in in_order]
                assert set(np.flatnonzero(attended).tolist()) == row
                assert all(attendance.positions[held] == positions[held] for held in row)
