"""Runs as futures, chained to the runs that hold their prefix."""

from __future__ import annotations

import asyncio

import pytest

from pipeinfer_dask.core.runs import RunCancelledError, RunFuture
from pipeinfer_dask.protocol.messages import CancelReason, Kind


def run(number: int, *parents: RunFuture) -> RunFuture:
    return RunFuture(number, Kind.SPECULATIVE, (), parents)


def test_a_mismatch_cancels_the_whole_chain() -> None:
    first = run(0)
    second = run(1, first)
    third = run(2, second)
    assert first.cancel()
    assert [r.status for r in (first, second, third)] == ["cancelled"] * 3
    assert third.reason is CancelReason.INVALID


def test_a_chain_is_cancelled_from_its_middle_on() -> None:
    first = run(0)
    second = run(1, first)
    third = run(2, second)
    second.cancel()
    assert first.status == "pending"
    assert third.cancelled()


def test_a_run_on_two_branches_stays_while_one_of_them_does() -> None:
    left, right = run(0), run(1)
    both = run(2, left, right)
    left.cancel()
    assert not both.done()
    right.cancel()
    assert both.cancelled()


def test_a_run_behind_a_finished_one_is_not_cancelled_with_others() -> None:
    left, right = run(0), run(1)
    both = run(2, left, right)
    left.finish((1,))
    right.cancel()
    assert not both.done()


def test_a_run_that_is_done_can_not_be_cancelled() -> None:
    finished = run(0)
    finished.finish((4, 5))
    assert not finished.cancel()
    assert finished.result() == (4, 5)


def test_the_result_of_a_pending_or_cancelled_run_is_an_error_that_says_so() -> None:
    pending = run(3)
    with pytest.raises(RuntimeError, match="still in the pipeline"):
        pending.result()
    pending.cancel(CancelReason.SUPERFLUOUS)
    with pytest.raises(RunCancelledError, match="superfluous"):
        pending.result()


def test_callbacks_are_called_once_whether_added_before_or_after() -> None:
    seen: list[str] = []
    one = run(0)
    one.add_done_callback(lambda r: seen.append(f"before {r.status}"))
    one.finish(())
    one.add_done_callback(lambda r: seen.append(f"after {r.status}"))
    assert seen == ["before finished", "after finished"]


def test_a_finished_run_keeps_nothing_of_its_chain_in_memory() -> None:
    first = run(0)
    second = run(1, first)
    first.finish(())
    second.finish(())
    assert second.parent is None
    assert not first._children


def test_a_run_can_be_awaited() -> None:
    async def wait() -> tuple[int, ...]:
        one = run(0)
        asyncio.get_running_loop().call_soon(one.finish, (7,))
        return await one

    assert asyncio.run(wait()) == (7,)


def test_awaiting_a_cancelled_run_raises() -> None:
    async def wait() -> None:
        one = run(0)
        asyncio.get_running_loop().call_soon(one.cancel)
        await one

    with pytest.raises(RunCancelledError):
        asyncio.run(wait())
