"""Shards in a row, driven by hand, and what the stock model says to the same text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeinfer_dask.models.layers import split_layers
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.stage import HiddenStates
from pipeinfer_dask.protocol.messages import Batch

LAYERS = 4
CAPACITY = 200
TEXT = tuple(b"def area(width, height):\n    return ")


def load(path: Path, stages: int) -> list[Shard]:
    return [Shard.load(path, share, capacity=CAPACITY) for share in split_layers(LAYERS, stages)]


def never() -> bool:
    return False


def linear(tokens: Sequence[int], start: int = 0) -> Batch:
    """Make a batch that continues a text of `start` tokens, each in the slot of its position."""
    places = tuple(range(start, start + len(tokens)))
    return Batch(tuple(tokens), places, places, tuple(place - 1 for place in places))


def through(stages: Sequence[Shard], batch: Batch, picks: int) -> torch.Tensor:
    """Send a batch down a pipeline and return the logits [picks, vocab_size]."""
    hidden: HiddenStates | None = None
    for stage in stages[:-1]:
        hidden = stage.run(batch, hidden, picks=picks, stopped=never).hidden
    logits = stages[-1].logits(batch, picks, never, hidden=hidden)
    assert logits is not None
    return logits


def expected(stock: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Return the stock model's logits [n, vocab_size] for a plain text."""
    with torch.inference_mode():
        logits: torch.Tensor = stock(torch.tensor([tokens])).logits[0]
    return logits


def assert_same(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert logits.argmax(-1).tolist() == wanted.argmax(-1).tolist()
