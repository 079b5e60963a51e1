"""Which stage holds which layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from numbers import Real


def split_layers(
    num_layers: int, stages: int, weights: Sequence[float] | None = None
) -> list[range]:
    """Split a model's decoder layers into contiguous shares, one for each stage.

    Each share is as near to its weight's part as whole layers allow, and holds at
    least one layer. Where layers are left over, earlier stages take them: the last
    stage has the output head to compute as well.

    Parameters
    ----------
    num_layers : int
        The model's decoder layers.
    stages : int
        Stages of the pipeline.
    weights : sequence of float, [stages], optional
        How large each share is to be, relative to the others. Even by default.

    Returns
    -------
    list of range, [stages]
        Together they are ``range(num_layers)``.

    Raises
    ------
    ValueError
        If there are fewer layers than stages, or the weights are no sensible shares.
    """
    check_stages(num_layers, stages)
    parts = [1.0] * stages if weights is None else _checked(weights, stages)
    total = math.fsum(parts)
    ideal = [num_layers * (part / total) for part in parts]
    shares = [max(1, math.floor(size)) for size in ideal]
    while sum(shares) < num_layers:
        shares[max(range(stages), key=lambda stage: ideal[stage] - shares[stage])] += 1
    while sum(shares) > num_layers:
        givers = [stage for stage in range(stages) if shares[stage] > 1]
        shares[max(givers, key=lambda stage: shares[stage] - ideal[stage])] -= 1
    return _ranges(shares)


def check_stages(num_layers: int, stages: int) -> None:
    """Raise a ValueError unless each of so many stages can have a layer."""
    if stages < 1:
        raise ValueError(f"expected stages as a whole number of at least 1, got {stages}")
    if stages > num_layers:
        raise ValueError(
            f"{stages} stages need at least {stages} layers, but the model has {num_layers}: "
            f"use at most {num_layers} stages"
        )


def balanced_layers(
    num_layers: int, speeds: Sequence[float], *, head: float, most: Sequence[int]
) -> list[range]:
    """Split a model's layers so that the slowest stage is as fast as it can be.

    Parameters
    ----------
    num_layers : int
    speeds : sequence of float, [stages]
        Layers a second, or in any other unit.
    head : float
        What the last stage computes besides, in layers.
    most : sequence of int, [stages]
        Layers that each has room for. Each gets one at least.

    Returns
    -------
    list of range, [stages]

    Raises
    ------
    MemoryError
        If there is not room for all.
    ValueError
        If there are fewer layers than stages.
    """
    stages = len(speeds)
    split_layers(num_layers, stages)
    if sum(max(1, room) for room in most) < num_layers:
        raise MemoryError(
            f"expected workers with room for {num_layers} layers, got room for {list(most)}: use "
            "more workers, or free memory there"
        )
    shares = [1] * stages
    for _ in range(num_layers - stages):
        free = [stage for stage in range(stages) if shares[stage] < most[stage]]
        shares[min(free, key=lambda s: (shares[s] + 1 + head * (s == stages - 1)) / speeds[s])] += 1
    return _ranges(shares)


def _ranges(shares: Sequence[int]) -> list[range]:
    stops = list(accumulate(shares))
    return [range(stop - share, stop) for share, stop in zip(shares, stops, strict=True)]


def _checked(weights: Sequence[object], stages: int) -> list[float]:
    if isinstance(weights, str) or len(weights) != stages:
        raise ValueError(
            f"the layer split needs one weight for each of the {stages} stages, not {weights!r}"
        )
    parts = []
    for weight in weights:
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise ValueError(f"a layer split is made of numbers, not of {weight!r}: {weights!r}")
        part = float(weight)
        if not 0 < part < math.inf:
            raise ValueError(
                f"expected finite weights above 0 for the layer split, got {weight}: use fewer "
                f"stages, for each has a layer at least"
            )
        parts.append(part)
    largest = max(parts)
    # Scaled, so that no sum overflows.
    return [part / largest for part in parts]
