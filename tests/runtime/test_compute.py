"""What a thread that computes holds, and lets go of."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from pipeinfer_dask.models.stage import StageOutput
from pipeinfer_dask.protocol.messages import CancelReason, CancelRuns, Release
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.nodes.compute import StageThread
from tests.runtime.chain import CountingStage, run_of


class HoldingStage(CountingStage):
    """Makes a KV cache when it is first named, as a shard does."""

    def __init__(self) -> None:
        super().__init__(last=True)
        self.held: set[int] = set()

    def run(self, *arguments: Any, **options: Any) -> StageOutput:
        self.held.add(options["cache"])
        return super().run(*arguments, **options)

    def release(self, cache: int) -> None:
        self.held.discard(cache)


def test_a_new_generation_holds_no_cache_of_before_not_even_of_a_run_behind_its_release() -> None:
    stage = HoldingStage()
    passed: SimpleQueue[RunPass] = SimpleQueue()
    failures: list[Exception] = []
    thread = StageThread(
        lambda: stage, deliver=passed.put, failed=failures.append, name="holding stage"
    )
    for cache in (1, 2):
        thread.submit(RunPass(replace(run_of(0, 5), request=cache, cache=cache)))
        passed.get(timeout=20)
    assert stage.held == thread.caches == {1, 2}
    thread.submit(Release(1, 0, 1))
    # It was on its way over another link when its request was released.
    thread.submit(RunPass(replace(run_of(1, 6), cache=1)))
    passed.get(timeout=20)
    assert stage.held == thread.caches == {1, 2}
    thread.cancel(CancelRuns(2, 0, (7,), CancelReason.INVALID))
    renewed: Future[None] = Future()
    thread.renew(1, lambda: renewed.set_result(None))
    renewed.result(timeout=20)
    assert stage.held == thread.caches == set()
    assert len(thread.cancelled) == 0
    thread.submit(RunPass(replace(run_of(2, 7), generation=1, cache=3)))
    passed.get(timeout=20)
    assert stage.held == {3}
    thread.close()
    assert not failures
