"""What a worker is told to load: small, picklable, and complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeinfer_dask.core.ngram import NGRAM, NgramDraft
from pipeinfer_dask.models.linears import Weights
from pipeinfer_dask.models.shard import Shard


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A stage of the target, or a draft model, which is a shard of all layers.

    Attributes
    ----------
    path : Path
        Directory of the model, as the worker sees it.
    first, last : int
        Decoder layers [first, last).
    capacity : int
        Slots of the KV cache.
    threads : int
        Threads that share one operation.
    name : str
        What messages call it.
    weights : {"auto", "fp16", "fp32"}
        How matrices are held; see `Shard.load`.
    target_vocab_size : int, optional
        Of a draft model: rows of the target's head.
    """

    path: Path
    first: int
    last: int
    capacity: int
    threads: int
    name: str
    weights: Weights = "auto"
    target_vocab_size: int | None = None

    def load(self) -> Shard:
        """Load the shard; torch's thread count is set for the calling thread."""
        torch.set_num_threads(self.threads)
        return Shard.load(
            self.path,
            range(self.first, self.last),
            capacity=self.capacity,
            weights=self.weights,
            threads=self.threads,
            target_vocab_size=self.target_vocab_size,
        )


@dataclass(frozen=True, slots=True)
class NgramSpec:
    """Prompt lookup in place of a draft model."""

    name: str = NGRAM

    def load(self) -> NgramDraft:
        """Return a lookup that knows no text yet."""
        return NgramDraft()
