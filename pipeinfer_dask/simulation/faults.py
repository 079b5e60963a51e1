"""What goes wrong in virtual time, and when: nodes that are lost, and nodes that are slow.

Whatever ends a real link or node (killed, stopped, hung, swallowed, dropped or swapped messages) is
a loss here, noticed sooner or later; whatever holds messages up makes a node slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a node, at a time in virtual seconds: a stage by its number, None the drafter.

    ``noticed_s`` later the head hears of it: after a hop where that is None. Until then what is
    sent to the node vanishes, as it does on one that hangs or behind a link that swallows it.
    """

    at_s: float
    node: int | None
    noticed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Passes that a node begins from ``at_s`` on, for ``for_s`` seconds, take so much longer."""

    at_s: float
    node: int | None
    factor: float
    for_s: float


def losses_of(losses: Sequence[tuple[Any, ...]], stages: int) -> list[Loss]:
    """Return what `simulate` takes as ``losses``; raise a ValueError if it can't be."""
    for loss in losses:
        match loss:
            case (at_s, node) | (at_s, node, _) if _is_node(node, stages) and _are_seconds(
                at_s, *loss[2:]
            ):
                continue
        raise ValueError(
            f"expected losses as (seconds, stage below {stages} or None), got {loss!r}: a third "
            "number may say after how many seconds one is noticed"
        )
    return [Loss(*loss) for loss in losses]


def slowdowns_of(slowdowns: Sequence[tuple[Any, ...]], stages: int) -> list[Slowdown]:
    """Return what `simulate` takes as ``slowdowns``; raise a ValueError if it can't be."""
    for slowdown in slowdowns:
        match slowdown:
            case (at_s, node, factor, for_s) if (
                _is_node(node, stages) and _are_seconds(at_s, factor, for_s) and factor > 0
            ):
                continue
        raise ValueError(
            f"expected slowdowns as (seconds, stage below {stages} or None, factor above 0, "
            f"seconds), got {slowdown!r}"
        )
    return [Slowdown(*slowdown) for slowdown in slowdowns]


def _is_node(node: object, stages: int) -> bool:
    return node is None or (type(node) is int and 0 <= node < stages)


def _are_seconds(*times: object) -> bool:
    return all(type(time) in (int, float) and 0 <= time < math.inf for time in times)  # type: ignore[operator]
