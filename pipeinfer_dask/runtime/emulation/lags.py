"""Emulated distance: real messages that arrive as late as a slower network would bring them.

Where network namespaces can't be had, this stands in for them. A message is held back
before it is sent, in a thread of its own, so that whoever sends it goes on: latency
overlaps with computing, and bandwidth occupies the link and nothing else.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import ClassVar, Generic, TypeVar

from distributed import Client, Worker

from pipeinfer_dask.models.stage import CountBytes, DraftModel, Intake, Stage
from pipeinfer_dask.protocol.messages import Event
from pipeinfer_dask.runtime.emulation.paced import sleep_until, wake_on_time
from pipeinfer_dask.runtime.head.head_actor import PipelinePlan
from pipeinfer_dask.runtime.head.remote_head import Asked, RemoteHead
from pipeinfer_dask.runtime.links.links import Session
from pipeinfer_dask.runtime.links.loops import post
from pipeinfer_dask.runtime.links.runs import RunPass
from pipeinfer_dask.runtime.links.wire import Message
from pipeinfer_dask.runtime.nodes.actors import StageNode
from pipeinfer_dask.runtime.nodes.loading import Progress
from pipeinfer_dask.runtime.nodes.room import Bounds
from pipeinfer_dask.runtime.nodes.specs import StageSpec
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.interface import Pipeline, PipelineCommand
from pipeinfer_dask.runtime.pipeline.local_pipeline import LocalPipeline

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Distance:
    """What a link adds to the real one below it.

    Attributes
    ----------
    latency_s : float
        Seconds by which every message is late.
    bandwidth : float
        Bytes a second, of hidden states.
    """

    latency_s: float
    bandwidth: float = math.inf


class Lag(Generic[T]):
    """Hands things on late, in order.

    Parameters
    ----------
    distance : Distance
    hand_on : callable
        Called with each thing at its time, in the lag's own thread.
    """

    def __init__(self, distance: Distance, hand_on: Callable[[T], None]) -> None:
        self._distance = distance
        self._hand_on = hand_on
        self._free = 0.0
        self._queue: SimpleQueue[tuple[float, T] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="pipeinfer-lag", daemon=True)
        self._thread.start()

    def send(self, thing: T, size: int = 0) -> None:
        """Have something handed on as late as its size in bytes makes it. Never waits."""
        now = time.monotonic()
        self._free = max(now, self._free) + size / self._distance.bandwidth
        self._queue.put((self._free + self._distance.latency_s, thing))

    def close(self) -> None:
        """End the thread once it has handed on what it holds. Does not wait."""
        self._queue.put(None)

    def _work(self) -> None:
        wake_on_time()
        while (entry := self._queue.get()) is not None:
            due, thing = entry
            sleep_until(due)
            self._hand_on(thing)


class LaggingHead:
    """A `Pipeline` seen from afar: commands reach it late, and so do its events come back.

    Parameters
    ----------
    pipeline : Pipeline
    distance : Distance
        To each of its nodes.
    loop : asyncio.AbstractEventLoop
    """

    def __init__(
        self, pipeline: Pipeline, distance: Distance, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.stages = pipeline.stages
        self._pipeline = pipeline
        self._loop = loop
        self._report: Callable[[Event], None] | None = None
        self._down = Lag[PipelineCommand](distance, self._post(pipeline.send))
        self._up = Lag[Event](distance, self._post(self._arrived))

    @property
    def generation(self) -> int:
        return self._pipeline.generation

    @property
    def draft_generation(self) -> int:
        return self._pipeline.draft_generation

    def listen(self, report: Callable[[Event], None], lost: Callable[[Exception], None]) -> None:
        self._report = report
        self._pipeline.listen(self._up.send, lost)

    def send(self, command: PipelineCommand) -> None:
        self._down.send(command)

    async def close(self) -> None:
        self._down.close()
        self._up.close()
        await self._pipeline.close()

    def _arrived(self, event: Event) -> None:
        if self._report is not None:
            self._report(event)

    def _post(self, call: Callable[[T], None]) -> Callable[[T], None]:
        return partial(post, self._loop, call)


class DistantHead(RemoteHead):
    """A head on a worker, far from the client: it hears late, and so is it heard."""

    distance: ClassVar[Distance] = Distance(0.0)
    """From the client to the head's worker; see `at`."""

    def __init__(
        self, client: Client, plan: PipelinePlan, worker: str, progress: Progress | None
    ) -> None:
        super().__init__(client, plan, worker, progress)
        self._down = Lag[Asked](self.distance, self._post(super()._put))
        self._up = Lag[Message](self.distance, self._post(super()._heed))

    @classmethod
    def at(cls, distance: Distance) -> type[DistantHead]:
        """Return the class of heads at this distance."""
        return type("DistantHead", (cls,), {"distance": distance})

    async def close(self) -> None:
        self._down.close()
        self._up.close()
        await super().close()

    def _put(self, asked: Asked) -> None:
        self._down.send(asked)

    def _heed(self, message: Message) -> None:
        self._up.send(message)

    def _post(self, call: Callable[[T], None]) -> Callable[[T], None]:
        return partial(post, self.loop, call)


class LaggingNode(StageNode):
    """A stage whose runs leave late."""

    def __init__(
        self, worker: Worker, session: Session, name: str, spec: StageSpec, bounds: Bounds
    ) -> None:
        assert isinstance(spec, DistantSpec)
        self._lag = Lag[RunPass](spec.distance, super()._deliver)
        self._last = spec.last
        super().__init__(worker, session, name, spec, bounds)

    def _deliver(self, job: RunPass) -> None:
        # The way back to the client is the client's own to delay.
        if self._last:
            super()._deliver(job)
        else:
            self._lag.send(job, _size(job))

    async def _finish(self) -> None:
        self._lag.close()
        await super()._finish()


@dataclass(frozen=True, slots=True)
class DistantSpec:
    """A stage far from the next one.

    Attributes
    ----------
    stage : StageSpec
    distance : Distance
    last : bool
        Whether there is no next one.
    """

    stage: StageSpec
    distance: Distance
    last: bool

    @property
    def name(self) -> str:
        """A short name for people to read."""
        return f"{self.stage.name}, at a distance"

    @property
    def intake(self) -> Intake | None:
        """What the stage takes."""
        return self.stage.intake

    def load(self, count: CountBytes) -> Stage:
        """Make the stage."""
        return self.stage.load(count)


class LaggingPipeline(DaskPipeline):
    """Stages on Dask workers, far from one another."""

    stage_node: ClassVar[type[StageNode]] = LaggingNode


class LaggingLocalPipeline(LocalPipeline):
    """Stages in this process, and yet far from one another."""

    def __init__(
        self,
        stages: Sequence[Callable[[CountBytes], Stage]],
        drafter: Callable[[CountBytes], DraftModel] | None,
        loop: asyncio.AbstractEventLoop,
        *,
        distance: Distance,
    ) -> None:
        hand_on = super()._hand_on
        self._lags = [Lag[RunPass](distance, partial(hand_on, i)) for i in range(len(stages))]
        super().__init__(stages, drafter, loop)

    def _hand_on(self, index: int, item: RunPass) -> None:
        self._lags[index].send(item, _size(item))

    async def close(self) -> None:
        for lag in self._lags:
            lag.close()
        await super().close()


def _size(job: RunPass) -> int:
    return 0 if job.hidden is None else job.hidden.nbytes
