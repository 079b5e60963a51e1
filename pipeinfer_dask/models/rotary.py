"""Rotary positions as fused layers take them: looked up in a table instead of worked out anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FIRST = 256
"""Positions that a table has at first."""

Turns = tuple[Tensor, Tensor]
"""Factors [n, 1, dim] for a head's features, and for those that they are paired with."""


class Rotary:
    """A family's rotary positions, for heads [n, heads, head_dim].

    Parameters
    ----------
    embedding : nn.Module
        The family's own, which makes cosines and sines [1, n, dim] for positions [1, n].
    arguments : sequence
        What it takes beside hidden states and positions.
    context : int
        Positions of the longest text. Beyond it some families encode all positions otherwise.
    interleaved : bool
        Whether a feature is paired with its neighbour, and not with the one half of ``dim`` away.
    once : bool
        Whether the family makes a factor for each pair, and not for each feature.
    """

    def __init__(
        self,
        embedding: Any,
        arguments: Sequence[Any],
        context: int,
        *,
        interleaved: bool,
        once: bool = False,
    ) -> None:
        self._embedding = embedding
        self._arguments = arguments
        self._context = context
        self._interleaved = interleaved
        self._once = once
        self._table = self._made(min(FIRST, context))
        self._dim = self._table.shape[-1]

    def at(self, positions: Tensor) -> Turns:
        """Return the factors for positions, int64 [n]."""
        top = int(positions.max()) + 1
        if top > len(self._table):
            self._table = self._made(max(top, min(2 * len(self._table), self._context)))
        near, far = self._table.index_select(0, positions).unbind(1)
        return near, far

    def turn(self, x: Tensor, turns: Turns) -> Tensor:
        """Turn heads [n, heads, head_dim] by their positions; what is given may change."""
        near, far = turns
        whole, dim = x, self._dim
        if partial := dim < x.shape[-1]:
            x = whole[..., :dim]
        if self._interleaved:
            paired = x.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)
        else:
            paired = x.roll(dim // 2, -1)
        turned = torch.addcmul(x * near, paired, far)
        if partial:
            x.copy_(turned)
            return whole
        return turned

    def _made(self, size: int) -> Tensor:
        """Make the table [size, 2, 1, dim]."""
        positions = torch.arange(size)[None]
        cos, sin = self._embedding(torch.zeros(1, dtype=torch.float32), positions, *self._arguments)
        cos, sin = (torch.cat((x[0], x[0]), dim=-1) if self._once else x[0] for x in (cos, sin))
        sign = torch.tensor([-1.0, 1.0], dtype=torch.float32)
        dim = cos.shape[-1]
        if self._interleaved:
            # Some families interleave what they are given only when they turn heads by it.
            if torch.equal(cos[:, : dim // 2], cos[:, dim // 2 :]):
                cos, sin = (x[:, : dim // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
            signs = sign.repeat(dim // 2)
        else:
            signs = sign.repeat_interleave(dim // 2)
        return torch.stack((cos, sin * signs), dim=1)[:, :, None]
