"""`iterative`: plain pipelined decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import Policy
from pipeinfer_dask.core.tree import Node


@dataclass(slots=True)
class Iterative(Policy):
    """Plain decoding: one token, one run."""

    name: ClassVar[str] = "iterative"
    needs_draft: ClassVar[bool] = False

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return [machine.root] if machine.root_waits else []
