"""Emulated models: they wait for as long as a cost model says, and speak a synthetic text.

Everything around them is the real thing: compute threads, links, worker processes, the
head. So a machine of 2 cores runs 32 nodes, and what a cluster of slow stages would do is
measured rather than computed. Neither torch nor Dask is loaded here: such nodes are small.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from pipeinfer_dask.models.stage import CountBytes, HiddenStates, Intake, StageOutput
from pipeinfer_dask.protocol.messages import Batch
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.simulation.costs import Costs, Curve
from pipeinfer_dask.simulation.truth import SyntheticPair, Texts

_PR_SET_TIMERSLACK = 29

MOST_TOKENS = 1 << 16
"""Of an emulated run: there is no cache that could be full."""


def wake_on_time() -> None:
    """Ask Linux to end this thread's sleeps within a microsecond, not within 50."""
    with suppress(OSError, AttributeError):  # Elsewhere sleeps end when they end.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def sleep_until(due: float) -> None:
    """Sleep until ``due``, in seconds on the monotonic clock; not at all if it has passed."""
    left = due - time.monotonic()
    if left > 0:
        time.sleep(left)


class PacedStage:
    """A `Stage` that computes nothing but takes its time.

    Parameters
    ----------
    curve : Curve
        Seconds of a run by its tokens.
    layers : int
        A run that is cancelled ends at the next of so many equal parts of its time.
    width : int
        float32 numbers for each token that go on to the next stage.
    pair : SyntheticPair, optional
        Of the last stage: whose text to pick tokens from. With sampling it's the text of that
        seed.
    """

    def __init__(
        self, curve: Curve, layers: int, width: int, pair: SyntheticPair | None = None
    ) -> None:
        self._curve = curve
        self._layers = layers
        self._width = width
        self._texts = Texts(pair) if pair is not None else None

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
        """Wait for the time of these tokens: see `Stage`."""
        began = time.monotonic()
        seconds = self._curve(len(batch))
        # What this thread really has to do, it does within the time that it is given.
        out: HiddenStates | None = None
        tokens: tuple[int, ...] | None = None
        if self._texts is not None:
            places = self._texts.places(cache, sampling)
            reached = places.take(batch)
            tokens = tuple(map(places.pair.target, reached[len(reached) - picks :]))
        else:
            out = np.zeros((len(batch), self._width), np.float32)
        for layer in range(self._layers):
            if stopped():
                return StageOutput(None, None, layer)
            # Each layer's end follows from the run's begin: what one is late, the next makes up.
            sleep_until(began + seconds * (layer + 1) / self._layers)
        return StageOutput(out, tokens, self._layers)

    def release(self, cache: int) -> None:
        """Forget a text: see `Stage`."""
        if self._texts is not None:
            self._texts.release(cache)


class PacedDraft:
    """A `DraftModel` that guesses at the synthetic text, and takes its time.

    A pass that has begun is taken to its end, as in the simulator: draft models are small.

    Parameters
    ----------
    curve : Curve
        Seconds of a pass by its tokens.
    pair : SyntheticPair
    """

    def __init__(self, curve: Curve, pair: SyntheticPair) -> None:
        self._curve = curve
        self._texts = Texts(pair)

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
        """Wait for the time of these tokens: see `DraftModel`."""
        if stopped():
            return None
        due = time.monotonic() + self._curve(len(batch))
        places = self._texts.places(cache, sampling)
        ends = places.take(batch)[len(batch) - frontier :]
        found = [places.pair.candidates(place, width) for place in ends]
        sleep_until(due)
        return found

    def release(self, cache: int) -> None:
        """Forget a text: see `DraftModel`."""
        self._texts.release(cache)


@dataclass(frozen=True, slots=True)
class PacedStageSpec:
    """Makes a `PacedStage` on a worker.

    Attributes
    ----------
    curve : Curve
    layers : int
    width : int
    text : (float, int), optional
        Of the last stage: acceptance and seed of the `SyntheticPair`.
    name : str
    """

    curve: Curve
    layers: int
    width: int
    text: tuple[float, int] | None = None
    name: str = "emulated"

    @property
    def intake(self) -> Intake:
        """What a stage before this one sends."""
        return Intake(MOST_TOKENS, self.width)

    def load(self, count: CountBytes) -> PacedStage:
        """Make the stage, in the thread that will wait for it."""
        wake_on_time()
        pair = SyntheticPair(*self.text) if self.text is not None else None
        return PacedStage(self.curve, self.layers, self.width, pair)


@dataclass(frozen=True, slots=True)
class PacedDraftSpec:
    """Makes a `PacedDraft` on a worker.

    Attributes
    ----------
    curve : Curve
    text : (float, int)
        Acceptance and seed of the `SyntheticPair`.
    name : str
    capacity : int
        Tokens of the longest text.
    """

    curve: Curve
    text: tuple[float, int]
    name: str = "emulated"
    capacity: int = MOST_TOKENS

    def load(self, count: CountBytes) -> PacedDraft:
        """Make the draft model, in the thread that will wait for it."""
        wake_on_time()
        return PacedDraft(self.curve, SyntheticPair(*self.text))


def paced_specs(
    costs: Costs, acceptance: float, seed: int
) -> tuple[list[PacedStageSpec], PacedDraftSpec]:
    """Return what the stages and the drafter of a cost model load.

    Raises
    ------
    ValueError
        If the acceptance is no chance.
    """
    SyntheticPair(acceptance, seed)
    text = (acceptance, seed)
    width = max(1, costs.token_bytes // np.dtype(np.float32).itemsize)
    last = len(costs.stages) - 1
    stages = [
        PacedStageSpec(curve, costs.layers, width, text if index == last else None)
        for index, curve in enumerate(costs.stages)
    ]
    return stages, PacedDraftSpec(costs.draft, text)
