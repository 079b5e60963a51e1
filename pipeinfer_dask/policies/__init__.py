"""The policies by name: what `strategy` means; and what a policy of one's own is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.policy import Policy
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.policies.adaptive import Adaptive
from pipeinfer_dask.policies.common import depth_left, fill_cache
from pipeinfer_dask.policies.iterative import Iterative
from pipeinfer_dask.policies.pipeinfer import PipeInfer
from pipeinfer_dask.policies.speculative import Speculative
from pipeinfer_dask.protocol.messages import DraftPlan, TreePlan

__all__ = [
    "Adaptive",
    "DraftPlan",
    "Iterative",
    "Machine",
    "Node",
    "PipeInfer",
    "Policy",
    "Speculative",
    "TreePlan",
    "depth_left",
    "fill_cache",
    "make_policy",
]

STRATEGIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Iterative, Speculative, PipeInfer, Adaptive)
}


def make_policy(strategy: str, /, **knobs: Any) -> Policy:
    """Return a fresh policy by name.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`.
    **knobs
        The policy's own attributes.

    Returns
    -------
    Policy
        That has heard nothing yet.

    Raises
    ------
    ValueError
        If there is no such strategy, or it has no such knob, or a value is out of range.
    """
    try:
        kind = STRATEGIES[strategy]
    except (KeyError, TypeError):
        near = get_close_matches(str(strategy), STRATEGIES, n=1, cutoff=0.7)
        meant = f"did you mean {near[0]!r}? There are" if near else "choose one of"
        raise ValueError(
            f"unknown strategy {strategy!r}: {meant} {', '.join(STRATEGIES)}"
        ) from None
    known = [knob.name for knob in fields(kind) if knob.init]  # type: ignore[arg-type]
    if unknown := [name for name in knobs if name not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"strategy {strategy!r} has no knob {unknown[0]!r}: {has}")
    return kind(**knobs)


def policy_of(strategy: str | Policy, knobs: Mapping[str, Any]) -> Policy:
    """Return a fresh policy: the one of this name with these knobs, or one like that given.

    Raises
    ------
    ValueError
        If strategy and knobs are not to be had, there are knobs beside a policy, it has no name, or
        nobody knows how to make a fresh one of it.
    """
    if isinstance(strategy, type) and issubclass(strategy, Policy):
        name = strategy.__name__
        raise ValueError(
            f"expected a strategy's name or a policy, got the class {name}: give an instance, "
            f"{name}()"
        )
    if not isinstance(strategy, Policy):
        return make_policy(strategy, **knobs)
    if knobs:
        raise ValueError(f"expected knobs or a policy of your own, got both: {dict(knobs)}")
    if not isinstance(called := getattr(strategy, "name", None), str):
        raise ValueError(
            f"expected a policy with a name, got {type(strategy).__name__} with {called!r}: put "
            f'name: ClassVar[str] = "..." into its class'
        )
    if type(strategy).fresh is Policy.fresh and not is_dataclass(strategy):
        raise ValueError(
            f"expected a policy that is a dataclass, got {type(strategy).__name__}: put @dataclass "
            f"before its class, or give it a method fresh"
        )
    return strategy.fresh()
