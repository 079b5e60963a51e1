"""What says how to make a node's model: small, and sent to its worker by pickle."""

from __future__ import annotations

from typing import Protocol

from pipeinfer_dask.models.stage import CountBytes, DraftModel, Intake, Stage


class StageSpec(Protocol):
    """Says how to make a stage. Travels to the worker by pickle."""

    @property
    def name(self) -> str:
        """A short name for people to read, such as the range of layers."""
        ...

    @property
    def intake(self) -> Intake | None:
        """What hidden states it takes; None for the first stage."""
        ...

    def load(self, count: CountBytes) -> Stage:
        """Make the stage. Called once, in the thread that will compute.

        Whatever reads for a while tells ``count`` how far it is.
        """
        ...


class DraftSpec(Protocol):
    """Says how to make a draft model. Travels to the worker by pickle."""

    @property
    def name(self) -> str:
        """A short name for people to read."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens of the longest text, and of what is guessed to follow it."""
        ...

    def load(self, count: CountBytes) -> DraftModel:
        """Make the model, as `StageSpec.load` makes a stage."""
        ...
