"""The pipeline in this process: stages and drafter are threads, and there is no cluster."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from pipeinfer_dask.models.stage import CountBytes, DraftModel, Stage
from pipeinfer_dask.protocol.messages import (
    AWAY,
    CancelDraft,
    CancelRuns,
    Drafted,
    DrafterLost,
    Event,
    Prune,
    Release,
    RunDone,
    RunTaken,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.nodes.compute import DrafterThread, StageThread
from pipeinfer_dask.runtime.nodes.loading import HERE, Progress, Steps
from pipeinfer_dask.runtime.pipeline.interface import DEADLINE_S, PipelineCommand

logger = logging.getLogger(__name__)

LOOKS = 6
"""A thread is lost that has been found unmoved so often, one look after the other."""


class LocalPipeline:
    """A `Pipeline` of threads: one is lost by an error of its model's own, or where that hangs.

    The loss of the draft model ends its drafts alone.

    Parameters
    ----------
    stages : sequence of callables
        Each loads one stage, in the thread that will compute it.
    drafter : callable, optional
        Loads the draft model.
    loop : asyncio.AbstractEventLoop
        Where events are reported.
    progress : callable, optional
        Told of each node's loading.
    deadline : float, seconds
        A thread whose computing does not move for so long is lost.
    """

    def __init__(
        self,
        stages: Sequence[Callable[[CountBytes], Stage]],
        drafter: Callable[[CountBytes], DraftModel] | None,
        loop: asyncio.AbstractEventLoop,
        progress: Progress | None = None,
        deadline: float = DEADLINE_S,
    ) -> None:
        self.stages = len(stages)
        self.generation = self.draft_generation = 0
        self._loop = loop
        self._deadline = deadline
        self._watching: asyncio.Task[None] | None = None
        self._report: Callable[[Event], None] | None = None
        self._lost: Callable[[Exception], None] | None = None
        self._threads: list[StageThread] = []
        for index, load in enumerate(stages):
            last = index == len(stages) - 1
            self._threads.append(
                StageThread(
                    Steps(f"stage {index}", HERE, progress).counted(load, self._post),
                    deliver=self._done if last else partial(self._hand_on, index + 1),
                    taken=self._taken if index == 0 else None,
                    failed=partial(self._failed, f"stage {index}"),
                    name=f"pipeinfer-stage-{index}",
                )
            )
        self._drafter = (
            DrafterThread(
                Steps("drafter", HERE, progress).counted(drafter, self._post),
                deliver=self._drafted,
                failed=partial(self._post, self._drafter_lost),
                name="pipeinfer-drafter",
            )
            if drafter is not None
            else None
        )

    async def loaded(self) -> Self:
        """Wait until every model stands; return this pipeline.

        Raises
        ------
        Exception
            What kept one from it. Everything is closed then.
        """
        drafter = [] if self._drafter is None else [self._drafter.loaded]
        nodes = [*(thread.loaded for thread in self._threads), *drafter]
        try:
            await asyncio.gather(*map(asyncio.wrap_future, nodes))
        except BaseException:
            await self.close()
            raise
        self._watching = asyncio.create_task(self._watch())
        return self

    def listen(self, report: Callable[[Event], None], lost: Callable[[Exception], None]) -> None:
        self._report, self._lost = report, lost

    def send(self, command: PipelineCommand) -> None:
        match command:
            case StartRun():
                self._threads[0].submit(RunPass(command))
            case CancelRuns():
                for thread in self._threads:
                    thread.cancel(command)
            case Prune():
                for thread in self._threads:
                    thread.prune(command)
            case Release():
                for thread in self._threads:
                    thread.submit(command)
                if self._drafter is not None and self.draft_generation != AWAY:
                    self._drafter.submit(command)
            case StartDraft() | CancelDraft():
                if self._drafter is None:
                    raise RuntimeError("expected no draft: this pipeline has no drafter")
                self._drafter.send(command)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

        def close() -> None:
            for thread in self._threads:
                thread.close()
            if self._drafter is not None:
                self._drafter.close()

        await asyncio.to_thread(close)

    async def _watch(self) -> None:
        """Look for threads that hang: nobody can end one, but its caller need not wait for it."""
        threads: list[StageThread | DrafterThread] = [*self._threads]
        if self._drafter is not None:
            threads.append(self._drafter)
        # By looks, not by the clock: it goes on while the whole process is stopped.
        looks: deque[list[float | None]] = deque(maxlen=LOOKS + 1)
        while True:
            looks.append([thread.moved for thread in threads])
            for index, moved in enumerate(zip(*looks, strict=True)):
                if len(looks) <= LOOKS or moved[0] is None or len({*moved}) > 1:
                    continue
                hangs = TimeoutError(f"its computing has not moved for {self._deadline:g} s")
                if index < self.stages:
                    self._failed(f"stage {index}", hangs)
                    return
                if self.draft_generation != AWAY:
                    self._drafter_lost(hangs)
            await asyncio.sleep(self._deadline / LOOKS)

    # --- called in the compute threads -----------------------------------------------

    def _hand_on(self, index: int, item: RunPass) -> None:
        self._threads[index].submit(item)

    def _taken(self, run: StartRun) -> None:
        self._tell(RunTaken(run.request, run.generation, run.run))

    def _done(self, item: RunPass) -> None:
        run = item.run
        self._tell(
            RunDone(run.request, run.generation, run.run, item.tokens, item.spans, item.logprobs)
        )

    def _drafted(self, answer: Drafted) -> None:
        self._tell(answer)

    def _tell(self, event: Event) -> None:
        self._post(partial(self._deliver, event))

    def _deliver(self, event: Event) -> None:
        if self._report is not None:
            self._report(event)

    def _drafter_lost(self, error: Exception) -> None:
        reason = f"drafter is lost: {type(error).__name__}: {error}"
        generation, self.draft_generation = self.draft_generation, AWAY
        logger.warning("pipeinfer goes on without drafts: %s", reason)
        self._deliver(DrafterLost(generation, reason))

    def _failed(self, who: str, error: Exception) -> None:
        def report() -> None:
            self._report = None  # one that hangs may yet wake up
            if self._lost is not None:
                lost = RuntimeError(f"{who} failed: {error}")
                lost.__cause__ = error
                self._lost(lost)

        self._post(report)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        post(self._loop, callback, *arguments)
