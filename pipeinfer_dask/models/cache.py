"""The KV cache of a shard: every token has a slot of its own, in every layer.

Branches of a draft lie side by side in the same storage and share their prefix; what
a token may look at is said by the mask alone. An accepted token stays where it is,
and a pruned one is simply overwritten: nothing is ever copied or rolled back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

SMALLEST = 64
"""Slots that a layer's storage has at first."""


class SlotCache(Cache):
    """Keys and values by slot, for the layers that a shard owns and no others.

    Parameters
    ----------
    layers : range
        The layers owned, numbered as in the whole model.
    capacity : int
        Slots that may be used. Storage grows towards it by doubling.
    whole : bool
        Whether storage has all its slots from the first: on a GPU, where growing would move
        what captured passes look at.
    """

    def __init__(self, layers: range, capacity: int, *, whole: bool = False) -> None:
        super().__init__(layers=[])
        smallest = capacity if whole else SMALLEST
        self._storage = {layer: LayerStorage(capacity, smallest) for layer in layers}
        self._slots = torch.empty(0, dtype=torch.long)
        self._filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(layer.nbytes for layer in self._storage.values())

    def turn_to(self, slots: Tensor, filled: int) -> None:
        """Prepare for a batch.

        Parameters
        ----------
        slots : Tensor of int64, [n]
            Where each token's keys and values go.
        filled : int
            The part of the storage that the batch looks at: slots [0, filled).
        """
        self._slots = slots
        self._filled = filled

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values, [1, heads, n, d]; return those of all filled slots."""
        return self._storage[layer_idx].scatter(key_states, value_states, self._slots, self._filled)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Families add the tokens at hand, and expect to get the keys' number.
        return self._filled - len(self._slots)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._filled, 0


class LayerStorage:
    """One layer's keys and values, [1, heads, slots, head_dim]."""

    def __init__(self, capacity: int, smallest: int) -> None:
        self._capacity = capacity
        self._smallest = smallest
        self._size = 0
        self._keys = torch.empty(0)
        self._values = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def scatter(
        self, keys: Tensor, values: Tensor, slots: Tensor, filled: int
    ) -> tuple[Tensor, Tensor]:
        if filled > self._size:
            size = min(max(filled, 2 * self._size, self._smallest), self._capacity)
            self._keys = _grown(self._keys, keys, self._size, size)
            self._values = _grown(self._values, values, self._size, size)
            self._size = size
        self._keys.index_copy_(2, slots, keys)
        self._values.index_copy_(2, slots, values)
        return self._keys[:, :, :filled], self._values[:, :, :filled]


def _grown(old: Tensor, like: Tensor, kept: int, size: int) -> Tensor:
    # Zeroed: a masked slot still takes part in the sums with weight zero, and 0 * nan is nan.
    grown = like.new_zeros((*like.shape[:2], size, like.shape[3]))
    if kept:
        grown[:, :, :kept] = old
    return grown
