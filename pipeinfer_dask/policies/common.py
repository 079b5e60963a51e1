"""What several policies need: what is left to draft, and the ranges of their settings."""

from __future__ import annotations

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import DraftChoice, Policy
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.protocol.messages import DraftPlan

SHORT_PROMPT = 64
"""Tokens that a draft model reads in about the time of one pass."""

LARGEST_SETTING = 256
"""No count that a policy is set to is larger: beyond it are only time and memory for nothing."""

FILL_CACHE: DraftChoice = (DraftPlan(size=0), ())
"""Let the draft model read the prompt while the target does."""


def fill_cache(machine: Machine) -> DraftChoice | None:
    """Return what the draft model does before the first token: read a long prompt, if it may.

    It reads a short one along with its first draft, at the cost of one pass either way.

    Parameters
    ----------
    machine : Machine
        While it is `Machine.prefilling`.

    Returns
    -------
    tuple or None
        What `Policy.choose_draft` returns.
    """
    request = machine.request
    long = request.reads_ahead and len(request.prompt) > SHORT_PROMPT
    useful = not machine.root.drafted and depth_left(machine, machine.root) > 0
    return FILL_CACHE if long and useful else None


def depth_left(machine: Machine, node: Node) -> int:
    """Return how many tokens below a node could be of use before the text has its length.

    Parameters
    ----------
    machine : Machine
        Of a request, which says how many tokens are wanted.
    node : Node
        Of its tree.

    Returns
    -------
    int
        Where it is 0 or less, nothing is to be drafted there.
    """
    return machine.last_position - node.position


def whole(policy: Policy, name: str, least: int) -> None:
    """Raise a ValueError unless this is a whole number from ``least`` to `LARGEST_SETTING`."""
    value = getattr(policy, name)
    known = isinstance(value, int) and not isinstance(value, bool)
    if not known or not least <= value <= LARGEST_SETTING:
        raise ValueError(
            f"expected {name} as a whole number from {least} to {LARGEST_SETTING}, got {value!r}"
        )


def probability(policy: Policy, name: str) -> None:
    """Raise a ValueError unless this setting is a number from 0 to 1."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"expected {name} as a number from 0 to 1, got {value!r}")


def switch(policy: Policy, name: str) -> None:
    """Raise a ValueError unless this setting is on or off."""
    value = getattr(policy, name)
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {value!r}")
