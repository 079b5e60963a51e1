"""Small passes padded to a few sizes, over buffers that stay: what a GPU replays as a graph.

On a CPU they are computed as they are, so that all but the capture is tried out. On torch's meta
device nothing has values, and whatever mixes devices or waits for a number fails: what would
mix CPU and GPU, or could not be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from pipeinfer_dask.models.attention import SLOT_ATTENTION
from pipeinfer_dask.models.devices import Device
from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.graphs import BUCKET, SIZES, StaticPasses, padded_slots
from pipeinfer_dask.models.inputs import Inputs, padded
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.splice import spliced
from pipeinfer_dask.protocol.messages import Batch
from tests.families import FAMILIES
from tests.models.pipelines import CAPACITY, LAYERS, TEXT, linear, never, through
from tests.tiny import make_tiny, tiny_fields

n = len(TEXT)
STEPS = [
    (linear(TEXT), 1),  # too long to be padded
    (linear(b"x", n), 1),
    (linear(b"xyz", n + 1), 3),
    # Two branches and a leaf, in slots of no order; then one token that follows the second.
    (
        Batch(
            tuple(b"abcde"),
            (n + 4, n + 5, n + 4, n + 5, n + 5),
            (n + 9, n + 4, n + 5, n + 7, n + 6),
            (n + 3, n + 9, n + 3, n + 5, n + 5),
        ),
        5,
    ),
    (Batch(tuple(b"f"), (n + 6,), (n + 8,), (n + 7,)), 1),
    (linear(TEXT[::-1]), 1),  # another text
    (linear(b"pq", n), 2),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "bloom", "gpt_neo"])
def test_padded_passes_say_what_ordinary_ones_say(name: str, tmp_path: Path) -> None:
    family, fields = FAMILIES[name]
    path = make_tiny(tmp_path, family, layers=LAYERS, seed=3, **fields)
    shares = range(1), range(1, LAYERS)
    plain, static = (
        [Shard.load(path, share, capacity=CAPACITY, static=static) for share in shares]
        for static in (False, True)
    )
    for batch, picks in STEPS:
        wanted, got = through(plain, batch, picks), through(static, batch, picks)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert got.isfinite().all()
    for shard in static:
        passes = shard._sequences.of(0).passes
        assert passes is not None
        assert set(passes._passes) == {(size, BUCKET) for size in (1, 2, 4, 8)}


def test_a_run_that_nobody_wants_ends_before_a_padded_pass(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=2, seed=3)
    shard = Shard.load(path, range(2), capacity=CAPACITY, static=True)
    stopped = shard.run(linear(b"ab"), None, picks=1, stopped=lambda: True)
    assert (stopped.tokens, stopped.layers) == (None, 0)
    done = shard.run(linear(b"ab"), None, picks=1, stopped=never)
    assert (len(done.tokens or ()), done.layers) == (1, 2)


def ones(tokens: int, filled: int) -> Inputs[Any]:
    return Inputs(
        np.arange(tokens),
        np.arange(tokens) + 5,
        np.arange(tokens),
        np.ones((tokens, filled), np.bool_),
        np.arange(filled) + 3,
    )


def test_added_tokens_write_to_the_scratch_slot_and_attend_to_the_first() -> None:
    inputs = padded(ones(3, 6), 4, 8, scratch=77)
    assert inputs.given.tolist() == [0, 1, 2, 0]
    assert inputs.slots.tolist() == [0, 1, 2, 77]
    assert inputs.positions.tolist() == [5, 6, 7, 3]  # where slot 0 is
    assert inputs.held.tolist() == [3, 4, 5, 6, 7, 8, 0, 0]
    assert inputs.allowed[:3].all(axis=0).tolist() == [True] * 6 + [False] * 2
    assert inputs.allowed[3].nonzero()[0].tolist() == [0]


def test_hidden_states_are_padded_with_zeros() -> None:
    hidden = np.ones((1, 4), np.float16)
    given = padded(ones(1, 2)._replace(given=hidden), 2, 4, scratch=9).given
    assert given.dtype == np.float16
    assert given.tolist() == [[1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("capacity", [1, BUCKET - 1, BUCKET, BUCKET + 1])
def test_the_scratch_slot_is_beyond_every_bucket(capacity: int) -> None:
    scratch = padded_slots(capacity) - 1
    assert scratch >= capacity
    assert scratch % BUCKET == 0


class Capturing(Device):
    """A device that counts what it captures, and can refuse to."""

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.captures = 0
        self._error = error

    def captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        if self._error is not None:
            raise RuntimeError(self._error)
        return compute


def test_a_pass_is_captured_once_for_each_size_and_bucket() -> None:
    device = Capturing()
    passes = StaticPasses(lambda inputs: inputs.given + inputs.held[0], device, 4 * BUCKET)
    for tokens, filled in [(1, 1), (1, BUCKET), (1, BUCKET + 1), (3, 1), (4, 9), (5, 9), (8, 9)]:
        result = passes.run(ones(tokens, filled))
        assert result is not None
        assert result.tolist() == [token + 3 for token in range(tokens)]
    assert device.captures == 4
    assert passes.run(ones(SIZES[-1] + 1, 9)) is None


def test_after_a_failed_capture_all_is_computed_without_and_it_is_told_once() -> None:
    device = Capturing("it waits\nfor a number")
    passes = StaticPasses(lambda inputs: inputs.given, device, BUCKET)
    with pytest.warns(UserWarning, match=r"could not be captured.* it waits for a number$"):
        assert passes.run(ones(1, 1)) is None
    assert passes.run(ones(2, 1)) is None
    assert device.captures == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_in_16_bits_keeps_to_its_device_and_waits_for_no_number(name: str) -> None:
    family, fields = FAMILIES[name]
    device = Device("meta", torch.bfloat16)
    for share in (range(1), range(1, LAYERS)):
        config = AutoConfig.for_model(family, **tiny_fields(family, layers=LAYERS) | fields)
        config._attn_implementation = SLOT_ATTENTION
        with torch.device("meta"):
            model: Any = spliced(model_class(config), share)(config)
        model.to(device.dtype)
        shard = Shard(model, share, capacity=CAPACITY, parameters=0, device=device, static=True)
        tokens, allowed = np.arange(4), np.ones((4, BUCKET), np.bool_)
        given = tokens if shard.is_first else np.ones((4, config.hidden_size), np.float32)
        inputs = Inputs(given, tokens, tokens, allowed, np.arange(BUCKET))
        with torch.inference_mode():
            result = shard.compute_all(Inputs(*map(device.put, inputs)))
        assert (result.device.type, result.dtype) == ("meta", torch.bfloat16)
        assert result.shape == (4, config.vocab_size if shard.is_last else config.hidden_size)
