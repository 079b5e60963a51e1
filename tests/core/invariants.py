"""What holds in a machine after every event, whatever has happened."""

from __future__ import annotations

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.protocol.messages import NO_SLOT, most_runs


def validate(machine: Machine) -> None:
    """Check the invariants.

    Raises
    ------
    AssertionError
        Which one does not hold.
    """
    live = [*machine.tree.committed(), *machine.tree.speculation()]
    held = [node.slot for node in live if node.slot != NO_SLOT]
    if machine.draft is not None:
        held.extend(machine.draft.slots)
    assert len(held) == len(set(held)), "a slot is held twice"
    assert set(held) == machine.tree.slots.taken(), "a slot is lost, or given back too early"
    assert all(node.alive for node in live), "a pruned node is still in the tree"
    assert machine.spare_slots >= 0, "speculation has taken slots that the text needs"
    assert machine.generated <= machine.request.max_new_tokens, "more tokens than asked for"
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
    assert len(machine.runs) <= most_runs(machine.flight.stages), "more runs than stages take"
    for run in machine.runs.values():
        alive = sum(node.alive for node in run.nodes)
        assert run.live == alive, "a run miscounts its live nodes"
        if machine.finished is None and machine.policy.cancellation:
            assert run.cancelled() == (alive == 0), "cancelled too early, or too late"
    for node in machine.fresh:
        assert node.alive and node.run is None and node is not machine.root, "not fresh"
