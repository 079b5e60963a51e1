"""What a worker is told to load: small, picklable, and complete.

A worker unpickles it on its event loop, which has other things to do: torch and the model's
code are imported only in the thread that loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeinfer_dask.drafting.ngram import NGRAM, NgramDraft
from pipeinfer_dask.models.sources import Source
from pipeinfer_dask.models.stage import CountBytes, Intake

if TYPE_CHECKING:
    from pipeinfer_dask.models.device_names import Dtype
    from pipeinfer_dask.models.linears import Weights
    from pipeinfer_dask.models.shard import Shard


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A stage of the target, or a draft model, which is a shard of all layers.

    Attributes
    ----------
    source : Source
        The model: each worker finds it by itself.
    first, last : int
        Decoder layers [first, last).
    capacity : int
        Slots of the KV cache.
    threads : int
        Threads that share one of torch's operations.
    width : int
        The model's hidden_size.
    name : str
        What messages call it.
    weights : {"auto", "fp16", "fp32"}
        How matrices are held; see `Shard.load`.
    target_vocab_size : int, optional
        Of a draft model: rows of the target's head.
    sharers : int, optional
        Threads that share a multiplication by a packed matrix; ``threads`` by default. They
        sleep when idle, so nodes on the same cores may each have as many as there are cores:
        torch's own would wait for one another there.
    device : str
        Where it computes: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    dtype : {"float32", "float16", "bfloat16"}
        What it computes in.
    static : bool
        Whether small passes are padded to a few sizes, which a GPU replays as CUDA graphs.
    """

    source: Source
    first: int
    last: int
    capacity: int
    threads: int
    width: int
    name: str
    weights: Weights = "auto"
    target_vocab_size: int | None = None
    sharers: int | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"
    static: bool = False

    @property
    def intake(self) -> Intake | None:
        """What hidden states it takes, on all but the first stage."""
        return Intake(self.capacity, self.width) if self.first else None

    def load(self, count: CountBytes) -> Shard:
        """Load the shard; torch's thread count is set for the calling thread."""
        import torch

        from pipeinfer_dask.models.shard import Shard

        torch.set_num_threads(self.threads)
        return Shard.load(
            self.source,
            range(self.first, self.last),
            capacity=self.capacity,
            weights=self.weights,
            threads=self.sharers or self.threads,
            target_vocab_size=self.target_vocab_size,
            device=self.device,
            dtype=self.dtype,
            static=self.static,
            count=count,
        )


@dataclass(frozen=True, slots=True)
class NgramSpec:
    """Prompt lookup in place of a draft model.

    Attributes
    ----------
    capacity : int
        Tokens of the longest text, and of what is guessed to follow it.
    name : str
    """

    capacity: int
    name: str = NGRAM

    def load(self, count: CountBytes) -> NgramDraft:
        """Return a lookup that knows no text yet."""
        return NgramDraft()
