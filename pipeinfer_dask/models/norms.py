"""What a family's norms compute, in as few operations as torch has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class RootMeanSquare:
    """What an RMSNorm computes over the last dimension, in half as many operations."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        (size,) = weight.shape
        # x / sqrt(mean(x**2) + eps) = x * sqrt(size) / hypot(norm(x), sqrt(size * eps))
        self._weight = weight * size**0.5
        self._floor = torch.tensor((size * epsilon) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._floor)).mul_(self._weight)


def bare_norm(norm: Any) -> Function:
    """Return what computes a norm of [n, ...]: the family's own where nothing shorter agrees.

    Raises
    ------
    ValueError
        If its weights are no finite numbers: so is nothing that is computed with them.
    """
    weight = getattr(norm, "weight", None)
    if weight is not None:
        if not torch.isfinite(weight).all():
            raise ValueError(
                "a norm has weights that are no finite numbers: download the checkpoint again"
            )
        x = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(0))
        for candidate in _candidates(norm, weight.detach()):
            if close(norm(x), candidate(x)):
                return candidate
    function: Function = norm.forward
    return function


def close(family: Tensor, ours: Tensor) -> bool:
    """Say whether what we compute is what a family computes, but for rounding."""
    return torch.allclose(ours, family, rtol=1e-4, atol=1e-5 * float(family.abs().max()))


def _candidates(norm: Any, weight: Tensor) -> Iterator[Function]:
    epsilon: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None or weight.dim() > 1:
        return
    yield RootMeanSquare(weight, epsilon)
    yield RootMeanSquare(1 + weight, epsilon)
    bias: Tensor | None = getattr(norm, "bias", None)
    yield partial(
        F.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=epsilon
    )
