"""What a pipeline stage computes: the one interface between runtime and models.

`pipeinfer_dask.models.shard.Shard` is the real one. Whatever else fits (a stage
that computes nothing, to time the links) runs through the same pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeinfer_dask.protocol.messages import Batch
from pipeinfer_dask.protocol.sampling import Logprobs, Sampling

HiddenStates = npt.NDArray[np.floating[Any]]
"""[n, hidden_size], C-contiguous: what travels from stage to stage."""

CountBytes = Callable[[int, int], None]
"""Called as (bytes read, bytes in all) while a model loads, from whichever thread reads."""


@dataclass(frozen=True, slots=True)
class Intake:
    """What hidden states a stage takes: those of at most so many tokens, of one width.

    Attributes
    ----------
    tokens : int
        Most tokens of one run.
    width : int
        The model's hidden_size.
    """

    tokens: int
    width: int


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one stage made of one run.

    Attributes
    ----------
    hidden : ndarray, [n, hidden_size], or None
        For the next stage; None on the last stage.
    tokens : tuple of int, [picks], or None
        The target's picks; None on all but the last stage.
    layers : int
        Decoder layers computed.
    logprobs : tuple of Logprobs, [picks]
        Empty unless they were asked for.

    Both `hidden` and `tokens` are None when the run was cancelled on the way.
    """

    hidden: HiddenStates | None
    tokens: tuple[int, ...] | None
    layers: int
    logprobs: tuple[Logprobs, ...] = ()


class Stage(Protocol):
    """A contiguous share of a model's layers, with KV caches of its own."""

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
        """Evaluate one run.

        Parameters
        ----------
        batch : Batch, n tokens
        hidden : ndarray, [n, hidden_size], or None
            From the stage before; None on the first stage.
        picks : int
            On the last stage, pick a token after each of the last ``picks`` tokens.
        stopped : callable
            Looked at before each layer; true means that nobody wants the rest.
        sampling : Sampling, optional
            How to pick; without it the most probable token.
        cache : int
            The KV cache that the slots are of: made when it is first named.
        """
        ...

    def release(self, cache: int) -> None:
        """Let go of a KV cache; no effect where there is none of that number."""
        ...


class DraftModel(Protocol):
    """A whole draft model with KV caches of its own."""

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
        """Evaluate a batch and say what may come next.

        Parameters
        ----------
        batch : Batch, n tokens
        frontier : int
            Look for candidates after each of the last ``frontier`` tokens.
        width : int
            Most candidates for each of them.
        stopped : callable
            Looked at before each layer; true means that nobody wants the rest.
        sampling : Sampling, optional
            How the target picks: candidates are ranked by what it is likely to pick.
        cache : int
            As of a `Stage`.

        Returns
        -------
        list of list of (token, probability), [frontier][at most width], best first
            None when it was stopped on the way.
        """
        ...

    def release(self, cache: int) -> None:
        """Let go of a KV cache, as a `Stage` does."""
        ...
