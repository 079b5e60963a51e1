"""Tokens that are left out of a run on its way."""

from __future__ import annotations

import queue
from collections.abc import Callable

import numpy as np
import pytest

from pipeinfer_dask.models.stage import HiddenStates, StageOutput
from pipeinfer_dask.protocol.messages import LEFT_OUT, Batch, Prune
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.nodes.compute import Cancellations, StageThread
from tests.runtime.chain import run_of

HIDDEN = np.arange(8, dtype=np.float32).reshape(4, 2)


def test_a_run_without_some_tokens_has_their_rows_and_columns_no_more() -> None:
    job = RunPass(run_of(1, 10, 11, 12, 13), HIDDEN).without((2,)).without((0,))
    assert job.left_out == (0, 2)
    assert job.batch == Batch((11, 13), (1, 3), (1, 3), (0, 2))
    assert job.hidden is not None
    np.testing.assert_array_equal(job.hidden, HIDDEN[[1, 3]])
    assert job.run.batch.tokens == (10, 11, 12, 13)


def test_a_run_without_any_token_less_is_itself() -> None:
    job = RunPass(run_of(1, 10, 11), None, left_out=(1,))
    assert job.without(()) is job
    assert job.without((1,)) is job


@pytest.mark.parametrize(
    ("left_out", "tokens", "whole"),
    [
        ((), (5, 6, 7, 8), (5, 6, 7, 8)),
        ((1, 3), (5, 7), (5, LEFT_OUT, 7, LEFT_OUT)),
        ((0,), (6, 7, 8), (LEFT_OUT, 6, 7, 8)),
        ((1,), (), ()),
    ],
)
def test_picks_keep_their_places(
    left_out: tuple[int, ...], tokens: tuple[int, ...], whole: tuple[int, ...]
) -> None:
    job = RunPass(run_of(1, 10, 11, 12, 13), left_out=left_out)
    assert job.whole(tokens, LEFT_OUT) == whole


def test_what_was_pruned_is_forgotten_once_the_run_has_passed() -> None:
    cancelled = Cancellations()
    cancelled.prune(0, 1, 5, (2,))
    cancelled.prune(0, 1, 5, (3,))
    cancelled.prune(0, 1, 9, (1,))
    assert cancelled.pruned((0, 1, 5)) == {2, 3}
    cancelled.passed((0, 1, 5))
    assert cancelled.pruned((0, 1, 5)) == frozenset()
    assert cancelled.pruned((0, 1, 9)) == {1}
    cancelled.prune(0, 1, 4, (1,))
    assert len(cancelled) == 1


def test_what_is_cancelled_of_a_request_does_not_depend_on_how_far_others_are() -> None:
    cancelled = Cancellations()
    cancelled.passed((0, 7, 90))
    cancelled.add(0, 1, (4, 5))
    cancelled.passed((0, 1, 4))
    cancelled.add(0, 1, (3,))  # too late
    assert (0, 1, 5) in cancelled and (0, 1, 3) not in cancelled
    cancelled.passed((0, 8, 6))
    assert (0, 1, 5) in cancelled
    cancelled.prune(0, 1, 6, (0,))
    cancelled.over(1)
    assert len(cancelled) == 0


class Doubling:
    """Doubles hidden states, and shows what it was given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def run(
        self,
        batch: Batch,
        hidden: HiddenStates | None,
        *,
        picks: int,
        stopped: Callable[[], bool],
        sampling: Sampling | None = None,
        cache: int = 0,
    ) -> StageOutput:
        assert hidden is not None
        assert len(batch) == len(hidden) == picks
        self.batches.append(batch)
        return StageOutput(2 * hidden, None, 1)

    def release(self, cache: int) -> None:
        pass


def test_a_stage_computes_only_what_is_left_and_hands_only_that_on() -> None:
    model = Doubling()
    delivered: queue.SimpleQueue[RunPass] = queue.SimpleQueue()
    failures: list[Exception] = []
    thread = StageThread(
        lambda: model, deliver=delivered.put, failed=failures.append, name="pipeinfer-test"
    )
    try:
        thread.prune(Prune(1, 0, (1, 2), ((3,), (0,))))
        thread.submit(RunPass(run_of(1, 10, 11, 12, 13), HIDDEN))
        thread.submit(RunPass(run_of(2, 10, 11, 12, 13), HIDDEN[1:], left_out=(2,)))
        first, second = (delivered.get(timeout=30) for _ in range(2))
    finally:
        thread.close()
    assert failures == []
    assert [batch.tokens for batch in model.batches] == [(10, 11, 12), (11, 13)]
    assert (first.left_out, second.left_out) == ((3,), (0, 2))
    assert first.hidden is not None and second.hidden is not None
    np.testing.assert_array_equal(first.hidden, 2 * HIDDEN[:3])
    np.testing.assert_array_equal(second.hidden, 2 * HIDDEN[2:])
