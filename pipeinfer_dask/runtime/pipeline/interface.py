"""The interface between the driver's loop and the pipeline that carries its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pipeinfer_dask.protocol.messages import (
    CancelDraft,
    CancelRuns,
    Event,
    Prune,
    Release,
    StartDraft,
    StartRun,
)

DEADLINE_S = 30.0
"""A node that gives no sign of life for so long is lost, unless the caller says otherwise."""

PipelineCommand = StartRun | CancelRuns | Prune | StartDraft | CancelDraft | Release


class Pipeline(Protocol):
    """Stages in a row and, beside them, a drafter.

    Both have a generation, which counts what was rebuilt; it is `AWAY` while they are lost.

    `send` and both callbacks belong to one event loop; everything else that a
    pipeline does happens elsewhere.
    """

    stages: int

    @property
    def generation(self) -> int:
        """Of the stages: what runs must name."""
        ...

    @property
    def draft_generation(self) -> int:
        """Of the drafter: what drafts must name."""
        ...

    def listen(self, report: Callable[[Event], None], lost: Callable[[Exception], None]) -> None:
        """Set who is told, on the loop, of each event, and of the pipeline's end."""
        ...

    def send(self, command: PipelineCommand) -> None:
        """Carry out a command. Never blocks; commands of a kind stay in order."""
        ...

    async def close(self) -> None:
        """Release every stage, thread and link. Can be called twice."""
        ...
