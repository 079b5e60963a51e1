"""How large the shares of a model are: what a worker needs, before it loads anything."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from pipeinfer_dask.models.splice import decoder_layers


@dataclass(frozen=True, slots=True)
class Width:
    """Bytes of a number in memory: in matrices, and in the table of embeddings."""

    matrices: int
    tables: int


WIDE = Width(4, 4)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a model's parts.

    Attributes
    ----------
    layers : tuple of int, [num_layers]
    first : int
        What the first stage has besides its layers: the embedding.
    last : int
        What the last stage has besides its layers: norm and head.
    tied : bool
        Whether the head is the embedding: who holds both holds it once.
    """

    layers: tuple[int, ...]
    first: int
    last: int
    tied: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        """Measure a whole model, which may be on torch's meta device."""
        _, layers = decoder_layers(model)
        each = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
        embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
        rest = sum(p.numel() for p in model.parameters()) - sum(each)
        tied = bool(model.all_tied_weights_keys)
        return cls(each, embedding, rest if tied else rest - embedding, tied)

    @property
    def head_layers(self) -> float:
        """What the last stage computes besides its layers, in layers: its weights are read, too."""
        # The embedding is only looked up, unless it is the head.
        return self.last / max(self.layers)

    def nbytes(self, owned: range, width: Width = WIDE) -> int:
        """Return the bytes in memory of a stage that holds these layers."""
        size = width.matrices * sum(self.layers[layer] for layer in owned)
        first, last = owned.start == 0, owned.stop == len(self.layers)
        size += width.tables * self.first * first + width.matrices * self.last * last
        # Packed, a head is a copy of its own.
        shared = self.tied and first and last and width == WIDE
        return size - self.first * width.tables if shared else size
