"""Stages and a drafter that compute almost nothing, and say what reached them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeinfer_dask.models.stage import CountBytes, HiddenStates, Intake, StageOutput
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch, Kind, StartRun
from pipeinfer_dask.protocol.sampling import Sampling

SLOW = 1_000_000
"""A run that begins with this token takes a stage until it is cancelled."""
SLOW_BEGAN = threading.Event()
"""Set when a stage of this process has begun such a run."""
BROKEN = 2_000_000
"""A run that begins with this token breaks the stage."""

INTAKE = Intake(tokens=1000, width=64)
"""What a `CountingStage` takes."""

READ_BYTES = 3
"""What a `CountingStage` pretends to have read."""


def run_of(number: int, *tokens: int) -> StartRun:
    """Return a run over these tokens that wants a pick after each."""
    places = tuple(range(len(tokens)))
    batch = Batch(tokens, places, places, (NO_PARENT, *places[:-1]))
    return StartRun(1, 0, number, Kind.SPECULATIVE, batch, len(tokens))


class CountingStage:
    """Adds one to each token: the first stage makes numbers of them, the last makes picks."""

    def __init__(self, last: bool) -> None:
        self._last = last

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
        if batch.tokens[0] == BROKEN:
            raise ArithmeticError("numbers ran out")
        if batch.tokens[0] == SLOW:
            pause = threading.Event()
            SLOW_BEGAN.set()
            while not stopped():
                pause.wait(0.001)
            return StageOutput(None, None, 1)
        if hidden is None:
            hidden = np.repeat(np.array(batch.tokens, np.float32)[:, None], 64, axis=1)
        hidden = hidden + np.float32(1)
        if self._last:
            return StageOutput(None, tuple(int(row[0]) for row in hidden[-picks:]), 2)
        return StageOutput(hidden, None, 2)

    def release(self, cache: int) -> None:
        pass


@dataclass(frozen=True)
class CountingSpec:
    """Makes a `CountingStage`."""

    name: str
    last: bool = False
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        for nbytes in range(READ_BYTES + 1):
            count(nbytes, READ_BYTES)
        return CountingStage(self.last)


@dataclass(frozen=True)
class MissingSpec:
    """Is not there to be loaded."""

    name: str = "missing"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        raise FileNotFoundError("no model here")


@dataclass(frozen=True)
class UnsendableSpec:
    """Can't be pickled."""

    name: str = "unsendable"
    intake: Intake = INTAKE
    held: Any = field(default_factory=threading.Lock)

    def load(self, count: CountBytes) -> CountingStage:
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class DyingSpec:
    """Takes its process along while it loads."""

    name: str = "dying"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class DyingOnceSpec:
    """Takes its process along while it loads, unless there is a file already."""

    path: str
    name: str = "dying once"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        if not Path(self.path).exists():
            Path(self.path).touch()
            DyingSpec().load(count)
        return CountingStage(last=True)


@dataclass(frozen=True)
class StoppingSpec:
    """Stops its process while it loads."""

    name: str = "stopping"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGSTOP)
        return CountingStage(last=True)


@dataclass(frozen=True)
class WaitingSpec:
    """Loads once there is a file."""

    path: str
    name: str = "waiting"
    intake: Intake = INTAKE

    def load(self, count: CountBytes) -> CountingStage:
        pause = threading.Event()
        while not Path(self.path).exists():
            pause.wait(0.01)
        return CountingStage(last=True)


class EchoingDraft:
    """Proposes the same token again, until it is stopped where the token is `SLOW`."""

    def candidates(
        self,
        batch: Batch,
        frontier: int,
        *,
        width: int,
        stopped: Callable[[], bool],
        sampling: Sampling | None = None,
        cache: int = 0,
    ) -> list[list[tuple[int, float]]] | None:
        if batch.tokens[-1] == SLOW:
            pause = threading.Event()
            while not stopped():
                pause.wait(0.001)
            return None
        return [[(token, 0.5)] * min(width, 9) for token in batch.tokens[-frontier:]]

    def release(self, cache: int) -> None:
        pass


@dataclass(frozen=True)
class EchoingSpec:
    """Makes an `EchoingDraft`."""

    name: str = "echo"
    capacity: int = 1 << 19

    def load(self, count: CountBytes) -> EchoingDraft:
        return EchoingDraft()
