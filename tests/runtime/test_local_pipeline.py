import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pipeinfer_dask.models.stage import CountBytes, Stage, StageOutput
from pipeinfer_dask.protocol.messages import Event, RunDone
from pipeinfer_dask.runtime.pipeline.local_pipeline import LocalPipeline
from tests.runtime.chain import BROKEN, CountingStage, run_of


def thread_of_stage() -> threading.Thread:
    (thread,) = (one for one in threading.enumerate() if one.name == "pipeinfer-stage-0")
    return thread


def test_a_thread_whose_loop_is_closed_ends_in_silence() -> None:
    loop = asyncio.new_event_loop()
    pipeline = LocalPipeline([lambda count: CountingStage(True)], None, loop)
    loop.run_until_complete(pipeline.loaded())
    loop.close()
    thread = thread_of_stage()
    pipeline.send(run_of(0, 1))
    pipeline.send(run_of(1, BROKEN))
    thread.join(20)
    assert not thread.is_alive()


def test_a_model_that_exits_while_it_loads_is_an_error() -> None:
    def load(count: CountBytes) -> Stage:
        raise SystemExit(3)

    async def main() -> None:
        pipeline = LocalPipeline([load], None, asyncio.get_running_loop())
        async with asyncio.timeout(20):
            with pytest.raises(RuntimeError, match="SystemExit: 3"):
                await pipeline.loaded()

    asyncio.run(main())


def test_a_model_that_exits_while_it_computes_is_lost() -> None:
    class Exiting(CountingStage):
        def run(self, *args: Any, **options: Any) -> StageOutput:
            raise SystemExit(3)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pipeline = LocalPipeline([lambda count: Exiting(True)], None, loop)
        await pipeline.loaded()
        lost: asyncio.Future[Exception] = loop.create_future()
        pipeline.listen(lambda event: None, lost.set_result)
        pipeline.send(run_of(0, 1))
        async with asyncio.timeout(20):
            assert str(await lost) == "stage 0 failed: SystemExit: 3"
        await pipeline.close()

    asyncio.run(main())


def test_a_thread_whose_loading_nobody_waits_for_any_more_ends_in_silence() -> None:
    begun, go = threading.Event(), threading.Event()

    def load(count: CountBytes) -> Stage:
        begun.set()
        go.wait(20)
        return CountingStage(True)

    async def main() -> None:
        pipeline = LocalPipeline([load], None, asyncio.get_running_loop())
        thread = thread_of_stage()
        loading = asyncio.create_task(pipeline.loaded())
        await asyncio.to_thread(begun.wait, 20)
        loading.cancel()
        go.set()
        with suppress(asyncio.CancelledError):
            await loading
        assert not thread.is_alive()

    asyncio.run(main())


@pytest.mark.parametrize("hangs", ["stage 0", "stage 1"])
def test_a_stage_that_hangs_is_lost_after_the_deadline(hangs: str) -> None:
    go = threading.Event()

    class Hanging(CountingStage):
        def run(self, *args: Any, **options: Any) -> StageOutput:
            go.wait(60)
            return super().run(*args, **options)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        stages = [Hanging(False), CountingStage(True)]
        if hangs == "stage 1":
            stages = [CountingStage(False), Hanging(True)]
        loads = [lambda count, stage=stage: stage for stage in stages]
        pipeline = await LocalPipeline(loads, None, loop, deadline=0.3).loaded()
        lost: asyncio.Future[Exception] = loop.create_future()
        pipeline.listen(lambda event: None, lost.set_result)
        pipeline.send(run_of(0, 1))
        async with asyncio.timeout(20):
            assert str(await lost) == f"{hangs} failed: its computing has not moved for 0.3 s"
        go.set()
        await pipeline.close()

    asyncio.run(main())


def test_a_stage_that_computes_for_longer_than_the_deadline_is_not_lost_while_it_moves() -> None:
    class Slow(CountingStage):
        def run(self, *args: Any, stopped: Callable[[], bool], **options: Any) -> StageOutput:
            pause = threading.Event()
            for _ in range(130):  # layers
                stopped()
                pause.wait(0.01)
            return super().run(*args, stopped=stopped, **options)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        load = lambda count: Slow(True)  # noqa: E731
        pipeline = await LocalPipeline([load], None, loop, deadline=1.0).loaded()
        done: asyncio.Future[Event] = loop.create_future()
        pipeline.listen(
            lambda event: done.set_result(event) if isinstance(event, RunDone) else None,
            done.set_exception,
        )
        pipeline.send(run_of(0, 1))
        async with asyncio.timeout(20):
            assert isinstance(await done, RunDone)
        await pipeline.close()

    asyncio.run(main())
